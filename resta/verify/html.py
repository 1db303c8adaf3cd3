"""The report that people look at: one HTML file without scripts or outside references.

A page in the order of its reader's questions: the verdict, the rules behind it, what to do, then the evidence.
Questions and answers are redacted unless asked for. The same comparison gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise

from resta.redeval.report import redact
from resta.statistics import Difference, Rate
from resta.verify.comparison import Cell, Comparison, Example, Overall, Rates, Task
from resta.verify.decision import Decision, Rule, Verdict
from resta.verify.guidance import layer_sizes
from resta.verify.markup import Markup, element, join, table
from resta.verify.measurement import ROLES
from resta.verify.plots import Caption, against_limits, forest, layer_bars, require_plots, trade_off
from resta.verify.policy import Policy
from resta.verify.provenance import provenance
from resta.verify.trace import Ruling
from resta.verify.words import against_limit, quantity, signed

# verdict or outcome -> (sign, class of its colours)
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
MEANING = {
    Verdict.PASS: "Everything that the policy asks for has been shown.",
    Verdict.FAIL: "At least one rule of the policy is broken beyond what chance explains, all rules taken together.",
    Verdict.INCONCLUSIVE: "Nothing is surely broken, but too little was measured to show what the policy asks for.",
    Verdict.INVALID: "Low rates of harm mean nothing here, and no rule that holds counts.",
}
SIGNS = {"aligned": "●", "tuned": "▲", "restored": "◆"}  # the markers of the figures
ABOUT = {"aligned": "where the safety comes from", "tuned": "before restoration", "restored": "held against the policy"}
KINDS = {
    "still harmful": "Harmful before restoration and after",
    "newly harmful": "Harmful only after restoration",
    "made safe": "Harmful before restoration, no longer after",
    "needlessly refused": "Safe questions that the restored model refuses",
}
HEAT = (0.05, 0.15, 0.30, 0.50, 0.75)  # shares at which the heat map's next step begins
POLICY_OF_CONTENT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def to_html(
    comparison: Comparison,
    decision: Decision,
    ruling: Ruling,
    *,
    include_text: bool,
) -> str:
    """Return the whole report. `include_text` shows questions and answers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_plots()
    policy = ruling.policy
    sections = (
        _section("rules", "Rules", _rules(decision)),
        _section("guidance", "What to try", _guidance(decision)),
        _section("power", "What these questions could show", _power(decision)),
        _section("models", "The three models", _models(comparison)),
        _section("asr", "Attack Success Rate", _attack(comparison, policy)),
        _section("categories", "Harm by category", _categories(comparison)),
        _section("trade-off", "Safety against utility", _trade_off(comparison)),
        _section("over-refusal", "Over-refusal", _over_refusal(comparison, policy)),
        _section("utility", "Utility", _utility(comparison)),
        _section("conduct", "Conduct", _conduct(comparison)),
        _section("examples", "Examples", _examples(comparison, include_text=include_text)),
        _section("layers", "Size of the safety vector", _layers(comparison)),
        _section("provenance", "Provenance", _provenance(comparison, ruling)),
    )
    return _page(comparison, decision, ruling, [section for section in sections if section])


