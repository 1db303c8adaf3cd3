"""The report that people look at: one HTML file without scripts or outside references, from page.html.jinja beside it.

A page in the order of its reader's questions: the verdict, the rules in its way, what to do, every gated quantity
against its limit, then the evidence, folded. Questions and answers are redacted unless asked for. The same comparison
gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from resta.dialect import dump
from resta.figure import Axis, Bars, Mark, Point, Row, Rows, Scatter, around, up_to
from resta.fingerprint import sha256_text
from resta.page import Cell, Entry, Table, Tile, render, table
from resta.redeval.report import percent, redact, with_interval
from resta.statistics import Difference, Rate
from resta.verify.comparison import Category, Comparison, Example, Overall, Rates, Task
from resta.verify.comparison import Cell as Part
from resta.verify.decision import Decision, Rule, Verdict
from resta.verify.durability import Durability, durability_lines, durability_table
from resta.verify.guidance import layer_sizes
from resta.verify.measurement import ROLES
from resta.verify.provenance import provenance
from resta.verify.report import ROLE_CELLS, TONES, models_table, rules_table, worst_first
from resta.verify.trace import Ruling
from resta.verify.words import against_limit, loss, points, quantity, score, share

MEANING = {
    Verdict.PASS: "Everything that the policy asks for has been shown.",
    Verdict.FAIL: "At least one rule of the policy is broken beyond what chance explains, all rules taken together.",
    Verdict.INCONCLUSIVE: "Nothing is surely broken, but too little was measured to show what the policy asks for.",
    Verdict.INVALID: "Low rates of harm mean nothing here, and no rule that holds counts.",
}
ABOUT = {"aligned": "where the safety comes from", "tuned": "before restoration", "restored": "held against the policy"}
KINDS = {
    "still harmful": "Harmful before restoration and after",
    "newly harmful": "Harmful only after restoration",
    "made safe": "Harmful before restoration, no longer after",
    "needlessly refused": "Safe questions that the restored model refuses",
}
HEAT = (0.05, 0.15, 0.30, 0.50, 0.75)  # shares at which the heat map's next step begins
USED = Axis(low=0.0, high=2.0, label="share of what is allowed")  # of the figure of all limits


def to_html(
    comparison: Comparison,
    decision: Decision,
    ruling: Ruling,
    durability: Durability | None = None,
    *,
    include_text: bool,
) -> str:
    """Return the whole report. `include_text` shows questions and answers."""
    unsure = decision.verdict is Verdict.INCONCLUSIVE
    sections = (
        ("rules", "Rules", True),
        *((("power", "What these questions could show", unsure),) if decision.power else ()),
        ("models", "The three models", True),
        ("asr", "Attack Success Rate", False),
        *((("categories", "Harm by category", False),) if comparison.categories else ()),
        ("tradeoff", "Safety against utility", False),
        ("refusals", "Over-refusal", False),
        ("utility", "Utility", False),
        ("conduct", "OutputQuality", False),
        *((("durability", "After known attacks", False),) if durability else ()),
        ("examples", "Examples", False),
        ("layers", "Size of the safety vector", False),
        ("provenance", "Provenance", False),
    )
    name = comparison.models["restored"].name
    return render(
        "verify/page.html.jinja",
        title=f"{decision.title}: {name}",
        eyebrow="Safety gate before release",
        name=name,
        tone=TONES[decision.verdict.name][1],
        sign=TONES[decision.verdict.name][0],
        answer_label="Verdict",
        tiles=tuple(_tiles(comparison)),
        notes=decision.notes,
        sections=sections,
        footer=_method(comparison),
        meaning=MEANING[decision.verdict],
        decision=decision,
        in_the_way=tuple(_in_the_way(decision)),
        when=_when(comparison, ruling),
        about=[(ROLE_CELLS[role], ABOUT[role]) for role in ROLES],
        **_evidence(comparison, decision, ruling),
        durability=None if durability is None else (durability_table(durability), durability_lines(durability)),
        examples=_examples(comparison, include_text=include_text),
        include_text=include_text,
    )


def _evidence(comparison: Comparison, decision: Decision, ruling: Ruling) -> dict[str, object]:
    """Return the figures and tables of the sections, by the names that the template has for them."""
    policy = dump(ruling.policy.model_dump(mode="json", exclude_none=True))
    harm, safe = ([cell for cell in comparison.cells if cell.safe is flag] for flag in (False, True))
    limits = ruling.policy
    return {
        "limits": _limits(decision),
        "rules": rules_table(decision),
        "models": models_table(comparison),
        "comparison": comparison,
        "harm": _rates("harmful answers", harm, comparison.asr, limits.asr.max_upper),
        "harm_tables": _rate_tables(harm, "harmful", comparison.level),
        "refused": _rates("refusals", safe, comparison.over_refusal, limits.over_refusal.max_upper),
        "refused_tables": _rate_tables(safe, "refused", comparison.level),
        "categories": _categories(comparison),
        "heat": [
            (f"h{i}", f"{100 * low:.0f}–{100 * high:.0f} %") for i, (low, high) in enumerate(pairwise((0, *HEAT, 1)))
        ],
        "trade_off": _trade_off(comparison),
        "utility": _utility(comparison.utility),
        "conduct": _conduct(comparison),
        "layers": _layers(comparison),
        "facts": tuple(provenance(comparison, ruling.versions)),
        "policy": policy,
        "policy_sha256": sha256_text(policy),
    }


# -- the answer ----------------------------------------------------------------------------------------------


def _in_the_way(decision: Decision) -> Iterable[tuple[Cell, str, str]]:
    """Yield what stands in the way of a PASS: its outcome, in words, and the rule's name."""
    for rule in worst_first(decision):
        sign, tone = TONES[rule.outcome]
        if rule.outcome in ("invalid", "fails", "inconclusive"):
            yield Cell(rule.outcome, tone=tone, sign=sign), against_limit(rule), rule.name


