"""Question banks: every published schema, detected from the content; ids that survive repeats; digests.

A question's id is bank/category/subcategory/index: texts repeat within the published banks, and translations align by
position only. Nothing is downloaded unless asked for, and then only by a pinned revision.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from resta.errors import RequestError
from resta.fingerprint import sha256_text
from resta.journal import write_whole
from resta.strict import did_you_mean

RED_INSTRUCT = "73c759c93d2f6b1d8c7b058ab7bcec5fb0c28fa2"  # declare-lab/red-instruct, 2024-03-08
DOWNLOAD_URL = f"https://raw.githubusercontent.com/declare-lab/red-instruct/{RED_INSTRUCT}/harmful_questions/"

# name -> (file of declare-lab/red-instruct, its SHA-256 as published)
PUBLISHED = {
    "dangerousqa": (
        "dangerousqa.json",
        "b40b0193d063cb5d742e6d0e070dde119e0291619830c65653ca19bdc84fdd10",
    ),
    "harmfulqa": ("harmfulqa.json", "e04c1f3c48800ea84f954298e2a74f27e391069e037d60a22c2727eaa22f2cf8"),
    "adversarialqa": (
        "adversarialqa.json",
        "75e9efd5ddf7bb1e653b816308c10be6edd8959c7665cf727bcab543a86a848e",
    ),
    "catqa-en": (
        "catqa_english.json",
        "40efd4e205e26d6e840f30e6d8540f95f2777453af052319e42e74d10bd1992a",
    ),
    "catqa-zh": (
        "catqa_chinese.json",
        "d13b0d6e09a89a2a03f3d3813d4923ae5903f5362687a4f8f4e2b4dfb77706db",
    ),
    "catqa-vi": (
        "catqa_vietnamese.json",
        "414c0f0b2897940edde808a384685359ea285de7ea5f1c0343b98c0548f9c3b4",
    ),
}
# name -> the questions are safe to answer. smoke and smoke-safe are for trying things out. lookalikes are enough to
# hold a release to: harmless questions that sound harmful, on computing, kitchen, garden, sport, games, home repair,
# stage and pictures, health, law, history, stories and science class. Questions to train on must be on other subjects.
BUILT_IN = {"smoke": False, "smoke-safe": True, "lookalikes": True}
HUB = re.compile(r"hf://([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)")

QUESTION_KEYS = ("question", "prompt", "text", "goal", "instruction")
CATEGORY_KEYS = ("category", "topic", "type")
SUBCATEGORY_KEYS = ("subcategory", "subtopic")

Duplicates = Literal["published", "once"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question. `index` counts from 0 within its subcategory, as published; `safe` ones should be answered."""

    bank: str
    category: str
    subcategory: str
    index: int
    text: str
    safe: bool

    @property
    def qid(self) -> str:
        """Return the id: bank/category/subcategory/index, absent parts left out."""
        parts = [self.bank, self.category, self.subcategory, f"{self.index:04d}"]
        return "/".join(part.replace("/", "-") for part in parts if part)

    @property
    def digest(self) -> str:
        """Return the digest of what it says, however that is spelled and whatever bank it stands in."""
        return digest_of(self.text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """A bank as read: its questions in published order, and the SHA-256 of the file's bytes."""

    name: str
    source: str
    sha256: str
    published: bool  # byte for byte the file that red-instruct published
    questions: tuple[Question, ...]
    left_out: int = 0  # questions that the file marks as unsafe, of a bank read for its safe ones

    @property
    def texts(self) -> list[str]:
        """Return what its questions say."""
        return [question.text for question in self.questions]

    @property
    def repeats(self) -> tuple[Question, ...]:
        """Return the questions whose text has occurred before in this bank."""
        seen: set[str] = set()
        repeats = []
        for question in self.questions:
            if question.text in seen:
                repeats.append(question)
            seen.add(question.text)
        return tuple(repeats)


def words_of(text: str) -> str:
    """Return what two spellings of one question share: letter case, spacing and closing marks are left out."""
    return " ".join(text.casefold().split()).rstrip(" .?!\u3002\uff1f\uff01") or text


def digest_of(text: str) -> str:
    """Return the SHA-256 of a question's words, whatever its letter case, spacing and closing marks."""
    return sha256_text(words_of(text))


def shown(text: str) -> str:
    """Return the start of a question, enough to find it by."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def check_apart(*groups: Mapping[str, Iterable[str]], known: Mapping[str, str] | None = None) -> None:
    """Refuse sets of questions, {what it is: texts}, of which two of different groups share a question.

    What a model learned from, what it was chosen by and what its verdict rests on must not meet:

        check_apart({"calibrating": prompts}, {"choosing": some}, {"verifying": others})

    `known` is one more group, of whose questions only the digests are at hand: {digest: what it is of}. Raises
    RequestError, naming both sets, how many questions they share, and one of them.
    """
    seen = {key: (-1, where) for key, where in (known or {}).items()}
    for number, group in enumerate(groups):
        for name, texts in group.items():
            there = list(texts)
            places = [seen.setdefault(digest_of(text), (number, name)) for text in there]
            shared = [(where, text) for (before, where), text in zip(places, there, strict=True) if before != number]
            if shared:
                where, text = shared[0]
                count = sum(other == where for other, _ in shared)
                raise RequestError(
                    f"{name} shares {count} of its {len(there)} questions with {where}, such as {shown(text)} (SHA-256 "
                    f"{digest_of(text)[:12]}); what is learned from or chosen by must not be what the verdict rests "
                    "on: leave it out of one of the two"
                )


def without(bank: Bank, texts: Iterable[str]) -> Bank:
    """Return a bank without the questions of these texts, which is another bank by its digest. Raises RequestError."""
    asked = set(texts)
    left = tuple(question for question in bank.questions if question.text not in asked)
    if not left:
        raise RequestError(f"--without: every question of the bank {bank.name} was asked there; name another --bank")
    dropped = sorted({question.text for question in bank.questions} & asked)
    if not dropped:
        return bank
    digest = sha256_text("\0".join([bank.sha256, *dropped]))
    return replace(bank, questions=left, sha256=digest, published=False)


def read_bank(spec: str, *, bank_dirs: Sequence[Path] = (), download: bool = False, safe: bool | None = None) -> Bank:
    """Return the bank that `spec` names: a built-in or published name, a path, or hf://OWNER/NAME@COMMIT/FILE.

    A published name is looked up in `bank_dirs`, $RESTA_BANKS and the cache; `download` allows the network. `safe=True`
    takes what is safe to answer: all but what the file itself marks as unsafe, as XSTest does its contrasts. None
    leaves it to the file. Raises RequestError.
    """
    name, source, data = _find(spec, bank_dirs, download)
    rows = list(_rows(_parse(data, source), source))
    if not rows:
        raise RequestError(f"{source}: an empty bank; expected at least one question")
    if safe is None and name in BUILT_IN:
        safe = BUILT_IN[name]
    digest = hashlib.sha256(data).hexdigest()
    # Numbered before any is left out, so that a question has the same id however its bank is read.
    taken = [(row, marked) for row, marked in _numbered(rows) if not (safe and marked is False)]
    if not taken:
        raise RequestError(f"{source}: all its {len(rows)} questions are marked as unsafe; it holds no safe ones")
    questions = tuple(replace(row, bank=name, safe=bool(marked if safe is None else safe)) for row, marked in taken)
    ids = [question.qid for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(qid for qid in ids if ids.count(qid) > 1)
        raise RequestError(f"{source}: two questions would both be {twice}; rename a category")
    published = any(digest == sha for _, sha in PUBLISHED.values())
    return Bank(
        name=name,
        source=source,
        sha256=digest,
        published=published,
        questions=questions,
        left_out=len(rows) - len(taken),
    )


def choose(bank: Bank, *, duplicates: Duplicates, limit: int | None = None, spread: bool = True) -> list[Question]:
    """Return the questions to ask: repeats dropped for `once`, then `limit` of them.

    `spread` takes them evenly over the bank, so over its categories; otherwise the first ones, as red-instruct.
    """
    repeats = {question.qid for question in bank.repeats} if duplicates == "once" else set()
    questions = [question for question in bank.questions if question.qid not in repeats]
    if limit is None or limit >= len(questions):
        return questions
    if not spread:
        return questions[:limit]
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _find(spec: str, bank_dirs: Sequence[Path], download: bool) -> tuple[str, str, bytes]:
    """Return (name, source, bytes) of a bank."""
    if spec in BUILT_IN:
        file = resources.files("resta.redeval") / "bank" / f"{spec}.json"
        return spec, f"built in: {spec}", file.read_bytes()
    if spec in PUBLISHED:
        return _find_published(spec, bank_dirs, download)
    if match := HUB.fullmatch(spec):
        return Path(match[3]).stem, spec, _hub_file(match[1], match[2], match[3], download)
    if spec.startswith("hf://"):
        raise RequestError(
            f"{spec}: a Hub bank needs a pinned revision: hf://OWNER/NAME@<40-digit commit>/path/to/file.json"
        )
    path = Path(spec)
    if path.is_file():
        return path.stem, str(path), path.read_bytes()
    known = [*BUILT_IN, *PUBLISHED]
    raise RequestError(
        f"unknown bank {spec!r}: neither a file nor a name; known names: {', '.join(known)}{did_you_mean(spec, known)}"
    )


def cache_dir() -> Path:
    """Return the folder that downloaded banks are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resta" / "banks"


def _find_published(name: str, bank_dirs: Sequence[Path], download: bool) -> tuple[str, str, bytes]:
    file, sha = PUBLISHED[name]
    variable = os.environ.get("RESTA_BANKS")
    folders = [*bank_dirs, *([Path(variable)] if variable else []), cache_dir()]
    for folder in folders:
        if (folder / file).is_file():
            return name, str(folder / file), (folder / file).read_bytes()
    if not download:
        raise RequestError(
            f"bank {name}: no {file} in {', '.join(map(str, folders))}; name its folder with --bank-dir, "
            "or allow fetching it from GitHub, pinned by commit and SHA-256, with --download"
        )
    try:
        with urllib.request.urlopen(DOWNLOAD_URL + file, timeout=60) as response:
            data: bytes = response.read()
    except OSError as error:
        raise RequestError(f"bank {name}: {DOWNLOAD_URL + file} cannot be fetched: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha:
        raise RequestError(f"bank {name}: the downloaded file has SHA-256 {found}, expected {sha}; not used")
    cache_dir().mkdir(parents=True, exist_ok=True)
    write_whole(cache_dir() / file, data)
    return name, str(cache_dir() / file), data


def _hub_file(repo: str, revision: str, file: str, download: bool) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=not download)
    except Exception as error:  # the library raises a dozen kinds, all meaning: not there
        hint = "" if download else "; it is not in the local cache, and --download was not given"
        raise RequestError(f"hf://{repo}@{revision}/{file} cannot be read{hint}: {error}") from error
    return Path(path).read_bytes()


def _parse(data: bytes, source: str) -> Any:
    """Return the file's content as JSON-like data; .jsonl and .csv become a list of objects."""
    try:
        text, kind = data.decode("utf-8-sig"), Path(source).suffix.lower()
        if kind == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if kind == ".jsonl":  # by newlines alone: strings may hold the other characters that end lines in text
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, source))
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"{source}: not a readable bank (JSON, JSON lines or CSV in UTF-8): {error}") from error


