"""How a rate answers to the scale: one smooth curve through all that was seen, and how sure it is.

    p(x) = end + (start - end) / (1 + exp(steepness * (x - middle)))          x = |scale|

`tuned` is seen at x = 0. Beforehand start and end are Beta(1/2, 1/2) (Jeffreys), the logarithm of the steepness and
the middle uniform. The posterior is drawn by an ensemble of walkers (Goodman and Weare 2010, the stretch move) from a
fixed seed: the same counts give the same answer. Falling and rising rates are the same curves. Knows nothing of
models, policies or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from resta.statistics import Floats

STEEPNESS = (3.0, 60.0)  # over the range of scales: from "all of it is one slope" to "a step"
MIDDLE = (-0.1, 1.4)  # in shares of the range
DRAWS = 400  # walkers, and so curves that stand for the posterior
STEPS = 100
STRETCH = 2.0  # the move's usual parameter
UNLIKELY = 1e-3  # an observation less likely than this under the curves says that no such curve holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was observed at one scale: a share of so many independent questions."""

    scale: float
    share: float
    questions: int

    @property
    def hits(self) -> float:
        """Return the share as a number of questions."""
        return self.share * self.questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What is known of the rate over scale. `smooth` is False where no such curve holds what was observed."""

    seen: tuple[Seen, ...]
    smooth: bool
    curves: Floats  # (4, DRAWS): curves drawn from the posterior, as `_rates` takes them
    reach: float  # the largest |scale|

    def draws(self, scale: float) -> Floats:
        """Return rates at a scale, (DRAWS,), as likely as each other; the i-th of every scale is of one curve.

        Without a curve each scale stands for itself: Beta(hits + 1/2, misses + 1/2), Jeffreys; one that was not
        observed is not known at all.
        """
        if self.smooth:
            return _rates(self.curves, np.array([abs(scale) / self.reach]))[:, 0]
        here = [each for each in self.seen if each.scale == scale]
        hits, total = sum(each.hits for each in here), sum(each.questions for each in here)
        return beta_draws(hits, total)

    def mean(self, scale: float) -> float:
        """Return the expected rate at a scale."""
        return float(self.draws(scale).mean())


def beta_draws(hits: float, total: float, seed: int = 0) -> Floats:
    """Return rates, (DRAWS,), of which `hits` of `total` questions tell: Beta(hits + 1/2, misses + 1/2), Jeffreys."""
    return np.random.default_rng(seed).beta(hits + 0.5, total - hits + 0.5, size=DRAWS)


@lru_cache(maxsize=64)
def fit(seen: tuple[Seen, ...], reach: float) -> Response:
    """Return what observations at scales of one sign, `tuned` at 0 among them, say of every scale up to `reach`."""
    at = np.array([abs(each.scale) / reach for each in seen])
    hits = np.array([each.hits for each in seen])
    misses = np.array([float(each.questions) for each in seen]) - hits

    def log_density(curves: Floats) -> Floats:
        rates = np.clip(_rates(curves, at), 1e-12, 1 - 1e-12)
        found: Floats = np.log(rates) @ hits + np.log1p(-rates) @ misses + _log_prior(curves)
        return found

    curves = _walk(_starts(log_density), log_density)
    return Response(seen=seen, smooth=_holds(_rates(curves, at), hits, misses), curves=curves, reach=reach)


def _holds(rates: Floats, hits: Floats, misses: Floats) -> bool:
    """Whether every observation is one that the drawn curves, (DRAWS, scales), would give: two-sided, predictive."""
    expected = np.random.default_rng(0).binomial(np.round(hits + misses).astype(np.int64), np.tile(rates, (10, 1)))
    tails = np.minimum((expected <= np.ceil(hits)).mean(axis=0), (expected >= np.floor(hits)).mean(axis=0))
    return bool((2 * tails >= UNLIKELY).all())


def _starts(log_density: Callable[[Floats], Floats]) -> Floats:
    """Return where the walkers begin, (4, DRAWS): on a coarse grid of curves, as often as they are likely."""
    ends = np.linspace(-6, 6, 9)
    axes = np.meshgrid(ends, ends, np.log(np.geomspace(*STEEPNESS, 7))[1:-1], np.linspace(*MIDDLE, 12)[1:-1])
    grid = np.stack([axis.ravel() for axis in axes])
    logs = log_density(grid)
    weights = np.exp(logs - logs.max())
    rng = np.random.default_rng(0)
    # Walkers must differ in every direction, or they stay in the plane that they lie in.
    return grid[:, rng.choice(len(logs), size=DRAWS, p=weights / weights.sum())] + rng.normal(0, 0.02, (4, DRAWS))


def _walk(walkers: Floats, log_density: Callable[[Floats], Floats]) -> Floats:
    """Return walkers, (4, DRAWS), after STEPS stretch moves of one half along lines through the other."""
    rng = np.random.default_rng(1)
    halves = [walkers[:, ::2], walkers[:, 1::2]]
    logs = [log_density(half) for half in halves]
    for step in range(2 * STEPS):
        mine, other = step % 2, 1 - step % 2
        count = halves[mine].shape[1]
        partners = halves[other][:, rng.integers(count, size=count)]
        z = ((STRETCH - 1) * rng.random(count) + 1) ** 2 / STRETCH
        moved = partners + z * (halves[mine] - partners)
        new = log_density(moved)
        taken = np.log(rng.random(count)) < (len(moved) - 1) * np.log(z) + new - logs[mine]
        halves[mine] = np.where(taken, moved, halves[mine])
        logs[mine] = np.where(taken, new, logs[mine])
    return np.concatenate(halves, axis=1)


def _log_prior(curves: Floats) -> Floats:
    """Return the logarithm of the prior's density, but for a constant: -inf outside of it."""
    ends, steepness, middle = curves[:2], curves[2], curves[3]
    # Beta(1/2, 1/2) in p is sqrt(p (1 - p)) in log(p / (1 - p)).
    found: Floats = -0.5 * (np.logaddexp(0, ends) + np.logaddexp(0, -ends)).sum(axis=0)
    inside = (steepness > math.log(STEEPNESS[0])) & (steepness < math.log(STEEPNESS[1]))
    inside &= (middle > MIDDLE[0]) & (middle < MIDDLE[1])
    return np.where(inside, found, -np.inf)


def _rates(curves: Floats, at: Floats) -> Floats:
    """Return the rate of every curve at shares of the range, (curves, places).

    Curves are log-odds of start and end, logarithm of the steepness, middle: (4, curves).
    """
    start, end = (1 / (1 + np.exp(-axis[:, np.newaxis])) for axis in curves[:2])
    steepness, middle = np.exp(curves[2])[:, np.newaxis], curves[3][:, np.newaxis]
    found: Floats = end + (start - end) / (1 + np.exp(np.clip(steepness * (at[np.newaxis] - middle), -500, 500)))
    return found
