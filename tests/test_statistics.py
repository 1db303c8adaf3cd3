from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from resta import statistics
from resta.statistics import (
    Clustered,
    Difference,
    Interval,
    Pairs,
    cluster_bootstrap,
    cohen_kappa,
    correct_rate,
    count_pairs,
    fisher_greater,
    holm,
    macro_rate,
    mcnemar_mid_p,
    mover,
    paired_rates,
    percentiles,
    pooled_rate,
    rogan_gladen,
    trials_at_rate,
    trials_for_bound,
    widened,
    wilson,
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_statsmodels(case: tuple[int, int]) -> None:
    k, n = case
    low, high = proportion_confint(k, n, method="wilson")
    interval = wilson(k, n)
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_fishers_p_is_that_of_scipy(k1: int, more1: int, k2: int, more2: int) -> None:
    n1, n2 = k1 + more1, k2 + more2
    expected = stats.fisher_exact([[k1, n1 - k1], [k2, n2 - k2]], alternative="greater").pvalue
    assert fisher_greater((k1, n1), (k2, n2)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second"), [((3, 2), (0, 2)), ((-1, 2), (0, 2)), ((1, 2), (3, 2)), ((1, 2), (-1, 2))]
)
def test_fishers_test_is_of_hits_among_trials(first: tuple[int, int], second: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="between 0 and the trials"):
        fisher_greater(first, second)


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.8, 0.95]))
def test_a_widened_interval_is_its_union_with_those_of_no_hit_and_of_nothing_but_hits(
    questions: int, one: float, other: float, level: float
) -> None:
    drawn = Interval(min(one, other), max(one, other))
    z2 = float(stats.norm.ppf(0.5 + level / 2)) ** 2
    none = z2 / (questions + z2)  # Wilson's upper bound of no hit
    found = widened(drawn, questions, level)
    assert (found.low, found.high) == pytest.approx((min(drawn.low, 1 - none), max(drawn.high, none)))


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


def clustered(hits: np.ndarray, banks: int = 1) -> Clustered:
    strata = np.arange(len(hits)) % banks
    return Clustered(hits=hits.astype(float), totals=np.ones_like(hits, dtype=float), strata=strata)


def test_one_cell_of_independent_questions_agrees_with_the_binomial_oracle() -> None:
    hits = np.zeros((400, 1))
    hits[:100] = 1
    pooled, macro = cluster_bootstrap(clustered(hits), draws=4000)
    oracle = np.quantile(np.random.default_rng(1).binomial(400, 0.25, 200_000) / 400, [0.025, 0.975])
    assert [pooled.low, pooled.high] == pytest.approx(oracle, abs=0.01)
    assert macro == pooled


def test_answers_that_go_together_give_a_wider_interval_than_independent_ones() -> None:
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random((100, 1)) < 0.3, 4, axis=1)
    apart = rng.permuted(together, axis=0)
    wide, _ = cluster_bootstrap(clustered(together))
    narrow, _ = cluster_bootstrap(clustered(apart))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_bootstrap_agrees_with_a_naive_loop() -> None:
    rng = np.random.default_rng(3)
    hits = (rng.random((60, 3)) < [0.1, 0.5, 0.8]).astype(float)
    values = []
    for _ in range(3000):
        rows = np.concatenate([rng.choice(np.flatnonzero(np.arange(60) % 2 == bank), 30) for bank in (0, 1)])
        values.append(hits[rows].mean(axis=0).mean())
    _, macro = cluster_bootstrap(clustered(hits, banks=2), draws=3000)
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


# -- two models on the same questions ------------------------------------------------------------------------

tables = st.builds(
    Pairs,
    both=st.integers(0, 60),
    first_only=st.integers(0, 60),
    second_only=st.integers(0, 60),
    neither=st.integers(1, 60),
)


def paired_difference(pairs: Pairs) -> Difference:
    """Return second minus first of a table, each pair one question."""
    kinds = ((1, 1), (1, 0), (0, 1), (0, 0))
    counts = (pairs.both, pairs.first_only, pairs.second_only, pairs.neither)
    hits = np.array([kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)], dtype=float)
    return paired_rates(hits.reshape(-1, 1, 2)).difference(1, 0)


