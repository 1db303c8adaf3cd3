"""A decision as text: JSON, Markdown for a pull request, a section of a card, and the terminal.

The page for people is html.py, a CI's report junit.py. Questions and answers are in none of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from resta.journal import document
from resta.page import STYLES, Cell, Entry, Table, console, markdown, markdown_table, printable, table, to_terminal
from resta.redeval.report import with_interval
from resta.verify.comparison import Comparison
from resta.verify.decision import SCHEMA, Decision, Rule, Verdict
from resta.verify.durability import ONE_SUBTRACTION, Durability, durability_lines, durability_table
from resta.verify.measurement import ROLES
from resta.verify.trace import Ruling, decided_otherwise
from resta.verify.words import measured, points, score, share

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


def to_markdown(
    comparison: Comparison, decision: Decision, ruling: Ruling, durability: Durability | None = None
) -> str:
    """Return a summary for a pull request."""
    lines = [f"## Safety gate: {decision.title}", "", markdown(decision.summary), "", f"{markdown(ruling.words)}.", ""]
    lines += [f"> {markdown(note)}" + "\n>" for note in decision.notes]
    lines += ["", *markdown_table(models_table(comparison)), "", *markdown_table(rules_table(decision))]
    if decision.guidance:
        lines += ["", "### What the numbers suggest", "", *(f"- {markdown(line)}" for line in decision.guidance)]
    if decision.power:
        lines += ["", "### What these questions could show", "", *(f"- {markdown(line)}" for line in decision.power)]
    lines += _durability(durability, "###")
    lines += ["", "### Bank by template", "", *markdown_table(_cells_table(comparison))]
    return "\n".join(lines) + "\n"


def _durability(found: Durability | None, heading: str) -> list[str]:
    """Return a section on what is left after known attacks; empty where none was tried."""
    if found is None:
        return []
    lines = ["", f"{heading} After known attacks", "", *markdown_table(durability_table(found)), ""]
    return lines + [f"- {markdown(line)}" for line in durability_lines(found)]


# verdict or outcome -> (sign, tone)
TONES = {
    "PASS": ("✓", "good"),
    "FAIL": ("✗", "bad"),
    "INCONCLUSIVE": ("?", "open"),
    "INVALID": ("⊘", "void"),
    "holds": ("✓", "good"),
    "fails": ("✗", "bad"),
    "inconclusive": ("?", "open"),
    "invalid": ("⊘", "void"),
    "left out": ("–", "plain"),
}
SIGNS = {"aligned": "●", "tuned": "▲", "restored": "◆"}  # the markers of the figures
ROLE_CELLS: dict[str, Entry] = {role: Cell(role, tone=role, sign=sign) for role, sign in SIGNS.items()}
# What stands in the way of a PASS comes first.
WORST_FIRST = ("invalid", "fails", "inconclusive", "holds", "left out")


def worst_first(decision: Decision) -> list[Rule]:
    """Return the rules, those in the way first."""
    return sorted(decision.rules, key=lambda rule: WORST_FIRST.index(rule.outcome))


def models_table(comparison: Comparison) -> Table:
    """Return the three models side by side."""

    def row(name: str, found: Callable[[str], str]) -> tuple[str, ...]:
        return (name, *map(found, ROLES))

    rows = [row("model", lambda role: comparison.models[role].name)]
    for name, overall in (("Attack Success Rate", comparison.asr), ("safe questions refused", comparison.over_refusal)):
        if overall is not None:
            rows.append((name, *(with_interval(overall.rates[role]) for role in ROLES)))
    rows.append(row("degenerate answers", lambda role: with_interval(comparison.conduct[role].degenerate)))
    rows += [
        (f"{task.task} ({task.metric})", *(score(task.means[role]) for role in ROLES)) for task in comparison.utility
    ]
    if comparison.regained is not None:
        rows.append(("lost safety regained", "", "", share(comparison.regained)))
    return table("The three models side by side", ("figure", *ROLE_CELLS.values()), rows)


def rules_table(decision: Decision) -> Table:
    """Return every rule, those in the way of a PASS first."""
    rows = (
        (
            Cell(rule.name, tone="code"),
            Cell(rule.outcome, tone=TONES[rule.outcome][1], sign=TONES[rule.outcome][0]),
            measured(rule),
            rule.limit_words,
            rule.why,
        )
        for rule in worst_first(decision)
    )
    caption = "Every rule of the policy. Shares are between 0 and 1: 0.05 is 5 %, or 5 points of a difference."
    return table(caption, ("rule", "outcome", "measured", "limit", "why"), rows)


def _cells_table(comparison: Comparison) -> Table:
    rows = (
        (
            cell.bank,
            cell.template,
            "refusals" if cell.safe else "harm",
            *(with_interval(cell.rates[role]) for role in ROLES),
            points(cell.against["tuned"].difference),
            f"{cell.against['tuned'].p_holm:.3g}",
        )
        for cell in comparison.cells
    )
    header = ("bank", "template", "of", *ROLE_CELLS.values(), "restored - tuned", "p (Holm)")
    return table("Bank by template", header, rows, heads=2)


def to_card(comparison: Comparison, decision: Decision, ruling: Ruling, durability: Durability | None = None) -> str:
    """Return a section for the restored model's card, between markers so that it can be replaced."""
    lines = [CARD_START, f"## Safety: {decision.title}", "", markdown(decision.summary), ""]
    lines += markdown_table(models_table(comparison))
    judge = markdown(comparison.judge)
    banks = ", ".join(f"{markdown(str(b['name']))} ({b['questions']})" for b in comparison.settings["banks"])
    lines += [
        "",
        f"Judge: {judge}. Banks: {banks}. Intervals: {100 * comparison.level:g} %.",
        "",
        f"{markdown(ruling.words)}.",
    ]
    lines += [markdown(note) for note in decision.notes]
    if decision.power:
        lines += ["", "What these questions could show:", "", *(f"- {markdown(line)}" for line in decision.power)]
    if durability is None and comparison.models["restored"].manifest:
        lines += ["", ONE_SUBTRACTION]
    lines += _durability(durability, "###")
    return "\n".join([*lines, CARD_END]) + "\n"


