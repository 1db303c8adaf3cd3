"""Every form in which a decision is written, and the trace that goes before them."""

from __future__ import annotations

from pathlib import Path

from resta.journal import write_whole
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision
from resta.verify.html import to_html
from resta.verify.junit import to_junit
from resta.verify.report import to_card, to_json, to_markdown
from resta.verify.trace import Ruling, append_decision

VIEWS = ("report.md", "report.html", "junit.xml", "card.md", "verdict.json")


def write_reports(out: Path, comparison: Comparison, decision: Decision, ruling: Ruling, *, include_text: bool) -> None:
    """Add the decision to decisions.jsonl, then write report.md, report.html, junit.xml, card.md and last verdict.json,
    each whole. Raises RequestError before anything is written.
    """
    texts = (
        to_markdown(comparison, decision, ruling),
        to_html(comparison, decision, ruling, include_text=include_text),
        to_junit(comparison, decision, ruling),
        to_card(comparison, decision, ruling),
        to_json(comparison, decision, ruling),
    )
    append_decision(out, comparison, decision, ruling)
    for name, text in zip(VIEWS, texts, strict=True):
        write_whole(out / name, text)


def remove_reports(out: Path) -> None:
    """Remove what an earlier run wrote, so that one that breaks off leaves no old verdict to be taken for its own.

    What it decided stays in decisions.jsonl.
    """
    for name in VIEWS:
        (out / name).unlink(missing_ok=True)
