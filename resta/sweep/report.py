"""A sweep for people and machines: a table on the terminal and in Markdown, a page, JSON, plots, the chosen recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resta.figure import Axis, Level, Scatter, around, require_matplotlib, up_to
from resta.figure import Point as Place
from resta.journal import document, write_whole
from resta.page import (
    Cell,
    Entry,
    Table,
    Tile,
    console,
    markdown,
    markdown_table,
    printable,
    render,
    table,
    to_terminal,
)
from resta.recipe import dump_recipe
from resta.redeval.report import with_interval
from resta.statistics import Rate
from resta.sweep.candidates import recipe_of
from resta.sweep.choose import Point, Tried
from resta.sweep.measure import SCHEMA, Sweep
from resta.sweep.outcome import Outcome
from resta.sweep.settings import settings_of
from resta.verify.policy import Policy

# method -> a colour and shape of the page's figures
TONES = {
    **dict.fromkeys(("resta", "recipe", "both", "patch"), "restored"),
    "resta_d": "tuned", "interpolation": "aligned", "random": "control",
}  # fmt: skip
STYLES = {  # the same for matplotlib: (colour of Okabe and Ito's palette, marker)
    "restored": ("#009E73", "D"),
    "tuned": ("#D55E00", "^"),
    "aligned": ("#0072B2", "o"),
    "control": ("#666666", "X"),
}


def write_reports(sweep: Sweep, outcome: Outcome, versions: Mapping[str, str]) -> None:
    """Write sweep.json, sweep.md, sweep.html, pareto.svg, pareto.png and, where there is a choice, chosen.yaml."""
    write_whole(sweep.out / "sweep.json", to_json(sweep, outcome, versions))
    write_whole(sweep.out / "sweep.md", to_markdown(outcome))
    write_whole(sweep.out / "sweep.html", to_html(sweep, outcome))
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
    terminal = console()
    terminal.print(to_terminal(candidates_table(outcome, short=True)))
    for each in outcome.tried:
        if not each.passes:
            terminal.print(printable(f"{each.candidate.name}: {_verdict(each)}"))
    for line in _lines(outcome):
        terminal.print(printable(line))
    if outcome.choice.name:
        for line in _next(out):
            terminal.print(printable(line))


def _next(out: Path) -> Iterable[str]:
    yield f"resta merge {out / 'chosen.yaml'} -o RESTORED"
    yield f"resta verify RESTORED --from {out / 'chosen.yaml'}"


def candidates_table(outcome: Outcome, *, short: bool = False) -> Table:
    """Return both references and every candidate; `short` fits a terminal and leaves the reasons out."""

    def row(each: Tried) -> tuple[Entry, ...]:
        cells = _cells(each.point, short=short) if each.point else ("", "", "")
        marks = _marks(each, outcome)
        name = each.candidate.name + (f" ({', '.join(marks)})" if marks and not short else "")
        brief = ", ".join([each.decision.title if each.decision else "stopped", *marks])
        return name, f"{100 * each.change.relative:.3g} %", *cells, _chance(each), brief if short else _verdict(each)

    references = (
        (role, "", *_cells(point, short=short), "", "reference") for role, point in outcome.references.items()
    )
    header = ("candidate", "change", "ASR", "over-refusal", "utility", "chance", "verdict")
    return table(
        "" if short else "Both references and every candidate", header, [*references, *map(row, outcome.tried)]
    )


def to_markdown(outcome: Outcome) -> str:
    """Return the table and what it says as Markdown."""
    said = [part for line in _lines(outcome) for part in (markdown(line), "")]
    steps = [f"{i}. {markdown(line)}" for i, line in enumerate(_path(outcome), 1)]
    search = ["The search:", "", *steps, ""] if steps else []
    lines = ["# Sweep", "", *markdown_table(candidates_table(outcome)), "", *said, *search, "![front](pareto.svg)"]
    return "\n".join(lines) + "\n"


def to_html(sweep: Sweep, outcome: Outcome) -> str:
    """Return the whole report as one HTML file without scripts or outside references."""
    chosen = [each for each in outcome.tried if each.candidate.name == outcome.choice.name]
    return render(
        "sweep/page.html.jinja",
        title=f"Sweep: {outcome.choice.name or 'no candidate'} chosen",
        eyebrow="Sweep: how much of the safety vector restores it",
        name=sweep.references["tuned"].name,
        tone="good" if chosen else "bad",
        answer_label="Choice",
        choice=outcome.choice,
        findings=outcome.findings,
        guidance=outcome.guidance,
        commands=tuple(_next(sweep.out)) if chosen else (),
        tiles=tuple(tile for each in chosen for tile in _tiles(each)),
        notes=outcome.notes,
        sections=[
            ("figures", "What each candidate does", True),
            ("candidates", "Every candidate in numbers", False),
            *([("search", "The search", False)] if outcome.steps else []),
        ],
        panels=[panel for panel in panels(outcome, sweep.policy) if panel.points],
        methods=[Cell(method, tone=tone, sign=SIGNS[tone]) for method, tone in _methods(outcome).items()],
        table=candidates_table(outcome),
        path=tuple(_path(outcome)),
        footer="Intervals hold 95 %.",
    )


SIGNS = {"aligned": "●", "tuned": "▲", "restored": "◆", "control": "✖"}  # the markers of the figures


def _methods(outcome: Outcome) -> dict[str, str]:
    return {each.candidate.method: TONES[each.candidate.method] for each in outcome.tried if each.seen or each.point}


def _tiles(chosen: Tried) -> Iterable[Tile]:
    point = chosen.point
    found = (("Harmful answers", point.asr), ("Safe questions refused", point.over_refusal)) if point else ()
    for title, rate in found:
        if rate is not None:
            figure, _, interval = with_interval(rate).partition(" [")
            yield Tile(title=title, figure=figure, lines=(f"[{interval}",) if interval else ())
    if point and point.utility is not None:
        yield Tile(title="Utility, mean over tasks", figure=f"{point.utility:.3f}", lines=())
    if chosen.chance is not None:
        yield Tile(title="Chance to pass on fresh questions", figure=f"{chosen.chance:.2f}", lines=())
    yield Tile(title="Change from tuned", figure=f"{100 * chosen.change.relative:.3g} %", lines=("of its norm",))


def _path(outcome: Outcome) -> Iterable[str]:
    """Yield how the search came to its choice, step by step."""
    for step in outcome.steps:
        asked = "every question" if step.every == 1 else f"one question in {step.every}"
        yield f"{step.candidate.name}, {asked}: chance {step.chance:.2f}, {step.words}"


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


# -- figures -------------------------------------------------------------------------------------------------


Bounds = tuple[float, float, float]  # value, low, high


def panels(outcome: Outcome, policy: Policy) -> tuple[Scatter, ...]:
    """Return ASR, over-refusal and utility over the change from `tuned`, with references and the policy's limits.

    Candidates of one norm stand above each other, whatever their method. Drawn is every candidate that was asked
    anything, hollow where it was not asked everything; those off the front are faint, and only the choice is named.
    """
    over, drops = policy.over_refusal, {rules.max_drop for rules in policy.utility.values()}
    points = outcome.references
    asr = _levels(
        {role: _bounds(point.asr) for role, point in points.items()},
        policy.asr.max_upper,
        {"aligned": policy.asr.max_increase_over_aligned},
    )
    refusals = _levels(
        {role: _bounds(point.over_refusal) for role, point in points.items()},
        over.max_upper,
        {"aligned": over.max_increase, "tuned": over.max_increase_over_tuned},
    )
    utility = _levels(
        {role: _exact(point) for role, point in points.items()},
        None,
        {"tuned": -drops.pop() if len(drops) == 1 else None},
    )
    return (
        _panel(outcome, "attack success rate", lambda each: _bounds(each.seen), asr),
        _panel(
            outcome, "over-refusal", lambda each: _bounds(each.point.over_refusal if each.point else None), refusals
        ),
        _panel(outcome, "utility (mean over tasks)", lambda each: _exact(each.point), utility),
    )


def _bounds(rate: Rate | None) -> Bounds | None:
    return None if rate is None or rate.value is None else (rate.value, rate.low, rate.high)


def _exact(point: Point | None) -> Bounds | None:
    return None if point is None or point.utility is None else (point.utility,) * 3


def _levels(
    references: Mapping[str, Bounds | None], upper: float | None, beyond: Mapping[str, float | None]
) -> tuple[Level, ...]:
    """Return the references, and what the policy allows: at most `upper`, and at most so much beside a reference."""
    known = {role: bounds[0] for role, bounds in references.items() if bounds is not None}
    levels = [Level(y=value, label=role, tone="reference") for role, value in known.items()]
    limits = {} if upper is None else {"on the rate": upper}
    limits |= {f"beside {r}": known[r] + step for r, step in beyond.items() if step is not None and r in known}
    return (*levels, *(Level(y=y, label=f"limit {name}", tone="limit") for name, y in limits.items()))


def _panel(
    outcome: Outcome, title: str, measured: Callable[[Tried], Bounds | None], levels: tuple[Level, ...]
) -> Scatter:
    found = [(each, bounds) for each in outcome.tried if (bounds := measured(each)) is not None]
    ends = [*(end for _, bounds in found for end in bounds), *(level.y for level in levels)]
    changes = [each.change.relative for each in outcome.tried]
    told = (f"{each.candidate.name} {100 * value:.1f} %" for each, (value, *_) in found)
    limits = (f"{level.label} {100 * level.y:.1f} %" for level in levels)
    return Scatter(
        key=f"{title.split()[0]}-plot",
        title=title,
        description="; ".join([*told, *limits]),
        x=Axis(low=0.0, high=1.08 * max(changes, default=0.0) or 1.0, label="change from tuned, of its norm"),
        y=around(ends) if title.startswith("utility") and ends else up_to([*ends, 0.0]),
        points=tuple(
            Place(
                x=each.change.relative,
                y=value,
                y_interval=(low, high),
                tone=TONES[each.candidate.method],
                label=each.candidate.name if each.candidate.name == outcome.choice.name else "",
                faint=each.candidate.name not in outcome.front and not each.candidate.baseline,
                hollow=each.point is None,
                ringed=each.candidate.name == outcome.choice.name,
            )
            for each, (value, low, high) in found
        ),
        levels=levels,
    )


def draw(outcome: Outcome, policy: Policy, out: Path) -> None:
    """Draw the panels of the page as files of their own: pareto.svg, pareto.png."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [panel for panel in panels(outcome, policy) if panel.points]
    with matplotlib.rc_context({"svg.hashsalt": "resta", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * max(1, len(drawn)), 4.8), layout="constrained")
        for axes, panel in zip(figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn, strict=False):
            _draw_panel(axes, panel)
            axes.legend(fontsize=7)
        handles = [
            figure.axes[0].plot([], [], STYLES[tone][1], color=STYLES[tone][0])[0]
            for tone in _methods(outcome).values()
        ]
        if handles:
            figure.legend(handles, list(_methods(outcome)), loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(out / "pareto.svg", metadata={"Date": None})
        figure.savefig(out / "pareto.png", dpi=130, metadata={"Software": None})


def _draw_panel(axes: Any, panel: Scatter) -> None:
    for point in panel.points:
        colour, marker = STYLES[point.tone]
        low, high = point.y_interval or (point.y, point.y)
        axes.errorbar(
            [point.x], [point.y], yerr=[[point.y - low], [high - point.y]], color=colour, marker=marker,
            markerfacecolor="white" if point.hollow else colour, capsize=2, linewidth=1,
            alpha=0.45 if point.faint else 1, clip_on=False,
        )  # fmt: skip
        if point.ringed:
            axes.scatter([point.x], [point.y], s=190, facecolors="none", edgecolors="black", linewidths=1.5, zorder=5)
            right, top = panel.x.at(point.x) > 55, panel.y.at(point.y) > 80
            axes.annotate(
                point.label, (point.x, point.y), xytext=(-10 if right else 10, -14 if top else 10),
                textcoords="offset points", ha="right" if right else "left", fontsize=8,
            )  # fmt: skip
    for level, dashes in zip(panel.levels, ("--", ":", "-", "-.", (0, (1, 4))), strict=False):
        colour = "#CC3311" if level.tone == "limit" else "black"
        axes.axhline(level.y, color=colour, linestyle=dashes, linewidth=1.2, label=level.label)
    axes.set(
        xlabel=panel.x.label, ylabel=panel.title, xlim=(panel.x.low, panel.x.high), ylim=(panel.y.low, panel.y.high)
    )
    for axis, scale in ((axes.xaxis, panel.x), (axes.yaxis, panel.y)):
        axis.set_ticks([value for value, _ in scale.ticks], [words for _, words in scale.ticks])
