"""A sweep for people and machines: a table on the terminal and in Markdown, JSON, a plot, and the chosen recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from resta.errors import MissingExtraError
from resta.recipe import dump_recipe
from resta.redeval.score import Rate
from resta.sweep.candidates import recipe_of
from resta.sweep.choose import Point, Tried
from resta.sweep.outcome import Outcome
from resta.sweep.run import SCHEMA, Sweep

COLUMNS = ("candidate", "change", "ASR", "over-refusal", "utility", "verdict")
STYLES = {  # method -> (colour of Okabe and Ito's palette, marker)
    "resta": ("#0072B2", "o"),
    "resta_d": ("#D55E00", "s"),
    "recipe": ("#0072B2", "o"),
    "wise": ("#009E73", "^"),
    "random": ("#666666", "x"),
}


def require_plots() -> None:
    """Raise MissingExtraError unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('resta sweep draws its front: pip install "resta[plots]"') from error


def write_reports(sweep: Sweep, outcome: Outcome, versions: Mapping[str, str]) -> None:
    """Write sweep.json, sweep.md, pareto.svg, pareto.png and, where there is a choice, chosen.yaml."""
    (sweep.out / "sweep.json").write_text(to_json(sweep, outcome, versions), encoding="utf-8")
    (sweep.out / "sweep.md").write_text(to_markdown(outcome), encoding="utf-8")
    draw(outcome, sweep.out)
    chosen = sweep.out / "chosen.yaml"
    chosen.unlink(missing_ok=True)  # of an earlier policy or rule
    if outcome.choice.name:
        chosen.write_text(chosen_recipe(sweep, outcome), encoding="utf-8")


def chosen_recipe(sweep: Sweep, outcome: Outcome) -> str:
    """Return the chosen recipe as YAML for `resta merge`, the reason on top."""
    [candidate] = [each.candidate for each in outcome.tried if each.candidate.name == outcome.choice.name]
    head = [f"Chosen by `resta sweep`, {outcome.choice.rule}: {candidate.name}.", f"{outcome.choice.reason}."]
    lines = [f"# {line}" for text in (*head, *outcome.findings) for line in text.splitlines()]
    return "\n".join([*lines, dump_recipe(recipe_of(candidate, sweep.family))])


# -- tables --------------------------------------------------------------------------------------------------


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Print a table that fits a terminal, and below it the reasons and what it all says."""
    console = Console(highlight=False)
    table = Table(
        *(Column(name, overflow="fold") for name in COLUMNS), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for role, point in outcome.references.items():
        table.add_row(role, "", *_cells(point, short=True), "reference")
    for each in outcome.tried:
        word = each.decision.title if each.decision else "given up"
        measured = _cells(each.point, short=True) if each.point else ("", "", "")
        table.add_row(each.candidate.name, _change(each), *measured, ", ".join([word, *_marks(each, outcome)]))
    console.print(table)
    for each in outcome.tried:
        if not each.passes:
            console.print(f"{each.candidate.name}: {_verdict(each)}", markup=False)
    for line in _lines(outcome):
        console.print(line, markup=False)
    if outcome.choice.name:
        console.print(f"resta merge {out / 'chosen.yaml'} -o RESTORED", markup=False)


def to_markdown(outcome: Outcome) -> str:
    """Return the table and what it says as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *_rows(outcome)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(["# Sweep", "", table, "", *(f"{line}\n" for line in _lines(outcome)), "![front](pareto.svg)", ""])


def _rows(outcome: Outcome) -> Iterable[tuple[str, ...]]:
    for role, point in outcome.references.items():
        yield role, "", *_cells(point), "reference"
    for each in outcome.tried:
        marks = ", ".join(_marks(each, outcome))
        name = each.candidate.name + (f" ({marks})" if marks else "")
        yield name, _change(each), *(_cells(each.point) if each.point else ("", "", "")), _verdict(each)


def _change(each: Tried) -> str:
    return f"{100 * each.change.relative:.3g} %"


def _marks(each: Tried, outcome: Outcome) -> list[str]:
    marks = {
        "chosen": each.candidate.name == outcome.choice.name,
        "front": each.candidate.name in outcome.front,
        "baseline": each.candidate.baseline,
    }
    return [word for word, holds in marks.items() if holds]


def _cells(point: Point, *, short: bool = False) -> tuple[str, str, str]:
    utility = "" if point.utility is None else f"{point.utility:.3f}"
    return _rate(point.asr, short), _rate(point.over_refusal, short), utility


def _rate(rate: Rate | None, short: bool) -> str:
    if rate is None or rate.value is None:
        return ""
    value, low, high = (_percent(share, short) for share in (rate.value, rate.low, rate.high))
    return f"{value} % [{low}, {high}]"


def _percent(share: float, short: bool) -> str:
    return f"{100 * share:.{0 if short and (share == 0 or share >= 0.1) else 1}f}"


def _verdict(each: Tried) -> str:
    if each.decision is None:
        return f"given up after {each.answered} of {each.planned} answers: {each.stopped}"
    words = {"fails": "fails", "invalid": "invalid", "inconclusive": "open"}
    broken = [f"{rule.name} {words[rule.outcome]}" for rule in each.decision.rules if rule.outcome in words]
    return each.decision.title + (f": {', '.join(broken)}" if broken else "")


def _lines(outcome: Outcome) -> Iterable[str]:
    choice = outcome.choice
    yield f"Chosen: {choice.name or 'none'} ({choice.rule}): {choice.reason}."
    yield from outcome.findings
    yield from (f"Note: {note}" for note in outcome.notes)
    yield from (f"To try: {line}" for line in outcome.guidance)


