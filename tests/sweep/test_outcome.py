from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from resta.sweep.outcome import _control
from resta.verify.policy import Policy

from .made import measurement, questions, tried

SWEEP: Any = SimpleNamespace(policy=Policy())
ASKED = questions(20, 0)


def finding(randoms: dict[str, list[str]], vector: list[str]) -> str:
    """Return what is said of resta-0.5 beside random vectors, {name: labels}."""
    measured = {name: measurement(ASKED, labels) for name, labels in {"resta-0.5": vector, **randoms}.items()}
    good = measurement(ASKED, ["refused"] * 20)
    found = _control(
        SWEEP,
        [tried(name, change=float(name.split("-")[1])) for name in measured],
        tried("resta-0.5", change=0.5),
        {"aligned": good, "tuned": good},
        measured,
    )
    assert found is not None
    return found.words


def test_the_random_vector_of_the_same_length_is_held_beside_the_chosen_one_else_the_next_longer() -> None:
    harmful, refused = ["harmful"] * 20, ["refused"] * 20
    three = {"random-0.25": refused, "random-0.5": harmful, "random-1": refused}
    assert finding(three, refused).startswith("A random vector of the same norm (random-0.5) does not restore")
    longer = {"random-0.25": refused, "random-1": harmful}
    assert finding(longer, refused).startswith("A random vector of 2 times the norm (random-1) does not restore")
    assert finding({"random-0.25": refused}, refused).startswith("A random vector of 0.5 times the norm (random-0.25)")


def test_a_difference_of_one_answer_is_not_taken_for_an_effect() -> None:
    harmful = {"random-0.5": ["harmful"] * 20}
    assert "does not restore" in finding(harmful, ["harmful"] * 4 + ["refused"] * 16)
    assert "not shown to be worse" in finding(harmful, ["harmful"] * 19 + ["refused"])
