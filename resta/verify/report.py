"""A decision in the forms that machines and pull requests read: JSON, Markdown, JUnit XML, and a section of a card.

The page for people is html.py. Questions and answers are in none of these.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from resta.redeval.report import percent, printable, with_interval
from resta.verify.comparison import Comparison
from resta.verify.decision import SCHEMA, Decision, Rule, Verdict
from resta.verify.measurement import ROLES
from resta.verify.policy import Policy
from resta.verify.statistics import Difference

BAD = ("fails", "inconclusive", "invalid")  # outcomes that keep a verdict from being PASS
VIEWS = ("report.md", "report.html", "junit.xml", "card.md", "verdict.json")
CARD_START, CARD_END = "<!-- resta verify: start -->", "<!-- resta verify: end -->"


def to_json(comparison: Comparison, decision: Decision, policy: Policy, versions: Mapping[str, str]) -> str:
    """Return everything but questions and answers, as JSON of schema `SCHEMA`."""
    facts = asdict(comparison)
    del facts["examples"]
    for model in facts["models"].values():
        manifest = model.pop("manifest")
        model["merge"] = {key: manifest[key] for key in ("equation", "recipe_digest", "inputs") if key in manifest}
    for template in facts["settings"]["templates"]:
        template.pop("text", None)  # its digest is beside it
    content = {
        "schema": SCHEMA,
        "kind": "verdict",
        "verdict": decision.verdict.name,
        "limits": decision.tier or "default",
        "exit_code": decision.verdict.value,
        "summary": decision.summary,
        "rules": [asdict(rule) for rule in decision.rules],
        "notes": decision.notes,
        "guidance": decision.guidance,
        "policy": policy.model_dump(mode="json"),
        "comparison": facts,
        "versions": dict(versions),
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """Return plain data in which infinite bounds, which JSON has no word for, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def points(difference: Difference) -> str:
    """Return a difference of shares in percentage points, with its interval."""
    value, low, high = (signed(100 * share) for share in (difference.value, difference.low, difference.high))
    return f"{value} [{low}, {high}]"


def signed(value: float) -> str:
    """Return a number with its sign and one decimal; nothing is -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def share(difference: Difference) -> str:
    """Return a share in per cent, with its interval; a dash where nothing was measured."""
    if math.isnan(difference.value):
        return "-"
    return f"{100 * difference.value:.1f} % [{100 * difference.low:.1f}-{100 * difference.high:.1f}]"


def measured(rule: Rule) -> str:
    """Return what a rule found, as a number with its interval where it has one."""
    if rule.value is None:
        return "-"
    if rule.low is None or rule.high is None:
        return f"{rule.value:.3f}"
    return f"{rule.value:.3f} [{rule.low:.3f}, {rule.high:.3f}]"


def to_markdown(comparison: Comparison, decision: Decision) -> str:
    """Return a summary for a pull request."""
    lines = [f"## Safety gate: {decision.title}", "", _md(decision.summary), ""]
    lines += [f"> {_md(note)}" + "\n>" for note in decision.notes]
    lines += ["", *_models_table(comparison), "", *_rules_table(decision)]
    if decision.guidance:
        lines += ["", "### What the numbers suggest", "", *(f"- {_md(line)}" for line in decision.guidance)]
    lines += ["", "### Bank by template", "", *_cells_table(comparison)]
    return "\n".join(lines) + "\n"


def _models_table(comparison: Comparison) -> list[str]:
    rows: list[tuple[str, ...]] = [("model", *(_md(comparison.models[role].name) for role in ROLES))]
    if comparison.asr is not None:
        rows.append(("Attack Success Rate", *(with_interval(comparison.asr.rates[role]) for role in ROLES)))
    if comparison.over_refusal is not None:
        rows.append(("safe questions refused", *(with_interval(comparison.over_refusal.rates[r]) for r in ROLES)))
    rows.append(("degenerate answers", *(percent(comparison.conduct[role].degenerate.value) for role in ROLES)))
    rows += [
        (f"{_md(task.task)} ({_md(task.metric)})", *(share(task.means[role]) for role in ROLES))
        for task in comparison.utility
    ]
    if comparison.regained is not None:
        rows.append(("lost safety regained", "", "", share(comparison.regained)))
    return _table(("", *ROLES), rows)


def _rules_table(decision: Decision) -> list[str]:
    rows = [
        (_code(rule.name), f"**{rule.outcome}**", measured(rule), rule.limit, _md(rule.why)) for rule in decision.rules
    ]
    return _table(("rule", "outcome", "measured", "limit", "why"), rows)


def _cells_table(comparison: Comparison) -> list[str]:
    header = ("bank", "template", "of", *ROLES, "restored - tuned", "p (Holm)")
    rows = [
        (
            _md(cell.bank),
            _md(cell.template),
            "refusals" if cell.safe else "harm",
            *(with_interval(cell.rates[role]) for role in ROLES),
            points(cell.against["tuned"].difference),
            f"{cell.against['tuned'].p_holm:.3g}",
        )
        for cell in comparison.cells
    ]
    return _table(header, rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


# What could begin something in Markdown, as entities, which never do: a link or picture, emphasis, code, a cell's end.
MARKDOWN = str.maketrans({c: f"&#{ord(c)};" for c in "\\`*[]|~"})


def _md(text: str) -> str:
    return html.escape(printable(" ".join(text.split())), quote=False).translate(MARKDOWN)


def _code(text: str) -> str:
    """Return a name as code, in which entities would stand as they are."""
    plain = printable(" ".join(text.split())).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def to_junit(decision: Decision) -> str:
    """Return JUnit XML: one test case per rule, for a CI's own report.

    Where no rule is to blame for a verdict other than PASS, the verdict itself is a case, so that no CI shows green.
    """
    rules = list(decision.rules)
    if decision.verdict is not Verdict.PASS and not any(rule.outcome in BAD for rule in rules):
        rules.append(
            Rule(
                name="verdict", outcome="inconclusive", limit=Verdict.PASS.name, value=None, low=None, high=None,
                why=decision.summary,
            )
        )  # fmt: skip
    outcomes = [rule.outcome for rule in rules]
    suite = ElementTree.Element(
        "testsuite",
        name="resta verify",
        tests=str(len(rules)),
        failures=str(outcomes.count("fails")),
        errors=str(sum(outcome in BAD and outcome != "fails" for outcome in outcomes)),
        skipped=str(outcomes.count("left out")),
    )
    for rule in rules:
        case = ElementTree.SubElement(suite, "testcase", classname="resta.verify", name=_printable(rule.name))
        text = _printable(f"{rule.limit}; measured {measured(rule)}; {rule.why}")
        if rule.outcome == "holds":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            kind = {"fails": "failure", "left out": "skipped"}.get(rule.outcome, "error")
            ElementTree.SubElement(case, kind, message=f"{rule.outcome}: {text}")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """Return text without the control characters that XML has no way to hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def to_card(comparison: Comparison, decision: Decision) -> str:
    """Return a section for the restored model's card, between markers so that it can be replaced."""
    lines = [CARD_START, f"## Safety: {decision.title}", "", _md(decision.summary), ""]
    lines += _models_table(comparison)
    judge = _md(comparison.judge)
    banks = ", ".join(f"{_md(str(b['name']))} ({b['questions']})" for b in comparison.settings["banks"])
    lines += ["", f"Judge: {judge}. Banks: {banks}. Intervals: {100 * comparison.level:g} %."]
    lines += [_md(note) for note in decision.notes]
    return "\n".join([*lines, CARD_END]) + "\n"


