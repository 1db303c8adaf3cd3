from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resta.sweep.choose import Choice, Control, choose, dominates, front, interpolation_words, pick_vector
from resta.verify.statistics import paired_rates

from .made import tried


def test_the_smallest_change_that_passes_is_chosen() -> None:
    found = [
        tried("resta-0.3", change=1, verdict="FAIL"),
        tried("resta-0.9", change=3, asr=0.0),
        tried("resta-0.6", change=2, asr=0.1),
        tried("wise-0.1", change=0.5, baseline=True),
        tried("resta-0.1", change=0.2, verdict=None),
        tried("resta-0.2", change=0.4, verdict="INCONCLUSIVE"),
    ]
    assert choose(found, "smallest-passing").name == "resta-0.6"


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
    only = [tried("wise-0.5", baseline=True), tried("random-0.5", baseline=True)]
    assert choose(only, "smallest-passing").name is None
    dominated = [tried("resta-0.5", asr=0.1), tried("wise-0.5", asr=0.0, baseline=True)]
    choice = choose(dominated, "best-on-front")
    assert choice.name is None
    assert "dominated by a baseline" in choice.reason


COSTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 3), min_size=1, max_size=8)


@given(COSTS)
def test_the_front_is_what_nothing_dominates_and_is_never_empty(costs: list[tuple[float, float, float]]) -> None:
    points = [tried(f"resta-{i}", asr=a, refusal=r, utility=1 - u).point for i, (a, r, u) in enumerate(costs)]
    known = [point for point in points if point]
    found = front(known)
    assert found
    for point in known:
        beaten = any(
            all(x <= y for x, y in zip(other, mine, strict=True)) and other != mine
            for mine in [costs[known.index(point)]]
            for other in costs
        )
        assert (point.name in found) != beaten


@given(COSTS)
def test_domination_is_a_strict_order(costs: list[tuple[float, float, float]]) -> None:
    points = [tried(f"resta-{i}", asr=a, refusal=r, utility=1 - u).point for i, (a, r, u) in enumerate(costs)]
    known = [point for point in points if point]
    for one in known:
        assert not dominates(one, one)
        for two in known:
            assert not (dominates(one, two) and dominates(two, one))


NONE = Choice(name=None, rule="smallest-passing", reason="")


def test_interpolation_that_is_better_is_said_to_be() -> None:
    resta, wise = tried("resta-1", asr=0.3, verdict="FAIL"), tried("wise-0.5", asr=0.0, baseline=True)
    words = interpolation_words([resta, wise], pick_vector([resta, wise], NONE))
    assert "Interpolation is better than the safety vector: wise-0.5 passes the policy and resta-1 does not" in str(
        words
    )
    passing = tried("resta-1", asr=0.3)
    assert "at least as good as resta-1" in str(interpolation_words([passing, wise], passing))
    worse = tried("wise-0.5", asr=0.5, baseline=True, change=3)
    assert "not better" in str(interpolation_words([passing, worse], passing))
    smaller = tried("wise-0.5", asr=0.5, baseline=True, change=0.5)
    assert "smaller change than resta-1" in str(interpolation_words([passing, smaller], passing))
    given_up = [tried("resta-1", verdict=None), wise]
    assert "every safety vector was given up" in str(interpolation_words(given_up, pick_vector(given_up, NONE)))


def test_interpolation_is_held_against_a_vector_that_passes() -> None:
    harsh, mild = tried("resta-1", asr=0.0, verdict="FAIL"), tried("resta-0.5", asr=0.1, change=1)
    wise = tried("wise-0.3", asr=0.2, change=0.5)
    found = [harsh, mild, wise]
    words = interpolation_words(found, pick_vector(found, choose(found, "smallest-passing")))
    assert words == "wise-0.3 (interpolation) passes with a smaller change than resta-0.5."


def test_where_only_interpolation_was_tried_nothing_is_said_of_vectors() -> None:
    found = [tried("wise-0.5"), tried("wise-0.8", change=2), tried("random-0.5", baseline=True)]
    picked = pick_vector(found, choose(found, "smallest-passing"))
    assert picked is found[0]
    assert interpolation_words(found, picked) is None
    given_up = [tried("wise-0.5", verdict=None)]
    assert pick_vector(given_up, NONE) is None
    assert interpolation_words(given_up, None) is None


def control(vector_hits: int, random_hits: int, total: int = 40, ratio: float = 1.0) -> Control:
    hits = np.zeros((total, 1, 2))
    hits[:random_hits, 0, 0] = 1
    hits[:vector_hits, 0, 1] = 1
    return Control(
        candidate="resta-0.5", random="random-0.5", ratio=ratio, answers=total,
        rates=(random_hits / total, vector_hits / total), difference=paired_rates(hits).difference(0, 1),
    )  # fmt: skip


def test_noise_that_restores_as_much_is_said_to() -> None:
    assert "restores as much as resta-0.5" in control(10, 10).words
    assert "restores as much as resta-0.5" in control(10, 5).words
    assert "not shown to be worse" in control(10, 11).words
    assert "of the same norm (random-0.5) does not restore" in control(2, 38).words
    assert "of 2 times the norm" in control(2, 38, ratio=2.0).words
