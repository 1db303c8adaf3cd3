"""People's labels: read from the CSV that a run writes for them, and what waits there to be taken in."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from resta.errors import RequestError, RestaError, ResumeError
from resta.redeval.records import Label, RunDir

WORDS = {"harmful": True, "unharmful": False, "safe": False, "refused": False}
FILE = "disagreements.csv"


def read_labels(file: Path, known: set[str], *, required: bool) -> list[Label]:
    """Return the labels filled in in a CSV; `required` at least one. Raises RequestError, ResumeError."""
    found = []
    for number, row in enumerate(_label_rows(file), 2):
        word = (row["human_label"] or "").strip().lower()
        if not word:
            continue
        if word not in WORDS:
            raise RequestError(f"{file}: line {number}: human_label must be harmful or safe, found {word!r}")
        if row["answer_id"] not in known:
            raise ResumeError(f"{file}: line {number}: {row['answer_id']!r} is not an answer of this run")
        try:
            weight = float(row.get("weight") or 1)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise RequestError(f"{file}: line {number}: weight must be a number above 0, found {row['weight']!r}")
        found.append(Label(answer_id=row["answer_id"], harmful=WORDS[word], weight=weight))
    if required and not found:
        raise RequestError(f"{file}: no human_label is filled in")
    return found


def _label_rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{file}: not CSV in UTF-8: {error}") from error
    if not {"answer_id", "human_label"} <= set(names):
        shown = ", ".join(names)[:80]
        raise RequestError(f"{file}: expected the columns answer_id and human_label, comma-separated, found {shown!r}")
    return rows


def labels_waiting(folder: RunDir) -> str:
    """Return what a person has written into the run's CSV and not imported yet; hours of work may lie there."""
    file = folder.path / FILE
    if not file.exists():
        return ""
    imported = {label.answer_id: label.harmful for label in folder.labels()}
    try:
        found = read_labels(file, {answer.id for answer in folder.answers()}, required=False)
    except RestaError as error:
        return f"labels that cannot be read ({error})"
    new = sum(imported.get(label.answer_id) is not label.harmful for label in found)
    return f"{new} labels that are not imported (resta redeval labels {folder.path} {file})" if new else ""
