"""Comparing two models on the same questions or documents: from counts and arrays alone.

Differences are shares in [-1, 1]. Knows nothing of models, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from resta.redeval.statistics import (
    BOOTSTRAP_DRAWS,
    Clustered,
    Floats,
    Interval,
    bootstrap_counts,
    percentiles,
    pooled_rate,
    wilson,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A difference of two rates and its interval, low <= value <= high."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """A 2 x 2 table of pairs: what happened under the first condition, the second, both or neither."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def total(self) -> int:
        """Return how many pairs there are."""
        return self.both + self.first_only + self.second_only + self.neither


def count_pairs(first: Sequence[bool], second: Sequence[bool]) -> Pairs:
    """Return the table of two equally long sequences."""
    pairs = list(zip(first, second, strict=True))
    return Pairs(
        both=sum(a and b for a, b in pairs),
        first_only=sum(a and not b for a, b in pairs),
        second_only=sum(b and not a for a, b in pairs),
        neither=sum(not a and not b for a, b in pairs),
    )


def mcnemar_mid_p(pairs: Pairs) -> float:
    """Return the two-sided mid-p value of McNemar's test; 1 where no pair is discordant.

    X ~ Binomial(b + c, 1/2), k = min(b, c): p = min(1, 2 P(X <= k) - P(X = k))   (Fagerland et al. 2013)
    """
    b, c = pairs.first_only, pairs.second_only
    n, k = b + c, min(b, c)
    # Whole numbers until the end: no table is too large for them.
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float((2 * tail - math.comb(n, k)) / 2**n))


def paired_difference(pairs: Pairs, level: float = 0.95) -> Difference:
    """Return second minus first of two paired rates, with Newcombe's interval (1998, method 10).

    Wilson's limits of each rate, joined by their correlation; sound at 0 and 1, where a normal interval has no width.
    """
    n = pairs.total
    if n == 0:
        return Difference(value=0.0, low=-1.0, high=1.0)
    first, second = pairs.both + pairs.first_only, pairs.both + pairs.second_only
    return mover_difference(
        (second / n, wilson(second, n, level)), (first / n, wilson(first, n, level)), _newcombe_phi(pairs)
    )


def _newcombe_phi(pairs: Pairs) -> float:
    """Return the correlation in a 2 x 2 table; a positive one is lessened by a continuity correction."""
    a, b, c, d = pairs.both, pairs.first_only, pairs.second_only, pairs.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    product = float(a * d - b * c)
    if product > 0:
        product = max(product - pairs.total / 2, 0.0)
    return product / math.sqrt(margins)