def _page(comparison: Comparison, decision: Decision, ruling: Ruling, sections: Sequence[Markup]) -> str:
    title = f"{decision.title}: {comparison.models['restored'].name}"
    style = resources.files("resta.verify").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY_OF_CONTENT),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("a", "Skip to the rules", href="#rules", class_="skip"),
        element("header", _verdict(comparison, decision, ruling), _contents(comparison, decision)),
        element("main", *sections),
        element("footer", element("p", _method(comparison), class_="quiet")),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _section(key: str, title: str, children: Iterable[str]) -> Markup:
    """Return a section under its heading; nothing where it has nothing to say."""
    content = join(children)
    if not content:
        return Markup("")
    return element("section", element("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def _folded(summary: str, children: Iterable[str]) -> Markup:
    return element("details", element("summary", summary), *children)


def _provenance(comparison: Comparison, ruling: Ruling) -> Iterable[Markup]:
    yield element("p", "What was measured, by what and under which policy, with every digest.")
    yield _folded("Models, judge, questions, settings, policy", provenance(comparison, ruling.policy, ruling.versions))


def _contents(comparison: Comparison, decision: Decision) -> Markup:
    links = {
        "rules": "Rules",
        **({"guidance": "What to try"} if decision.guidance else {}),
        **({"power": "Power"} if decision.power else {}),
        "models": "Models",
        "asr": "Attack Success Rate",
        **({"categories": "Categories"} if comparison.categories else {}),
        "trade-off": "Safety against utility",
        "over-refusal": "Over-refusal",
        "utility": "Utility",
        "conduct": "Conduct",
        "examples": "Examples",
        "layers": "Safety vector",
        "provenance": "Provenance",
    }
    items = (element("li", element("a", title, href=f"#{key}")) for key, title in links.items())
    return element("nav", element("ul", *items), aria_label="Contents")


# -- numbers in words ----------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def _signed(value: float) -> str:
    return signed(value).replace("-", "−")


def _interval(text: str) -> Markup:
    return element("span", f" [{text}]", class_="interval")


def _rate(rate: Rate) -> Markup:
    """Return "4.1 % [2.0–7.3]"."""
    if rate.value is None:
        return Markup("–")
    return join((_percent(rate.value), _interval(f"{100 * rate.low:.1f}–{100 * rate.high:.1f}")))


def _points(found: Difference) -> Markup:
    """Return "+1.5 [−0.4, +3.2]", in points."""
    return join((_signed(100 * found.value), _interval(f"{_signed(100 * found.low)}, {_signed(100 * found.high)}")))


def _score(found: Difference) -> Markup:
    """Return "0.574 [0.546–0.602]"."""
    if math.isnan(found.value):
        return Markup("–")
    return join((f"{found.value:.3f}", _interval(f"{found.low:.3f}–{found.high:.3f}")))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _role(role: str) -> Markup:
    """Return a model's role with its marker."""
    return element("span", element("span", SIGNS[role], aria_hidden="true"), role, class_=f"role {role}")


def _role_heads(suffix: str = "") -> tuple[Markup, ...]:
    return tuple(join((_role(role), suffix)) for role in ROLES)


def _chip(outcome: str) -> Markup:
    sign, tone = TONES[outcome]
    return element("span", element("span", f"{sign} ", aria_hidden="true"), outcome, class_=f"chip {tone}")


# -- verdict and rules ---------------------------------------------------------------------------------------


def _verdict(comparison: Comparison, decision: Decision, ruling: Ruling) -> Markup:
    verdict = decision.verdict
    sign, tone = TONES[verdict.name]
    notes = [element("li", note) for note in decision.notes]
    return join(
        (
            element("p", "Safety gate before release", class_="eyebrow"),
            element("h1", element("bdi", comparison.models["restored"].name)),
            element(
                "div",
                element("p", element("span", f"{sign} ", aria_hidden="true"), decision.title, class_="badge"),
                _lead(decision),
                element("p", decision.summary),
                element("p", MEANING[verdict]),
                element("p", _when(comparison, ruling), class_="quiet"),
                class_=f"verdict {tone}",
                role="group",
                aria_label="Verdict",
            ),
            _tiles(comparison),
            element("div", "Read with care:", element("ul", *notes), class_="warning") if notes else Markup(""),
        )
    )


# What stands in the way of a PASS comes first.
WORST_FIRST = ("invalid", "fails", "inconclusive", "holds", "left out")


def _worst_first(decision: Decision) -> list[Rule]:
    return sorted(decision.rules, key=lambda rule: WORST_FIRST.index(rule.outcome))


def _lead(decision: Decision) -> Markup:
    """Return the rules that stand in the way in words, the rule's own name beside each."""
    blocking = [rule for rule in _worst_first(decision) if rule.outcome in ("invalid", "fails", "inconclusive")]
    items = (
        element("li", against_limit(rule), " ", _chip(rule.outcome), " ", _rule_name(rule.name)) for rule in blocking
    )
    return element("ul", *items, class_="lead") if blocking else Markup("")


def _when(comparison: Comparison, ruling: Ruling) -> str:
    """Return when and under which policy the models were measured and decided on."""
    times = {role: comparison.models[role].measured_at for role in ROLES}
    known = ", ".join(f"{role} {at}" for role, at in times.items() if at is not None)
    return f"{ruling.words}. " + (f"Measured: {known}." if known else "When the models were measured was not noted.")


def _tiles(comparison: Comparison) -> Markup:
    """Return the figures that a reader in a hurry takes along."""
    tiles = []
    for title, overall in (("Harmful answers", comparison.asr), ("Safe questions refused", comparison.over_refusal)):
        if overall is not None:
            others = ", ".join(f"{role} {_percent(overall.rates[role].value or 0.0)}" for role in ROLES[:2])
            restored = overall.rates["restored"]
            tiles.append((title, _percent(restored.value or 0.0), f"[{_bounds(restored)}]", others))
    if comparison.regained is not None:
        share = comparison.regained
        bounds = f"[{100 * share.low:.0f}–{100 * share.high:.0f}]"
        tiles.insert(1, ("Lost safety regained", f"{100 * share.value:.0f} %", bounds, "of what tuned had lost"))
    if comparison.utility:
        task = max(comparison.utility, key=lambda task: task.drop["tuned"].value)
        drop = task.drop["tuned"]
        bounds = f"[{_signed(-100 * drop.high)}, {_signed(-100 * drop.low)}]"
        where = f"{task.task}, restored against tuned"
        tiles.append(("Largest loss on a task, points", _signed(-100 * drop.value), bounds, where))
    bad = comparison.conduct["restored"].degenerate
    tiles.append(
        ("Unusable answers", _percent(bad.value or 0.0), f"[{_bounds(bad)}]", "empty, repetitive, no language")
    )
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", title),
                element("dd", figure, class_="figure"),
                *(element("dd", line) for line in lines),
            )
            for title, figure, *lines in tiles
        ),
        class_="tiles",
    )