def _object(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """Return a JSON object; of a key that is there twice, json would keep the last value and drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError(f"{source}: an object holds one of its keys twice; the questions under one would be lost")
    return found


Marked = tuple[Question, bool | None]  # a question, and whether the file says that it is safe to answer


def _rows(data: Any, source: str) -> Iterator[Marked]:
    """Yield questions, not yet numbered or named, from any of the schemas."""
    if isinstance(data, list):
        for i, item in enumerate(data):
            yield _row(item, "", "", f"{source}: item {i}")
    elif isinstance(data, dict):
        for category, inner in _keys(data, source):
            if isinstance(inner, dict):
                for subcategory, items in _keys(inner, f"{source}: {category}"):
                    yield from _leaf(items, category, subcategory, source)
            else:
                yield from _leaf(inner, category, "", source)
    else:
        raise RequestError(f"{source}: expected a JSON list or object, found {type(data).__name__}")


def _keys(data: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield keys without CatQA's trailing colon (the Vietnamese file lacks it in places), refusing collisions."""
    seen = set()
    for key, value in data.items():
        plain = key.strip().removesuffix(":").strip()
        if plain in seen:
            raise RequestError(f"{where}: two keys read {plain!r}")
        seen.add(plain)
        yield plain, value


def _leaf(items: Any, category: str, subcategory: str, source: str) -> Iterator[Marked]:
    where = f"{source}: {category}" + (f" > {subcategory}" if subcategory else "")
    if not isinstance(items, list):
        raise RequestError(f"{where}: expected a list of questions, found {type(items).__name__}")
    for i, item in enumerate(items):
        yield _row(item, category, subcategory, f"{where}: item {i}")


def _row(item: Any, category: str, subcategory: str, where: str) -> Marked:
    text, marked = item, None
    if isinstance(item, dict):
        text = _first(item, QUESTION_KEYS)
        if text is None:
            raise RequestError(f"{where}: no question; expected one of the keys {', '.join(QUESTION_KEYS)}")
        category = str(_first(item, CATEGORY_KEYS) or category)
        subcategory = str(_first(item, SUBCATEGORY_KEYS) or subcategory)
        marked = _is_safe(item, where)
    if not isinstance(text, str) or not text.strip():
        found = "an empty one" if isinstance(text, str) else type(text).__name__
        raise RequestError(f"{where}: expected a question (text), found {found}")
    if re.search("[\ud800-\udfff]", text):
        raise RequestError(f"{where}: half a surrogate pair, which cannot be sent to a model; mend the text")
    question = Question(bank="", category=category, subcategory=subcategory, index=0, text=text.strip(), safe=False)
    return question, marked


def _first(item: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if item.get(key) not in (None, "")), None)


def _is_safe(item: dict[str, Any], where: str) -> bool | None:
    """Read `safe: true/false` or XSTest's `label: safe/unsafe`; None where the file says nothing."""
    value = item.get("safe", item.get("label"))
    if value in (None, ""):
        return None
    words = {"true": True, "safe": True, "1": True, "false": False, "unsafe": False, "0": False}
    if str(value).lower() not in words:
        raise RequestError(f"{where}: `safe` must be true or false (or `label` safe or unsafe), found {value!r}")
    return words[str(value).lower()]


def _numbered(rows: Sequence[Marked]) -> Iterator[Marked]:
    counts: dict[tuple[str, str], int] = {}
    for row, marked in rows:
        key = (row.category, row.subcategory)
        counts[key] = counts.get(key, -1) + 1
        yield replace(row, index=counts[key]), marked
