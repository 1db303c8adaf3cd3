"""The search, on simulated answers: each candidate has its own, drawn once, whoever asks and in whatever order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from resta.ladder.costs import most_asked
from resta.sweep.candidates import Candidate
from resta.sweep.forecast import NEED, Outlook, in_the_way, plan_factor
from resta.sweep.response import Seen, fit
from resta.sweep.search import (
    EVERY,
    LAST,
    Job,
    Look,
    Search,
    ask_all,
    enough_for_one,
    explore,
    planned_factors,
    series_of,
)
from resta.verify.decision import Outcome, Rule
from resta.verify.policy import AsrRules, OverRefusalRules, Policy, read_policy

Truth = Callable[[Candidate], float]
GRID = [Candidate(method="resta", scale=i / 10) for i in range(1, 11)]


def logistic(slope: float = 15, end: float = 0.0, middle: float = 0.4) -> Truth:
    return lambda each: end + (0.9 - end) / (1 + math.exp(slope * (each.scale - middle)))


@dataclass
class Simulated:
    """Answers of candidates whose true rates are known; what was asked is counted."""

    truth: Truth
    questions: int = 200
    refusals: Truth = lambda each: 0.0
    seed: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)

    def measure(self, jobs: Sequence[Job]) -> None:
        for candidate, rung in jobs:
            count = len(range(0, self.questions, EVERY[rung]))
            self.asked[candidate.name] = max(count, self.asked.get(candidate.name, 0))
            self.order.append((candidate.name, rung))

    def look(self, candidate: Candidate, rung: int) -> Look:
        assert (candidate.name, rung) in self.order, "was looked at before it was asked"
        return Look(
            harm=self._seen(candidate, rung, self.truth(candidate), 1),
            refusal=self._seen(candidate, rung, self.refusals(candidate), 2),
            norm=candidate.scale + sum(scale - candidate.scale for _, scale in candidate.groups) / 4,
        )

    def _seen(self, candidate: Candidate, rung: int, rate: float, kind: int) -> Seen:
        rng = np.random.default_rng([self.seed, kind, *candidate.name.encode()])
        answers = (rng.random(self.questions) < rate)[:: EVERY[rung]]
        return Seen(scale=candidate.scale, share=float(answers.mean()), questions=len(answers))

    def outlook(self, policy: Policy | None = None) -> Outlook:
        tuned = self.truth(Candidate(method="resta", scale=0.0))
        harm = {
            "aligned": Seen(scale=0, share=0.0, questions=self.questions),
            "tuned": Seen(scale=0, share=tuned, questions=self.questions),
        }
        refusal = {role: Seen(scale=0, share=0.0, questions=self.questions) for role in ("aligned", "tuned")}
        return Outlook(policy=policy or read_policy(None), harm=harm, refusal=refusal)


def searched(
    answers: Simulated, candidates: Sequence[Candidate] = GRID, groups: Sequence[str] = (), policy: Policy | None = None
) -> Search:
    outlook = answers.outlook(policy)
    search = Search(records=answers, outlook=outlook)
    explore(search, candidates, groups=groups, factors=planned_factors(outlook))
    return search


def choice(search: Search) -> Candidate | None:
    return min(search.passing(), key=lambda each: search.look(each).norm, default=None)


@pytest.mark.parametrize("slope", [8, 15])
@pytest.mark.parametrize("questions", [200, 400])
def test_a_search_asks_a_third_of_the_grid_and_chooses_as_it_does(slope: float, questions: int) -> None:
    same, asked = [], []
    for seed in range(4):
        answers = Simulated(logistic(slope), questions=questions, seed=seed)
        found = choice(searched(answers))
        asked.append(sum(answers.asked.values()) / (len(GRID) * questions))
        grid = Search(records=answers, outlook=answers.outlook())
        ask_all(grid, GRID)
        enough_for_one(grid, planned_factors(grid.outlook))
        best = choice(grid)
        assert found
        assert best
        same.append(abs(found.scale - best.scale) < 0.15)
    assert np.mean(asked) < 1 / 3
    assert np.mean(same) >= 3 / 4


def test_what_is_chosen_was_asked_everything_and_every_measurement_is_explained() -> None:
    search = searched(Simulated(logistic()))
    found = choice(search)
    assert found
    assert search.rungs[found] == LAST
    assert search.chance(found) >= NEED
    assert {step.candidate for step in search.steps} == set(search.rungs)
    assert all(step.words for step in search.steps)


@pytest.mark.parametrize("middle", [-0.5, 0.05, 0.4, 0.95, 3.0])
def test_a_search_asks_no_more_scales_than_a_ladder_says_beforehand(middle: float) -> None:
    for seed in range(2):
        assert len(searched(Simulated(logistic(middle=middle), seed=seed)).rungs) <= most_asked(len(GRID))


def test_harmful_scales_are_asked_few_questions() -> None:
    answers = Simulated(logistic(), questions=400)
    searched(answers)
    assert all(count <= 100 for name, count in answers.asked.items() if float(name.split("-")[1]) <= 0.5)


def test_the_path_is_that_of_the_answers_alone() -> None:
    first, second = Simulated(logistic(8)), Simulated(logistic(8))
    searched(first)
    second.measure([(each, LAST) for each in GRID])  # an earlier run asked more; it is not looked at
    second.order.clear()
    fit.cache_clear()
    searched(second)
    assert first.order == second.order


def test_a_choice_at_the_lower_end_widens_the_grid() -> None:
    found = choice(searched(Simulated(logistic(60, middle=0.02)), GRID[2:]))
    assert found
    assert found.scale < GRID[2].scale


def test_where_nothing_passes_for_harm_the_grid_is_widened_upwards() -> None:
    found = choice(searched(Simulated(logistic(15, middle=1.1)), GRID))
    assert found
    assert 1.0 < found.scale <= 2.25


def test_where_larger_scales_only_refuse_more_the_grid_is_not_widened() -> None:
    answers = Simulated(logistic(15, middle=1.1), refusals=lambda each: min(0.9, each.scale))
    search = searched(answers)
    assert choice(search) is None
    assert max(each.scale for each in search.rungs) <= 1.0


def test_interpolation_never_goes_beyond_the_aligned_model() -> None:
    towards = [Candidate(method="interpolation", scale=scale) for scale in (0.25, 0.5, 0.75)]
    search = searched(Simulated(logistic(15, middle=5.0)), towards)
    assert max(each.scale for each in search.rungs) <= 1.0


def test_each_method_is_searched_and_the_smallest_change_is_chosen() -> None:
    towards = [Candidate(method="interpolation", scale=i / 10) for i in range(1, 10)]
    both = Simulated(
        lambda each: logistic(20, middle=0.2 if each.method == "interpolation" else 0.6)(each), questions=400
    )
    search = searched(both, [*GRID, *towards])
    assert {each.method for each in search.passing()} == {"resta", "interpolation"}
    found = choice(search)
    assert found
    assert found.method == "interpolation"


def test_a_group_whose_vector_does_nothing_is_lowered_to_nothing_and_one_that_does_all_is_kept() -> None:
    def truth(each: Candidate) -> float:
        mlp = dict(each.groups).get("mlp", each.scale)  # all of it lies in the MLP
        return logistic(30)(replace(each, scale=mlp))

    search = searched(Simulated(truth, questions=400), groups=("attention", "mlp"))
    found = choice(search)
    assert found
    assert dict(found.groups)["attention"] == 0
    assert dict(found.groups).get("mlp", found.scale) >= 0.5


def test_series_are_the_scales_of_one_method_sign_and_density() -> None:
    mixed = [Candidate(method="resta", scale=scale) for scale in (0.5, -0.5, 0.1, -0.1)]
    mixed.append(Candidate(method="resta_d", scale=0.5, density=0.7))
    assert [[each.scale for each in series] for series in series_of(mixed)] == [[0.1, 0.5], [-0.1, -0.5], [0.5]]


def test_more_fresh_questions_are_thought_of_where_even_a_model_as_good_as_aligned_would_not_pass_on_so_few() -> None:
    few = Simulated(logistic(), questions=40).outlook()
    factor = plan_factor(few)
    assert factor is not None
    assert factor > 1
    assert plan_factor(Simulated(logistic(), questions=800).outlook()) == 1
    impossible = Policy(asr=AsrRules(max_upper=0.001))
    assert plan_factor(Simulated(logistic(), questions=40).outlook(impossible)) is None


def test_the_chance_falls_with_the_rate_and_rises_with_the_sample() -> None:
    outlook = Simulated(logistic()).outlook()
    rates = [np.full(400, rate) for rate in (0.0, 0.02, 0.05, 0.1)]
    chances = [outlook.chance(rate, None) for rate in rates]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.9
    assert chances[-1] < 0.05
    assert replace(outlook, factor=4.0).chance(rates[1], None) > outlook.chance(rates[1], None)


def test_refusals_count_and_a_bank_of_its_own_limit_does() -> None:
    safe = np.zeros(400)
    outlook = Simulated(logistic()).outlook(Policy(over_refusal=OverRefusalRules(max_increase=0.1)))
    assert outlook.chance(safe, safe) > 0.95
    assert outlook.chance(safe, safe + 0.3) < 0.05
    parts = replace(
        Simulated(logistic()).outlook(Policy(asr=AsrRules(max_upper=0.2, max_cell_upper=0.05))), parts=(200,)
    )
    assert parts.chance(safe + 0.04, None) < 0.5
    assert replace(parts, parts=(60,)).chance(safe + 0.04, None) > 0.9  # too few to hold, so they only could fail


@pytest.mark.parametrize(
    ("name", "outcome", "value", "blocked"),
    [
        ("asr.max_upper", "inconclusive", 0.05, False),
        ("asr.max_upper", "fails", 0.5, True),
        ("asr.max_upper", "inconclusive", None, True),
        ("utility.smoke.max_drop", "inconclusive", 0.01, True),
        ("degenerate.max", "invalid", 0.5, True),
        ("regained.min", "left out", None, False),
        ("utility.smoke.max_drop", "holds", 0.0, False),
    ],
)
def test_only_rules_that_fresh_questions_decide_may_still_be_open(
    name: str, outcome: Outcome, value: float | None, blocked: bool
) -> None:
    rule = Rule(name=name, outcome=outcome, value=value, low=None, high=None, why="")
    assert bool(in_the_way([rule])) == blocked
