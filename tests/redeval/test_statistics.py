from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from resta.redeval.statistics import (
    Clustered,
    cluster_bootstrap,
    cohen_kappa,
    correct_rate,
    macro_rate,
    pooled_rate,
    rogan_gladen,
    wilson,
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_statsmodels(case: tuple[int, int]) -> None:
    k, n = case
    low, high = proportion_confint(k, n, method="wilson")
    interval = wilson(k, n)
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 200, 0, 1.88),
        (2, 200, 0.27, 3.57),
        (10, 200, 2.74, 8.96),
        (8, 550, 0.74, 2.84),
        (28, 550, 3.55, 7.26),
        (102, 550, 15.52, 22.01),
        (98, 1960, 4.12, 6.06),
        (25, 50, 36.6, 63.4),
    ],
)
def test_wilson_gives_the_reference_values(k: int, n: int, low: float, high: float) -> None:
    interval = wilson(k, n)
    assert 100 * interval.low == pytest.approx(low, abs=0.05)
    assert 100 * interval.high == pytest.approx(high, abs=0.05)


def test_wilson_is_exact_at_the_ends_and_refuses_nonsense() -> None:
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(6, 5)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1, max_size=60))
def test_kappa_agrees_with_statsmodels(pairs: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    table = np.array([[sum(p == (x, y) for p in pairs) for y in "ab"] for x in "ab"])
    mine = cohen_kappa(first, second)
    if mine is None:  # chance agreement is 1: both always say the same one thing
        assert len(set(first) | set(second)) == 1
    else:
        assert mine == pytest.approx(cohens_kappa(table, return_results=False), abs=1e-12)


@pytest.mark.parametrize(
    ("observed", "se", "sp", "value"),
    [(0.10, 0.9, 0.95, 0.0588), (0.05, 0.9, 0.95, 0.0), (0.02, 0.9, 0.99, 0.0112), (0.5, 0.5, 0.5, None)],
)
def test_rogan_gladen_gives_the_reference_values(observed: float, se: float, sp: float, value: float | None) -> None:
    found = rogan_gladen(observed, se, sp)
    assert found == (None if value is None else pytest.approx(value, abs=5e-5))


@given(st.floats(0, 1), st.floats(0.6, 1), st.floats(0.6, 1))
def test_rogan_gladen_undoes_what_a_judges_errors_do(true: float, se: float, sp: float) -> None:
    assert rogan_gladen(true * se + (1 - true) * (1 - sp), se, sp) == pytest.approx(true, abs=1e-9)


def counts(hits: np.ndarray, banks: int = 1) -> Clustered:
    strata = np.arange(len(hits)) % banks
    return Clustered(hits=hits.astype(float), totals=np.ones_like(hits, dtype=float), strata=strata)


def test_one_cell_of_independent_questions_agrees_with_the_binomial_oracle() -> None:
    hits = np.zeros((400, 1))
    hits[:100] = 1
    pooled, macro = cluster_bootstrap(counts(hits), draws=4000)
    oracle = np.quantile(np.random.default_rng(1).binomial(400, 0.25, 200_000) / 400, [0.025, 0.975])
    assert [pooled.low, pooled.high] == pytest.approx(oracle, abs=0.01)
    assert macro == pooled


def test_answers_that_go_together_give_a_wider_interval_than_independent_ones() -> None:
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random((100, 1)) < 0.3, 4, axis=1)
    apart = rng.permuted(together, axis=0)
    wide, _ = cluster_bootstrap(counts(together))
    narrow, _ = cluster_bootstrap(counts(apart))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_bootstrap_agrees_with_a_naive_loop() -> None:
    rng = np.random.default_rng(3)
    hits = (rng.random((60, 3)) < [0.1, 0.5, 0.8]).astype(float)
    values = []
    for _ in range(3000):
        rows = np.concatenate([rng.choice(np.flatnonzero(np.arange(60) % 2 == bank), 30) for bank in (0, 1)])
        values.append(hits[rows].mean(axis=0).mean())
    _, macro = cluster_bootstrap(counts(hits, banks=2), draws=3000)
    assert [macro.low, macro.high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.012)


def test_the_bootstrap_is_the_same_every_time_and_survives_empty_cells() -> None:
    hits = np.array([[1.0, 0.0], [0.0, 0.0]])
    totals = np.array([[1.0, 0.0], [1.0, 0.0]])
    sparse = Clustered(hits=hits, totals=totals, strata=np.zeros(2, dtype=np.int64))
    assert cluster_bootstrap(sparse) == cluster_bootstrap(sparse)
    assert pooled_rate(hits.sum(axis=0), totals.sum(axis=0)) == macro_rate(hits.sum(axis=0), totals.sum(axis=0)) == 0.5
    empty = Clustered(hits=hits * 0, totals=totals * 0, strata=np.zeros(2, dtype=np.int64))
    assert cluster_bootstrap(empty)[0].high == 1.0


def test_a_correction_from_labels_recovers_the_true_rate() -> None:
    rng = np.random.default_rng(5)
    true = rng.random(4000) < 0.3
    judged = np.where(true, rng.random(4000) < 0.8, rng.random(4000) < 0.1)
    labelled = rng.permutation(4000)[:800]
    found = correct_rate((int(judged.sum()), 4000), judged[labelled], true[labelled], np.ones(800), draws=500)
    assert found.corrected == pytest.approx(true.mean(), abs=0.04)
    assert found.interval is not None
    assert found.interval.low < true.mean() < found.interval.high
    assert found.sensitivity == pytest.approx(0.8, abs=0.06)


def test_weights_undo_a_sample_taken_mostly_from_disagreements() -> None:
    # 90 agreed answers of which 9 were labelled (weight 10), 10 disputed ones that were all labelled.
    judged = np.array([True] * 4 + [False] * 5 + [True] * 10)
    human = np.array([True] * 4 + [False] * 5 + [True] * 2 + [False] * 8)
    weights = np.array([10.0] * 9 + [1.0] * 10)
    found = correct_rate((50, 100), judged, human, weights, draws=50)
    assert found.specificity == pytest.approx(50 / 58)
    assert found.sensitivity == 1.0


def test_labels_of_one_kind_only_correct_nothing() -> None:
    harmless = np.zeros(3, dtype=bool)
    found = correct_rate((1, 10), harmless, harmless, np.ones(3))
    assert (found.sensitivity, found.corrected) == (None, None)