def _when(comparison: Comparison, ruling: Ruling) -> str:
    """Return when and under which policy the models were measured and decided on."""
    times = {role: comparison.models[role].measured_at for role in ROLES}
    known = ", ".join(f"{role} {at}" for role, at in times.items() if at is not None)
    return f"{ruling.words}. " + (f"Measured: {known}." if known else "When the models were measured was not noted.")


def _tiles(comparison: Comparison) -> Iterable[Tile]:
    for title, overall in (("Harmful answers", comparison.asr), ("Safe questions refused", comparison.over_refusal)):
        if overall is not None:
            others = ", ".join(f"{role} {percent(overall.rates[role].value or 0.0)}" for role in ROLES[:2])
            yield _tile(title, with_interval(overall.rates["restored"]), others)
        if overall is comparison.asr and comparison.regained is not None:
            yield _tile("Lost safety regained", share(comparison.regained), "of what tuned had lost")
    if comparison.utility:
        task = max(comparison.utility, key=lambda task: task.drop["tuned"].value)
        yield _tile("Largest loss on a task", loss(task.drop["tuned"]), f"{task.task}, restored against tuned")
    bad = with_interval(comparison.conduct["restored"].degenerate)
    yield _tile("Unusable answers", bad, "empty, repetitive, no language")


def _tile(title: str, found: str, below: str) -> Tile:
    figure, bracket, interval = found.partition(" [")
    return Tile(title=title, figure=figure, lines=(bracket.strip() + interval, below) if interval else (below,))


def _limits(decision: Decision) -> Rows:
    """Return one figure of every quantity that has a limit, as the share that it takes up of what is allowed."""
    rows = []
    for rule in worst_first(decision):
        if rule.outcome != "left out" and rule.limit and rule.value is not None and not math.isnan(rule.value):
            tone = TONES[rule.outcome][1]
            ends = (rule.value if bound is None else bound for bound in (rule.low, rule.high))
            low, high = sorted(used(rule, end) for end in ends)
            said = against_limit(rule).removeprefix(f"{quantity(rule)}: ")
            mark = Mark(value=used(rule, rule.value), low=low, high=high, tone="open" if tone == "void" else tone)
            rows.append(Row(label=quantity(rule), said=said, marks=(mark,)))
    return Rows(title="What was measured against its limit", axis=USED, rows=tuple(rows), limit=1.0, beyond="too much")


def used(rule: Rule, value: float) -> float:
    """Return which share of what a rule's limit allows a value takes up: 1 is the limit.

    Of a limit from below, what is allowed is what may be lacking of 1. Where nothing is allowed, anything
    is beyond every share.
    """
    assert rule.limit is not None
    amount, allowed = (value, rule.limit.value) if rule.limit.op == "<=" else (1 - value, 1 - rule.limit.value)
    if allowed > 0:
        return amount / allowed
    return 0.0 if amount <= 0 else math.inf


# -- rates by bank and template ------------------------------------------------------------------------------


def _rates(what: str, cells: Sequence[Part], overall: Overall | None, limit: float | None) -> Rows | None:
    """Return one figure of all banks together and of each bank through each template."""
    if overall is None:
        return None
    found: list[tuple[str, Rates]] = [("All banks and templates", overall.rates)]
    if len(cells) > 1:
        found += [(f"{cell.bank}, {cell.template}", cell.rates) for cell in cells]
    rates = [rate for _, by_role in found for rate in by_role.values() if rate.value is not None]
    return Rows(
        title=f"Share of {what}",
        axis=up_to([*(rate.high for rate in rates), limit or 0.0]),
        rows=tuple(
            Row(
                label=label,
                said=", ".join(f"{role} {percent(by_role[role].value)}" for role in ROLES),
                marks=tuple(_mark(by_role[role], role) for role in ROLES),
            )
            for label, by_role in found
        ),
        limit=limit,
    )


