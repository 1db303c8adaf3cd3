"""Numbers in words, as every report writes them."""

from __future__ import annotations

import math

from resta.statistics import Difference
from resta.verify.decision import Rule


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


def score(found: Difference) -> str:
    """Return a task's mean in its own unit, with its interval; a dash where nothing was measured."""
    return "-" if math.isnan(found.value) else f"{found.value:.3f} [{found.low:.3f}-{found.high:.3f}]"


def loss(found: Difference) -> str:
    """Return how much a mean lost in its own unit, with its interval."""
    value, low, high = (f"{round(number, 3) + 0.0:+.3f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def measured(rule: Rule) -> str:
    """Return what a rule found, as a number with its interval where it has one."""
    if rule.value is None:
        return "-"
    if rule.low is None or rule.high is None:
        return f"{rule.value:.3f}"
    return f"{rule.value:.3f} [{rule.low:.3f}, {rule.high:.3f}]"


QUANTITIES = {
    "missing.max": "Pairs that are missing",
    "unparsed.max": "Verdicts that cannot be read",
    "degenerate.max": "Unusable answers",
    "degenerate.max (aligned)": "Unusable answers of aligned",
    "degenerate.max_increase": "More unusable answers",
    "one_answer.max_aligned": "Answers of aligned alike",
    "one_answer.max_increase": "More answers alike than aligned's",
    "asr.max_upper": "Harmful answers",
    "asr.max_increase_over_aligned": "More harmful answers than aligned",
    "asr.max_cell_upper": "Harmful answers in the worst part",
    "regained.min": "Lost safety regained",
    "over_refusal.max_upper": "Safe questions refused",
    "over_refusal.max_increase": "More refused than by aligned",
    "over_refusal.max_increase_over_tuned": "More refused than by tuned",
    "provenance.min_coverage": "Parameters covered",
    "provenance.min_kept": "Change kept in the weights",
}


def quantity(rule: Rule) -> str:
    """Return in words what a rule measures; the rule's own name where there are none."""
    if rule.name.startswith("utility.") and rule.name.endswith(".max_drop"):
        return f"Loss on {rule.name.removeprefix('utility.').removesuffix('.max_drop')}"
    return QUANTITIES.get(rule.name, rule.name)


def against_limit(rule: Rule) -> str:
    """Return a rule in words: "Harmful answers: 28.7 %, allowed 10 %"; its reason where no one number decides."""
    if rule.limit is None or rule.value is None or rule.test:
        return f"{quantity(rule)}: {rule.why}"
    utility = rule.name.startswith("utility.")  # in the task's own unit, which need not be a share
    unit = "points" if "increase" in rule.name else "%"

    def number(value: float) -> str:
        return f"{value:.3f}" if utility else f"{100 * value:.1f} {unit}"

    edge = {"high": rule.high, "low": rule.low, "value": None}[rule.limit.bound]
    asked = "allowed" if rule.limit.op == "<=" else "asked for at least"
    limit = f"{rule.limit.value:g}" if utility else f"{100 * rule.limit.value:g} {unit}"
    reach = ""
    if rule.outcome == "inconclusive" and edge is not None:
        side = "to" if rule.limit.bound == "high" else "from"
        reach = f" (interval {side} {number(edge)})" if math.isfinite(edge) else " (interval without end)"
    return f"{quantity(rule)}: {number(rule.value)}{reach}, {asked} {limit}"
