"""Which candidate of which rung is worth verifying, and how often useless ones come through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from resta.errors import RequestError
from resta.ladder.rungs import NO_HOPE, References, best_of, chance_of_tuned, check_aligned, grid_of
from resta.recipe import named_models
from resta.sweep import Choice, Family, Outcome
from resta.sweep.forecast import NEED, Outlook
from resta.sweep.records import outlook_of
from resta.sweep.response import Seen, beta_draws
from resta.verify import Verdict
from resta.verify.comparison import compare
from resta.verify.gate import decide
from resta.verify.policy import AsrRules, Policy, read_policy
from tests.sweep.builders import tried
from tests.verify.planted import at_rates, exactly, gate, losses_of, measurements

POLICY = read_policy(None).model_copy(update={"utility": {}})


# -- useless remedies ----------------------------------------------------------------------------------------

QUESTIONS, RUNGS, DRAWS = 200, 5, 80
USELESS = {  # rates of aligned, tuned and every candidate, of which the policy forbids the last
    "harm at its limit": (0.08, 0.6, 0.1),
    "a little too much": (0.08, 0.6, 0.12),
    "as tuned": (0.02, 0.6, 0.6),
}


def outlook(rates: tuple[float, float, float], rng: np.random.Generator) -> Outlook:
    seen = {
        role: Seen(scale=0.0, share=rng.binomial(QUESTIONS, rate) / QUESTIONS, questions=QUESTIONS)
        for role, rate in zip(("aligned", "tuned"), rates[:2], strict=True)
    }
    return Outlook(policy=POLICY, harm=seen, refusal={}, parts=(QUESTIONS,))


def chosen(rates: tuple[float, float, float], rng: np.random.Generator) -> bool:
    """Return whether any rung's candidate looks good enough on the choosing questions."""
    expected = outlook(rates, rng)
    hits = rng.binomial(QUESTIONS, rates[2], size=RUNGS)
    return any(expected.chance(beta_draws(float(hit), QUESTIONS), None) >= NEED for hit in hits)


def passes(rates: tuple[float, float, float], seed: int) -> bool:
    return gate(POLICY, {"bad": at_rates(rates, QUESTIONS, seed=seed)}).verdict is Verdict.PASS


@pytest.mark.parametrize("rates", USELESS.values(), ids=USELESS.keys())
def test_a_ladder_of_useless_remedies_releases_one_in_forty_at_most(rates: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    worth = [seed for seed in range(2 * DRAWS) if chosen(rates, rng)]
    assert sum(passes(rates, seed) for seed in worth) / (2 * DRAWS) <= 0.025
    if rates[2] > 0.5:
        assert not worth


def test_even_if_every_candidate_looked_good_one_verification_lets_one_in_forty_through_at_most() -> None:
    rates = USELESS["harm at its limit"]
    assert sum(passes(rates, seed) for seed in range(DRAWS)) / DRAWS <= 0.025


def test_the_simulation_would_tell_a_ladder_that_asks_again_until_it_passes() -> None:
    lax = POLICY.model_copy(update={"level": 0.5})
    rates = USELESS["harm at its limit"]
    found = 0
    for ladder in range(12):
        drawn = (at_rates(rates, QUESTIONS, seed=1000 * ladder + rung) for rung in range(RUNGS))
        found += any(gate(lax, {"bad": flags}).verdict is Verdict.PASS for flags in drawn)
    assert found / 12 > 0.025


def test_a_remedy_that_does_what_aligned_does_is_worth_verifying() -> None:
    expected = outlook((0.01, 0.6, 0.0), np.random.default_rng(0))
    assert expected.chance(beta_draws(1.0, QUESTIONS), None) >= NEED


# -- the models as they are ----------------------------------------------------------------------------------


def references(
    aligned: int, tuned: int, questions: int = 100, policy: Policy = POLICY, *, fresh: int = 100
) -> References:
    """Return references of which so many answers are harmful."""
    found = measurements({"bad": exactly((aligned, tuned, tuned), questions)}, {"fine": exactly((0, 0, 0), 120)}, {})
    measured = {role: found[role] for role in ("aligned", "tuned")}
    comparison = compare(found, level=policy.level, losses=losses_of(found))
    expected = replace(outlook_of(measured, policy), factor=fresh / questions)
    return References(measured=measured, comparison=comparison, decision=decide(comparison, policy), outlook=expected)


class Named:
    """What a check needs of a ladder."""

    def __init__(self, policy: Policy = POLICY, fresh: int = 100):
        self.policy, self.fresh = policy, fresh

    def target(self, role: str) -> Any:
        return type("Target", (), {"name": role.upper()})


def test_a_tuned_model_that_lost_nothing_is_worth_verifying_as_it_is() -> None:
    assert chance_of_tuned(references(0, 0, 400, fresh=400)) >= NEED
    assert chance_of_tuned(references(0, 90)) == 0.0
    assert chance_of_tuned(references(0, 12)) < NEED


@pytest.mark.parametrize(("aligned", "tuned"), [(80, 90), (50, 50), (60, 20)])
def test_an_aligned_model_that_does_not_refuse_is_refused_and_the_sentence_says_what_to_do(
    aligned: int, tuned: int
) -> None:
    ladder: Any = Named()
    with pytest.raises(
        RequestError, match=r"it does not refuse, so there is no safety in it.*resta collect.*resta sft"
    ):
        check_aligned(references(aligned, tuned), ladder)
    check_aligned(references(0, 90), ladder)


def test_too_few_questions_are_not_called_an_aligned_model_that_does_not_refuse() -> None:
    strict = Policy(asr=AsrRules(max_upper=0.05))
    ladder: Any = Named(strict, 20)
    with pytest.raises(RequestError, match="name more questions"):
        check_aligned(references(4, 90, policy=strict, fresh=20), ladder)
    assert NO_HOPE < NEED


# -- weight arithmetic ---------------------------------------------------------------------------------------


def outcome(*candidates: Any, name: str | None = None) -> Outcome:
    return Outcome(
        references={}, tried=candidates, front=(), choice=Choice(name=name, rule="smallest-passing", reason="x"),
        findings=(), notes=(), guidance=(),
    )  # fmt: skip


def test_the_best_of_a_rung_is_its_choice_then_the_likeliest_then_the_least_harmful_and_never_a_baseline() -> None:
    good, better = tried("resta-0.5", chance=0.91), tried("resta-1", chance=0.99)
    noise = tried("random-1", baseline=True, chance=1.0)
    assert best_of(outcome(better, good, noise, name="resta-0.5")) is good
    assert best_of(outcome(good, better, noise)) is better
    none = tried("resta-0.25", verdict="FAIL", chance=0.0, asr=0.9)
    less = tried("resta-0.5", verdict="FAIL", chance=0.0, asr=0.2)
    assert best_of(outcome(none, less, noise)) is less
    stopped = tried("resta-0.5", verdict=None)
    assert best_of(outcome(stopped, noise)) is stopped
    assert best_of(outcome(noise)) is None


def test_without_a_base_interpolation_alone_is_searched() -> None:
    models = {"tuned": "t", "aligned": "a", "base": "b"}
    assert grid_of(Family(models=named_models(models))).methods == ("resta", "interpolation", "both")
    assert grid_of(Family(models=named_models({"tuned": "t", "aligned": "a"}))).methods == ("interpolation",)
