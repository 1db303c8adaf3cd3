"""Which questions are for what: calibrating, choosing and verifying share none, by what the questions say.

    R/questions/PART/BANK.json      the questions of a part, private as all records of answers are
    R/questions/parts.json          the digest of every question of every part, drawn before anything is asked
    R/spent.jsonl                   which model the verifying questions were asked of, before the first is asked

The parts are drawn from the named banks by a seed: of each category one question for choosing, one for verifying, and
so on; spellings of one question are one question. Questions that a verdict was based on are spent: whoever tries one
candidate after the other on them ends with one that was lucky. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resta.errors import RequestError, ResumeError
from resta.fingerprint import digest, sha256_text
from resta.journal import Journal, differences, document, read_object, read_rows, to_json, write_whole
from resta.redeval.plan import RunSpec
from resta.redeval.questions import Bank, Question, check_apart, choose, words_of
from resta.verify.budget import Exam

CALIBRATING, CHOOSING, VERIFYING = "calibrating", "choosing", "verifying"
MOST_CALIBRATING = 64  # harmful questions that a patch learns from; sixteen are nearly enough
LARGEST_SHARE = 0.25  # of the harmful questions, for calibrating
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Questions for one purpose: banks, and the folder that each has a file in."""

    folder: Path
    banks: tuple[Bank, ...]

    @property
    def name(self) -> str:
        """Return what the part is called."""
        return self.folder.name

    @property
    def questions(self) -> tuple[Question, ...]:
        """Return the questions of all banks."""
        return tuple(question for bank in self.banks for question in bank.questions)

    @property
    def digests(self) -> frozenset[str]:
        """Return what its questions say, whatever bank they stand in."""
        return frozenset(question.digest for question in self.questions)

    @property
    def sha256(self) -> str:
        """Return the digest of all of them."""
        return digest(sorted(self.digests))

    @property
    def harmful_count(self) -> int:
        """Return how many different harmful questions there are."""
        return len({question.digest for question in self.questions if not question.safe})

    def path(self, bank: Bank) -> Path:
        """Return where a bank's questions are written."""
        return self.folder / f"{bank.name}.json"


# -- drawing -------------------------------------------------------------------------------------------------


def draw(spec: RunSpec, folder: Path, *, seed: int, calibrating: Bank | None = None) -> dict[str, Part]:
    """Return the parts. A bank of one's own for calibrating leaves the others to choosing and verifying.

    Raises RequestError: a bank has too few questions to be parted, or shares some with the one for calibrating.
    """
    asked = spec.asked
    banks = [
        replace(bank, questions=tuple(choose(bank, duplicates=asked.duplicates or "once", limit=asked.limit)))
        for bank in spec.banks
    ]
    place = _places(banks, seed, 0 if calibrating else MOST_CALIBRATING)
    names = (CALIBRATING, CHOOSING, VERIFYING)
    parts = {name: Part(folder=folder / name, banks=_cut(banks, place, name)) for name in names}
    for name, bank in ((name, bank) for name in names[1:] for bank in banks):
        if bank.name not in {each.name for each in parts[name].banks}:
            raise RequestError(
                f"bank {bank.name}: {len(bank.questions)} question(s) are too few to choose on some and verify on "
                "others"
            )
    if calibrating is not None:
        check_apart({calibrating.source: calibrating.texts}, known=known_of(parts[name] for name in names[1:]))
        parts[CALIBRATING] = replace(parts[CALIBRATING], banks=(calibrating,))
    return parts


