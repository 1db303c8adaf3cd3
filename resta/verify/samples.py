"""Utility documents from lm_eval's own logs (`--log_samples`): samples_TASK_DATE.jsonl, with results_DATE.json beside.

What was measured elsewhere is compared as what was measured here, in pairs: documents go by lm_eval's digests, and the
prompts' digests must be the same for all models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resta.errors import RequestError
from resta.fingerprint import digest
from resta.verify.documents import Document, finished_tasks, read_facts, start_suite, write_documents
from resta.verify.generated import said_of
from resta.verify.scores import is_loss, value_of

NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d{2}-\d{2}T[\d.+-]+)\.jsonl")
BACKEND = "logged by lm_eval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """One file's task: its documents, and what must be equal between models."""

    task: str
    documents: tuple[Document, ...]
    facts: Mapping[str, Any]


def import_samples(folder: Path, files: Sequence[Path], names: Sequence[str]) -> tuple[Logged, ...]:
    """Add the documents of sample files to a measurement's utility folder, and return them by task.

    `names` are TASK or TASK:METRIC, as where tasks are measured: only these, by another metric than the file's first.
    All files are read before anything is written. Raises RequestError, ResumeError.
    """
    metrics = dict(_metric_of(name) for name in names)
    logged = tuple(each for path in files if (each := _read(path, metrics, chosen=bool(names))) is not None)
    if unknown := metrics.keys() - {each.task for each in logged}:
        raise RequestError(f"no file holds the task {sorted(unknown)[0]!r}; there are {', '.join(map(str, files))}")
    counts = Counter(each.task for each in logged)
    if twice := [task for task, count in counts.items() if count > 1]:
        raise RequestError(f"{twice[0]} is in two of the files; give one")
    if read_facts(folder).get("backend", BACKEND) != BACKEND:
        raise RequestError(f"{folder} holds what was measured here; logged documents go into a measurement without any")
    start_suite(
        folder, {"name": "imported", "backend": BACKEND, "tasks": {each.task: dict(each.facts) for each in logged}}
    )
    done = finished_tasks(folder)
    for each in logged:
        if each.task not in done:
            write_documents(folder, each.task, each.documents, imported=True)
    return logged


def _metric_of(name: str) -> tuple[str, str | None]:
    task, _, metric = name.partition(":")
    return task, metric or None


def _read(path: Path, metrics: Mapping[str, str | None], *, chosen: bool) -> Logged | None:
    """Return a file's task, or None where others were chosen. Raises RequestError."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise RequestError(f"{path}: expected a file of lm_eval's, samples_TASK_DATE.jsonl")
    task = match["task"]
    if chosen and task not in metrics:
        return None
    rows = list(_rows(path))
    metric = metrics.get(task) or _first_metric(rows[0])
    results = _results(path.with_name(f"results_{match['date']}.json"))
    higher = _higher_is_better(results, task, metric, path)
    own = [row for row in rows if row["filter"] == (metric.partition(",")[2] or "none")]
    if not own or metric.partition(",")[0] not in own[0]["metrics"]:
        raise RequestError(f"{path}: no document has the metric {metric!r}; the first has {_first_metric(rows[0])!r}")
    documents = tuple(_documents(task, metric, own, higher_is_better=higher, path=path))
    facts = {
        "metric": metric,
        "prompts_sha256": digest(sorted(str(row["prompt_hash"]) for row in own)),
        "num_fewshot": results.get("n-shot", {}).get(task),
        "version": results.get("versions", {}).get(task),
        **({} if higher else {"higher_is_better": False}),
    }
    return Logged(task=task, documents=documents, facts=facts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    wanted = {"doc_hash", "prompt_hash", "filter", "metrics"}
    number = 0
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # by newlines alone: answers hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error
    for line in filter(str.strip, lines):
        number += 1
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not row.keys() >= wanted or not row["metrics"]:
            raise RequestError(f"{path}: line {number} is no sample; expected the keys {', '.join(sorted(wanted))}")
        yield row
    if not number:
        raise RequestError(f"{path}: an empty file")


def _first_metric(row: Mapping[str, Any]) -> str:
    metric, part = row["metrics"][0], row["filter"]
    return str(metric) if part == "none" else f"{metric},{part}"


def _results(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RequestError(f"{path}: not JSON: {error}") from error


def _higher_is_better(results: Mapping[str, Any], task: str, metric: str, path: Path) -> bool:
    name = metric.partition(",")[0]
    found = results.get("higher_is_better", {}).get(task, {}).get(name)
    if found is None and not is_loss(name):
        known = {"acc": True, "acc_norm": True, "exact_match": True}.get(name)
        if known is None:
            raise RequestError(
                f"{path}: nothing says whether a higher {name} is better; put lm_eval's results_DATE.json beside it"
            )
        return known
    return bool(found)


def _documents(
    task: str, metric: str, rows: Sequence[Mapping[str, Any]], *, higher_is_better: bool, path: Path
) -> Iterator[Document]:
    seen: Counter[str] = Counter()
    for row in rows:
        identity = str(row["doc_hash"])
        seen[identity] += 1  # some banks hold a document twice
        repeat = f"#{seen[identity]}" if seen[identity] > 1 else ""
        found = row.get(metric.partition(",")[0])
        value = value_of(metric, found, higher_is_better=higher_is_better, where=str(path))
        generated, runs = said_of(row)
        yield Document(
            task=task, doc_id=f"{identity}{repeat}", metric=metric, value=value, generated=generated, runs=runs
        )
