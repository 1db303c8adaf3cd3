"""One answer to everything, looked for in what utility tasks generate, where a score alone may hide it.

Of each document's answer its buckets are kept (sameness.py), never its text. A choice among given answers has no text:
such tasks are left out. Knows nothing of lm_eval, of policies or of intervals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resta.verify.documents import Document
from resta.verify.sameness import alike_by_buckets, buckets
from resta.verify.scores import is_loss

MOST = 2000  # documents of a task that are compared with each other, in the order of their digests
EMPTY = (0,)  # the buckets of an empty answer: to say nothing to everything is one answer, too
CHOSEN = frozenset({"acc", "acc_norm"})  # metrics of choices among given answers
REPEAT = re.compile(r"#\d+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A task's documents that all models have: which answers would have done for another one, (documents, models), or
    why it was not looked for. `missed`: the task generates, or may do so.
    """

    task: str
    alike: NDArray[np.bool_] | None
    why: str = ""
    missed: bool = False


def said_of(row: Mapping[str, Any], question: str | None = None) -> tuple[bool | None, tuple[int, ...]]:
    """Return whether a sample of lm_eval's was generated, None where it does not say, and its answer's buckets.

    `question` is the document's own, by default the end of the prompt: examples come before it, parted from it
    by an empty line.
    """
    request, said = _request(row), row.get("resps")
    while isinstance(said, list | tuple) and said:
        said = said[0]
    if not request:
        return None, ()
    if len(request) < 2 or not isinstance(request[1], Mapping):  # a text to score, where settings would stand
        return False, ()
    own = str(request[0]).rpartition("\n\n")[2] if question is None else question
    return (True, buckets(own, said) or EMPTY) if isinstance(said, str) else (None, ())


def _request(row: Mapping[str, Any]) -> Sequence[Any]:
    """Return a sample's first request, (prompt, ...), from lm_eval's results or its log file; empty without one."""
    found = row.get("arguments") or [()]
    return tuple(found.get("gen_args_0", {}).values()) if isinstance(found, Mapping) else tuple(found[0])


def look(documents: Mapping[str, Sequence[Document]]) -> tuple[Look, ...]:
    """Return what each task shows; `documents` are by role, and the models of a Look in the same order."""
    tasks = sorted({document.task for found in documents.values() for document in found})
    return tuple(
        _look(task, {r: [d for d in found if d.task == task] for r, found in documents.items()}) for task in tasks
    )


def _look(task: str, documents: Mapping[str, Sequence[Document]]) -> Look:
    by_id = [{document.doc_id: document for document in found} for found in documents.values()]
    # A document's digest is the last part of its name: by it, all subtasks of a group are among the first ones.
    common = sorted(set.intersection(*map(set, by_id)), key=lambda name: (name.rpartition("/")[2], name))[:MOST]
    rows = [[found[name] for found in by_id] for name in common]
    noted = {document.generated for row in rows for document in row}
    if not rows:
        return Look(task=task, alike=None, why="no document is common to all models", missed=True)
    if noted == {False}:
        return Look(task=task, alike=None, why="nothing is generated there")
    if noted != {True}:
        metric = rows[0][0].metric
        chosen = noted == {None} and (metric in CHOSEN or is_loss(metric))
        without = [role for role, column in zip(documents, zip(*rows, strict=True), strict=True) if not _kept(column)]
        why = f"what {' and '.join(without)} said was not kept, as by earlier versions; measure again"
        return Look(task=task, alike=None, why=why, missed=not chosen)
    names = [REPEAT.sub("", name) for name in common]
    columns = [alike_by_buckets(names, [row[model].runs for row in rows]) for model in range(len(by_id))]
    return Look(task=task, alike=np.array(columns).T)


def _kept(documents: Sequence[Document]) -> bool:
    return all(document.generated for document in documents)
