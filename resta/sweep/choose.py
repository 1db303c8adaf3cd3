"""What was measured of every candidate, which lie on the front, and which one is chosen: rules that can be read.

smallest-passing   of the candidates that would pass, the one with the smallest realised change from `tuned`
best-on-front      of those that would pass and lie on the front, the one with the smallest
                   cost = ASR + over-refusal + (utility of tuned - utility)

A candidate would pass if the chance is at least NEED that fresh questions let it pass the policy (forecast.py). It is
on the front if no other is at least as good in ASR, over-refusal, utility and change, and better in one. Baselines are
on the front like all others and never chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from resta.statistics import Rate
from resta.sweep.apply import Change
from resta.sweep.candidates import Candidate
from resta.sweep.forecast import NEED
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision, Verdict

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
    """A candidate after the sweep: measured in full (`point`, `decision`), or given up, and why.

    `chance` is that of passing on fresh questions; None where it was not measured in full. `seen` is the ASR on
    whatever was answered, a question counting once.
    """

    candidate: Candidate
    equation: str
    change: Change
    answered: int
    planned: int
    stopped: str | None
    point: Point | None
    decision: Decision | None
    chance: float | None = None
    seen: Rate | None = None

    @property
    def passes(self) -> bool:
        """Whether the policy lets it pass on the sweep's own questions."""
        return self.decision is not None and self.decision.verdict is Verdict.PASS

    @property
    def would_pass(self) -> bool:
        """Whether it is likely enough to pass on fresh questions."""
        return self.chance is not None and self.chance >= NEED


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


def dominates(one: Tried, other: Tried) -> bool:
    """Whether `one` is at least as good in everything, the size of its change included, and better in something."""
    assert one.point is not None
    assert other.point is not None
    mine, theirs = (one.change.norm, *one.point.costs), (other.change.norm, *other.point.costs)
    pairs = list(zip(mine, theirs, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(tried: Iterable[Tried]) -> tuple[str, ...]:
    """Return the names of the measured candidates that no other dominates, in the order given."""
    measured = [each for each in tried if each.point]
    return tuple(each.candidate.name for each in measured if not any(dominates(other, each) for other in measured))


def _would(passing: Sequence[Tried]) -> str:
    return f"{len(passing)} candidate(s) whose chance to pass on fresh questions is at least {NEED:g}"


def _why_none(tried: Sequence[Tried]) -> str:
    own = [(each.chance, each) for each in tried if not each.candidate.baseline and each.chance is not None]
    if not own:
        return "no candidate passes the policy"
    chance, best = max(own, key=lambda pair: pair[0])
    lucky = sum(each.passes for _, each in own)
    so_far = f"{lucky} pass the policy on the sweep's own questions, but " if lucky else "no candidate passes: "
    return (
        f"{so_far}the best, {best.candidate.name}, has a chance of {chance:.2f} to pass on fresh ones, where "
        f"{NEED:g} is asked for"
    )


def choose(tried: Sequence[Tried], rule: Rule) -> Choice:
    """Return which candidate is chosen, by the rule."""
    passing = [each for each in tried if each.would_pass and not each.candidate.baseline]
    if not passing:
        return Choice(name=None, rule=rule, reason=_why_none(tried))
    if rule == "smallest-passing":
        best = min(passing, key=lambda each: (each.change.norm, each.candidate.name))
        reason = (
            f"the smallest change from tuned ({100 * best.change.relative:.3g} % of its norm) of {_would(passing)}; "
            f"its own chance is {best.chance:.2f}"
        )
        return Choice(name=best.candidate.name, rule=rule, reason=reason)
    on_front = set(front(tried))
    eligible = [each for each in passing if each.candidate.name in on_front]
    if not eligible:
        reason = "all candidates that would pass are dominated by a baseline; add its method to --method"
        return Choice(name=None, rule=rule, reason=reason)
    best = min(eligible, key=lambda each: (_cost(each), each.change.norm, each.candidate.name))
    reason = (
        f"the smallest sum of ASR, over-refusal and utility lost of {_would(eligible)} and lie on the front; "
        f"its own chance is {best.chance:.2f}"
    )
    return Choice(name=best.candidate.name, rule=rule, reason=reason)


def _cost(each: Tried) -> float:
    assert each.point is not None
    return each.point.cost
