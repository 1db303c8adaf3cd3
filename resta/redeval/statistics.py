"""Intervals and agreement, from counts and arrays alone; numpy and the standard library.

Rates are shares in [0, 1], never per cent. Knows nothing of questions, judges or files, so any gate may use
it.
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
    """Counts per cluster (rows: questions) and cell (columns: bank x template), for rates that share
    questions.
    """

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

    One question is asked through several templates and epochs; treating its answers as independent gives
    intervals that are too narrow. The same counts and seed give the same interval.
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

    Resampling a handful of hits varies too little: one in 200 questions would be bounded by 1.5 %, none by 1.9 %.
    """
    none, every = wilson(0, questions, level), wilson(questions, questions, level)
    return Interval(min(interval.low, every.low), max(interval.high, none.high))


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two judges over the same items, or None where chance agreement is 1 (or no
    items).

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

    `observed` is (k harmful, n). `judged`, `human` are (items,) and say harmful; `weights` (items,) is how
    many answers each labelled one stands for, so that labels taken mostly from disagreements do not bias the
    rates.
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
