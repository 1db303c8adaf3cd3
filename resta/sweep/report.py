"""A sweep for people and machines: a table on the terminal and in Markdown, JSON, a plot, and the chosen recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from resta.errors import RequestError
from resta.journal import document, write_whole
from resta.recipe import dump_recipe
from resta.statistics import Rate
from resta.sweep.candidates import recipe_of
from resta.sweep.choose import Point, Tried
from resta.sweep.measure import SCHEMA, Sweep
from resta.sweep.outcome import Outcome
from resta.sweep.settings import settings_of
from resta.verify.policy import Policy

COLUMNS = ("candidate", "change", "ASR", "over-refusal", "utility", "chance", "verdict")
STYLES = {  # method -> (colour of Okabe and Ito's palette, marker)
    "resta": ("#0072B2", "o"),
    "resta_d": ("#D55E00", "s"),
    "recipe": ("#0072B2", "o"),
    "interpolation": ("#009E73", "^"),
    "random": ("#666666", "x"),
}


def require_plots() -> None:
    """Raise RequestError unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError('resta sweep draws its front: pip install "resta[plots]"') from error


def write_reports(sweep: Sweep, outcome: Outcome, versions: Mapping[str, str]) -> None:
    """Write sweep.json, sweep.md, pareto.svg, pareto.png and, where there is a choice, chosen.yaml."""
    write_whole(sweep.out / "sweep.json", to_json(sweep, outcome, versions))
    write_whole(sweep.out / "sweep.md", to_markdown(outcome))
    draw(outcome, sweep.policy, sweep.out)
    chosen = sweep.out / "chosen.yaml"
    chosen.unlink(missing_ok=True)  # of an earlier policy or rule
    if outcome.choice.name:
        write_whole(chosen, chosen_recipe(sweep, outcome))


def chosen_recipe(sweep: Sweep, outcome: Outcome) -> str:
    """Return the chosen recipe as YAML for `resta merge`, the reason on top."""
    [candidate] = [each.candidate for each in outcome.tried if each.candidate.name == outcome.choice.name]
    head = [f"Chosen by `resta sweep`, {outcome.choice.rule}: {candidate.name}.", f"{outcome.choice.reason}."]
    lines = [f"# {line}" for text in (*head, *outcome.findings) for line in text.splitlines()]
    return "\n".join([*lines, *settings_of(sweep, outcome.fresh), dump_recipe(recipe_of(candidate, sweep.family))])


# -- tables --------------------------------------------------------------------------------------------------


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Print a table that fits a terminal, and below it the reasons and what it all says."""
    console = Console(highlight=False)
    table = Table(
        *(Column(name, overflow="fold") for name in COLUMNS), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for role, point in outcome.references.items():
        table.add_row(role, "", *_cells(point, short=True), "", "reference")
    for each in outcome.tried:
        word = each.decision.title if each.decision else "stopped"
        measured = _cells(each.point, short=True) if each.point else ("", "", "")
        words = ", ".join([word, *_marks(each, outcome)])
        table.add_row(each.candidate.name, _change(each), *measured, _chance(each), words)
    console.print(table)
    for each in outcome.tried:
        if not each.passes:
            console.print(f"{each.candidate.name}: {_verdict(each)}", markup=False)
    for line in _lines(outcome):
        console.print(line, markup=False)
    if outcome.choice.name:
        console.print(f"resta merge {out / 'chosen.yaml'} -o RESTORED", markup=False)
        console.print(f"resta verify RESTORED --from {out / 'chosen.yaml'}", markup=False)


def to_markdown(outcome: Outcome) -> str:
    """Return the table and what it says as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *_rows(outcome)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(
        [
            "# Sweep",
            "",
            table,
            "",
            *(f"{line}\n" for line in _lines(outcome)),
            *_path(outcome),
            "![front](pareto.svg)",
            "",
        ]
    )


def _path(outcome: Outcome) -> list[str]:
    """Return how the search came to its choice, one step a line."""
    if not outcome.steps:
        return []
    asked = {step.every: f"one question in {step.every}" for step in outcome.steps} | {1: "every question"}
    lines = [
        f"{i}. {step.candidate.name}, {asked[step.every]}: chance {step.chance:.2f}, {step.words}"
        for i, step in enumerate(outcome.steps, 1)
    ]
    return ["The search:", "", *lines, ""]


def _rows(outcome: Outcome) -> Iterable[tuple[str, ...]]:
    for role, point in outcome.references.items():
        yield role, "", *_cells(point), "", "reference"
    for each in outcome.tried:
        marks = ", ".join(_marks(each, outcome))
        name = each.candidate.name + (f" ({marks})" if marks else "")
        cells = _cells(each.point) if each.point else ("", "", "")
        yield name, _change(each), *cells, _chance(each), _verdict(each)


def _change(each: Tried) -> str:
    return f"{100 * each.change.relative:.3g} %"


def _chance(each: Tried) -> str:
    return "" if each.chance is None else f"{each.chance:.2f}"


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
        return f"stopped after {each.answered} of {each.planned} answers: {each.stopped}"
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
        "chosen": asdict(outcome.choice),
        "references": {role: asdict(point) for role, point in outcome.references.items()},
        "candidates": [_facts(sweep, each) for each in outcome.tried],
        "front": outcome.front,
        "fresh": outcome.fresh,
        "search": [asdict(step) | {"candidate": step.candidate.name} for step in outcome.steps],
        "findings": outcome.findings,
        "notes": outcome.notes,
        "guidance": outcome.guidance,
        "policy": sweep.policy.model_dump(mode="json"),
        "versions": dict(versions),
    }
    return document("sweep", content, schema=SCHEMA)


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
        "chance": each.chance,
        "verdict": decision.verdict.name if decision else None,
        "summary": decision.summary if decision else None,
        "rules": [asdict(rule) for rule in decision.rules] if decision else [],
    }