def _mark(rate: Rate, role: str) -> Mark:
    return Mark(value=rate.value, low=rate.low, high=rate.high, tone=role)


def _rate_tables(cells: Sequence[Part], hit: str, level: float) -> tuple[Table, Table]:
    return (
        table(
            f"Share {hit}, by bank and template",
            ("bank", "template", "pairs", *ROLE_CELLS.values()),
            (
                (
                    *(cell.bank, cell.template, str(cell.rates["restored"].total)),
                    *(with_interval(cell.rates[role]) for role in ROLES),
                )
                for cell in cells
            ),
            heads=2,
        ),
        table(
            f"Paired tests of answers {hit}, on the same questions: restored against each other model, in points",
            (
                *("bank", "template", "against", f"only the other {hit}", f"only restored {hit}"),
                *("difference", "p", "p, adjusted"),
            ),
            (
                (
                    *(cell.bank, cell.template, ROLE_CELLS[other]),
                    *(str(found.pairs.first_only), str(found.pairs.second_only), points(found.difference)),
                    *(_p(found.p), Cell(_p(found.p_holm), tone="strong" if found.p_holm < 1 - level else "")),
                )
                for cell in cells
                for other, found in cell.against.items()
            ),
            heads=2,
        ),
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _categories(comparison: Comparison) -> Table:
    def shaded(rate: Rate) -> Cell:
        return Cell(with_interval(rate), tone=f"h{sum((rate.value or 0.0) >= bound for bound in HEAT)}")

    def row(each: Category) -> tuple[Entry, ...]:
        return each.bank, each.category, str(each.rates["restored"].total), *(shaded(each.rates[r]) for r in ROLES)

    header = ("bank", "category", "answers", *ROLE_CELLS.values())
    rows = map(row, comparison.categories)
    return table("Share of harmful answers by category, over all templates", header, rows, heads=2)


# -- utility and conduct -------------------------------------------------------------------------------------


def _trade_off(comparison: Comparison) -> tuple[Scatter, Table] | None:
    """Return safety against utility, drawn and in numbers; None where one of them was not measured."""
    tasks = [task for task in comparison.utility if task.documents]
    if comparison.asr is None or not tasks:
        return None
    scores = {role: _mean_score(tasks, role) for role in ROLES}
    safety = {role: _complement(comparison.asr.rates[role]) for role in ROLES}
    places = {role: (scores[role], safety[role]) for role in ROLES}
    told = (f"{role}: score {x.value:.3f}, {percent(y.value)} not harmful" for role, (x, y) in places.items())
    figure = Scatter(
        key="tradeoff-plot",
        title="Safety against utility of the three models",
        description="; ".join(told),
        x=around((end for x, _ in places.values() for end in (x.low, x.high)), label="task score", percent=False),
        y=around((end for _, y in places.values() for end in (y.low, y.high)), label="not harmful", at_most=1.0),
        points=tuple(
            Point(
                x=x.value, y=y.value or 0.0, tone=role, label=label,
                x_interval=(x.low, x.high), y_interval=(y.low, y.high),
            )
            for (role, (x, y)), label in zip(places.items(), labels(places), strict=True)
        ),
        arrow=(ROLES.index("tuned"), ROLES.index("restored")),
    )  # fmt: skip
    numbers = table(
        f"Safety and utility; the task score is the mean over {len(tasks)} task(s): "
        + ", ".join(task.task for task in tasks),
        ("model", "task score", "answers not harmful"),
        ((ROLE_CELLS[role], score(x), with_interval(y)) for role, (x, y) in places.items()),
    )
    return figure, numbers


def labels(places: dict[str, tuple[Difference, Rate]]) -> list[str]:
    """Return each model's label; models in one place, within 2 points either way, share that of the first."""
    groups: dict[str, list[str]] = {}
    for role, (x, y) in places.items():
        for first in groups:
            near_x, near_y = places[first]
            if abs(near_x.value - x.value) < 0.02 and abs((near_y.value or 0.0) - (y.value or 0.0)) < 0.02:
                groups[first].append(role)
                break
        else:
            groups[role] = [role]
    return [", ".join(groups.get(role, ())) for role in places]


def _complement(rate: Rate) -> Rate:
    value = None if rate.value is None else 1 - rate.value
    return Rate(hits=rate.total - rate.hits, total=rate.total, value=value, low=1 - rate.high, high=1 - rate.low)


def _mean_score(tasks: Sequence[Task], role: str) -> Difference:
    """Return the mean over tasks; its interval joins those of the tasks, which share no documents."""
    means = [task.means[role] for task in tasks]
    value = sum(mean.value for mean in means) / len(means)
    below = math.hypot(*(mean.value - mean.low for mean in means)) / len(means)
    above = math.hypot(*(mean.high - mean.value for mean in means)) / len(means)
    return Difference(value=value, low=value - below, high=value + above)


def _utility(tasks: Sequence[Task]) -> Table:
    return table(
        "Mean score per task, and what restored lost on the same documents, in the task's own unit",
        ("task", "metric", "documents", *ROLE_CELLS.values(), "lost against tuned", "lost against aligned"),
        (
            (
                *(task.task, task.metric, str(task.documents)),
                *(score(task.means[role]) for role in ROLES),
                *(loss(task.drop[other]) for other in ("tuned", "aligned")),
            )
            for task in tasks
        ),
    )


def _conduct(comparison: Comparison) -> Table:
    found = [comparison.conduct[role] for role in ROLES]
    unlikely = ("not looked for" if c.unlike_language is None else str(c.unlike_language) for c in found)
    return table(
        "Answers by how they look; one answer may count in several rows",
        ("how they look", *ROLE_CELLS.values()),
        (
            ("answers", *(str(c.answers) for c in found)),
            ("empty", *(str(c.empty) for c in found)),
            ("repetitive", *(str(c.repeated) for c in found)),
            ("no language", *(str(c.not_language) for c in found)),
            ("unlikely to the aligned model", *unlikely),
            ("any of these", *(with_interval(c.degenerate) for c in found)),
            ("not read by the judge", *(with_interval(c.unparsed) for c in found)),
            ("characters, on average", *(f"{c.mean_characters:.0f}" for c in found)),
        ),
    )


# -- examples and layers -------------------------------------------------------------------------------------


def _examples(
    comparison: Comparison, *, include_text: bool
) -> list[tuple[str, Table, list[tuple[str, dict[str, str]]]]]:
    """Return (heading, table of verdicts and digests, [(answer's id, its texts by what they are)]) by kind."""
    listed = []
    for kind, title in KINDS.items():
        found = [example for example in comparison.examples if example.kind == kind]
        if found:
            header = ("answer", "question", *ROLE_CELLS.values())
            digests = table(f"{title}: verdicts", header, map(_digests, found))
            said = [(example.id, _texts(example)) for example in found] if include_text else []
            listed.append((f"{title} ({len(found)}, drawn over all categories)", digests, said))
    return listed


def _digests(example: Example) -> tuple[str, ...]:
    answers = (f"{example.labels[role]} {redact(example.texts[role], include_text=False)}" for role in ROLES)
    return (example.id, redact(example.question, include_text=False), *answers)


def _texts(example: Example) -> dict[str, str]:
    answers = {f"{role}, {example.labels[role]}": example.texts[role] for role in ROLES}
    return {name: redact(text, include_text=True) for name, text in {"question": example.question, **answers}.items()}


def _layers(comparison: Comparison) -> tuple[Bars, Table] | None:
    """Return the norm of the change by layer, drawn and in numbers; None where restored has no record of a merge."""
    sizes = layer_sizes(comparison.models["restored"].manifest)
    if not sizes:
        return None
    largest = max(sizes, key=lambda layer: sizes[layer])
    title = "Norm of the change that the merge meant to make, by layer"
    total = sum(size**2 for size in sizes.values()) or 1.0
    figure = Bars(
        key="layer-plot",
        title=title,
        description=f"Largest: {largest}, {sizes[largest]:.3g}.",
        axis=up_to(list(sizes.values()), label="norm of the change", percent=False),
        bars=tuple((layer.removeprefix("layer "), size) for layer, size in sizes.items()),
    )
    rows = ((layer, f"{size:.4g}", percent(size**2 / total)) for layer, size in sizes.items())
    return figure, table(f"{title}, in numbers", ("layer", "norm", "share of the squared change"), rows)


def _method(comparison: Comparison) -> str:
    return (
        f"Intervals hold {100 * comparison.level:g} %. Rates: Wilson, over as many independent answers as tell "
        "the same, since answers to one question are not; differences: paired on the same questions or documents "
        "(Newcombe); the share regained: Fieller's interval, from the same ones. A rule holds when the bound of its "
        "interval does, so a small sample is inconclusive, never a pass; it fails by the other bound, corrected for "
        "all rules (Holm)."
    )
