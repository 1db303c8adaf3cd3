"""Conversations from public formats: read, tell apart by content, check, mix, split; it knows nothing of tokens.

Formats: chat `messages`, ShareGPT / FastChat `conversations`, Alpaca `instruction` / `input` / `output`, `prompt` /
`completion` and `question` / `answer`, and HarmfulQA's threads; JSON, JSON lines or Parquet, or a Hub dataset. Pickles
are never loaded. What is left out is counted under a reason, with the first place where it happened.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resta.errors import RequestError
from resta.fingerprint import sha256_file
from resta.sft.recipe import Recipe, Source

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
ALPACA_WITH_INPUT = "{instruction}\n\n{input}"
SUFFIXES = (".jsonl", ".json", ".parquet")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one; UTF-8 has none


class RowProblem(Exception):
    """One row that cannot be used; the caller knows the file and the line."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One checked conversation: an optional system turn, then user and assistant in turn, ending with assistant."""

    messages: tuple[Message, ...]
    side: str  # "blue", "red" or "keep"
    source: str
    where: str  # file and line, row or thread

    @property
    def question(self) -> str:
        """The first user turn, which decides on which side of the held-out split the conversation falls."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


@dataclass
class Counts:
    """How often each thing happened, and where first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one occurrence."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def total(self) -> int:
        """Return the number of occurrences of everything."""
        return sum(self.counts.values())


@dataclass(kw_only=True)
class Loaded:
    """One source as read: its conversations, the digest of what was read, and what happened on the way."""

    source: Source
    digest: str
    commit: str | None  # of a Hub dataset: a branch or tag can move
    rows: int
    conversations: list[Conversation]
    dropped: Counts  # conversations left out
    changed: Counts  # conversations kept, but not as they were written


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The data of one run: what each epoch trains on, what is held out, and the sources behind both."""

    train: tuple[Conversation, ...]
    heldout: tuple[Conversation, ...]
    sources: tuple[Loaded, ...]
    drawn: dict[str, int]  # source name -> conversations in `train`, repeats included


Pools = dict[str, list[Conversation]]  # by source name


# -- rows ----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (`file, line n` or `file, row n`, value) for every row of one file. Raises RequestError."""
    if path.suffix in {".pkl", ".pickle", ".pt", ".bin"}:
        raise RequestError(f"{path}: pickles can run code when loaded and are never read; export JSON lines instead")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if path.suffix not in SUFFIXES:
        raise RequestError(f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from _read_json_array(path, text)
    else:
        yield from _read_json_lines(path, text)


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = text.split("\n")
    if path.suffix == ".json":
        try:
            yield f"{path}, line 1", json.loads(text)  # a single object, possibly over many lines
            return
        except (json.JSONDecodeError, RecursionError):
            pass  # then it is JSON lines under another name, and the loop below says which line is bad
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise RequestError(f"{where}: nested too deeply to be conversations") from None


def _read_json_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    place = text.index("[") + 1
    line, counted = 1, 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        line += text.count("\n", counted, place)
        counted = place
        where = f"{path}, line {line}"
        if place >= len(text):
            raise RequestError(f"{where}: the list is not closed; the file looks cut off")
        if text[place] == "]":
            if text[place + 1 :].strip():
                raise RequestError(f"{where}: more text follows the end of the list; keep one list in a file")
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise RequestError(f"{where}: nested too deeply to be conversations") from None
        yield where, value


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"{path}: not a readable Parquet file: {error}") from None


def _local_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise RequestError(f"{path}: the folder holds none of {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder")
    return [path]