def _bounds(rate: Rate) -> str:
    return f"{100 * rate.low:.1f}–{100 * rate.high:.1f}"


def _rules(decision: Decision) -> Iterable[Markup]:
    yield from _limits_figure(decision)
    yield table(
        "Every rule of the policy. Shares are between 0 and 1: 0.05 is 5 %, or 5 points of a difference.",
        ("rule", "outcome", "measured", "interval", "limit", "why"),
        (
            (
                _rule_name(rule.name),
                _chip(rule.outcome),
                *_measured(rule),
                rule.limit_words.replace("<=", "≤").replace(">=", "≥") or "–",
                rule.why,
            )
            for rule in _worst_first(decision)
        ),
        right=(2, 3),
        wide=(5,),
    )


def _limits_figure(decision: Decision) -> Iterable[Markup]:
    """Yield one figure of every quantity that has a limit, in the order of the table."""
    rules = [rule for rule in _worst_first(decision) if rule.outcome != "left out"]
    rows = [
        (quantity(rule), _estimate(rule, rule.value), rule.limit.value, rule.outcome == "holds")
        for rule in rules
        if rule.limit is not None and rule.value is not None and not math.isnan(rule.value)
    ]
    if not rows:
        return
    title = "What was measured against its limit"
    told = "; ".join(against_limit(rule) for rule in rules if rule.limit is not None and rule.value is not None)
    caption = Caption(key="limits-plot", title=title, description=told)
    figure = against_limits(rows, caption, colours={True: "restored", False: "tuned"})
    yield element("figure", element("figcaption", title), figure)
    yield element(
        "p",
        "One row per rule, those in the way first. Marker: what was measured; line: its interval; upright bar: the "
        "limit; what lies beyond an edge is drawn at it. Shares, and differences in points (a task's loss: "
        "hundredths of its unit). Green diamonds are kept, orange crosses are not, or are not shown to be.",
        class_="quiet",
    )


