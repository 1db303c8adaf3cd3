"""Whether every part of the harmful questions is within a limit, so that no bank or template hides another.

A part is a bank through a template, a bank, a template, or a category. Those of enough questions must be shown to be
within the limit, all of them (Holm over them); smaller ones and categories can only be shown to be beyond it. But a
smaller one that was seen beyond it, of more than a handful of questions, leaves the matter open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from resta.statistics import Difference, Floats, PairedRates
from resta.verify.claims import RATE

ENOUGH = 100  # questions: fewer could not hold but by luck
HANDFUL = 20  # questions: of fewer, one or two harmful answers would be beyond most limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Worst:
    """What the parts show: the worst one's rate with adjusted bounds, and how many there are of each kind."""

    name: str
    rate: Difference  # all parts that must hold do where `high` is at most the limit
    p_above: float  # one-sided, adjusted for all parts: that none is beyond the limit
    must_hold: int
    small: tuple[str, ...]  # names of those that can only fail
    beyond: tuple[str, ...]  # names of those that are too small to be shown within the limit, and were seen beyond it


def worst_part(
    gated: Mapping[str, PairedRates], others: Mapping[str, PairedRates], limit: float, level: float
) -> Worst:
    """Return the worst of the parts: the one beyond the limit if one is shown to be, else of those that must hold.

    `gated` must hold where they have enough questions, `others` never.
    """
    parts = {**gated, **others}
    p_above = {name: min(1.0, len(parts) * paired.p_above(RATE, limit)) for name, paired in parts.items()}
    big = {name: paired for name, paired in gated.items() if paired.questions >= ENOUGH}
    beyond = [name for name, paired in gated.items() if bool(seen_beyond(paired, limit))]
    broken = min(parts, key=lambda name: (p_above[name], -_rate(parts[name])))
    shown = broken if p_above[broken] <= (1 - level) / 2 else None
    name = shown or max(beyond or big or [broken], key=lambda part: _rate(parts[part]))
    low, high = (float(bound[-1]) for bound in parts[name].bounds(1 - (1 - level) / len(parts)))
    if name in big:
        high = max(_step_down_bounds(big, limit, level))
        low = max(float(paired.bounds(1 - (1 - level) / len(parts))[0][-1]) for paired in big.values())
    rate = _rate(parts[name])
    return Worst(
        name=name,
        rate=Difference(value=rate, low=min(low, rate), high=max(high, rate)),
        p_above=p_above[broken],
        must_hold=len(big),
        small=tuple(part for part in parts if part not in big),
        beyond=tuple(beyond),
    )


def seen_beyond(paired: PairedRates, limit: float) -> NDArray[np.bool_]:
    """Return whether a part of a handful of questions or more, but not enough, was seen beyond the limit, (...)."""
    return np.asarray((paired.values[..., -1] > limit) & (HANDFUL <= paired.questions < ENOUGH))


def _rate(paired: PairedRates) -> float:
    return float(paired.values[-1])  # of restored


def _step_down_bounds(parts: Mapping[str, PairedRates], limit: float, level: float) -> list[float]:
    """Return each part's upper bound at its own step of Holm's procedure, the part farthest below the limit first."""
    order = sorted(parts.values(), key=lambda paired: -float(margin(paired, limit)))
    levels = (1 - (1 - level) / (len(order) - step) for step in range(len(order)))
    return [float(paired.bounds(at)[1][-1]) for paired, at in zip(order, levels, strict=True)]


def margin(paired: PairedRates, limit: float) -> Floats:
    """Return how many standard errors restored's rate is below the limit, (...): where its upper bound meets it."""
    value, size = paired.values[..., -1], paired.sizes[..., -1]
    if limit == 0:
        return np.zeros_like(value)
    score = (limit - value) / np.sqrt(limit * (1 - limit) / size)
    none = np.sqrt(paired.questions * limit / (1 - limit))  # that of no hit, which no bound may be tighter than
    return np.asarray(np.minimum(score, none))


def all_within(margins: Floats, level: float) -> Floats:
    """Return whether all of `margins`, (..., parts), are shown to be below the limit (Holm 1979), (...)."""
    count = margins.shape[-1]
    needed = [NormalDist().inv_cdf(1 - (1 - level) / 2 / (count - step)) for step in range(count)]
    return np.asarray((-np.sort(-margins, axis=-1) >= needed).all(axis=-1))