def _read_hub(source: Source) -> tuple[str, str | None, list[tuple[str, Any]]]:
    """Return (digest of the rows, commit, rows) of a Hub dataset, or of a local dataset folder given as its id."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    assert source.hub is not None
    origin = source.hub + (f"@{source.revision}" if source.revision else "")
    try:
        builder = datasets.load_dataset_builder(source.hub, source.subset, revision=source.revision)
        commit = str(builder.hash) if COMMIT.fullmatch(str(builder.hash)) else None
        if isinstance(builder, Cache) and source.revision not in (None, commit):
            # Without the Hub the library takes the newest copy in its cache, whatever revision was asked for.
            raise RequestError(f"the Hub cannot be reached, and the copy in the cache is of commit {commit}")
        builder.download_and_prepare()
        table = builder.as_dataset(split=source.split)
    except Exception as error:  # which class differs by version and cause
        raise RequestError(f"data source {source.name!r}: cannot load {origin!r}: {error}") from error
    rows = [(f"{origin} ({source.split}), row {n}", row) for n, row in enumerate(table, start=1)]
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest(), commit, rows


# -- formats -------------------------------------------------------------------------------------------------


def _turns(value: Any, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise RowProblem(f"expected a list of turns, found {type(value).__name__}")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise RowProblem(f"turn {number} is not an object with {role_key!r} and {text_key!r}")
        role, text = turn[role_key], turn[text_key]
        if not isinstance(role, str) or role not in ROLES:
            raise RowProblem(f"turn {number} has the role {role!r}; known are {', '.join(sorted(ROLES))}")
        turns.append({"role": ROLES[role], "content": _text(text, f"turn {number}")})
    return turns


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"{what} is {type(value).__name__}, not text")
    if LONE_SURROGATE.search(value):
        raise RowProblem(f"{what} holds half of a character (a lone surrogate), which no tokenizer can read")
    return value


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _turns(row["messages"], "role", "content")


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    value = row["conversations"]
    first = value[0] if isinstance(value, list) and value else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    turns = _turns(value, *keys)
    system = row.get("system")
    return [{"role": "system", "content": _text(system, "`system`")}, *turns] if system else turns


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, extra = _text(row["instruction"], "`instruction`"), row.get("input") or ""
    if extra:
        instruction = ALPACA_WITH_INPUT.format(instruction=instruction, input=_text(extra, "`input`"))
    return _exchange(instruction, _text(row["output"], "`output`"))


def _from_prompt(row: dict[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns([*prompt, *completion], "role", "content")
    return _exchange(_text(prompt, "`prompt`"), _text(completion, "`completion`"))


def _from_question(row: dict[str, Any]) -> list[Message]:
    return _exchange(_text(row["question"], "`question`"), _text(row["answer"], "`answer`"))


def _exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


# Format name -> (keys that a row must have, reader). The first that fits is taken; HarmfulQA is read apart.
FORMATS: dict[str, tuple[set[str], Callable[[dict[str, Any]], list[Message]]]] = {
    "messages": ({"messages"}, _from_messages),
    "sharegpt": ({"conversations"}, _from_sharegpt),
    "alpaca": ({"instruction", "output"}, _from_alpaca),
    "prompt/completion": ({"prompt", "completion"}, _from_prompt),
    "question/answer": ({"question", "answer"}, _from_question),
}
HARMFULQA_KEYS = {"blue_conversations", "red_conversations"}


def format_of(row: Any) -> str:
    """Return the name of the format of a row, told by its keys. Raises RowProblem."""
    if not isinstance(row, dict):
        raise RowProblem(f"expected an object, found {type(row).__name__}")
    if HARMFULQA_KEYS & row.keys():
        return "harmfulqa"
    for name, (keys, _) in FORMATS.items():
        if keys <= row.keys():
            return name
    raise RowProblem(
        f"no known format has the keys {', '.join(sorted(map(str, row))) or '(none)'}; expected one of: "
        + "; ".join(" + ".join(sorted(keys)) for keys, _ in FORMATS.values())
        + "; blue_conversations / red_conversations"
    )


def threads_of(row: Any, side: str) -> list[tuple[str, list[Message] | RowProblem]]:
    """Return (thread key or "", turns or what is wrong with them) for each conversation of one row.

    A HarmfulQA row holds up to five threads a side; every other format holds one conversation.
    """
    name = format_of(row)
    if name != "harmfulqa":
        return [("", FORMATS[name][1](row))]
    threads = row.get(f"{side}_conversations")
    if not threads:
        raise RowProblem(f"the row has no {side} conversation")
    if not isinstance(threads, dict):
        raise RowProblem(f"`{side}_conversations` is {type(threads).__name__}, not an object of threads")
    result: list[tuple[str, list[Message] | RowProblem]] = []
    for key in sorted(threads):
        try:
            if not threads[key]:
                raise RowProblem("empty thread")
            result.append((key, _turns(threads[key], "from", "value")))
        except RowProblem as problem:
            result.append((key, problem))
    return result


def conversation_of(row: Any) -> list[Message]:
    """Return the turns of a row of one conversation; of HarmfulQA's, the first blue thread's. Raises RowProblem."""
    [(_, turns), *_] = threads_of(row, "blue")
    if isinstance(turns, RowProblem):
        raise turns
    return turns


# Marks what HarmfulQA leaves out by design: counted, but no reason to refuse a file.
MISSING_THREAD = ("empty thread", "the row has no blue conversation", "the row has no red conversation")


def tidy(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Return a conversation that alternates and ends with an answer, and what was cut at its ends to get there.

    A leading assistant turn has nothing before it to answer (ShareGPT has many), and a trailing user turn has no answer
    to learn. Anything else that does not alternate raises `RowProblem`.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    notes = []
    if turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
        notes.append("leading assistant turn removed")
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
        notes.append("trailing user turn removed")
    if not turns:
        raise RowProblem("no user turn followed by an answer")
    for number, (turn, expected) in enumerate(zip(turns, ["user", "assistant"] * len(turns), strict=False)):
        if turn["role"] != expected:
            raise RowProblem(f"roles do not alternate: turn {number + 1} is {turn['role']}, expected {expected}")
        if not turn["content"].strip():
            raise RowProblem(f"turn {number + 1} ({turn['role']}) is empty")
    return system + turns, notes


# -- sources and mixtures ------------------------------------------------------------------------------------


def load(source: Source, root: Path, *, bad_rows: str) -> Loaded:
    """Read one source whole. Relative paths start at `root`. Raises RequestError with file, line and fix."""
    if source.path is not None:
        files = _local_files((root / source.path).expanduser())
        digests = [sha256_file(file) for file in files]
        digest = digests[0] if len(files) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
        rows: Iterator[tuple[str, Any]] = (row for path in files for row in read_rows(path))
        commit = None
    else:
        digest, commit, listed = _read_hub(source)
        rows = iter(listed)
    loaded = Loaded(
        source=source, digest=digest, commit=commit, rows=0, conversations=[], dropped=Counts(), changed=Counts()
    )
    for where, row in rows:
        loaded.rows += 1
        _take_row(loaded, where, row, bad_rows)
    if not loaded.rows:
        raise RequestError(f"data source {source.name!r} ({source.path or source.hub}): no rows; the file is empty")
    return loaded


def _take_row(loaded: Loaded, where: str, row: Any, bad_rows: str) -> None:
    source = loaded.source
    try:
        threads = threads_of(row, source.side)
    except RowProblem as problem:
        threads = [("", problem)]
    for key, turns in threads:
        place = f"{where}, {source.side} thread {key}" if key else where
        try:
            if isinstance(turns, RowProblem):
                raise turns
            messages, notes = tidy(turns)
        except RowProblem as problem:
            if bad_rows == "refuse" and str(problem) not in MISSING_THREAD:
                raise RequestError(f"{place}: {problem}; mend the row, or set `bad_rows: drop`") from None
            loaded.dropped.add(_reason(problem), place)
            continue
        for note in notes:
            loaded.changed.add(note, place)
        loaded.conversations.append(
            Conversation(messages=tuple(messages), side=source.side, source=source.name, where=place)
        )


def _reason(problem: RowProblem) -> str:
    """Return a problem without the numbers and names that would give every row a reason of its own."""
    text = str(problem)
    for start in ("roles do not alternate", "no known format"):
        if text.startswith(start):
            return start
    return "an empty turn" if text.startswith("turn") and text.endswith("is empty") else text


def rng(seed: int, *keys: str) -> random.Random:
    """Return a generator for (seed, keys) alone, so that one source never shifts the draws of another."""
    return random.Random(hashlib.sha256("\0".join([str(seed), *keys]).encode()).digest())


def mix(recipe: Recipe, root: Path) -> Mixture:
    """Read every source, hold out whole questions, draw by weight, shuffle; all from the recipe's seed."""
    sources = tuple(load(source, root, bad_rows=recipe.bad_rows) for source in recipe.data)
    for loaded in sources:
        _drop_leftovers(loaded, recipe)
    limited = {loaded.source.name: _limit(loaded, recipe.seed) for loaded in sources}
    heldout_questions = _heldout_questions([c for kept in limited.values() for c in kept], recipe)
    heldout, pools = [], {}
    for name, kept in limited.items():
        heldout += [c for c in kept if _key(c) in heldout_questions]
        pools[name] = [c for c in kept if _key(c) not in heldout_questions]
    chosen: dict[str, list[Conversation]] = {}
    for loaded in sorted(sources, key=lambda loaded: bool(loaded.source.equal_to)):  # the others' counts come first
        chosen[loaded.source.name] = _draw(loaded.source, pools, chosen, recipe.seed)
    train = [conversation for loaded in sources for conversation in chosen[loaded.source.name]]
    drawn = {loaded.source.name: len(chosen[loaded.source.name]) for loaded in sources}
    rng(recipe.seed, "order").shuffle(train)
    if not train:
        raise RequestError("nothing is left to train on; see the counts above, or lower `holdout`")
    return Mixture(train=tuple(train), heldout=tuple(heldout), sources=sources, drawn=drawn)