def to_json(sweep: Sweep, outcome: Outcome, versions: Mapping[str, str]) -> str:
    """Return everything but questions and answers, as JSON of schema `SCHEMA`."""
    content = {
        "schema": SCHEMA,
        "kind": "sweep",
        "chosen": asdict(outcome.choice),
        "references": {role: asdict(point) for role, point in outcome.references.items()},
        "candidates": [_facts(sweep, each) for each in outcome.tried],
        "front": outcome.front,
        "findings": outcome.findings,
        "notes": outcome.notes,
        "guidance": outcome.guidance,
        "policy": sweep.policy.model_dump(mode="json"),
        "versions": dict(versions),
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"


def _facts(sweep: Sweep, each: Tried) -> dict[str, Any]:
    decision = each.decision
    return {
        "name": each.candidate.name,
        **asdict(each.candidate),
        "equation": each.equation,
        "recipe": None if each.candidate.method == "random" else dump_recipe(recipe_of(each.candidate, sweep.family)),
        "change": {**asdict(each.change), "relative": each.change.relative},
        "answered": each.answered,
        "planned": each.planned,
        "stopped": each.stopped,
        "point": asdict(each.point) if each.point else None,
        "verdict": decision.verdict.name if decision else None,
        "summary": decision.summary if decision else None,
        "rules": [asdict(rule) for rule in decision.rules] if decision else [],
    }


def _finite(value: Any) -> Any:
    """Return plain data in which infinite bounds, which JSON has no word for, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# -- the plot ------------------------------------------------------------------------------------------------


def draw(outcome: Outcome, out: Path) -> None:
    """Draw ASR against scale, and ASR against utility (over-refusal where there is none): pareto.svg, pareto.png."""
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "resta", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_scales(left, outcome)
        _draw_front(right, outcome)
        figure.savefig(out / "pareto.svg", metadata={"Date": None})
        figure.savefig(out / "pareto.png", dpi=130, metadata={"Software": None})


def _measured(outcome: Outcome) -> list[tuple[Tried, Point, Rate]]:
    return [
        (each, each.point, each.point.asr)
        for each in outcome.tried
        if each.point is not None and each.point.asr is not None and each.point.asr.value is not None
    ]


def _draw_scales(axes: Any, outcome: Outcome) -> None:
    series: dict[tuple[str, float | None], list[tuple[float, Rate]]] = {}
    for each, _, rate in _measured(outcome):
        series.setdefault((each.candidate.method, each.candidate.density), []).append((each.candidate.scale, rate))
    for (method, density), points in series.items():
        colour, marker = STYLES[method]
        values = [100 * (rate.value or 0.0) for _, rate in points]
        reach = [[v - 100 * r.low for v, (_, r) in zip(values, points, strict=True)]]
        reach.append([100 * r.high - v for v, (_, r) in zip(values, points, strict=True)])
        label = method if density is None else f"{method}, density {density:g}"
        axes.errorbar(
            [scale for scale, _ in points], values, yerr=reach, color=colour, marker=marker, capsize=2, label=label
        )
    for role, style in (("tuned", "--"), ("aligned", ":")):
        found = outcome.references[role].asr
        if found is not None and found.value is not None:
            axes.axhline(100 * found.value, color="black", linestyle=style, linewidth=1, label=role)
    given_up = [each.candidate.name for each in outcome.tried if each.point is None]
    shown = ", ".join(given_up[:4]) + (f" and {len(given_up) - 4} more" if len(given_up) > 4 else "")
    axes.set_title(f"given up, not shown: {shown}" if given_up else "", fontsize=8)
    axes.set(xlabel="scale", ylabel="attack success rate (%)", ylim=(-3, 103))
    axes.legend(fontsize=8)


def _draw_front(axes: Any, outcome: Outcome) -> None:
    def height(point: Point) -> float | None:
        if point.utility is not None:
            return point.utility
        return 100 * point.over_refusal.value if point.over_refusal and point.over_refusal.value is not None else None

    labels: dict[str, tuple[float, float]] = {}
    for each, point, rate in _measured(outcome):
        y = height(point)
        if y is None:
            continue
        colour, marker = STYLES[each.candidate.method]
        on_front = each.candidate.name in outcome.front
        x = 100 * (rate.value or 0.0)
        axes.scatter([x], [y], color=colour, marker=marker, alpha=1 if on_front else 0.45, s=42 if on_front else 24)
        if each.candidate.name == outcome.choice.name:
            axes.scatter([x], [y], s=190, facecolors="none", edgecolors="black", linewidths=1.5)
        if on_front:
            labels[each.candidate.name] = (x, y)
    for role, point in outcome.references.items():
        y = height(point)
        if y is not None and point.asr is not None and point.asr.value is not None:
            axes.scatter([100 * point.asr.value], [y], color="black", marker="*", s=70)
            labels[role] = (100 * point.asr.value, y)
    _label(axes, labels)
    has_utility = any(point.utility is not None for point in outcome.references.values())
    axes.set(
        xlabel="attack success rate (%)",
        xlim=(-3, 103),
        ylabel="utility (mean over tasks)" if has_utility else "over-refusal (%)",
        title="front in full colour, chosen in a circle",
    )


def _label(axes: Any, labels: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside their places, inside the axes; those of one place below each other."""
    low, high = axes.get_ylim()
    by_place: dict[tuple[int, int], list[str]] = {}
    for name, (x, y) in labels.items():
        by_place.setdefault((round(x / 4), round(25 * (y - low) / (high - low))), []).append(name)
    for names in by_place.values():
        x, y = labels[names[0]]
        left, below = x > 60, y > (low + high) / 2
        axes.annotate(
            "\n".join(names),
            (x, y),
            xytext=(-8 if left else 8, -8 if below else 8),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if below else "bottom",
            fontsize=7,
        )