# -- the plot ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    """One measure over the change, in percent: of every candidate, of both references, and what the policy allows."""

    title: str
    points: tuple[tuple[Tried, float, float, float], ...]  # value, low, high
    references: Mapping[str, float]
    limits: Mapping[str, float]


def draw(outcome: Outcome, policy: Policy, out: Path) -> None:
    """Draw ASR, over-refusal and utility against the change from `tuned`: pareto.svg, pareto.png.

    Candidates of one norm stand above each other, whatever their method; those that tie stand side by side. Drawn is
    every candidate that was asked anything, hollow where it was not asked everything.
    """
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(outcome, policy) if panel.points]
    with matplotlib.rc_context({"svg.hashsalt": "resta", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * max(1, len(panels)), 4.8), layout="constrained")
        grid = figure.subplots(1, max(1, len(panels)), squeeze=False, sharex=True)[0]
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, outcome)
        handles, labels = grid[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
        figure.savefig(out / "pareto.svg", metadata={"Date": None})
        figure.savefig(out / "pareto.png", dpi=130, metadata={"Software": None})


def _panels(outcome: Outcome, policy: Policy) -> Iterable[_Panel]:
    found = outcome.references
    asr = {role: point.asr.value for role, point in found.items() if point.asr and point.asr.value is not None}
    refusal = {
        role: point.over_refusal.value
        for role, point in found.items()
        if point.over_refusal and point.over_refusal.value is not None
    }
    utility = {role: point.utility for role, point in found.items() if point.utility is not None}
    over = policy.over_refusal
    drops = {rules.max_drop for rules in policy.utility.values()}
    yield _Panel(
        title="attack success rate (%)",
        points=tuple((each, *_bars(each.seen)) for each in outcome.tried if each.seen),
        references=asr,
        limits=_limits(policy.asr.max_upper, asr, {"aligned": policy.asr.max_increase_over_aligned}),
    )
    yield _Panel(
        title="over-refusal (%)",
        points=tuple((e, *_bars(e.point.over_refusal)) for e in outcome.tried if e.point and e.point.over_refusal),
        references=refusal,
        limits=_limits(over.max_upper, refusal, {"aligned": over.max_increase, "tuned": over.max_increase_over_tuned}),
    )
    yield _Panel(
        title="utility (mean over tasks, %)",
        points=tuple(
            (each, each.point.utility, each.point.utility, each.point.utility)
            for each in outcome.tried
            if each.point and each.point.utility is not None
        ),
        references=utility,
        limits=_limits(None, utility, {"tuned": -drops.pop() if len(drops) == 1 else None}),
    )


def _bars(rate: Rate) -> tuple[float, float, float]:
    return rate.value or 0.0, rate.low, rate.high


def _limits(
    upper: float | None, references: Mapping[str, float], beyond: Mapping[str, float | None]
) -> dict[str, float]:
    """Return what the policy allows, by what it is called in the picture."""
    found = {} if upper is None else {"on the rate": upper}
    for role, step in beyond.items():
        if step is not None and role in references:
            found[f"beside {role}"] = references[role] + step
    return found


def _draw_panel(axes: Any, panel: _Panel, outcome: Outcome) -> None:
    for method in dict.fromkeys(each.candidate.method for each, *_ in panel.points):
        colour, marker = STYLES[method]
        axes.plot([], [], color=colour, marker=marker, linestyle="", label=method)
    for each, value, low, high in panel.points:
        colour, marker = STYLES[each.candidate.method]
        x, strong = 100 * each.change.relative, each.candidate.name in outcome.front
        axes.errorbar(
            [x], [100 * value], yerr=[[100 * (value - low)], [100 * (high - value)]], color=colour, marker=marker,
            markerfacecolor=colour if each.point else "white", capsize=2, linewidth=1, alpha=1 if strong else 0.45,
        )  # fmt: skip
        if each.candidate.name == outcome.choice.name:
            axes.scatter([x], [100 * value], s=190, facecolors="none", edgecolors="black", linewidths=1.5, zorder=5)
            right, high = x > 60 * max(each.change.relative for each in outcome.tried), value > 0.5
            axes.annotate(
                each.candidate.name, (x, 100 * value), xytext=(-10 if right else 10, -14 if high else 10),
                textcoords="offset points", ha="right" if right else "left", va="top" if high else "bottom", fontsize=8,
            )  # fmt: skip
    for role, style in (("tuned", "--"), ("aligned", ":")):
        if role in panel.references:
            axes.axhline(100 * panel.references[role], color="black", linestyle=style, linewidth=1, label=role)
    for (name, limit), dashes in zip(panel.limits.items(), ("-", "-.", ":"), strict=False):
        axes.axhline(100 * limit, color="#CC3311", linestyle=dashes, linewidth=1.2, label=f"policy: limit {name}")
    farthest = max(each.change.relative for each in outcome.tried)
    axes.set(xlabel="change from tuned (% of its norm)", ylabel=panel.title, ylim=(-5, 107))
    axes.set_xlim(0, 108 * farthest or 1)
