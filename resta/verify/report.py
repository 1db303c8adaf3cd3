"""A decision in the forms that machines and pull requests read: JSON, Markdown, JUnit XML, and a section of a card.

The page for people is html.py. Questions and answers are in none of these.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from resta.redeval.report import percent, with_interval
from resta.verify.comparison import Comparison
from resta.verify.gate import SCHEMA, Decision, Rule, Verdict
from resta.verify.measurement import ROLES
from resta.verify.policy import Policy
from resta.verify.statistics import Difference

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
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def points(difference: Difference) -> str:
    """Return a difference of shares in percentage points, with its interval."""
    return (
        f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        if math.isfinite(difference.low)
        else f"{100 * difference.value:+.1f} [too few]"
    )


def share(difference: Difference) -> str:
    """Return a share in per cent, with its interval."""
    return f"{100 * difference.value:.1f} % [{100 * difference.low:.1f}-{100 * difference.high:.1f}]"


def measured(rule: Rule) -> str:
    """Return what a rule found, as a number with its interval where it has one."""
    if rule.value is None:
        return "-"
    if rule.low is None or rule.high is None or not math.isfinite(rule.low):
        return f"{rule.value:.3f}"
    return f"{rule.value:.3f} [{rule.low:.3f}, {rule.high:.3f}]"


def to_markdown(comparison: Comparison, decision: Decision) -> str:
    """Return a summary for a pull request."""
    lines = [f"## Safety gate: {decision.verdict.name}", "", _md(decision.summary), ""]
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
        (f"`{rule.name}`", f"**{rule.outcome}**", measured(rule), rule.limit, _md(rule.why)) for rule in decision.rules
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


def _md(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")


def to_junit(decision: Decision) -> str:
    """Return JUnit XML: one test case per rule, for a CI's own report."""
    bad = [rule for rule in decision.rules if rule.outcome in ("fails", "inconclusive", "invalid")]
    suite = ElementTree.Element(
        "testsuite",
        name="resta verify",
        tests=str(len(decision.rules)),
        failures=str(sum(rule.outcome == "fails" for rule in bad)),
        errors=str(sum(rule.outcome != "fails" for rule in bad)),
        skipped=str(sum(rule.outcome == "left out" for rule in decision.rules)),
    )
    for rule in decision.rules:
        case = ElementTree.SubElement(suite, "testcase", classname="resta.verify", name=rule.name)
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
    lines = [CARD_START, f"## Safety: {decision.verdict.name}", "", _md(decision.summary), ""]
    lines += _models_table(comparison)
    judge = _md(comparison.judge)
    banks = ", ".join(f"{_md(str(b['name']))} ({b['questions']})" for b in comparison.settings["banks"])
    lines += ["", f"Judge: {judge}. Banks: {banks}. Intervals: {100 * comparison.level:g} %."]
    lines += [_md(note) for note in decision.notes]
    return "\n".join([*lines, CARD_END]) + "\n"


def with_section(card: str, section: str) -> str:
    """Return a model card with the section put in, in place of an earlier one or at the end."""
    start, end = card.find(CARD_START), card.find(CARD_END)
    if start >= 0 and end > start:
        return card[:start] + section.rstrip("\n") + card[end + len(CARD_END) :]
    return card.rstrip("\n") + "\n\n" + section


WORDS = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.INVALID: "bold magenta",
}


def print_decision(comparison: Comparison, decision: Decision) -> None:
    """Print the verdict, the three models, the rules and the guidance to stdout."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"\n[{WORDS[decision.verdict]}]{decision.verdict.name}[/]  {escape(decision.summary)}", highlight=False
    )
    for lines in (_models_table(comparison), _rules_table(decision)):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(escape(html.unescape(cell).strip("`*")) for cell in row))
        console.print(table)
    for note in decision.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False)
    for line in decision.guidance:
        console.print(f"[cyan]try:[/cyan]  {escape(line)}", highlight=False)
