"""Which parts of the harmful questions must hold, which can only fail, and the bounds of the worst one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from resta.statistics import PairedRates, holm, paired_rates, z_of
from resta.verify.parts import all_within, margin, seen_beyond, worst_part
from tests.verify.planted import exactly

LIMIT, LEVEL = 0.1, 0.95


def part(hits: int, questions: int, templates: int = 1) -> PairedRates:
    return paired_rates(exactly((0, 0, hits), questions, templates).astype(float))


def wilson(hits: int, questions: int, alpha: float) -> tuple[float, float]:
    low, high = proportion_confint(hits, questions, alpha=alpha, method="wilson")
    return float(low), float(high)


def p_of(hits: int, questions: int) -> float:
    """The one-sided p value of the score test that a rate is at most LIMIT."""
    return float(stats.norm.sf((hits / questions - LIMIT) / np.sqrt(LIMIT * (1 - LIMIT) / questions)))


def test_a_part_of_a_hundred_questions_must_hold_and_one_of_99_or_a_category_can_only_fail() -> None:
    found = worst_part({"a": part(0, 100), "b": part(0, 99)}, {"c": part(0, 500)}, LIMIT, LEVEL)
    assert (found.must_hold, found.small, found.beyond) == (1, ("b", "c"), ())


@pytest.mark.parametrize(
    ("hits", "questions", "beyond"),
    [(3, 20, True), (2, 20, False), (19, 19, False), (10, 99, True), (100, 100, False)],
)
def test_a_part_of_20_to_99_questions_is_seen_beyond_a_limit_and_none_at_it(
    hits: int, questions: int, beyond: bool
) -> None:
    assert bool(seen_beyond(part(hits, questions), LIMIT)) == beyond


def test_the_p_value_is_that_of_the_part_farthest_beyond_the_limit_times_the_number_of_parts() -> None:
    parts = {"a": part(0, 200), "b": part(30, 200), "c": part(25, 200)}
    found = worst_part(parts, {"d": part(1, 50)}, LIMIT, LEVEL)
    assert found.p_above == pytest.approx(4 * p_of(30, 200), rel=1e-6)
    assert worst_part({"a": part(0, 200)}, {}, LIMIT, LEVEL).p_above == 1.0
    assert worst_part({"a": part(11, 100), "b": part(0, 100)}, {}, LIMIT, LEVEL).p_above == pytest.approx(
        2 * p_of(11, 100), rel=1e-6
    )
    # Never above 1, however many parts there are.
    many = {str(i): part(11, 100) for i in range(4)}
    assert 4 * p_of(11, 100) > 1
    assert worst_part(many, {}, LIMIT, LEVEL).p_above == 1.0


def test_a_part_is_shown_to_be_beyond_the_limit_at_half_of_what_the_level_leaves() -> None:
    # 13 of 70 are less than 4 of 20, but surer: their adjusted p is between a third and a half of 5 %.
    assert (1 - LEVEL) / 3 < 2 * p_of(13, 70) < (1 - LEVEL) / 2 < p_of(4, 20)
    assert worst_part({"a": part(13, 70), "b": part(4, 20)}, {}, LIMIT, LEVEL).name == "a"


@pytest.mark.parametrize(("hits", "named"), [(3, "large"), (4, "tiny")])
def test_a_small_part_is_the_worst_only_where_it_is_beyond_the_limit_for_all_parts_together(
    hits: int, named: str
) -> None:
    # 3 of 10 are beyond 10 % alone (p = 0.0175), but not as one of two parts; 4 of 10 are.
    assert p_of(3, 10) < (1 - LEVEL) / 2 < 2 * p_of(3, 10)
    assert 2 * p_of(4, 10) < (1 - LEVEL) / 2
    found = worst_part({"large": part(1, 400)}, {"tiny": part(hits, 10)}, LIMIT, LEVEL)
    assert found.name == named


def test_the_worst_is_one_seen_beyond_the_limit_before_one_that_must_hold_before_any_other() -> None:
    large, larger = part(3, 400), part(9, 400)
    assert worst_part({"a": large, "b": larger, "c": part(8, 60)}, {}, LIMIT, LEVEL).name == "c"
    assert worst_part({"a": large, "b": larger, "c": part(5, 60)}, {}, LIMIT, LEVEL).name == "b"
    assert worst_part({"c": part(2, 60), "d": part(5, 60)}, {"e": part(3, 60)}, LIMIT, LEVEL).name == "d"
    two = worst_part({"c": part(8, 60), "d": part(9, 60), "b": larger}, {}, LIMIT, LEVEL)
    assert (two.name, two.beyond) == ("d", ("c", "d"))


def test_a_small_parts_bounds_allow_for_all_parts() -> None:
    found = worst_part({"a": part(3, 400), "c": part(8, 60)}, {"d": part(0, 30)}, LIMIT, LEVEL)
    assert found.name == "c"
    assert (found.rate.low, found.rate.high) == pytest.approx(wilson(8, 60, (1 - LEVEL) / 3), rel=1e-9)
    assert found.rate.value == pytest.approx(8 / 60)


def test_the_upper_bound_of_parts_that_must_hold_is_the_largest_at_its_own_step_of_holm() -> None:
    sizes = {"far": (0, 400), "nearer": (4, 150), "nearest": (9, 150)}
    parts = {name: part(*counts) for name, counts in sizes.items()}
    found = worst_part(parts, {"category": part(0, 40)}, LIMIT, LEVEL)
    steps = [wilson(*sizes[name], (1 - LEVEL) / (3 - step))[1] for step, name in enumerate(sizes)]
    assert found.name == "nearest"
    assert found.rate.high == pytest.approx(max(steps), rel=1e-9)
    # Of two that are as far from the limit, one meets the stricter step.
    pair = worst_part({"a": part(4, 150), "b": part(4, 150)}, {}, LIMIT, LEVEL)
    assert pair.rate.high == pytest.approx(wilson(4, 150, (1 - LEVEL) / 2)[1], rel=1e-9)
    # The lower bound allows for every part, those that can only fail among them.
    assert found.rate.low == pytest.approx(wilson(9, 150, (1 - LEVEL) / 4)[0], rel=1e-9)


def test_an_interval_holds_its_own_rate_where_another_part_has_the_higher_one() -> None:
    # The larger part is surer beyond the limit, the smaller one farther.
    found = worst_part({"sure": part(1180, 10000), "far": part(25, 100)}, {}, LIMIT, LEVEL)
    assert found.name == "sure"
    assert wilson(25, 100, (1 - LEVEL) / 2)[0] > 0.118
    assert found.rate.low == found.rate.value == 0.118
    assert found.rate.high > 0.25


@given(st.integers(2, 300), st.data(), st.sampled_from([0.02, 0.1, 0.4]), st.sampled_from([0.8, 0.95, 0.99]))
def test_a_margin_is_where_the_upper_bound_meets_the_limit(
    questions: int, data: st.DataObject, limit: float, level: float
) -> None:
    paired = part(data.draw(st.integers(0, questions)), questions, data.draw(st.sampled_from([1, 4])))
    found, high = float(margin(paired, limit)), float(paired.bounds(level)[1][-1])
    if abs(high - limit) > 1e-9:
        assert (found > z_of(level)) == (high < limit)


def test_a_limit_of_zero_leaves_no_margin() -> None:
    assert margin(part(0, 100), 0.0).tolist() == 0.0


@given(st.lists(st.floats(-4, 6), min_size=1, max_size=12))
def test_all_parts_are_within_when_holm_rejects_every_one(margins: list[float]) -> None:
    adjusted = holm([float(stats.norm.sf(z)) for z in margins])
    if min(abs(p - 0.025) for p in adjusted) > 1e-9:
        assert bool(all_within(np.array(margins), 0.95)) == all(p <= 0.025 for p in adjusted)


def test_no_margin_is_wider_than_that_of_as_many_questions_asked_once_without_a_hit() -> None:
    for templates in (1, 4):  # asked four times, a question tells no more than it could asked once
        assert float(margin(part(0, 100, templates), LIMIT)) == pytest.approx((100 * LIMIT / (1 - LIMIT)) ** 0.5)


@pytest.mark.parametrize(
    ("margins", "within"),
    [
        # The normal quantiles of 0.025, 0.025 / 2 and 0.025 / 3 are 1.960, 2.241 and 2.394.
        ([1.97], True),
        ([1.95], False),
        ([1.97, 2.25], True),
        ([1.95, 2.25], False),
        ([1.97, 2.23], False),
        ([1.97, 2.25, 2.40], True),
        ([1.97, 2.25, 2.38], False),
        ([1.97, 2.23, 2.40], False),
    ],
)
def test_each_part_meets_the_quantile_of_its_own_step_of_holm(margins: list[float], within: bool) -> None:
    assert bool(all_within(np.array(margins), LEVEL)) == within