def mover_difference(
    minuend: tuple[float, Interval], subtrahend: tuple[float, Interval], correlation: float
) -> Difference:
    """Return the difference of two estimates from their own intervals and correlation.

    low = d - sqrt((p1 - l1)^2 - 2 phi (p1 - l1)(u2 - p2) + (u2 - p2)^2), high likewise   (Zou and Donner 2008)
    """
    (p1, one), (p2, two) = minuend, subtrahend

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    d = p1 - p2
    low, high = d - reach(p1 - one.low, two.high - p2), d + reach(one.high - p1, p2 - two.low)
    return Difference(value=d, low=max(-1.0, low), high=min(1.0, high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given.

    Sorted ascending, the i-th of m is max over j <= i of min(1, (m - j + 1) p_j)   (Holm 1979)
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def mean_difference(first: Floats, second: Floats, level: float = 0.95) -> Difference:
    """Return the mean of second - first over the same documents, (documents,) each, with its interval.

    Newcombe's paired interval where every value is 0 or 1, else Student's t on the differences.
    """
    if first.shape != second.shape:
        raise ValueError(f"both must hold the same documents, got {first.shape} and {second.shape}")
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return paired_difference(count_pairs(first.astype(bool).tolist(), second.astype(bool).tolist()), level)
    value, half = _student(second - first, level)
    return Difference(value=value, low=value - half, high=value + half)


def mean_interval(values: Floats, level: float = 0.95) -> tuple[float, Interval]:
    """Return the mean of (documents,) values and its interval: Wilson's for 0 and 1, else Student's t."""
    if np.isin(values, (0, 1)).all():
        k, n = int(values.sum()), len(values)
        return (k / n if n else math.nan), wilson(k, n, level)
    value, half = _student(values, level)
    return value, Interval(value - half, value + half)


FEWEST = 10  # values below which the expansion for Student's t is not good to a hundredth, and nothing is said


def _student(values: Floats, level: float) -> tuple[float, float]:
    """Return mean and half-width of its interval, infinite for under ten values."""
    n = len(values)
    if n < FEWEST:
        return (float(values.mean()) if n else math.nan), math.inf
    return float(values.mean()), student_quantile(0.5 + level / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)


def student_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t for nine or more degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(freedom) ** (i + 1) for i, term in enumerate(terms))


# -- rates over questions that are asked several times -------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedRates:
    """Pooled rates of several models on the same questions, and bootstrap draws that keep the questions paired."""

    values: Floats  # (models,)
    draws: Floats  # (models, draws)
    questions: int
    level: float

    def interval(self, model: int) -> Interval:
        """Return a rate's bootstrap interval; at 0 and 1, where no draw differs, Wilson's over the questions."""
        value = float(self.values[model])
        if value in (0.0, 1.0):
            return wilson(round(value) * self.questions, self.questions, self.level)
        return percentiles(self.draws[model], self.level)

    def difference(self, minuend: int, subtrahend: int) -> Difference:
        """Return one model's rate minus another's, with its interval."""
        one, two = self.draws[minuend], self.draws[subtrahend]
        varied = one.std() > 0 and two.std() > 0
        return mover_difference(
            (float(self.values[minuend]), self.interval(minuend)),
            (float(self.values[subtrahend]), self.interval(subtrahend)),
            float(np.corrcoef(one, two)[0, 1]) if varied else 0.0,
        )

    def regained(self, *, lost: int, kept: int, restored: int, seed: int = 0) -> Difference | None:
        """Return the share of lost safety regained, (lost - restored) / (lost - kept), with its interval.

        None where the interval of lost - kept holds 0: nothing measurable was lost. A rate of exactly 0 or 1, which
        no resampling varies, is drawn from Beta(k + 1/2, n - k + 1/2) over the questions (Jeffreys).
        """
        if not self.difference(lost, kept).low > 0:
            return None
        rng = np.random.default_rng(seed)
        draws = self.draws.copy()
        for model, value in enumerate(self.values):
            if value in (0.0, 1.0):
                k = round(float(value)) * self.questions
                draws[model] = rng.beta(k + 0.5, self.questions - k + 0.5, size=draws.shape[1])
        loss = draws[lost] - draws[kept]
        shares = np.divide(draws[lost] - draws[restored], loss, out=np.full_like(loss, np.nan), where=loss > 0)
        interval = percentiles(shares, self.level)
        value = float((self.values[lost] - self.values[restored]) / (self.values[lost] - self.values[kept]))
        return Difference(value=value, low=min(interval.low, value), high=max(interval.high, value))


def paired_rates(
    hits: Floats, strata: Sequence[int], *, level: float = 0.95, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> PairedRates:
    """Return pooled rates of models asked the same: `hits` (questions, asks per question, models) holds 0, 1, or NaN
    where a question was not asked that way; strata (questions,) are banks.
    """
    questions, _, models = hits.shape
    asked = ~np.isnan(hits)
    counts = Clustered(
        hits=np.nansum(hits, axis=1),  # (questions, models)
        totals=asked.sum(axis=1).astype(np.float64),
        strata=np.asarray(strata, dtype=np.int64),
    )
    drawn_hits, drawn_totals = bootstrap_counts(counts, draws=draws, seed=seed)  # (draws, models)
    return PairedRates(
        values=np.array([float(pooled_rate(counts.hits[:, m], counts.totals[:, m])) for m in range(models)]),
        draws=np.stack([pooled_rate(drawn_hits[:, [m]], drawn_totals[:, [m]]) for m in range(models)]),
        questions=questions,
        level=level,
    )


# -- what small samples cannot show --------------------------------------------------------------------------


def trials_for_bound(limit: float, level: float = 0.95) -> int:
    """Return the fewest trials without any event whose upper bound is at most `limit`: z^2 (1 - limit) / limit."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return math.ceil(z * z * (1 - limit) / limit)


def trials_at_rate(rate: float, limit: float, level: float = 0.95) -> int | None:
    """Return the fewest trials at which an observed `rate` is shown to lie under `limit`; None where it never is."""
    if rate >= limit:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    # Wilson's limit u solves (u - p)^2 = z^2 u (1 - u) / n.
    return math.ceil(z * z * limit * (1 - limit) / (limit - rate) ** 2)