def _places(banks: Sequence[Bank], seed: int, calibrating: int) -> dict[str, str]:
    """Return the part of each question by its digest."""
    fresh: list[list[str]] = []
    known: set[str] = set()
    for bank in banks:
        order = sorted(bank.questions, key=lambda q: (q.safe, q.category, q.subcategory, _drawn(seed, q)))
        own = [each for each in dict.fromkeys(q.digest for q in order) if each not in known]
        known.update(own)
        fresh.append(own)
    harmful = sum(len(own) for own, bank in zip(fresh, banks, strict=True) if not _is_safe(bank))
    share = min(LARGEST_SHARE, calibrating / harmful) if harmful else 0.0
    place: dict[str, str] = {}
    for own, bank in zip(fresh, banks, strict=True):
        learned = 0 if _is_safe(bank) else int(share * len(own))
        taken = {i * len(own) // learned for i in range(learned)}
        place |= {own[i]: CALIBRATING for i in taken}
        rest = [each for i, each in enumerate(own) if i not in taken]
        place |= {each: (VERIFYING, CHOOSING)[i % 2] for i, each in enumerate(rest)}
    return place


def _drawn(seed: int, question: Question) -> str:
    return sha256_text(f"{seed}\0{words_of(question.text)}")


def _is_safe(bank: Bank) -> bool:
    return all(question.safe for question in bank.questions)


def _cut(banks: Iterable[Bank], place: Mapping[str, str], part: str) -> tuple[Bank, ...]:
    cut = (replace(b, questions=tuple(q for q in b.questions if place[q.digest] == part)) for b in banks)
    return tuple(bank for bank in cut if bank.questions)


def known_of(parts: Iterable[Part]) -> dict[str, str]:
    """Return the digest of every question of these parts, and what it is for."""
    return {each: _told(part.name) for part in parts for each in part.digests}


def _told(part: str) -> str:
    return f"the {part} questions of this run"


# -- on disk -------------------------------------------------------------------------------------------------


def keep(folder: Path, parts: Mapping[str, Part]) -> None:
    """Write the parts, or find them as they were drawn before. Raises ResumeError where they are others now.

    Parts may be added later, and none may change.
    """
    path = folder / "parts.json"
    facts = {name: {"sha256": part.sha256, "questions": sorted(part.digests)} for name, part in parts.items()}
    there: dict[str, Any] = read_object(path)["parts"] if path.is_file() else {}
    for name in facts.keys() & there.keys():
        if differences(there[name], facts[name]):
            raise ResumeError(
                f"{path}: the questions for {name} were others when they were drawn (sha256 "
                f"{there[name]['sha256'][:12]} there, {facts[name]['sha256'][:12]} now). Give the banks and the seed "
                "of then, or choose another -o"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, document("questions", {"parts": {**there, **facts}}, schema=SCHEMA))
    for part in parts.values():
        for bank in part.banks:
            _write(part.path(bank), bank)


def _write(path: Path, bank: Bank) -> None:
    content = to_json([_row(question) for question in bank.questions], indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != content:
        raise ResumeError(f"{path} was changed after its questions were drawn; remove it, and it is written anew")
    path.parent.mkdir(exist_ok=True)
    write_whole(path, content)


def _row(question: Question) -> dict[str, Any]:
    return {
        "question": question.text,
        "category": question.category,
        "subcategory": question.subcategory,
        "safe": question.safe,
    }


def seen_before(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of every question that was drawn for anything but these parts, and what it was drawn for."""
    path = folder / "parts.json"
    there = read_object(path)["parts"] if path.is_file() else {}
    return {each: _told(name) for name, part in there.items() if name not in names for each in part["questions"]}


def exam_on(part: Part, exam: Exam, number: int) -> Exam:
    """Return an exam on the questions of a part, and on the part of its tasks' documents of that number, of two."""
    asked = replace(
        exam.questions,
        banks=[part.path(bank) for bank in part.banks if not _is_safe(bank)],
        safe_banks=[part.path(bank) for bank in part.banks if _is_safe(bank)],
        templates=exam.questions.named().templates,
        profile=None,
        bank_dirs=(),
        download=False,
        without=(),
        limit=None,
    )
    return replace(exam, questions=asked, utility=exam.utility and replace(exam.utility, part=(number, 2)))


# -- spending ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Verifying questions that were asked of a model, and once there is one the verdict.

    `questions`, `model` and `records` are digests: of the questions, of the model's files, of all that was answered.
    """

    questions: str
    model: str
    candidate: str
    at: str  # ISO 8601, UTC
    verdict: str | None = None
    records: str | None = None
    schema: int = SCHEMA


def spend(path: Path, now: Spent, answers: Path) -> Spent | None:
    """Note that questions are spent on a model, before the first is asked; return the line of the verdict, if any.

    `answers` is the folder of what is asked. Raises ResumeError: they were spent on another model, or nobody noted on
    which.
    """
    earlier = [line for line in read_rows(path, Spent) if line.questions == now.questions]
    for line in earlier:
        if line.model != now.model:
            raise ResumeError(
                f"the verifying questions (sha256 {now.questions[:12]}) are spent on {line.candidate}, {line.at}: a "
                f"second candidate, {now.candidate}, verified on them would be chosen by them. Name questions that "
                "nobody has seen: --unseen-bank, and --unseen-safe-bank where safe questions are asked"
            )
    if not earlier and answers.exists() and any(answers.iterdir()):
        raise ResumeError(
            f"{answers} holds answers to the verifying questions, and {path} does not say of which model: name unseen "
            "ones (--unseen-bank), or choose another -o"
        )
    if not earlier:
        add(path, now)
    return next((line for line in earlier if line.verdict), None)


def add(path: Path, line: Spent) -> None:
    """Add a line to the record, on the disk before this returns."""
    with Journal(path) as journal:
        journal.append(line)
        journal.sync()