def _estimate(rule: Rule, value: float) -> Difference:
    low, high = (value if bound is None else bound for bound in (rule.low, rule.high))
    return Difference(value=value, low=low, high=high)


def _rule_name(name: str) -> Markup:
    """Return a rule's name, which may be broken after its dots and underscores."""
    parts = re.split(r"(?<=[._])", name)
    return element("code", join([parts[0], *(join((element("wbr"), part)) for part in parts[1:])]))


def _measured(rule: Rule) -> tuple[str, str]:
    value = "–" if rule.value is None else _decimal(rule.value)
    if rule.low is None or rule.high is None:
        return value, "–"
    return value, f"[{_decimal(rule.low)}, {_decimal(rule.high)}]"


def _decimal(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _guidance(decision: Decision) -> Iterable[Markup]:
    if decision.guidance:
        yield element("ul", *(element("li", _with_code(line)) for line in decision.guidance))


def _power(decision: Decision) -> Iterable[Markup]:
    if decision.power:
        head, *lines = decision.power
        yield element("p", head)
        yield element("ul", *(element("li", line) for line in lines))


def _with_code(text: str) -> Markup:
    """Return a sentence in which commands stand between backticks, as elements."""
    return join(element("code", part) if i % 2 else part for i, part in enumerate(text.split("`")))


# -- the models side by side ---------------------------------------------------------------------------------


def _models(comparison: Comparison) -> Iterable[Markup]:
    models, conduct = comparison.models, comparison.conduct
    rows: list[Sequence[str]] = [
        ("name", *(element("bdi", models[role].name) for role in ROLES)),
        ("what it is", *(ABOUT[role] for role in ROLES)),
        ("kind", *(str(models[role].target["kind"]) for role in ROLES)),
    ]
    for title, overall in (("Attack Success Rate", comparison.asr), ("over-refusal", comparison.over_refusal)):
        if overall is not None:
            rows.append((title, *(_rate(overall.rates[role]) for role in ROLES)))
    rows.append(("unusable answers", *(_rate(conduct[role].degenerate) for role in ROLES)))
    rows += [
        (join((element("bdi", task.task), f", {task.metric}")), *(_score(task.means[role]) for role in ROLES))
        for task in comparison.utility
    ]
    yield table("Side by side; in brackets the interval of each figure.", ("figure", *_role_heads()), rows)
    if comparison.regained is not None:
        share = comparison.regained
        yield element(
            "p",
            element("strong", f"{100 * share.value:.0f} % of the lost safety is back"),
            f" [{100 * share.low:.0f}–{100 * share.high:.0f}]: ",
            "(tuned − restored) / (tuned − aligned), in shares of harmful answers.",
        )
    elif comparison.asr is not None:
        yield element("p", "No share of regained safety: tuned is not measurably less safe than aligned.")
    yield element("p", _pairs(comparison), class_="quiet")


def _pairs(comparison: Comparison) -> str:
    missing = (
        f"; {comparison.missing} are missing for at least one model and left out for all" if comparison.missing else ""
    )
    return f"{comparison.pairs} answers of each model, to the same questions through the same templates{missing}."


# -- rates by bank and template ------------------------------------------------------------------------------


def _attack(comparison: Comparison, policy: Policy) -> Iterable[Markup]:
    if comparison.asr is None:
        yield element("p", "No harmful question was asked.")
        return
    yield element(
        "p", "Share of answers to harmful questions that the judge calls harmful; unreadable verdicts count as harm."
    )
    cells = [cell for cell in comparison.cells if not cell.safe]
    yield from _forests("asr", "harmful answers", cells, comparison.asr, policy.asr.max_upper)
    yield _folded("The same in numbers, by bank and template", _cell_tables(cells, "harmful", comparison.level))


def _over_refusal(comparison: Comparison, policy: Policy) -> Iterable[Markup]:
    if comparison.over_refusal is None:
        yield element("p", "No safe question was asked.")
        return
    yield element("p", "Share of safe questions that are refused outright.")
    cells = [cell for cell in comparison.cells if cell.safe]
    yield from _forests("refusal", "refusals", cells, comparison.over_refusal, policy.over_refusal.max_upper)
    yield _folded("The same in numbers, by bank and template", _cell_tables(cells, "refused", comparison.level))


def _legend() -> Markup:
    items = (element("li", _role(role), element("span", f": {ABOUT[role]}", class_="quiet")) for role in ROLES)
    return element("ul", *items, class_="legend")


def _forests(key: str, what: str, cells: Sequence[Cell], overall: Overall, limit: float | None) -> Iterable[Markup]:
    """Yield one figure for all banks together and one per bank, all on the same scale."""
    banks: dict[str, list[tuple[str, Rates]]] = defaultdict(list)
    for cell in cells:
        banks[cell.bank].append((cell.template, cell.rates))
    rates = [
        rate
        for _, found in (("", overall.rates), *(row for rows in banks.values() for row in rows))
        for rate in found.values()
    ]
    highest = _round_up(max([*(rate.high for rate in rates if rate.value is not None), limit or 0.0]))
    figures = [_forest(f"{key}-all", f"All banks and templates: {what}", [("all", overall.rates)], highest, limit)]
    figures += [
        _forest(f"{key}-{i}", f"{bank}: {what} by template", rows, highest, None)
        for i, (bank, rows) in enumerate(banks.items())
    ]
    yield _legend()
    yield element("div", *figures, class_="figures")
    dashed = f" The dashed line is the policy's limit, {_percent(limit)}." if limit is not None else ""
    yield element("p", f"Marker: rate; line: its interval. All figures have the same scale.{dashed}", class_="quiet")


def _forest(key: str, title: str, rows: Sequence[tuple[str, Rates]], highest: float, limit: float | None) -> Markup:
    told = (
        f"{label}: " + ", ".join(f"{role} {_percent(rates[role].value or 0.0)}" for role in ROLES)
        for label, rates in rows
    )
    caption = Caption(key=key, title=title, description="; ".join(told))
    return element("figure", element("figcaption", title), forest(rows, caption, highest=highest, limit=limit))


def _round_up(share: float) -> float:
    return min(1.0, max(0.05, math.ceil(20 * share - 1e-9) / 20))


def _cell_tables(cells: Sequence[Cell], hit: str, level: float) -> Iterable[Markup]:
    yield table(
        f"Share {hit}, by bank and template",
        ("bank", "template", "pairs", *_role_heads()),
        (
            (cell.bank, cell.template, str(cell.rates["restored"].total), *(_rate(cell.rates[role]) for role in ROLES))
            for cell in cells
        ),
        heads=2,
        right=(2, 3, 4, 5),
    )
    yield table(
        f"Paired tests of answers {hit}, on the same questions: restored against each other model, in points",
        (
            "bank",
            "template",
            "against",
            f"only the other {hit}",
            f"only restored {hit}",
            "difference",
            "p",
            "p, adjusted",
        ),
        (
            (
                cell.bank,
                cell.template,
                _role(other),
                str(found.pairs.first_only),
                str(found.pairs.second_only),
                _points(found.difference),
                _p(found.p),
                element("strong", _p(found.p_holm)) if found.p_holm < 1 - level else _p(found.p_holm),
            )
            for cell in cells
            for other, found in cell.against.items()
        ),
        heads=2,
        right=range(3, 8),
    )
    yield element(
        "p",
        "p is McNemar's mid-p; adjusted after Holm over all rows against the same model; bold where it is below "
        f"{1 - level:.2g}.",
        class_="quiet",
    )


def _categories(comparison: Comparison) -> Iterable[Markup]:
    if not comparison.categories:
        return
    yield element(
        "p",
        "Not gated: no rule of the policy reads this table. A category holds few questions and many are compared, so "
        "one that stands out is a reason to look, not a finding. Mind the intervals.",
    )
    yield _heat_key()
    yield table(
        "Share of harmful answers by category, over all templates",
        ("bank", "category", "answers", *_role_heads()),
        (
            (
                category.bank,
                category.category,
                str(category.rates["restored"].total),
                *(_heat(category.rates[role]) for role in ROLES),
            )
            for category in comparison.categories
        ),
        heads=2,
        right=(2, 3, 4, 5),
        class_="heat",
    )


def _heat(rate: Rate) -> Markup:
    step = sum((rate.value or 0.0) >= bound for bound in HEAT)
    return element("td", _rate(rate), class_=f"right h{step}")


def _heat_key() -> Markup:
    bounds = (0.0, *HEAT, 1.0)
    items = (
        element("li", f"{100 * low:.0f}–{100 * high:.0f} %", class_=f"h{i}")
        for i, (low, high) in enumerate(pairwise(bounds))
    )
    return element("ul", *items, class_="legend key", aria_label="Colours of the shares")


# -- utility -------------------------------------------------------------------------------------------------


def _trade_off(comparison: Comparison) -> Iterable[Markup]:
    tasks = [task for task in comparison.utility if task.documents]
    if comparison.asr is None or not tasks:
        yield element("p", "Needs both harmful questions and a utility task; one of them was not measured.")
        return
    scores = {role: _mean_score(tasks, role) for role in ROLES}
    rates = comparison.asr.rates
    safety = {
        role: Difference(value=1 - (rates[role].value or 0.0), low=1 - rates[role].high, high=1 - rates[role].low)
        for role in ROLES
    }
    told = "; ".join(
        f"{role}: score {scores[role].value:.3f}, {_percent(safety[role].value)} not harmful" for role in ROLES
    )
    title = "Safety against utility of the three models"
    names = ", ".join(task.task for task in tasks)
    yield element(
        "p", "Up is safer, right is more able. The arrow is what restoration did; the axes do not begin at 0."
    )
    yield element(
        "figure",
        element("figcaption", title),
        trade_off(scores, safety, Caption(key="trade-off-plot", title=title, description=told)),
    )
    numbers = table(
        f"Safety and utility; the task score is the mean over {len(tasks)} task(s): {names}",
        ("model", "task score", "answers not harmful"),
        ((_role(role), _score(scores[role]), _rate(_complement(rates[role]))) for role in ROLES),
        right=(1, 2),
    )
    yield _folded("The same in numbers", [numbers])


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


def _utility(comparison: Comparison) -> Iterable[Markup]:
    if not comparison.utility:
        yield element("p", "No utility task was measured.")
        return
    yield table(
        "Mean score per task, and what restored lost on the same documents, in points",
        ("task", "metric", "documents", *_role_heads(), "lost against tuned", "lost against aligned"),
        (
            (
                task.task,
                task.metric,
                str(task.documents),
                *(_score(task.means[role]) for role in ROLES),
                *(_points(task.drop[other]) for other in ("tuned", "aligned")),
            )
            for task in comparison.utility
        ),
        right=range(2, 8),
    )


def _conduct(comparison: Comparison) -> Iterable[Markup]:
    yield element(
        "p", "How the answers look, whoever judges them. A broken model harms nobody: read a low rate with this."
    )
    found = [comparison.conduct[role] for role in ROLES]
    unknown = "not looked for"
    yield table(
        "Answers by how they look; one answer may count in several rows",
        ("how they look", *_role_heads()),
        (
            ("answers", *(str(c.answers) for c in found)),
            ("empty", *(str(c.empty) for c in found)),
            ("repetitive", *(str(c.repeated) for c in found)),
            ("no language", *(str(c.not_language) for c in found)),
            (
                "unlikely to the aligned model",
                *(unknown if c.unlike_language is None else str(c.unlike_language) for c in found),
            ),
            ("any of these", *(_rate(c.degenerate) for c in found)),
            ("not read by the judge", *(_rate(c.unparsed) for c in found)),
            ("characters, on average", *(f"{c.mean_characters:.0f}" for c in found)),
        ),
        right=(1, 2, 3),
    )


# -- examples ------------------------------------------------------------------------------------------------


def _examples(comparison: Comparison, *, include_text: bool) -> Iterable[Markup]:
    if not comparison.examples:
        yield element("p", "No answer is of a kind that is listed here.")
        return
    if include_text:
        warning = (
            "What follows may be harmful, offensive or disturbing: questions and answers as they are. Open with care."
        )
        yield element("p", element("strong", "Content warning. "), warning, class_="warning")
    else:
        yield element(
            "p", "Texts are redacted; the digests find them in the records. The option --include-text shows them."
        )
    for kind, title in KINDS.items():
        found = [example for example in comparison.examples if example.kind == kind]
        if found:
            yield element("h3", f"{title} ({len(found)}, drawn over all categories)")
            yield from (
                map(_said, found) if include_text else [_folded("Verdicts and digests", [_digests(title, found)])]
            )


def _said(example: Example) -> Markup:
    """Return one question and its answers, folded."""
    texts = [("question", example.question)]
    texts += [(f"{role}, {example.labels[role]}", example.texts[role]) for role in ROLES]
    return element(
        "details",
        element("summary", element("bdi", example.id)),
        element(
            "dl",
            *(join((element("dt", name), element("dd", redact(text, include_text=True)))) for name, text in texts),
            class_="said",
        ),
    )


def _digests(title: str, examples: Sequence[Example]) -> Markup:
    def row(example: Example) -> Iterable[str]:
        yield element("bdi", example.id)
        yield element("span", redact(example.question, include_text=False), class_="quiet")
        for role in ROLES:
            text = redact(example.texts[role], include_text=False)
            yield join((f"{example.labels[role]} ", element("span", text, class_="quiet")))

    rows = (tuple(row(example)) for example in examples)
    return table(f"{title}: verdicts", ("answer", "question", *_role_heads()), rows)


# -- the safety vector ---------------------------------------------------------------------------------------


def _layers(comparison: Comparison) -> Iterable[Markup]:
    sizes = layer_sizes(comparison.models["restored"].manifest)
    if not sizes:
        yield element("p", "Not known: restored comes without the record (resta.json) of a merge.")
        return
    largest = max(sizes, key=lambda layer: sizes[layer])
    title = "Norm of the change that the merge meant to make, by layer"
    caption = Caption(key="layer-plot", title=title, description=f"Largest: {largest}, {sizes[largest]:.3g}.")
    yield element("figure", element("figcaption", title), layer_bars(sizes, caption))
    total = sum(size**2 for size in sizes.values()) or 1.0
    numbers = table(
        title,
        ("layer", "norm", "share of the squared change"),
        ((layer, f"{size:.4g}", _percent(size**2 / total)) for layer, size in sizes.items()),
        right=(1, 2),
    )
    yield _folded("The same in numbers", [numbers])


def _method(comparison: Comparison) -> str:
    return (
        f"Intervals hold {100 * comparison.level:g} %. Rates: Wilson, over as many independent answers as tell "
        "the same, since answers to one question are not; differences: paired on the same questions or documents "
        "(Newcombe); the share regained: Fieller's interval, from the same ones. A rule holds when the bound of its "
        "interval does, so a small sample is inconclusive, never a pass; it fails by the other bound, corrected for "
        "all rules (Holm). Written by resta."
    )