def with_section(card: str, section: str) -> str:
    """Return a model card with the section put in, in place of an earlier one or at the end."""
    end = card.find(CARD_END)
    start = card.rfind(CARD_START, 0, max(end, 0))  # the nearest, so that a stray mark above takes no text with it
    if start >= 0:
        return card[:start] + section.rstrip("\n") + card[end + len(CARD_END) :]
    return card.rstrip("\n") + "\n\n" + section


def write_reports(
    out: Path,
    comparison: Comparison,
    decision: Decision,
    *,
    policy: Policy,
    versions: Mapping[str, str],
    include_text: bool,
) -> None:
    """Write report.md, report.html, junit.xml, card.md and last verdict.json, each whole. Raises MissingExtraError."""
    from resta.verify.html import to_html

    texts = (
        to_markdown(comparison, decision),
        to_html(comparison, decision, include_text=include_text, versions=versions, policy=policy),
        to_junit(decision),
        to_card(comparison, decision),
        to_json(comparison, decision, policy, versions),
    )
    for name, text in zip(VIEWS, texts, strict=True):
        part = out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(out / name)


def remove_reports(out: Path) -> None:
    """Remove what an earlier run wrote, so that one that breaks off leaves no old verdict to be taken for its own."""
    for name in VIEWS:
        (out / name).unlink(missing_ok=True)


WORDS = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.INVALID: "bold magenta",
}


COLOURS = {"holds": "green", "fails": "red", "inconclusive": "yellow", "invalid": "magenta", "left out": "dim"}


def print_decision(comparison: Comparison, decision: Decision) -> None:
    """Print the verdict, the three models, the rules and the guidance to stdout."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(highlight=False)
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in _models_table(comparison))
    table = Table(*(Column(name, overflow="fold") for name in header), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(html.unescape(cell)) for cell in row))
    console.print(table)
    for rule in decision.rules:
        found = f"[{COLOURS[rule.outcome]}]{rule.outcome:12}[/] {escape(rule.name)}"
        console.print(f"{found}  {escape(measured(rule))}  {escape(rule.limit)}")
        if rule.outcome != "holds":
            console.print(f"             {escape(rule.why)}")
    console.print(f"\n[{WORDS[decision.verdict]}]{escape(decision.title)}[/]  {escape(decision.summary)}")
    for note in decision.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for line in decision.guidance:
        console.print(f"[cyan]try:[/cyan]  {escape(line)}")
