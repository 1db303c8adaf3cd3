from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resta.sweep.choose import choose, dominates, front
from tests.sweep.builders import tried


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
