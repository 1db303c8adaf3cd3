"""Utility records: one line per document and task, and the facts that must be equal between models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document's score on one task; higher is better."""

    task: str
    doc_id: str
    metric: str
    value: float
    schema: int = SCHEMA


def read_documents(folder: Path) -> tuple[Document, ...]:
    """Return all documents of finished tasks; an absent folder has none."""
    path = folder / "documents.jsonl"
    if not path.exists():
        return ()
    return tuple(Document(**json.loads(line)) for line in path.read_text().splitlines())


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the suite's facts; an absent folder has none."""
    path = folder / "suite.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
