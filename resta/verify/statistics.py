"""Comparing two models on the same questions or documents: from counts and arrays alone.

Differences are shares in [-1, 1]. Knows nothing of models, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resta.redeval.statistics import Floats, Interval, wilson_bounds, z_of


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


def mover(
    coefficients: Sequence[float], values: Floats, bounds: tuple[Floats, Floats], correlations: Floats
) -> tuple[Floats, Floats]:
    """Return the bounds, (...), of a sum of coefficients times estimates, from their own bounds and correlations.

    `values` and both `bounds` are (..., estimates), `correlations` (..., estimates, estimates). With reach_i the
    distance of coefficient times estimate i to its own lower bound (its upper one where the coefficient is negative):
    low = sum - sqrt(sum over i, j of sign_i sign_j phi_ij reach_i reach_j), high likewise
    (Zou and Donner 2008; Zou, Huang and Zhang 2009).
    """
    c = np.asarray(coefficients)
    low, high = bounds
    down, up = c * (values - np.where(c >= 0, low, high)), c * (np.where(c >= 0, high, low) - values)
    centre = (c * values).sum(axis=-1)
    phi = correlations * np.outer(np.sign(c), np.sign(c)) * (1 - np.eye(len(c))) + np.eye(len(c))

    def reach(x: Floats) -> Floats:
        found: Floats = np.sqrt(np.maximum(0.0, np.einsum("...i,...ij,...j->...", np.abs(x), phi, np.abs(x))))
        return found

    return (
        np.maximum(c[c < 0].sum(), centre - reach(down)),
        np.minimum(c[c > 0].sum(), centre + reach(up)),
    )


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


# -- rates over questions that are asked several times -------------------------------------------------------

# What is supposed of how alike answers to one question are before any is seen: an intraclass correlation, worth as many
# hits. Our own choice, between what is usual and the worst; benchmarks/gate_characteristics.py shows what comes of it.
PRIOR_ICC = 0.3
PRIOR_HITS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedRates:
    """Pooled rates of several models on the same questions, however often and in however many ways each was asked.

    Answers to one question are not independent, so intervals are Wilson's over `sizes`: how many independent answers
    tell as much. One answer to each question gives Wilson's and Newcombe's own intervals. Arrays may have leading
    dimensions, one for each of many samples; bounds then have them too.
    """

    questions: int
    answers: int  # of each model
    values: Floats  # (..., models)
    sizes: Floats  # (..., models)
    correlations: Floats  # (..., models, models): over questions, positive ones lessened as in Newcombe's interval
    level: float

    def bounds(self, level: float | None = None) -> tuple[Floats, Floats]:
        """Return the bounds of each rate, (..., models), at the level of these rates or another.

        No bound is tighter than that of as many questions, asked once, without any hit (or with nothing but hits):
        whether answers to one question are alike cannot be seen then.
        """
        z = z_of(self.level if level is None else level)
        low, high = wilson_bounds(self.values, self.sizes, z)
        _, none = wilson_bounds(np.zeros(1), np.full(1, float(self.questions)), z)
        return np.minimum(low, 1 - none), np.maximum(high, none)

    def interval(self, model: int, level: float | None = None) -> Interval:
        """Return a rate's interval."""
        low, high = self.bounds(level)
        return Interval(float(low[model]), float(high[model]))

    def contrast_bounds(self, coefficients: Sequence[float], level: float | None = None) -> tuple[Floats, Floats]:
        """Return the bounds, (...), of a sum of coefficients, one for each model, times rates."""
        return mover(coefficients, self.values, self.bounds(level), self.correlations)

    def contrast(self, coefficients: Sequence[float], level: float | None = None) -> Difference:
        """Return a sum of coefficients, one for each model, times rates, with its interval."""
        low, high = self.contrast_bounds(coefficients, level)
        value = float((np.asarray(coefficients) * self.values).sum())
        return Difference(value=value, low=min(float(low), value), high=max(float(high), value))

    def difference(self, minuend: int, subtrahend: int) -> Difference:
        """Return one model's rate minus another's, with its interval."""
        coefficients = np.zeros(len(self.values))
        coefficients[minuend], coefficients[subtrahend] = 1.0, -1.0
        return self.contrast(coefficients.tolist())

    def p_above(self, coefficients: Sequence[float], limit: float) -> float:
        """Return the one-sided p value of a contrast being at most `limit`: where its lower bound meets the limit."""
        return _p_above(self, coefficients, limit)

    def regained(self, *, lost: int, kept: int, restored: int) -> Difference | None:
        """Return the share of lost safety regained, (lost - restored) / (lost - kept), with its interval.

        None where the interval of lost - kept holds 0: nothing measurable was lost. The interval holds the shares L at
        which that of restored - ((1 - L) lost + L kept) holds 0 (Fieller 1954).
        """
        loss = self.difference(lost, kept)
        if not loss.low > 0:
            return None
        value = float(self.values[lost] - self.values[restored]) / loss.value

        def bound(side: int) -> float:
            # Beyond `outer` on this side every share is excluded; between, one change.
            outer, inner = value + (-1 if side else 1) * (1 + abs(value)) * 2 / loss.low, value
            for _ in range(60):
                middle = (outer + inner) / 2
                edge = self.contrast_bounds(_weighed(middle, lost, kept, restored), None)[side]
                excluded = edge < 0 if side else edge > 0
                outer, inner = (middle, inner) if excluded else (outer, middle)
            return inner

        return Difference(value=value, low=bound(1), high=bound(0))


