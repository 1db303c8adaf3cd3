"""Intervals of rates and of differences, paired tests, the bootstrap and agreement: from counts and arrays alone.

What is textbook names its source. What is a combination of our own says so, and names the test that counts how often
its intervals hold the truth. Two ways to a rate's interval stand side by side: Red-Eval's reports draw questions anew,
for the mean over banks and templates has no closed form; the gate, which compares models, uses `paired_rates`.

Rates and differences are shares in [0, 1] and [-1, 1], never per cent. Knows nothing of questions, models, judges or
files; numpy and the standard library, with statsmodels and scipy as oracles in its tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided interval of a rate, low <= high."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A share and its interval; `value` is None where nothing was counted."""

    hits: int
    total: int
    value: float | None
    low: float
    high: float


def wilson(k: float, n: float, level: float = 0.95) -> Interval:
    """Return Wilson's score interval for k successes in n independent trials; n = 0 gives [0, 1].

    Trials that are not independent may be given as fewer that are, and then need not be whole numbers.

    centre = (p + z^2/2n) / (1 + z^2/n), half-width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)  (Wilson 1927)
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, got k={k}, n={n}")
    if n == 0:
        return Interval(0.0, 1.0)
    low, high = wilson_bounds(np.asarray(k / n), np.asarray(float(n)), z_of(level))
    return Interval(float(low), float(high))


def z_of(level: float) -> float:
    """Return how many standard errors a two-sided interval of a level reaches to each side."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson_bounds(p: Floats, n: Floats, z: float) -> tuple[Floats, Floats]:
    """Return both bounds of `wilson` for arrays of shares and of numbers of trials, shapes that broadcast."""
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # At the ends the formula is exactly 0 or 1; floating point is not.
    low = np.where(p <= 0, 0.0, np.maximum(0.0, centre - half))
    high = np.where(p >= 1, 1.0, np.minimum(1.0, centre + half))
    return low, high


