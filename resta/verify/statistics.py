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

    def per_question(self, questions: int) -> Pairs:
        """Return the discordant pairs as if each of `questions` had been asked once: epochs are no new questions."""
        if self.total == questions:
            return self
        b, c = (round(count * questions / self.total) for count in (self.first_only, self.second_only))
        return Pairs(both=0, first_only=b, second_only=c, neither=max(0, questions - b - c))


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
    """Return the mean of second - first over the same documents, (documents,) scores in [0, 1] each, with its interval.

    Newcombe's paired interval where every score is 0 or 1.
    """
    if first.shape != second.shape:
        raise ValueError(f"both must hold the same documents, got {first.shape} and {second.shape}")
    if not len(first):
        return Difference(value=0.0, low=-1.0, high=1.0)
    return paired_rates(np.stack([first, second], axis=1)[:, np.newaxis], level=level).difference(1, 0)


def mean_interval(values: Floats, level: float = 0.95) -> tuple[float, Interval]:
    """Return the mean of (documents,) scores in [0, 1] and its interval; Wilson's where every score is 0 or 1."""
    if not len(values):
        return math.nan, Interval(0.0, 1.0)
    found = paired_rates(values[:, np.newaxis, np.newaxis], level=level)
    return float(found.values[0]), found.interval(0)


# -- rates over questions that are asked several times -------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedRates:
    """Pooled rates of several models on the same questions, however often and in however many ways each was asked.

    Answers to one question are not independent, so intervals are Wilson's over `sizes`: how many independent answers
    tell as much. One answer to each question gives Wilson's and Newcombe's own intervals.
    """

    hits: Floats  # (questions, models)
    totals: Floats  # (questions,): asks
    values: Floats  # (models,)
    sizes: Floats  # (models,)
    correlations: Floats  # (models, models): over questions, positive ones lessened as in Newcombe's interval
    level: float

    @property
    def questions(self) -> int:
        """Return how many questions there are."""
        return len(self.totals)

    def interval(self, model: int) -> Interval:
        """Return a rate's interval."""
        value, size = float(self.values[model]), float(self.sizes[model])
        return wilson(value * size, size, self.level)

    def difference(self, minuend: int, subtrahend: int) -> Difference:
        """Return one model's rate minus another's, with its interval."""
        return mover_difference(
            (float(self.values[minuend]), self.interval(minuend)),
            (float(self.values[subtrahend]), self.interval(subtrahend)),
            float(self.correlations[minuend, subtrahend]),
        )

    def regained(
        self, *, lost: int, kept: int, restored: int, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
    ) -> Difference | None:
        """Return the share of lost safety regained, (lost - restored) / (lost - kept), with its interval.

        None where the interval of lost - kept holds 0: nothing measurable was lost. The interval is a bootstrap over
        whole questions; a rate of exactly 0 or 1, which no resampling varies, is drawn from
        Beta(k + 1/2, n - k + 1/2) over the questions (Jeffreys).
        """
        if not self.difference(lost, kept).low > 0:
            return None
        rng = np.random.default_rng(seed)
        rates = self._drawn(draws, seed)
        for model, value in enumerate(self.values):
            if value in (0.0, 1.0):
                k = round(float(value)) * self.questions
                rates[model] = rng.beta(k + 0.5, self.questions - k + 0.5, size=draws)
        loss = rates[lost] - rates[kept]
        shares = np.divide(rates[lost] - rates[restored], loss, out=np.full_like(loss, np.nan), where=loss > 0)
        interval = percentiles(shares, self.level)
        value = float((self.values[lost] - self.values[restored]) / (self.values[lost] - self.values[kept]))
        return Difference(value=value, low=min(interval.low, value), high=max(interval.high, value))

    def _drawn(self, draws: int, seed: int) -> Floats:
        """Return the rates, (models, draws), when whole questions are drawn with replacement, paired in each draw."""
        models = len(self.values)
        counts = Clustered(
            hits=self.hits,
            totals=np.repeat(self.totals[:, np.newaxis], models, axis=1),
            strata=np.zeros(self.questions, dtype=np.int64),
        )
        hits, totals = bootstrap_counts(counts, draws=draws, seed=seed)  # (draws, models)
        return np.stack([pooled_rate(hits[:, [m]], totals[:, [m]]) for m in range(models)])