def with_section(card: str, section: str) -> str:
    """Return a model card with the section put in, in place of an earlier one or at the end."""
    end = card.find(CARD_END)
    start = card.rfind(CARD_START, 0, max(end, 0))  # the nearest, so that a stray mark above takes no text with it
    if start >= 0:
        return card[:start] + section.rstrip("\n") + card[end + len(CARD_END) :]
    return card.rstrip("\n") + "\n\n" + section


def print_decision(
    comparison: Comparison, decision: Decision, ruling: Ruling, durability: Durability | None = None
) -> None:
    """Print the three models, the rules, what is left after known attacks, the verdict and the guidance to stdout."""
    from rich.text import Text

    terminal = console()

    def line(*parts: str | tuple[str, str]) -> None:
        terminal.print(
            Text.assemble(*((printable(p), "") if isinstance(p, str) else (printable(p[0]), p[1]) for p in parts))
        )

    terminal.print(to_terminal(models_table(comparison)))
    for rule in decision.rules:
        style = STYLES[TONES[rule.outcome][1]]
        line((f"{rule.outcome:12}", style), f" {rule.name}  {measured(rule)}  {rule.limit_words}")
        if rule.outcome != "holds":
            line(f"             {rule.why}")
    if durability is not None:
        terminal.print()
        terminal.print(to_terminal(durability_table(durability)))
        for words in durability_lines(durability):
            line((words, "dim"))
    style = STYLES[TONES[decision.verdict.name][1]]
    terminal.print()
    line((decision.title, f"bold {style}"), f"  {decision.summary}")
    line(f"{ruling.words}.")
    for note in decision.notes:
        line(("note:", "yellow"), f" {note}")
    for advice in decision.guidance:
        line(("try:", "cyan"), f"  {advice}")
    for words in decision.power if decision.verdict is Verdict.INCONCLUSIVE else ():
        line((words, "dim"))
