"""Lessons on disk: prompts, a teacher's own answers, and what it held likely at each token of them.

A folder of lessons is a source of conversations like any other (lessons.jsonl), with two files more:

    lessons.safetensors   ids            (tokens,) int32         prompt and answer of every lesson, one after another
                          tokens         (lessons,) int64        how many of them each lesson has
                          prompt_tokens  (lessons,) int64        and how many of these are the prompt's
                          top_ids        (answer tokens, k) int32    the k likeliest tokens at each place of an answer
                          top_logprobs   (answer tokens, k) float32  and the teacher's log-probability of each, in nats
                          rest           (answer tokens,) float32    log of the probability of all other tokens together
    lessons.json          who the teacher is, how it was asked, and the SHA-256 of the other two

Knows nothing of models or trainers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from resta.errors import RequestError, RestaError
from resta.fingerprint import sha256_file
from resta.journal import document, read_object, to_json

FACTS, ROWS, TENSORS = "lessons.json", "lessons.jsonl", "lessons.safetensors"
ANEW = "remove it, and make the lessons anew with: resta patch"
NOTHING = np.float32(-np.inf)  # the log of no probability at all, where the k likeliest are the whole vocabulary

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """One prompt, a teacher's answer, and the teacher's distribution at each of the answer's tokens."""

    messages: tuple[Message, ...]  # the answer last
    kind: str  # what sort of prompt it is, for people
    ids: np.ndarray[Any, np.dtype[np.int32]]  # (tokens,), prompt and answer
    prompt_tokens: int
    top_ids: np.ndarray[Any, np.dtype[np.int32]]  # (answer tokens, k)
    top_logprobs: np.ndarray[Any, np.dtype[np.float32]]  # (answer tokens, k), nats; -inf: no token is held here
    rest: np.ndarray[Any, np.dtype[np.float32]]  # (answer tokens,), nats

    def __post_init__(self) -> None:
        answer = len(self.ids) - self.prompt_tokens
        assert answer > 0, "a lesson without an answer"
        assert self.top_ids.shape == self.top_logprobs.shape == (answer, self.top_ids.shape[1])
        assert self.rest.shape == (answer,)


def write_lessons(folder: Path, lessons: Sequence[Lesson], facts: dict[str, Any]) -> None:
    """Write a folder of lessons, with `facts` of who taught them; it appears under its name when it is whole."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = [to_json({"messages": lesson.messages, "kind": lesson.kind}) + "\n" for lesson in lessons]
    (part / ROWS).write_text("".join(rows), encoding="utf-8")
    save_file(
        {
            "ids": np.concatenate([lesson.ids for lesson in lessons]).astype(np.int32),
            "tokens": np.array([len(lesson.ids) for lesson in lessons], dtype=np.int64),
            "prompt_tokens": np.array([lesson.prompt_tokens for lesson in lessons], dtype=np.int64),
            "top_ids": np.concatenate([lesson.top_ids for lesson in lessons]).astype(np.int32),
            "top_logprobs": np.concatenate([lesson.top_logprobs for lesson in lessons]).astype(np.float32),
            "rest": np.concatenate([lesson.rest for lesson in lessons]).astype(np.float32),
        },
        part / TENSORS,
    )
    digests = {name: sha256_file(part / name) for name in (ROWS, TENSORS)}
    (part / FACTS).write_text(document("lessons", {**facts, "sha256": digests}, schema=1), encoding="utf-8")
    part.replace(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what lessons.json says, the digests of the other two checked. Raises RequestError."""
    try:
        facts = read_object(folder / FACTS)
        digests = {name: sha256_file(folder / name) for name in (ROWS, TENSORS)}
    except (OSError, RestaError) as error:
        raise RequestError(f"{folder}: not a folder of lessons ({error}); {ANEW}") from None
    if (facts.get("kind"), facts.get("schema")) != ("lessons", 1):
        raise RequestError(f"{folder / FACTS}: not lessons of schema 1; {ANEW}")
    if facts.get("sha256") != digests:
        raise RequestError(f"{folder}: {ROWS} and {TENSORS} are not the files that {FACTS} was written for; {ANEW}")
    return facts


def read_lessons(folder: Path) -> tuple[Lesson, ...]:
    """Return the lessons of a folder, in the order in which they were written. Raises RequestError."""
    read_facts(folder)
    try:
        tensors = load_file(folder / TENSORS)
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, SafetensorError) as error:
        raise RequestError(f"{folder}: the lessons cannot be read ({error}); {ANEW}") from None
    ends = np.cumsum(tensors["tokens"])
    answers = np.cumsum(tensors["tokens"] - tensors["prompt_tokens"])
    if not len(rows) == len(ends) or ends[-1] != len(tensors["ids"]) or answers[-1] != len(tensors["rest"]):
        raise RequestError(f"{folder}: {ROWS} and {TENSORS} do not hold the same lessons; {ANEW}")
    return tuple(
        Lesson(
            messages=tuple(row["messages"]),
            kind=row["kind"],
            ids=tensors["ids"][end - tokens : end],
            prompt_tokens=int(prompt),
            top_ids=tensors["top_ids"][last - (tokens - prompt) : last],
            top_logprobs=tensors["top_logprobs"][last - (tokens - prompt) : last],
            rest=tensors["rest"][last - (tokens - prompt) : last],
        )
        for row, end, tokens, prompt, last in zip(
            rows, ends, tensors["tokens"], tensors["prompt_tokens"], answers, strict=True
        )
    )
