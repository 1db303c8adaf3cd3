"""Utility records: the score of every document of every task, and what must be equal between models.

    UTILITY/suite.json       the suite's facts (utility.suite_facts), written before the first document
    UTILITY/documents.jsonl  one line per document, and after a task's last one its mark
                             {"task": ..., "finished": documents, "cut": prompts cut to the model's context, ...}

A task counts once its mark is there: the lines of one that was torn are left out, and it is measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resta.errors import ResumeError
from resta.journal import Journal, differences, read_lines, read_object, to_json, to_row, write_whole
from resta.redeval.records import SCHEMA

DOCUMENTS = "documents.jsonl"
SUITE = "suite.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document's value on one task: a score in [0, 1], or where lower is better (the suite's facts say so) an error
    or loss from 0 on (scores.py). `doc_id` is the same for every model: a digest of the document, after the subtask's
    name and a slash where `task` is a group.

    Of what was generated its text is not kept, but `runs`: its buckets (sameness.py), never none of them. `generated`
    is False where the model chose among given answers, None where it was not noted, as by earlier versions.
    """

    task: str
    doc_id: str
    metric: str
    value: float
    generated: bool | None = None
    runs: tuple[int, ...] = ()
    schema: int = SCHEMA


def read_documents(folder: Path) -> tuple[Document, ...]:
    """Return all documents of finished tasks; an absent folder has none. Raises ResumeError."""
    return tuple(document for documents in _finished(folder).values() for document in documents)


def finished_tasks(folder: Path) -> frozenset[str]:
    """Return the names of the tasks that need not be measured again. Raises ResumeError."""
    return frozenset(_finished(folder))


def _finished(folder: Path) -> dict[str, list[Document]]:
    path = folder / DOCUMENTS
    finished: dict[str, list[Document]] = {}
    waiting: list[Document] = []
    for line in read_lines(path):
        if "finished" not in line:
            waiting.append(to_row(line, Document, path))
            continue
        # What lies before the last `finished` lines is an attempt that was torn.
        own = waiting[max(0, len(waiting) - line["finished"]) :]
        if len(own) != line["finished"] or {document.task for document in own} - {line["task"]}:
            raise ResumeError(
                f"{path}: the {line['finished']} documents of {line['task']} are not all there; remove it"
            )
        finished[line["task"]] = own
        waiting = []
    return finished


def write_documents(folder: Path, task: str, documents: Sequence[Document], **facts: Any) -> None:
    """Append a finished task's documents and its mark; `facts` stand in the mark for people to read."""
    with Journal(folder / DOCUMENTS) as journal:
        for document in documents:
            journal.append(document)
        journal.append({"task": task, "finished": len(documents), **facts, "schema": SCHEMA})


def start_suite(folder: Path, facts: dict[str, Any]) -> None:
    """Create the folder of a suite's documents, or go on with it if it is of the same suite. Raises ResumeError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / SUITE
    if not path.exists():
        write_whole(path, to_json(facts, indent=2) + "\n")
        return
    different = differences(read_facts(folder), facts)
    if different:
        raise ResumeError(
            f"{folder} holds utility documents of another suite; it differs in {'; '.join(different[:6])}. "
            "Choose another folder"
        )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the suite's facts; an absent folder has none. Raises ResumeError."""
    try:
        return read_object(folder / SUITE)
    except FileNotFoundError:
        return {}
