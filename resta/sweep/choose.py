"""What was measured of every candidate, which lie on the front, and which one is chosen: rules that can be read.

smallest-passing   of the candidates that pass the policy, the one with the smallest realised change from `tuned`
best-on-front      of those that pass and lie on the front, the one with the smallest
                   cost = ASR + over-refusal + (utility of tuned - utility)

A candidate is on the front if no other is at least as good in ASR, over-refusal and utility and better in one.
Baselines are on the front like all others and never chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from resta.redeval.score import Rate
from resta.sweep.apply import Change
from resta.sweep.candidates import Candidate
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision, Verdict
from resta.verify.statistics import Difference

Rule = Literal["smallest-passing", "best-on-front"]
RULES: tuple[Rule, ...] = ("smallest-passing", "best-on-front")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One model on the map. Rates are None where nothing of the kind was asked, utility is the mean over tasks."""

    name: str
    asr: Rate | None
    over_refusal: Rate | None
    utility: float | None

    @property
    def costs(self) -> tuple[float, ...]:
        """Return what should be small: ASR, over-refusal, and what utility lacks of 1; an absent one is left out."""
        rates = [rate.value for rate in (self.asr, self.over_refusal) if rate is not None and rate.value is not None]
        return (*rates, *(() if self.utility is None else (1 - self.utility,)))

    @property
    def cost(self) -> float:
        """Return the sum of the costs; between two points of a sweep only differences mean anything."""
        return sum(self.costs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A candidate after the sweep: measured in full (`point`, `decision`), or given up, and why."""

    candidate: Candidate
    equation: str
    change: Change
    answered: int
    planned: int
    stopped: str | None
    point: Point | None
    decision: Decision | None

    @property
    def passes(self) -> bool:
        """Whether the policy lets it pass."""
        return self.decision is not None and self.decision.verdict is Verdict.PASS


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The chosen candidate's name, or None, and the reason in one sentence."""

    name: str | None
    rule: Rule
    reason: str


def point_of(name: str, comparison: Comparison) -> Point:
    """Return where the comparison's restored model lies."""
    means = [task.means["restored"].value for task in comparison.utility]
    return Point(
        name=name,
        asr=comparison.asr.rates["restored"] if comparison.asr else None,
        over_refusal=comparison.over_refusal.rates["restored"] if comparison.over_refusal else None,
        utility=sum(means) / len(means) if means else None,
    )


def is_safer(one: Point, other: Point) -> bool:
    """Whether `one` was observed to do less harm."""
    rates = [point.asr.value for point in (one, other) if point.asr is not None and point.asr.value is not None]
    return len(rates) == 2 and rates[0] < rates[1]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is at least as good in everything and better in something."""
    pairs = list(zip(one.costs, other.costs, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(points: Iterable[Point]) -> tuple[str, ...]:
    """Return the names of the points that no other dominates, in the order given."""
    points = list(points)
    return tuple(point.name for point in points if not any(dominates(other, point) for other in points))


def choose(tried: Sequence[Tried], rule: Rule) -> Choice:
    """Return which candidate is chosen, by the rule."""
    passing = [each for each in tried if each.passes and not each.candidate.baseline]
    if not passing:
        return Choice(name=None, rule=rule, reason="no candidate passes the policy")
    if rule == "smallest-passing":
        best = min(passing, key=lambda each: (each.change.norm, each.candidate.name))
        reason = (
            f"the smallest change from tuned ({100 * best.change.relative:.3g} % of its norm) of {len(passing)} "
            f"candidate(s) that pass the policy"
        )
        return Choice(name=best.candidate.name, rule=rule, reason=reason)
    on_front = set(front(each.point for each in tried if each.point))
    eligible = [each for each in passing if each.candidate.name in on_front]
    if not eligible:
        reason = "all candidates that pass are dominated by a baseline; add its method to --method"
        return Choice(name=None, rule=rule, reason=reason)
    best = min(eligible, key=lambda each: (_cost(each), each.change.norm, each.candidate.name))
    reason = (
        f"the smallest sum of ASR, over-refusal and utility lost of {len(eligible)} candidate(s) that pass the "
        "policy and lie on the front"
    )
    return Choice(name=best.candidate.name, rule=rule, reason=reason)


def _cost(each: Tried) -> float:
    assert each.point is not None
    return each.point.cost


# -- what the baselines say ----------------------------------------------------------------------------------


SAME_NORM = 0.02  # two norms that differ by less are called the same: both are rounded to the output's dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """Random against a candidate, on the harmful asks that both answered.

    `ratio` is how far random is from `tuned`, in times of how far the candidate is.
    """

    candidate: str
    random: str
    ratio: float
    answers: int
    rates: tuple[float, float]  # random's, the candidate's
    difference: Difference  # of these two

    @property
    def restores_as_much(self) -> bool:
        """Whether noise is not shown to be worse."""
        return self.difference.low <= 0

    @property
    def words(self) -> str:
        """Return the finding as a sentence."""
        noise, vector = (100 * rate for rate in self.rates)
        rates = f"ASR {noise:.1f} % against {vector:.1f} % on {self.answers} shared answers"
        norm = "the same norm" if abs(self.ratio - 1) < SAME_NORM else f"{self.ratio:.2g} times the norm"
        random = f"A random vector of {norm} ({self.random})"
        if not self.restores_as_much:
            return f"{random} does not restore what {self.candidate} does: {rates}."
        if self.difference.value <= 0:
            return (
                f"{random} restores as much as {self.candidate}: {rates}. What looks like restored safety is what any "
                "change of this size does."
            )
        return f"{random} is not shown to be worse than {self.candidate}: {rates}; ask more questions."


def pick_vector(tried: Sequence[Tried], choice: Choice) -> Tried | None:
    """Return the candidate that the baselines are held against: the chosen one, else the least harmful of those that
    pass, else of those that were measured.

    Interpolation is what others are compared with, and is picked only where nothing else was tried.
    """
    measured = [each for each in _vectors(tried) or tried if each.point and each.candidate.method != "random"]
    chosen = [each for each in measured if each.candidate.name == choice.name]
    passing = [each for each in measured if each.passes]
    return min(chosen or passing or measured, key=lambda each: (_asr(each), each.change.norm), default=None)


def _vectors(tried: Sequence[Tried]) -> list[Tried]:
    return [each for each in tried if each.candidate.method not in ("wise", "random")]


def _asr(each: Tried) -> float:
    assert each.point is not None
    return each.point.asr.value or 0.0 if each.point.asr else 0.0


def interpolation_words(tried: Sequence[Tried], vector: Tried | None) -> str | None:
    """Return what interpolation towards the aligned model shows beside the vector; None where only one was tried."""
    wise = [each for each in tried if each.candidate.method == "wise"]
    passing = [each for each in wise if each.passes]
    if not wise or not _vectors(tried):
        return None
    if vector is None or vector.point is None:
        if passing:
            name = _smallest(passing).candidate.name
            return f"Interpolation is better: {name} passes the policy, and every safety vector was given up."
        return "Every safety vector was given up, and no interpolation passes the policy."
    name = vector.candidate.name
    better = [each for each in wise if each.point and dominates(each.point, vector.point)]
    if passing and not vector.passes:
        return (
            f"Interpolation is better than the safety vector: {_smallest(passing).candidate.name} passes the policy "
            f"and {name} does not. It needs no base."
        )
    if better:
        best = min(better, key=_cost)
        return (
            f"Interpolation is better than the safety vector: {best.candidate.name} is at least as good as {name} in "
            "everything that was measured, and better in something. It needs no base."
        )
    if vector.passes and passing and _smallest(passing).change.norm < vector.change.norm:
        return f"{_smallest(passing).candidate.name} (interpolation) passes with a smaller change than {name}."
    return f"Interpolation is not better than {name} in what was measured."


def _smallest(tried: Sequence[Tried]) -> Tried:
    return min(tried, key=lambda each: (each.change.norm, each.candidate.name))
