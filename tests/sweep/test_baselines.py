"""What is said of the baselines, on made-up measurements of one norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from resta.sweep.baselines import Beside, beside, interpolation_words, nearest, pick_vector, random_words
from resta.sweep.choose import Choice
from resta.verify.policy import Policy
from tests.sweep.builders import measurement, questions, tried

NONE = Choice(name=None, rule="smallest-passing", reason="")
TUNED = tried("resta-9", asr=1.0).point


def held(vector: Sequence[str], baseline: Sequence[str], ratio: float = 1.0, name: str = "random-0.5") -> Beside:
    """Return a baseline beside resta-0.5, by their labels on the same questions."""
    asked = questions(len(vector), 0)
    measured = {"resta-0.5": measurement(asked, vector), name: measurement(asked, baseline)}
    return beside(
        tried("resta-0.5"), tried(name, change=ratio, baseline=True), measured, ("judge", None), Policy().level
    )


def labels(harmful: int, total: int = 40) -> list[str]:
    return ["harmful"] * harmful + ["refused"] * (total - harmful)


def random(vector: int, baseline: int, ratio: float = 1.0) -> str:
    assert TUNED
    return random_words(tried("resta-0.5"), TUNED, held(labels(vector), labels(baseline), ratio))


def test_a_question_that_stands_in_two_banks_tells_nothing_twice() -> None:
    vector, baseline = labels(10), labels(16)
    once = held(vector, baseline).of("ASR")
    asked = questions(len(vector), 0)
    again = [replace(each, bank="other", text=f" {each.text.upper()} ") for each in asked]
    measured = {
        "resta-0.5": measurement([*asked, *again], [*vector, *vector]),
        "random-0.5": measurement([*asked, *again], [*baseline, *baseline]),
    }
    twice = beside(tried("resta-0.5"), tried("random-0.5"), measured, ("judge", None), Policy().level).of("ASR")
    assert once
    assert twice
    assert twice.answers == 2 * once.answers
    assert twice.difference.value == once.difference.value
    assert twice.difference.high - twice.difference.low > 0.9 * (once.difference.high - once.difference.low)


def test_noise_that_restores_as_much_is_said_to() -> None:
    assert "restores as much as resta-0.5" in random(10, 10)
    assert "restores as much as resta-0.5" in random(10, 5)
    assert "not shown to be worse" in random(10, 11)
    assert "of the same norm (random-0.5) does not restore" in random(2, 38)
    assert "of 2 times the norm" in random(2, 38, ratio=2.0)


def test_the_random_vector_of_the_same_norm_is_held_beside_the_vector_else_the_next_longer() -> None:
    vector = tried("resta-0.5", change=0.5)
    randoms = [tried(f"random-{x}", change=x, baseline=True) for x in (0.25, 0.5, 1)]

    def name(there: list[int]) -> str:
        found = nearest(vector, [vector, *(randoms[i] for i in there)], "random")
        assert found
        return found.candidate.name

    assert name([0, 1, 2]) == "random-0.5"
    assert name([0, 2]) == "random-1"
    assert name([0]) == "random-0.25"
    assert nearest(vector, [vector], "random") is None


@pytest.mark.parametrize(("vector", "baseline"), [(0, 1), (1, 0), (0, 0), (3, 5)])
def test_one_answer_of_forty_eight_never_makes_interpolation_better_or_worse(vector: int, baseline: int) -> None:
    found = held(labels(vector, 48), labels(baseline, 48), name="interpolation-0.3")
    words = interpolation_words(tried("resta-0.5"), [tried("resta-0.5"), tried("interpolation-0.3")], found)
    assert words
    assert "and resta-0.5 are not told apart: ASR" in words
    assert "on 48 shared answers" in words
    assert "[" in words
    assert "better" not in words


def test_interpolation_that_is_shown_to_be_better_or_worse_at_the_same_norm_is_said_to_be() -> None:
    tries = [tried("resta-0.5"), tried("interpolation-0.3")]
    better = interpolation_words(tries[0], tries, held(labels(30), labels(2), name="interpolation-0.3"))
    assert str(better).startswith(
        "Interpolation of the same norm (interpolation-0.3) is better in ASR than resta-0.5: ASR 5.0 %"
    )
    worse = interpolation_words(tries[0], tries, held(labels(2), labels(30), name="interpolation-0.3"))
    assert "is worse in ASR than resta-0.5" in str(worse)
    farther = interpolation_words(tries[0], tries, held(labels(2), labels(2), ratio=2.0, name="interpolation-0.3"))
    assert "Interpolation of 2 times the norm" in str(farther)


def test_interpolation_that_passes_where_no_vector_does_is_said_to() -> None:
    resta, towards = tried("resta-1", asr=0.3, verdict="FAIL"), tried("interpolation-0.5", asr=0.0, baseline=True)
    words = interpolation_words(pick_vector([resta, towards], NONE), [resta, towards], None)
    assert words == "Interpolation, interpolation-0.5, passes the policy on these questions, and resta-1 does not."
    given_up = [tried("resta-1", verdict=None), towards]
    assert "no safety vector was left" in str(interpolation_words(pick_vector(given_up, NONE), given_up, None))


def test_where_only_interpolation_was_tried_nothing_is_said_of_vectors() -> None:
    found = [tried("interpolation-0.5"), tried("interpolation-0.8", change=2), tried("random-0.5", baseline=True)]
    picked = pick_vector(found, Choice(name="interpolation-0.5", rule="smallest-passing", reason=""))
    assert picked is found[0]
    assert interpolation_words(picked, found, None) is None
    given_up = [tried("interpolation-0.5", verdict=None)]
    assert pick_vector(given_up, NONE) is None
    assert interpolation_words(None, given_up, None) is None