def mean_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Return the mean of second - first over the same documents."""
    return paired_rates(np.stack([first, second], axis=1)[:, np.newaxis]).difference(1, 0)


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(both=pairs.both, first_only=pairs.second_only, second_only=pairs.first_only, neither=pairs.neither)


@given(tables)
def test_mid_p_is_the_exact_p_less_the_chance_of_what_was_seen(pairs: Pairs) -> None:
    b, c = pairs.first_only, pairs.second_only
    exact = mcnemar([[0, b], [c, 0]], exact=True).pvalue if b + c else 1.0
    # Where both sides are equal the exact p is cut off at 1; the mid-p formula then has room for the whole term.
    whole = 2 * stats.binom.cdf(min(b, c), b + c, 0.5)
    assert min(1.0, whole) == pytest.approx(exact)
    assert mcnemar_mid_p(pairs) == pytest.approx(min(1.0, whole - stats.binom.pmf(min(b, c), b + c, 0.5)))


@pytest.mark.parametrize(("b", "c", "p"), [(5, 0, 0.03125), (6, 0, 0.015625), (8, 2, 0.0654), (15, 6, 0.0525)])
def test_mid_p_of_published_examples(b: int, c: int, p: float) -> None:
    assert mcnemar_mid_p(Pairs(both=9, first_only=b, second_only=c, neither=1)) == pytest.approx(p, abs=5e-5)


def test_mid_p_of_a_table_too_large_for_floating_point_is_still_a_number() -> None:
    assert mcnemar_mid_p(Pairs(both=0, first_only=3000, second_only=200, neither=0)) == pytest.approx(0.0, abs=1e-300)


def test_newcombes_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II: 20, 12, 2, 16 by method 10.
    found = paired_difference(Pairs(both=20, first_only=2, second_only=12, neither=16))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0562, 0.3292), abs=5e-4)


@given(tables)
def test_a_paired_interval_holds_its_value_and_turns_with_the_order(pairs: Pairs) -> None:
    one, two = paired_difference(pairs), paired_difference(swapped(pairs))
    assert -1 <= one.low <= one.value <= one.high <= 1
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low))


def test_no_change_in_a_small_sample_is_not_shown_to_be_no_change() -> None:
    found = paired_difference(Pairs(both=0, first_only=0, second_only=0, neither=20))
    assert found.value == 0
    assert found.high == pytest.approx(proportion_confint(0, 20, method="wilson")[1])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_a_paired_interval_covers_the_truth_about_as_often_as_it_says(p: float, q: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(200):
        found = paired_rates((rng.random((60, 1, 2)) < (p, q)).astype(float)).difference(1, 0)
        covered += found.low <= q - p <= found.high
    assert covered >= 176  # 88 %: five standard deviations under 95 %


@settings(max_examples=15, deadline=None)  # each call of statsmodels collects garbage, for a third of a second
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=400, max_size=400), st.integers(0, 2**31))
def test_a_mean_of_many_graded_scores_has_students_interval(values: list[float], seed: int) -> None:
    array = np.concatenate([values, np.random.default_rng(seed).random(400)])
    found = paired_rates(array[:, np.newaxis, np.newaxis])
    mean, interval = found.values[0], found.interval(0)
    low, high = stats.t.interval(0.95, len(array) - 1, loc=array.mean(), scale=stats.sem(array))
    assert (mean, interval.low, interval.high) == pytest.approx((array.mean(), low, high), abs=2e-3)


def test_a_change_in_many_graded_scores_has_students_interval() -> None:
    rng = np.random.default_rng(0)
    first = rng.beta(2, 3, 800)
    second = np.clip(first + rng.normal(0.02, 0.1, 800), 0, 1)
    found = mean_difference(first, second)
    low, high = stats.t.interval(0.95, 799, loc=(second - first).mean(), scale=stats.sem(second - first))
    assert found.value == pytest.approx((second - first).mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


def test_a_few_graded_scores_that_agree_are_not_shown_to_agree() -> None:
    same = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = mean_difference(same, same)
    assert found.value == 0
    assert found.high > 0.1


def test_right_or_wrong_scores_are_compared_as_pairs() -> None:
    first, second = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 0, 1, 1.0])
    pairs = count_pairs(first.astype(bool).tolist(), second.astype(bool).tolist())
    assert mean_difference(first, second) == paired_difference(pairs)


def test_independent_estimates_join_as_newcombes_unpaired_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873: 56/70 - 48/80 by method 10.
    one, two = wilson(56, 70), wilson(48, 80)
    bounds = np.array([one.low, two.low]), np.array([one.high, two.high])
    found = mover((1, -1), np.array([0.8, 0.6]), bounds, np.zeros((2, 2)))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)


# -- rates over questions that are asked several times -------------------------------------------------------


def asks(rates: tuple[float, ...], questions: int, templates: int, seed: int = 0) -> np.ndarray:
    """Answers whose harm depends on the question as well as on the model: (questions, templates, models)."""
    rng = np.random.default_rng(seed)
    luck = np.repeat(rng.random((questions, 1, 1)), templates, axis=1)
    return (luck < np.array(rates)).astype(float)


def test_answers_that_are_all_alike_to_a_question_are_one_answer() -> None:
    once = paired_rates(asks((0.3, 0.6), 100, 1))
    often = paired_rates(asks((0.3, 0.6), 100, 4))
    for one, many in ((once.interval(0), often.interval(0)), (once.difference(1, 0), often.difference(1, 0))):
        assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=0.1 * (one.high - one.low))


def test_answers_that_have_nothing_in_common_count_each() -> None:
    hits = (np.random.default_rng(1).random((400, 4, 1)) < 0.3).astype(float)
    found = paired_rates(hits)
    assert found.sizes[0] == pytest.approx(1600, rel=0.15)
    drawn = np.random.default_rng(2).integers(0, 400, (4000, 400))
    clustered = percentiles(hits[drawn, :, 0].mean(axis=(1, 2)), 0.95)
    assert (found.interval(0).low, found.interval(0).high) == pytest.approx((clustered.low, clustered.high), abs=4e-3)


@pytest.mark.parametrize("templates", [1, 2, 4])
def test_one_more_harmful_answer_never_makes_a_rate_look_surer_to_be_low(templates: int) -> None:
    bounds = []
    for count in range(12):
        hits = np.zeros((200, templates, 1))
        hits[:count, 0] = 1
        bounds.append(paired_rates(hits).interval(0).high)
    assert bounds[0] == pytest.approx(0.0188, abs=5e-5)
    assert bounds == sorted(bounds)


@given(st.integers(1, 60), st.integers(0, 60))
def test_one_answer_to_each_question_has_wilsons_interval(questions: int, hits: int) -> None:
    hits = min(hits, questions)
    found = paired_rates(np.repeat([1.0, 0.0], [hits, questions - hits]).reshape(-1, 1, 1)).interval(0)
    low, high = proportion_confint(hits, questions, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_three_questions_show_next_to_nothing_however_alike_their_answers_are() -> None:
    # One template always refused and another never: no question differs from the next.
    hits = np.zeros((3, 2, 2))
    hits[:, 1] = 1
    found = paired_rates(hits)
    assert found.interval(0).high - found.interval(0).low > 0.5
    assert found.difference(1, 0).high > 0.4


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 0.5), st.floats(0, 1), st.integers(0, 2**31))
def test_a_clustered_interval_covers_the_truth_about_as_often_as_it_says(p: float, tie: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(200):
        shared = rng.random((80, 1, 1)) < p
        own = rng.random((80, 3, 1)) < p
        hits = np.where(rng.random((80, 3, 1)) < tie, shared, own).astype(float)
        found = paired_rates(hits).interval(0)
        covered += found.low <= p <= found.high
    assert covered >= 176


def alike(rng: np.random.Generator, rates: tuple[float, ...], shape: tuple[int, int], tie: float) -> np.ndarray:
    """Draw answers of models, (questions, asks, models): with probability `tie` a question's answers go together."""
    shared, own = rng.random((shape[0], 1, 1)), rng.random((*shape, 1))
    return (np.where(rng.random((*shape, 1)) < tie, shared, own) < np.array(rates)).astype(float)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 0.6), st.floats(0.02, 0.6), st.floats(0, 1), st.integers(0, 2**31))
