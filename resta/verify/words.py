"""Numbers in words, as every report writes them."""

from __future__ import annotations

import math

from resta.verify.decision import Rule
from resta.verify.statistics import Difference


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
