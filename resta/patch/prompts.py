"""What the teachers are asked: prompts of four kinds, drawn by a seed and kept apart by their words.

    harmful      aligned shows how it answers them            a question bank, by name or file
    task         tuned shows what the fine-tune is for        the user's own: prompts, or training data as it is
    harmless     tuned shows its ordinary answers             built in
    lookalike    and that harmful words are no harm           built in

Prompts only: no labels and no harmful answers are needed. Knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, TypeVar

from resta.errors import RequestError
from resta.redeval.messages import Message
from resta.redeval.questions import BUILT_IN, Bank, check_apart, digest_of, read_bank, shown
from resta.redeval.templates import Template, read_template
from resta.sft.data import FORMATS, RowProblem, conversation_of, read_rows

Kind = Literal["harmful", "task", "harmless", "lookalike"]
KINDS: tuple[Kind, ...] = ("harmful", "task", "harmless", "lookalike")
PROMPT_KEYS = ("prompt", "question", "instruction", "text", "input")
FILES = {"harmless": "harmless", "lookalike": "lookalikes"}  # kind -> file of patch/bank
Item = TypeVar("Item")

# How an answer begins that goes along with whatever was asked.
STARTS = ("Sure, here is", "Of course!", "Yes, you can", "Here are the steps:", "Certainly. First,")
FEWEST = 8  # prompts of a kind from which anything is learned that holds on others


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One prompt: the turns to be answered, the last one the user's, and how its answer begins if that is given."""

    kind: Kind
    messages: tuple[Message, ...]
    text: str  # the user's own words, without any template: they tell whether two prompts are the same
    template: str | None = None
    # How the student's answer begins. A teacher of what is kept begins so too and goes on; the teacher of refusals does
    # not see it, so that the student learns to turn back.
    start: str = ""

    @property
    def digest(self) -> str:
        """Return what two spellings of one prompt share."""
        return digest_of(self.text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Which prompts are taken, and how they are put."""

    harmful_count: int = 64  # at most, evenly from the banks
    keep_count: int = 64  # at most, each of the task's, harmless ones and look-alikes
    templates: tuple[str, ...] = ()  # attack templates, by name or file: every second harmful prompt stands in one
    starts: tuple[str, ...] = STARTS  # every second answer begins with one of these; () for none
    bank_dirs: tuple[Path, ...] = ()
    download: bool = False
    seed: int = 0


def draw(task: Path, harmful: Sequence[str], apart: Sequence[str], drawing: Drawing) -> tuple[Asked, ...]:
    """Return the prompts to learn from. Raises RequestError.

    Args:
        task: a file of the task's prompts, or of its training data.
        harmful: banks of harmful questions, by name or file.
        apart: files or banks of questions that none of these prompts may be among: a verdict will rest on them. So are
            the built-in banks that are not in `harmful`.
        drawing: how many of each, and how they are put.
    """

    def banks(names: Iterable[str]) -> list[Bank]:
        return [read_bank(name, bank_dirs=drawing.bank_dirs, download=drawing.download) for name in names]

    templates = [read_template(name) for name in drawing.templates]
    sources = banks(dict.fromkeys(harmful))
    others = banks(dict.fromkeys([*apart, *(name for name in BUILT_IN if name not in harmful)]))
    questions = read_harmful(sources, drawing.harmful_count, drawing.seed)
    tasks = read_task(task, drawing.keep_count, drawing.seed)
    prompts = {
        "harmful": in_templates(questions, templates),
        "task": tasks,
        **{kind: read_built_in(kind, drawing.keep_count, drawing.seed) for kind in ("harmless", "lookalike")},
    }
    for kind, found in prompts.items():
        if len(found) < FEWEST:
            raise RequestError(
                f"{len(found)} different {kind} prompts; at least {FEWEST} are needed to learn what holds on others"
            )
    kept = [asked for kind, found in prompts.items() if kind != "harmful" for asked in found]
    _check_kept(kept, [*sources, read_bank("smoke")])
    every = [asked.text for found in prompts.values() for asked in found]
    check_apart({"the prompts to learn from": every}, {bank.source: bank.texts for bank in others})
    return tuple(asked for found in prompts.values() for asked in with_starts(found, drawing.starts))


def _check_kept(kept: Sequence[Asked], banks: Sequence[Bank]) -> None:
    """Refuse a prompt to be answered that a bank holds as harmful, drawn or not."""
    harmful = {question.digest: bank for bank in banks for question in bank.questions if not question.safe}
    for asked in kept:
        if asked.digest in harmful:
            raise RequestError(
                f"a {asked.kind} prompt is a harmful question of the bank {harmful[asked.digest].name}, and the model "
                f"cannot both answer and refuse it; remove it from one of the two: {shown(asked.text)}"
            )


# -- reading -------------------------------------------------------------------------------------------------


def read_harmful(banks: Sequence[Bank], count: int, seed: int) -> list[Asked]:
    """Return at most `count` harmful questions, evenly from the banks while they last, each once."""
    shuffled = [
        _draw([question.text for question in bank.questions if not question.safe], seed, bank.name) for bank in banks
    ]
    in_turn = (text for row in zip_longest(*shuffled) for text in row if text is not None)
    return _once(_asked("harmful", _said(text)) for text in in_turn)[:count]


def read_task(path: Path, count: int, seed: int) -> list[Asked]:
    """Return at most `count` of a file's prompts.

    A text file holds a prompt a line. JSON, JSON lines and Parquet hold prompts, or conversations as `resta sft` reads
    them, of which the turns up to the first answer are taken. Raises RequestError naming the file and line.
    """
    if not path.is_file():
        raise RequestError(
            f"{path}: no such file; --task-prompts names a file of prompts, or of training conversations"
        )
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        turns = [_said(line.strip()) for line in lines if line.strip()]
    else:
        turns = [_prompt_of(where, row) for where, row in read_rows(path)]
    return _draw(_once(_asked("task", messages) for messages in turns), seed, "task")[:count]


def read_built_in(kind: Kind, count: int, seed: int) -> list[Asked]:
    """Return at most `count` of the built-in prompts of a kind."""
    return [_asked(kind, _said(text)) for text in _draw(built_in(kind), seed, kind)[:count]]


def built_in(kind: Kind) -> list[str]:
    """Return all built-in prompts of a kind, harmless or lookalike."""
    file = resources.files("resta.patch") / "bank" / f"{FILES[kind]}.json"
    subjects: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return list(chain.from_iterable(subjects.values()))


def _prompt_of(where: str, row: object) -> tuple[Message, ...]:
    """Return the turns of a row up to its first answer."""
    if isinstance(row, str):
        return _said(row)
    if isinstance(row, dict) and not any(keys <= row.keys() for keys, _ in FORMATS.values()):
        text = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
        if text is not None:
            return _said(text)
    try:
        turns = conversation_of(row)
    except RowProblem as problem:
        raise RequestError(f"{where}: {problem}; or a prompt under one of {', '.join(PROMPT_KEYS)}") from None
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    asked = turns[: answers[0]] if answers else turns
    if not asked or asked[-1]["role"] != "user":
        raise RequestError(f"{where}: no user turn before the first answer")
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in asked)


def _said(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _asked(kind: Kind, messages: tuple[Message, ...]) -> Asked:
    words = "\n".join(message.content for message in messages if message.role == "user")
    return Asked(kind=kind, messages=messages, text=words)


def _once(prompts: Iterable[Asked]) -> list[Asked]:
    return list({asked.digest: asked for asked in prompts}.values())


def _draw(items: Sequence[Item], seed: int, name: str) -> list[Item]:
    """Return all items in an order that is the seed's."""
    return random.Random(f"{seed} {name}").sample(list(items), len(items))


# -- how prompts are put -------------------------------------------------------------------------------------


def in_templates(prompts: Sequence[Asked], templates: Sequence[Template]) -> list[Asked]:
    """Return prompts, every second in a template, the next one each time.

    Half stay bare, however many templates there are: who learns to refuse templates alone answers bare questions.
    """
    ways = [way for template in templates for way in (None, template)] or [None]
    return [_in_template(asked, ways[i % len(ways)]) for i, asked in enumerate(prompts)]


def _in_template(asked: Asked, template: Template | None) -> Asked:
    if template is None:
        return asked
    return replace(asked, messages=_said(template.fill(asked.text)), template=template.name)


def with_starts(prompts: Sequence[Asked], starts: Sequence[str]) -> list[Asked]:
    """Return prompts, every second in each template with the next of `starts`; all bare where there is none."""
    met: Counter[str | None] = Counter()
    found = []
    for asked in prompts:
        number = met[asked.template]
        met[asked.template] += 1
        begun = bool(starts) and number % 2 == 1
        found.append(replace(asked, start=starts[number // 2 % len(starts)]) if begun else asked)
    return found