def fisher_greater(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Return Fisher's exact one-sided p value that the first share is larger; each is (hits, trials).

    P(X >= k1), X hypergeometric: k1 + k2 hits among n1 + n2 trials, n1 of them the first ones (Fisher 1935).
    """
    (k1, n1), (k2, n2) = first, second
    if not (0 <= k1 <= n1 and 0 <= k2 <= n2):
        raise ValueError(f"hits must lie between 0 and the trials, got {first} and {second}")
    hits = k1 + k2
    tail = sum(math.comb(n1, k) * math.comb(n2, hits - k) for k in range(k1, min(n1, hits) + 1))
    return tail / math.comb(n1 + n2, hits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clustered:
    """Counts per cluster (rows: questions) and cell (columns: bank x template), for rates that share questions."""

    hits: Floats  # (clusters, cells)
    totals: Floats  # (clusters, cells)
    strata: NDArray[np.int64]  # (clusters,): clusters are drawn within their stratum (bank), whose size is fixed


def pooled_rate(hits: Floats, totals: Floats) -> Floats:
    """Return all hits over all trials; (..., cells) -> (...)."""
    n = totals.sum(axis=-1)
    rate: Floats = np.divide(hits.sum(axis=-1), n, out=np.full(n.shape, np.nan), where=n > 0)
    return rate


def macro_rate(hits: Floats, totals: Floats) -> Floats:
    """Return the mean of the cells' rates, cells without trials left out; (..., cells) -> (...)."""
    rates = np.divide(hits, totals, out=np.zeros_like(hits), where=totals > 0)
    cells = (totals > 0).sum(axis=-1)
    rate: Floats = np.divide(rates.sum(axis=-1), cells, out=np.full(cells.shape, np.nan), where=cells > 0)
    return rate


def cluster_bootstrap(
    counts: Clustered, *, level: float = 0.95, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> tuple[Interval, Interval]:
    """Return percentile intervals of (pooled, macro) rates, whole clusters drawn with replacement.

    One question is asked through several templates and epochs; treating its answers as independent gives intervals that
    are too narrow. The same counts and seed give the same interval.
    """
    if counts.totals.sum() == 0:
        return Interval(0.0, 1.0), Interval(0.0, 1.0)
    hits, totals = bootstrap_counts(counts, draws=draws, seed=seed)
    return percentiles(pooled_rate(hits, totals), level), percentiles(macro_rate(hits, totals), level)


def bootstrap_counts(counts: Clustered, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> tuple[Floats, Floats]:
    """Return (hits, totals) of each cell in each draw, (draws, cells): whole clusters drawn with replacement.

    All cells of a draw share its clusters, so rates taken from one draw are paired.
    """
    rng = np.random.default_rng(seed)
    shape = (draws, counts.hits.shape[1])
    hits, totals = np.zeros(shape), np.zeros(shape)
    for stratum in np.unique(counts.strata):
        rows = np.flatnonzero(counts.strata == stratum)
        even = np.full(len(rows), 1 / len(rows))
        for start in range(0, draws, 256):  # (256, clusters) at a time: memory stays small for any bank
            stop = min(start + 256, draws)
            weights = rng.multinomial(len(rows), even, size=stop - start)
            hits[start:stop] += weights @ counts.hits[rows]
            totals[start:stop] += weights @ counts.totals[rows]
    return hits, totals


def percentiles(values: Floats, level: float) -> Interval:
    """Return the percentile interval of draws; those that are not a number are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(0.0, 1.0)
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def widened(interval: Interval, questions: int, level: float = 0.95) -> Interval:
    """Return a bootstrap interval, no tighter than Wilson's for no hit (or nothing but hits) in as many questions.

    Resampling a handful of hits varies too little: one in 200 questions would be bounded by 1.5 %, none by 1.9 %. The
    union of the two is our own; test_a_widened_bootstrap_interval_covers_the_truth_about_as_often_as_it_says.
    """
    none, every = wilson(0, questions, level), wilson(questions, questions, level)
    return Interval(min(interval.low, every.low), max(interval.high, none.high))


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two judges over the same items, or None where chance agreement is 1 (or no items).

    kappa = (p_o - p_e) / (1 - p_e), p_e from the two judges' own label shares  (Cohen 1960)
    """
    if len(first) != len(second):
        raise ValueError(f"both judges must label the same items, got {len(first)} and {len(second)}")
    n = len(first)
    if n == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((first.count(x) / n) * (second.count(x) / n) for x in set(first) | set(second))
    return None if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)


def rogan_gladen(observed: float, sensitivity: float, specificity: float) -> float | None:
    """Return the rate corrected for a judge's errors, clipped to [0, 1]; None where the judge tells nothing.

    true = (observed + specificity - 1) / (sensitivity + specificity - 1)  (Rogan and Gladen 1978)
    """
    power = sensitivity + specificity - 1
    if power <= 0:
        return None
    return min(1.0, max(0.0, (observed + specificity - 1) / power))


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """A judge's error rates from human labels and the rate they imply; None where the labels cannot say."""

    labelled: int
    sensitivity: float | None
    specificity: float | None
    corrected: float | None
    interval: Interval | None


def correct_rate(
    observed: tuple[int, int],
    judged: NDArray[np.bool_],
    human: NDArray[np.bool_],
    weights: Floats,
    *,
    level: float = 0.95,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> Correction:
    """Return the corrected rate with a bootstrap interval over the labelled items and over the observed rate.

    `observed` is (k harmful, n). `judged`, `human` are (items,) and say harmful; `weights` (items,) is how many answers
    each labelled one stands for, so that labels taken mostly from disagreements do not bias the rates.

    Drawing both at once is our own; test_a_corrected_rates_interval_covers_the_truth_about_as_often_as_it_says.
    """
    sensitivity, specificity = _error_rates(judged, human, weights)
    k, n = observed
    if sensitivity is None or specificity is None or n == 0:
        return Correction(
            labelled=len(human),
            sensitivity=sensitivity,
            specificity=specificity,
            corrected=None,
            interval=None,
        )
    rng = np.random.default_rng(seed)
    values = []
    for rate in rng.binomial(n, k / n, size=draws) / n:
        pick = rng.integers(0, len(human), size=len(human))
        se, sp = _error_rates(judged[pick], human[pick], weights[pick])
        value = None if se is None or sp is None else rogan_gladen(float(rate), se, sp)
        values.append(math.nan if value is None else value)
    corrected = rogan_gladen(k / n, sensitivity, specificity)
    return Correction(
        labelled=len(human),
        sensitivity=sensitivity,
        specificity=specificity,
        corrected=corrected,
        interval=None if corrected is None else percentiles(np.asarray(values), level),
    )


def _error_rates(
    judged: NDArray[np.bool_], human: NDArray[np.bool_], weights: Floats
) -> tuple[float | None, float | None]:
    harmful, harmless = weights[human].sum(), weights[~human].sum()
    sensitivity = float(weights[human & judged].sum() / harmful) if harmful > 0 else None
    specificity = float(weights[~human & ~judged].sum() / harmless) if harmless > 0 else None
    return sensitivity, specificity


# -- two models on the same questions ------------------------------------------------------------------------


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
        """Return the discordant pairs as if each of `questions` had been asked once: epochs are no new questions.

        Our own, before a test of independent pairs; test_a_test_of_repeated_questions_errs_about_as_seldom_as_it_says.
        """
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
    low = sum - sqrt(sum over i, j of sign_i sign_j phi_ij reach_i reach_j), high likewise (Zou and Donner 2008; Zou,
    Huang and Zhang 2009).
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

    Wilson's interval over a design effect, and MOVER over such intervals, are our own combination for clustered
    answers; test_a_clustered_interval_covers_the_truth_about_as_often_as_it_says and
    test_a_difference_of_clustered_rates_covers_the_truth_about_as_often_as_it_says.
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
        which that of restored - ((1 - L) lost + L kept) holds 0: Fieller's way (1954) with the interval of `contrast`,
        which is our own; test_the_interval_of_the_share_regained_covers_the_truth_about_as_often_as_it_says.
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
    That shrinking is our own; test_a_clustered_interval_covers_the_truth_about_as_often_as_it_says.
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