def _weighed(share: float, lost: int, kept: int, restored: int) -> list[float]:
    """Return the coefficients of restored - ((1 - share) lost + share kept)."""
    found = [0.0] * 3
    found[lost], found[kept], found[restored] = share - 1, -share, 1.0
    return found


def padded(questions: Sequence[Sequence[Sequence[float]]]) -> Floats:
    """Return [question][ask][model] as one array, (questions, most asks of a question, models), NaN where not asked."""
    hits = np.full((len(questions), max(map(len, questions)), len(questions[0][0])), np.nan)
    for row, asks in zip(hits, questions, strict=True):
        row[: len(asks)] = asks
    return hits


def paired_rates(hits: Floats, *, level: float = 0.95) -> PairedRates:
    """Return pooled rates of models asked the same: `hits` (..., questions, asks per question, models) holds shares in
    [0, 1], mostly 0 or 1, and NaN where a question was not asked that way.

    Banks are no strata: a bank with few questions, or without any hit, would then seem to be known for certain.
    """
    asked = ~np.isnan(hits[..., 0])
    first = asked.reshape(-1, *asked.shape[-2:])[0]  # samples are of the same asks
    totals = first.sum(axis=1).astype(np.float64)
    sums: Floats = np.nansum(hits, axis=-2)  # (..., questions, models)
    squares: Floats = np.nansum(np.square(hits), axis=(-3, -2))
    values = sums.sum(axis=-2) / totals.sum()
    residuals = (sums - values[..., np.newaxis, :] * totals[:, np.newaxis]) / totals.mean()
    sizes = _sizes(values, squares / totals.sum(), residuals, totals)
    return PairedRates(
        questions=len(totals),
        answers=round(totals.sum()),
        values=values,
        sizes=sizes,
        correlations=_correlations(residuals, sizes),
        level=level,
    )


def _sizes(values: Floats, squares: Floats, residuals: Floats, totals: Floats) -> Floats:
    """Return how many independent answers of 0 or 1 tell as much as those of each model, (..., models).

    The answers, divided by the design effect 1 + (m - 1) ICC of m answers to a question (Kish 1965), and by the share
    that the variance of graded answers is of p (1 - p). Few hits tell neither, and would make a rate look sure: both
    are means of what is seen, weighed by the rarer outcome's count, and of what is supposed, weighed by PRIOR_HITS.
    """
    questions, answers = len(totals), totals.sum()
    binary = values * (1 - values)
    rarer = np.minimum(values, 1 - values) * answers
    weight = rarer / (rarer + PRIOR_HITS)
    spread = np.divide(squares - values**2, binary, out=np.ones_like(values), where=binary > 0)
    spread = 1 + weight * (spread - 1)
    asks = totals.mean()
    if asks == 1:
        found: Floats = answers / spread
        return found
    variance = asks * np.square(residuals).sum(axis=-2) / max(1, questions - 1)
    each = squares - values**2
    icc = (np.divide(variance, each, out=np.ones_like(values), where=each > 1e-12) - 1) / (asks - 1)
    icc = PRIOR_ICC + weight * (np.clip(icc, 0.0, 1.0) - PRIOR_ICC)
    return np.asarray(answers / (spread * (1 + (asks - 1) * icc)))


def _correlations(residuals: Floats, sizes: Floats) -> Floats:
    """Return the correlation of two models' shares over questions, (..., models, models), Newcombe's phi for single
    answers: a positive one is lessened by a continuity correction; 0 where a model does not vary.

    `residuals` (..., questions, models) are the questions' shares minus the rate.
    """
    questions = residuals.shape[-2]
    covariance = np.swapaxes(residuals, -1, -2) @ residuals / questions
    deviation = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    scale = deviation[..., :, np.newaxis] * deviation[..., np.newaxis, :]
    # Half a pair of single answers, of which there are `sizes`; a question's share varies less by questions / sizes.
    correction = 0.5 * questions / (sizes[..., :, np.newaxis] * sizes[..., np.newaxis, :])
    lessened = np.where(covariance > 0, np.maximum(covariance - correction, 0.0), covariance)
    found: Floats = np.divide(lessened, scale, out=np.zeros_like(lessened), where=scale > 0)
    return np.clip(found, -1.0, 1.0)