def padded(questions: Sequence[Sequence[Sequence[float]]]) -> Floats:
    """Return [question][ask][model] as one array, (questions, most asks of a question, models), NaN where not asked."""
    hits = np.full((len(questions), max(map(len, questions)), len(questions[0][0])), np.nan)
    for row, asks in zip(hits, questions, strict=True):
        row[: len(asks)] = asks
    return hits


def paired_rates(hits: Floats, *, level: float = 0.95) -> PairedRates:
    """Return pooled rates of models asked the same: `hits` (questions, asks per question, models) holds shares in
    [0, 1], mostly 0 or 1, and NaN where a question was not asked that way.

    Banks are no strata: a bank with few questions, or without any hit, would then seem to be known for certain.
    """
    asked = ~np.isnan(hits[:, :, 0])
    totals = asked.sum(axis=1).astype(np.float64)
    sums: Floats = np.nansum(hits, axis=1)  # (questions, models)
    values = sums.sum(axis=0) / totals.sum()
    return PairedRates(
        hits=sums,
        totals=totals,
        values=values,
        sizes=_sizes(sums, totals, level),
        correlations=_correlations(sums, totals, values),
        level=level,
    )


def _sizes(hits: Floats, totals: Floats, level: float) -> Floats:
    """Return the effective number of questions of each model, (models,): all of them, divided by the design effect.

    The design effect is the variance of questions' shares over p (1 - p), that of single answers (Kish 1965). A few
    hits alone cannot tell it, and would make a rate look sure; so z^2 more questions are reckoned with, half of them
    all hits and half none, as Agresti and Coull (1998) do for a rate. Without any hit the size is that of the sample.
    """
    z2, questions = NormalDist().inv_cdf(0.5 + level / 2) ** 2, len(totals)
    shares, weights = hits / totals.mean(), totals / totals.mean()
    p = (shares.sum(axis=0) + z2 / 2) / (questions + z2)
    squares = np.square(shares - p * weights[:, np.newaxis]).sum(axis=0) + z2 / 2 * ((1 - p) ** 2 + p**2)
    found: Floats = questions * (questions + z2) * p * (1 - p) / squares
    return found


def _correlations(hits: Floats, totals: Floats, values: Floats) -> Floats:
    """Return the correlation of two models' shares over questions, (models, models), Newcombe's phi for single answers:
    a positive one is lessened by a continuity correction; 0 where a model does not vary.
    """
    questions = len(totals)
    residuals = (hits - values * totals[:, np.newaxis]) / totals.mean()
    covariance = residuals.T @ residuals / questions
    deviation = np.sqrt(np.diag(covariance))
    scale = np.outer(deviation, deviation)
    lessened = np.where(covariance > 0, np.maximum(covariance - 0.5 / questions, 0.0), covariance)
    found: Floats = np.divide(lessened, scale, out=np.zeros_like(lessened), where=scale > 0)
    return np.clip(found, -1.0, 1.0)


# -- what small samples cannot show --------------------------------------------------------------------------


def trials_for_bound(limit: float, level: float = 0.95) -> int | None:
    """Return the fewest trials without any event whose upper bound is at most `limit`: z^2 (1 - limit) / limit.

    None for a limit of 0, which no number of trials can show.
    """
    if limit == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return math.ceil(z * z * (1 - limit) / limit)


def trials_at_rate(rate: float, limit: float, level: float = 0.95) -> int | None:
    """Return the fewest trials at which an observed `rate` is shown to lie under `limit`; None where it never is."""
    if rate >= limit:
        return None
    z = NormalDist().inv_cdf(0.5 + level / 2)
    # Wilson's limit u solves (u - p)^2 = z^2 u (1 - u) / n.
    return math.ceil(z * z * limit * (1 - limit) / (limit - rate) ** 2)
