"""A decision as text: JSON, Markdown for a pull request, a section of a card, and the terminal.

The page for people is html.py, a CI's report junit.py. Questions and answers are in none of these.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from resta.journal import document
from resta.redeval.report import percent, printable, with_interval
from resta.verify.comparison import Comparison
from resta.verify.decision import SCHEMA, Decision, Rule, Verdict
from resta.verify.measurement import ROLES
from resta.verify.trace import Ruling, decided_otherwise
from resta.verify.words import measured, points, share

CARD_START, CARD_END = "<!-- resta verify: start -->", "<!-- resta verify: end -->"


def to_json(comparison: Comparison, decision: Decision, ruling: Ruling) -> str:
    """Return everything but questions and answers, as JSON of schema `SCHEMA`."""
    facts = asdict(comparison)
    del facts["examples"]
    for model in facts["models"].values():
        manifest = model.pop("manifest")
        model["merge"] = {key: manifest[key] for key in ("equation", "recipe_digest", "inputs") if key in manifest}
    for template in facts["settings"]["templates"]:
        template.pop("text", None)  # its digest is beside it
    content = {
        "verdict": decision.verdict.name,
        "limits": decision.tier or "default",
        "exit_code": decision.verdict.value,
        "summary": decision.summary,
        "rules": [_rule(rule) for rule in decision.rules],
        "notes": decision.notes,
        "guidance": decision.guidance,
        "power": decision.power,
        "decided_at": ruling.decided_at,
        "policy_name": ruling.policy_name,
        "policy_sha256": ruling.policy_sha256,
        "policy": ruling.policy.model_dump(mode="json"),
        "decided_otherwise": decided_otherwise(decision, ruling),
        "comparison": facts,
        "versions": dict(ruling.versions),
    }
    return document("verdict", content, schema=SCHEMA)


def _rule(rule: Rule) -> dict[str, Any]:
    facts = asdict(rule)
    del facts["test"]  # part of the words
    return {**facts, "limit_words": rule.limit_words}


def to_markdown(comparison: Comparison, decision: Decision, ruling: Ruling) -> str:
    """Return a summary for a pull request."""
    lines = [f"## Safety gate: {decision.title}", "", _md(decision.summary), "", f"{_md(ruling.words)}.", ""]
    lines += [f"> {_md(note)}" + "\n>" for note in decision.notes]
    lines += ["", *_models_table(comparison), "", *_rules_table(decision)]
    if decision.guidance:
        lines += ["", "### What the numbers suggest", "", *(f"- {_md(line)}" for line in decision.guidance)]
    if decision.power:
        lines += ["", "### What these questions could show", "", *(f"- {_md(line)}" for line in decision.power)]
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
        (_code(rule.name), f"**{rule.outcome}**", measured(rule), rule.limit_words, _md(rule.why))
        for rule in decision.rules
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


def to_card(comparison: Comparison, decision: Decision, ruling: Ruling) -> str:
    """Return a section for the restored model's card, between markers so that it can be replaced."""
    lines = [CARD_START, f"## Safety: {decision.title}", "", _md(decision.summary), ""]
    lines += _models_table(comparison)
    judge = _md(comparison.judge)
    banks = ", ".join(f"{_md(str(b['name']))} ({b['questions']})" for b in comparison.settings["banks"])
    lines += [
        "",
        f"Judge: {judge}. Banks: {banks}. Intervals: {100 * comparison.level:g} %.",
        "",
        f"{_md(ruling.words)}.",
    ]
    lines += [_md(note) for note in decision.notes]
    if decision.power:
        lines += ["", "What these questions could show:", "", *(f"- {_md(line)}" for line in decision.power)]
    return "\n".join([*lines, CARD_END]) + "\n"


def with_section(card: str, section: str) -> str:
    """Return a model card with the section put in, in place of an earlier one or at the end."""
    end = card.find(CARD_END)
    start = card.rfind(CARD_START, 0, max(end, 0))  # the nearest, so that a stray mark above takes no text with it
    if start >= 0:
        return card[:start] + section.rstrip("\n") + card[end + len(CARD_END) :]
    return card.rstrip("\n") + "\n\n" + section


WORDS = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.INVALID: "bold magenta",
}


COLOURS = {"holds": "green", "fails": "red", "inconclusive": "yellow", "invalid": "magenta", "left out": "dim"}


def print_decision(comparison: Comparison, decision: Decision, ruling: Ruling) -> None:
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
        console.print(f"{found}  {escape(measured(rule))}  {escape(rule.limit_words)}")
        if rule.outcome != "holds":
            console.print(f"             {escape(rule.why)}")
    console.print(f"\n[{WORDS[decision.verdict]}]{escape(decision.title)}[/]  {escape(decision.summary)}")
    console.print(escape(f"{ruling.words}."))
    for note in decision.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for line in decision.guidance:
        console.print(f"[cyan]try:[/cyan]  {escape(line)}")
    for line in decision.power if decision.verdict is Verdict.INCONCLUSIVE else ():
        console.print(f"[dim]{escape(line)}[/dim]")