# -- means without bounds ------------------------------------------------------------------------------------

FEWEST = 5  # documents, or documents that differ, under which their spread is not known well enough to say anything


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedMeans:
    """Mean values of several models on the same documents, where no bounds are known: losses, errors.

    Intervals are Student's, of a contrast over its own value in each document.
    """

    scores: Floats  # (documents, models)
    level: float

    @property
    def questions(self) -> int:
        """Return how many documents there are."""
        return len(self.scores)

    @property
    def answers(self) -> int:
        """Return how many values each model has."""
        return len(self.scores)

    @property
    def values(self) -> Floats:
        """Return the means, (models,)."""
        found: Floats = self.scores.mean(axis=0)
        return found

    def interval(self, model: int, level: float | None = None) -> Interval:
        """Return a mean's interval."""
        coefficients = [float(i == model) for i in range(self.scores.shape[1])]
        low, high = self.contrast_bounds(coefficients, level)
        return Interval(low, high)

    def contrast_bounds(self, coefficients: Sequence[float], level: float | None = None) -> tuple[float, float]:
        """Return the bounds of a sum of coefficients, one for each model, times means."""
        each = self.scores @ np.asarray(coefficients)
        if len(each) < FEWEST or 0 < np.count_nonzero(each) < FEWEST:
            return -math.inf, math.inf
        reach = student(self.level if level is None else level, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each))
        return float(each.mean() - reach), float(each.mean() + reach)

    def contrast(self, coefficients: Sequence[float], level: float | None = None) -> Difference:
        """Return a sum of coefficients, one for each model, times means, with its interval."""
        low, high = self.contrast_bounds(coefficients, level)
        return Difference(value=float(self.values @ np.asarray(coefficients)), low=low, high=high)

    def difference(self, minuend: int, subtrahend: int) -> Difference:
        """Return one model's mean minus another's, with its interval."""
        coefficients = np.zeros(self.scores.shape[1])
        coefficients[minuend], coefficients[subtrahend] = 1.0, -1.0
        return self.contrast(coefficients.tolist())

    def p_above(self, coefficients: Sequence[float], limit: float) -> float:
        """Return the one-sided p value of a contrast being at most `limit`: where its lower bound meets the limit."""
        return _p_above(self, coefficients, limit)


PairedScores = PairedRates | PairedMeans


def paired_scores(values: Floats, *, shares: bool, level: float = 0.95) -> PairedScores:
    """Return mean scores of models on the same documents, `values` (documents, models): shares in [0, 1], or any."""
    return paired_rates(values[:, np.newaxis], level=level) if shares else PairedMeans(scores=values, level=level)


def student(level: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t, by Cornish and Fisher's expansion; within 1 % from 4 degrees on at
    a level of 0.95.
    """
    z = z_of(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def _p_above(paired: PairedRates | PairedMeans, coefficients: Sequence[float], limit: float) -> float:
    if (np.asarray(coefficients) * paired.values).sum() <= limit:
        return 1.0
    low, high = 0.0, 1 - 1e-15  # levels: the lower bound lies above the limit at the first
    for _ in range(60):
        middle = (low + high) / 2
        above = paired.contrast_bounds(coefficients, middle)[0] > limit
        low, high = (middle, high) if above else (low, middle)
    return (1 - low) / 2


# -- what small samples cannot show --------------------------------------------------------------------------


def trials_for_bound(limit: float, level: float = 0.95) -> int | None:
    """Return the fewest trials without any event whose upper bound is at most `limit`: z^2 (1 - limit) / limit.

    None for a limit of 0, which no number of trials can show.
    """
    if limit == 0:
        return None
    z = z_of(level)
    return math.ceil(z * z * (1 - limit) / limit)


def trials_at_rate(rate: float, limit: float, level: float = 0.95) -> int | None:
    """Return the fewest trials at which an observed `rate` is shown to lie under `limit`; None where it never is."""
    if rate >= limit:
        return None
    z = z_of(level)
    # Wilson's limit u solves (u - p)^2 = z^2 u (1 - u) / n.
    return math.ceil(z * z * limit * (1 - limit) / (limit - rate) ** 2)
