"""Every form in which a decision is written, and the trace that goes before them."""

from __future__ import annotations

from pathlib import Path

from resta.journal import write_whole
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision
from resta.verify.durability import Durability
from resta.verify.html import to_html
from resta.verify.junit import to_junit
from resta.verify.report import to_card, to_json, to_markdown
from resta.verify.trace import Ruling, append_decision

VIEWS = ("report.md", "report.html", "junit.xml", "card.md", "verdict.json")


def write_reports(
    out: Path,
    comparison: Comparison,
    decision: Decision,
    ruling: Ruling,
    durability: Durability | None = None,
    *,
    include_text: bool,
) -> None:
    """Add the decision to decisions.jsonl, then write report.md, report.html, junit.xml, card.md and last verdict.json,
    each whole. Raises RequestError before anything is written.
    """
    texts = _texts(comparison, decision, ruling, durability, include_text=include_text)
    append_decision(out, comparison, decision, ruling)
    _write(out, texts)


def write_views(
    out: Path,
    comparison: Comparison,
    decision: Decision,
    ruling: Ruling,
    durability: Durability | None,
    *,
    include_text: bool,
) -> None:
    """Write the reports of a decision that has left its trace already, each whole."""
    _write(out, _texts(comparison, decision, ruling, durability, include_text=include_text))


def _texts(
    comparison: Comparison, decision: Decision, ruling: Ruling, durability: Durability | None, *, include_text: bool
) -> tuple[str, ...]:
    """Return the reports in the order of VIEWS."""
    return (
        to_markdown(comparison, decision, ruling, durability),
        to_html(comparison, decision, ruling, durability, include_text=include_text),
        to_junit(comparison, decision, ruling),
        to_card(comparison, decision, ruling, durability),
        to_json(comparison, decision, ruling),
    )


def _write(out: Path, texts: tuple[str, ...]) -> None:
    for name, text in zip(VIEWS, texts, strict=True):
        write_whole(out / name, text)


def remove_reports(out: Path) -> None:
    """Remove what an earlier run wrote, so that one that breaks off leaves no old verdict to be taken for its own.

    What it decided stays in decisions.jsonl.
    """
    for name in VIEWS:
        (out / name).unlink(missing_ok=True)