def _drop_leftovers(loaded: Loaded, recipe: Recipe) -> None:
    lost = {r: n for r, n in loaded.dropped.counts.items() if r not in MISSING_THREAD}
    total = len(loaded.conversations) + sum(lost.values())
    if sum(lost.values()) > recipe.max_dropped * total:
        worst = max(lost, key=lambda reason: lost[reason])
        raise RequestError(
            f"data source {loaded.source.name!r}: {sum(lost.values())} of {total} conversations cannot be "
            "used, more "
            f"than `max_dropped: {recipe.max_dropped}`; most often: {worst} (first at "
            f"{loaded.dropped.first[worst]})"
        )
    if not loaded.conversations:
        raise RequestError(f"data source {loaded.source.name!r}: {loaded.rows} rows, but no conversation to train on")


def _limit(loaded: Loaded, seed: int) -> list[Conversation]:
    limit = loaded.source.limit
    if limit is None or limit >= len(loaded.conversations):
        return loaded.conversations
    return rng(seed, "limit", loaded.source.name).sample(loaded.conversations, limit)


def _key(conversation: Conversation) -> str:
    return " ".join(conversation.question.lower().split())


def _heldout_questions(conversations: list[Conversation], recipe: Recipe) -> set[str]:
    """Choose whole questions, so that a repeated question is never on both sides of the split."""
    if not recipe.holdout:
        return set()
    sizes: dict[str, int] = {}
    for conversation in conversations:
        sizes[_key(conversation)] = sizes.get(_key(conversation), 0) + 1
    questions = sorted(sizes)
    rng(recipe.seed, "holdout").shuffle(questions)
    wanted, chosen, held = max(1, round(recipe.holdout * len(conversations))), set(), 0
    for question in questions:
        if held >= wanted:
            break
        chosen.add(question)
        held += sizes[question]
    return chosen


def _draw(source: Source, pools: Pools, chosen: Pools, seed: int) -> list[Conversation]:
    pool = pools[source.name]
    if source.equal_to:
        wanted = round(source.weight * sum(len(chosen[name]) for name in source.equal_to))
        if wanted > len(pool):
            raise RequestError(
                f"data source {source.name!r}: equal_to asks for {wanted} conversations, it has {len(pool)}; "
                f"lower its `weight` to {len(pool) / max(1, wanted) * source.weight:.3f}"
            )
    else:
        wanted = round(source.weight * len(pool))
    whole, part = divmod(wanted, len(pool)) if pool else (0, 0)
    return pool * whole + rng(seed, "draw", source.name).sample(pool, part)
