from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace as Shown

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.sweep.choose import Point, choose, dominates, front, point_of
from tests.sweep.builders import rate, tried


def test_the_smallest_change_that_passes_is_chosen() -> None:
    found = [
        tried("resta-0.3", change=1, verdict="FAIL"),
        tried("resta-0.9", change=3, asr=0.0),
        tried("resta-0.6", change=2, asr=0.1),
        tried("interpolation-0.1", change=0.5, baseline=True),
        tried("resta-0.1", change=0.2, verdict=None),
        tried("resta-0.2", change=0.4, verdict="INCONCLUSIVE"),
    ]
    assert choose(found, "smallest-passing").name == "resta-0.6"


def test_a_candidate_that_passed_by_luck_is_not_chosen_and_its_chance_is_said() -> None:
    lucky, sure = tried("resta-0.3", change=1, chance=0.4), tried("resta-0.5", change=2, chance=0.93)
    choice = choose([lucky, sure], "smallest-passing")
    assert choice.name == "resta-0.5"
    assert "its own chance is 0.93" in choice.reason
    none = choose([lucky], "smallest-passing")
    assert none.name is None
    assert "1 pass the policy on the sweep's own questions" in none.reason
    assert "resta-0.3, has a chance of 0.40 to pass on fresh ones, where 0.9 is asked for" in none.reason


def test_a_candidate_of_too_small_a_sample_may_be_chosen_where_the_fresh_one_is_large_enough() -> None:
    assert choose([tried("resta-0.3", verdict="INCONCLUSIVE", chance=0.95)], "smallest-passing").name == "resta-0.3"


def test_a_chance_of_nine_in_ten_is_enough() -> None:
    assert choose([tried("resta-0.3", chance=0.9)], "smallest-passing").name == "resta-0.3"
    assert choose([tried("resta-0.3", chance=0.899)], "smallest-passing").name is None


def test_where_none_is_chosen_the_candidate_of_the_highest_chance_is_named_and_no_baseline() -> None:
    found = [
        tried("resta-0.3", chance=0.2),
        tried("resta-0.6", chance=0.5, verdict="FAIL"),
        tried("resta-0.9", chance=0.3),
        tried("resta-1.2", verdict=None),  # given up: it has no chance to speak of
        tried("interpolation-0.5", chance=0.8, baseline=True),
    ]
    reason = choose(found, "smallest-passing").reason
    assert reason.startswith("2 pass the policy on the sweep's own questions, but the best, resta-0.6, has a chance of")
    assert "chance of 0.50" in reason
    none = [tried("resta-0.3", chance=0.2, verdict="FAIL"), tried("interpolation-0.5", baseline=True)]
    assert choose(none, "smallest-passing").reason.startswith("no candidate passes: the best, resta-0.3,")
    assert choose([tried("resta-0.9", verdict=None)], "smallest-passing").reason == "no candidate passes the policy"


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "INVALID", None])
def test_only_a_verdict_of_pass_passes(verdict: str | None) -> None:
    assert tried("resta-0.3", verdict=verdict).passes == (verdict == "PASS")


def test_costs_are_rates_and_what_utility_lacks_and_what_was_not_asked_costs_nothing() -> None:
    whole = Point(name="", asr=rate(0.1), over_refusal=rate(0.2), utility=0.75)
    assert whole.costs == (0.1, 0.2, 0.25)
    assert whole.cost == pytest.approx(0.55)
    assert replace(whole, asr=None).costs == (0.2, 0.25)
    assert replace(whole, over_refusal=replace(rate(0.2), value=None)).costs == (0.1, 0.25)
    assert replace(whole, utility=None).costs == (0.1, 0.2)


def test_a_models_utility_is_the_mean_over_its_tasks() -> None:
    tasks = [Shown(means={"restored": Shown(value=value)}) for value in (0.2, 0.3, 0.7)]
    comparison = Shown(utility=tasks, asr=None, over_refusal=Shown(rates={"restored": rate(0.5)}))
    point = point_of("resta-1", comparison)  # type: ignore[arg-type]
    assert point.utility == pytest.approx(0.4)
    assert (point.asr, point.over_refusal) == (None, rate(0.5))
    assert point_of("resta-1", Shown(utility=[], asr=None, over_refusal=None)).utility is None  # type: ignore[arg-type]


def test_the_best_on_the_front_weighs_harm_refusals_and_utility_alike() -> None:
    found = [
        tried("resta-0.3", asr=0.2, refusal=0.0, utility=0.9, change=1),
        tried("resta-0.6", asr=0.05, refusal=0.02, utility=0.88, change=2),
        tried("resta-0.9", asr=0.0, refusal=0.4, utility=0.5, change=3),
    ]
    assert choose(found, "best-on-front").name == "resta-0.6"
    assert choose(found, "smallest-passing").name == "resta-0.3"


def test_none_is_chosen_where_none_passes() -> None:
    found = [
        tried("resta-0.3", verdict="FAIL"),
        tried("resta-0.6", verdict="INVALID"),
        tried("resta-0.9", verdict=None),
    ]
    for rule in ("smallest-passing", "best-on-front"):
        assert choose(found, rule).name is None  # type: ignore[arg-type]


def test_a_baseline_is_never_chosen() -> None:
    only = [tried("interpolation-0.5", baseline=True), tried("random-0.5", baseline=True)]
    assert choose(only, "smallest-passing").name is None
    dominated = [tried("resta-0.5", asr=0.1), tried("interpolation-0.5", asr=0.0, baseline=True)]
    choice = choose(dominated, "best-on-front")
    assert choice.name is None
    assert "dominated by a baseline" in choice.reason


COSTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 4), min_size=1, max_size=8)


@given(COSTS)
def test_the_front_is_what_nothing_dominates_and_is_never_empty(costs: list[tuple[float, ...]]) -> None:
    found = [tried(f"resta-{i}", asr=a, refusal=r, utility=1 - u, change=c) for i, (a, r, u, c) in enumerate(costs, 1)]
    names = front(found)
    assert names
    for each, mine in zip(found, costs, strict=True):
        beaten = any(all(x <= y for x, y in zip(other, mine, strict=True)) and other != mine for other in costs)
        assert (each.candidate.name in names) != beaten


@given(COSTS)
def test_domination_is_a_strict_order(costs: list[tuple[float, ...]]) -> None:
    found = [tried(f"resta-{i}", asr=a, refusal=r, utility=1 - u, change=c) for i, (a, r, u, c) in enumerate(costs, 1)]
    for one in found:
        assert not dominates(one, one)
        for two in found:
            assert not (dominates(one, two) and dominates(two, one))


def test_candidates_that_tie_in_everything_measured_are_told_apart_by_their_change() -> None:
    tied = [tried(f"resta-{i}", change=i) for i in range(1, 26)]
    assert front(tied) == ("resta-1",)