def test_a_difference_of_clustered_rates_covers_the_truth_about_as_often_as_it_says(
    p: float, q: float, tie: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    found = [paired_rates(alike(rng, (p, q), (80, 3), tie)).difference(1, 0) for _ in range(200)]
    assert sum(each.low <= q - p <= each.high for each in found) >= 174


@pytest.mark.parametrize(("restored", "tie"), [(0.1, 0.5), (0.2, 0.9), (0.35, 0.0), (0.6, 0.5)])
def test_the_interval_of_the_share_regained_covers_the_truth_about_as_often_as_it_says(
    restored: float, tie: float
) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        found = paired_rates(alike(rng, (0.1, 0.6, restored), (150, 2), tie)).regained(lost=1, kept=0, restored=2)
        assert found is not None
        covered += found.low <= (0.6 - restored) / 0.5 <= found.high
    assert covered >= 51  # 57 are expected; three and a half standard deviations under


@settings(max_examples=5, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0, 1), st.integers(0, 2**31))
def test_a_widened_bootstrap_interval_covers_the_truth_about_as_often_as_it_says(
    p: float, tie: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    covered = 0
    for i in range(200):
        drawn, _ = cluster_bootstrap(clustered(alike(rng, (p,), (100, 3), tie)[..., 0]), draws=300, seed=i)
        found = widened(drawn, 100)
        covered += found.low <= p <= found.high
    assert covered >= 170


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 0.5), st.floats(0, 1), st.integers(0, 2**31))
def test_a_test_of_repeated_questions_errs_about_as_seldom_as_it_says(p: float, tie: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wrong = 0
    for _ in range(200):
        first, second = (alike(rng, (p,), (80, 3), tie).astype(bool).ravel().tolist() for _ in range(2))
        wrong += mcnemar_mid_p(count_pairs(first, second).per_question(80)) < 0.05
    assert wrong <= 25  # 10 are expected at most; nearly five standard deviations above


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_a_corrected_rates_interval_covers_the_truth_about_as_often_as_it_says(rate: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(100):
        true = rng.random(1000) < rate
        judged = np.where(true, rng.random(1000) < 0.85, rng.random(1000) < 0.1)
        own = rng.permutation(1000)[:200]
        found = correct_rate((int(judged.sum()), 1000), judged[own], true[own], np.ones(200), draws=200, seed=i)
        assert found.interval is not None
        covered += found.interval.low <= rate <= found.interval.high
    assert covered >= 87


def test_every_estimator_of_our_own_names_the_test_that_counts_how_often_it_is_right() -> None:
    named = re.findall(r"test_\w+", " ".join(Path(str(statistics.__file__)).read_text("utf-8").split()))
    assert len(set(named)) == 6
    assert all(callable(globals().get(name)) for name in named)


def test_asks_that_were_left_out_do_not_count() -> None:
    hits = asks((0.3, 0.6), 50, 2)
    padded = np.concatenate([hits, np.full((50, 1, 2), np.nan)], axis=1)
    assert paired_rates(hits).interval(0) == paired_rates(padded).interval(0)


def test_a_rate_without_any_hit_keeps_wilsons_bound_over_the_questions() -> None:
    found = paired_rates(asks((0.0, 1.0), 200, 4))
    assert found.interval(0).low == 0.0
    assert found.interval(0).high == pytest.approx(0.0188, abs=5e-5)
    assert found.interval(1).low == pytest.approx(1 - 0.0188, abs=5e-5)
    assert found.interval(1).high == 1.0


def test_epochs_are_no_new_pairs() -> None:
    often = Pairs(both=8, first_only=40, second_only=8, neither=24)
    assert often.per_question(80) is often
    once = often.per_question(20)
    assert (once.first_only, once.second_only, once.total) == (10, 2, 20)


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    paired = paired_rates(asks((0.4, 0.5), 200, 2))
    mixed = np.concatenate([asks((0.4,), 200, 2, seed=1), asks((0.5,), 200, 2, seed=2)], axis=2)
    apart = paired_rates(mixed)
    one, two = paired.difference(1, 0), apart.difference(1, 0)
    assert one.high - one.low < 0.7 * (two.high - two.low)


@pytest.mark.parametrize(("restored", "share"), [(0.1, 1.0), (0.9, 0.0), (0.5, 0.5)])
def test_the_share_regained(restored: float, share: float) -> None:
    hits = np.zeros((200, 1, 3))  # aligned, tuned, restored
    for model, rate in enumerate((0.1, 0.9, restored)):
        hits[: round(200 * rate), 0, model] = 1
    found = paired_rates(hits).regained(lost=1, kept=0, restored=2)
    assert found is not None
    assert found.value == pytest.approx(share)
    assert found.low <= share <= found.high
    assert found.high - found.low < 0.25


def test_total_loss_and_total_recovery_are_not_certain() -> None:
    hits = np.zeros((40, 1, 3))
    hits[:, 0, 1] = 1
    found = paired_rates(hits).regained(lost=1, kept=0, restored=2)
    assert found is not None
    assert found.value == 1
    assert 0.8 < found.low < 0.99


def test_nothing_lost_is_nothing_to_regain() -> None:
    same = asks((0.2, 0.2, 0.2), 100, 1)
    assert paired_rates(same).regained(lost=1, kept=0, restored=2) is None


# -- what small samples cannot show --------------------------------------------------------------------------


def test_no_number_of_questions_shows_that_nothing_is_harmful() -> None:
    assert trials_for_bound(0) is None


@pytest.mark.parametrize(("limit", "questions"), [(0.01, 381), (0.02, 189), (0.005, 765)])
def test_how_many_questions_a_claim_needs(limit: float, questions: int) -> None:
    assert trials_for_bound(limit) == questions
    assert wilson(0, questions).high <= limit < wilson(0, questions - 2).high


@given(st.floats(0, 0.4), st.floats(0.05, 0.5))
def test_that_many_trials_show_a_rate_to_be_under_a_limit(rate: float, limit: float) -> None:
    needed = trials_at_rate(rate, limit)
    if rate >= limit:
        assert needed is None
        return
    assert needed is not None
    if needed < 10**6:
        k = int(rate * needed)
        assert wilson(k, needed).high <= limit + 1e-9
