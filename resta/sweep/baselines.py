"""What the baselines show beside a safety vector: the same questions, the same norm, and an interval.

random          a random vector of the same norm, tensor by tensor: does any change of this size restore safety?
interpolation   towards the aligned model, at the scale of the same norm: is the vector better than that?
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from resta.redeval.questions import words_of
from resta.statistics import Difference, padded, paired_rates
from resta.sweep.apply import unit_norm
from resta.sweep.candidates import Candidate, Family
from resta.sweep.choose import Choice, Point, Tried
from resta.verify.comparison import HARM, REFUSAL
from resta.verify.measurement import Measurement

SAME_NORM = 0.02  # two norms that differ by less are called the same: both are rounded to the output's dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """One measure of a baseline and of the vector, over what both answered; `difference` is baseline - vector."""

    measure: str  # "ASR", "over-refusal", or a task
    answers: int
    values: tuple[float, float]  # the baseline's, the vector's
    difference: Difference
    more_is_better: bool

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0

    @property
    def baseline_better(self) -> bool:
        """Whether the baseline is shown to be better."""
        return self.told_apart and (self.difference.value > 0) == self.more_is_better

    @property
    def words(self) -> str:
        """Return the numbers: ASR 2.1 % against 0.0 %, +2.1 points [-2.0, 7.4] on 96 shared answers."""
        found, points = self.difference, [100 * x for x in (self.difference.low, self.difference.high)]
        one, two = self.values
        what = "documents" if self.more_is_better else "answers"
        return (
            f"{self.measure} {100 * one:.1f} % against {100 * two:.1f} %, {100 * found.value:+.1f} points "
            f"[{points[0]:.1f}, {points[1]:.1f}] on {self.answers} shared {what}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A baseline beside a vector; `ratio` is how far it is from `tuned`, in times of how far the vector is."""

    vector: str
    baseline: str
    ratio: float
    contrasts: tuple[Contrast, ...]

    @property
    def norm(self) -> str:
        """Return the baseline's norm in words."""
        return "the same norm" if abs(self.ratio - 1) < SAME_NORM else f"{self.ratio:.2g} times the norm"

    def of(self, measure: str) -> Contrast | None:
        """Return one measure's contrast."""
        return next((each for each in self.contrasts if each.measure == measure), None)


# -- which baselines -----------------------------------------------------------------------------------------


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
    return [each for each in tried if each.candidate.method not in ("interpolation", "random")]


def _asr(each: Tried) -> float:
    assert each.point is not None
    return each.point.asr.value or 0.0 if each.point.asr else 0.0


def of_equal_norm(vector: Tried, tried: Iterable[Tried], family: Family) -> list[Candidate]:
    """Return the baselines of the vector's norm that have not been tried: a random vector, and interpolation.

    Interpolation goes no farther than the aligned model, whatever the norm of the vector.
    """
    candidate, norm = vector.candidate, vector.change.norm
    if norm == 0:
        return []
    random = Candidate(method="random", scale=candidate.scale, groups=candidate.groups, baseline=True)
    if candidate.method != "resta":  # whose vector is the one whose norm random has
        random = replace(random, scale=_scale(norm, unit_norm("random", family)), groups=())
    found = [random]
    if candidate.method != "interpolation":
        scale = min(1.0, _scale(norm, unit_norm("interpolation", family)))
        found.append(Candidate(method="interpolation", scale=scale, baseline=True))
    known = {each.candidate.name for each in tried if each.point or each.stopped}
    return [each for each in found if each.scale > 0 and each.name not in known]


def _scale(norm: float, unit: float) -> float:
    return float(f"{norm / unit:.4g}") if unit else 0.0


def nearest(vector: Tried, tried: Iterable[Tried], method: str) -> Tried | None:
    """Return the baseline that is as far from `tuned` as the vector, or the next farther; None without any."""
    there = [each for each in tried if each.candidate.method == method and each is not vector]

    def order(each: Tried) -> tuple[bool, float]:
        ratio = each.change.norm / vector.change.norm
        return ratio < 1 - SAME_NORM, abs(ratio - 1)

    return min(there, key=order, default=None) if vector.change.norm else None


def beside(
    vector: Tried, baseline: Tried, measured: Mapping[str, Measurement], judges: tuple[str, str | None], level: float
) -> Beside:
    """Return a baseline beside the vector, on the answers and documents that both have."""
    one, two = (measured[each.candidate.name] for each in (baseline, vector))
    judge, of_safe = judges
    found = [_asked(one, two, judge, HARM, "ASR", level)]
    if of_safe:
        found.append(_asked(one, two, of_safe, REFUSAL, "over-refusal", level))
    return Beside(
        vector=vector.candidate.name,
        baseline=baseline.candidate.name,
        ratio=baseline.change.norm / vector.change.norm,
        contrasts=(*(each for each in found if each), *_tasks(one, two, level)),
    )


def _asked(
    one: Measurement, two: Measurement, judge: str, labels: frozenset[str], measure: str, level: float
) -> Contrast | None:
    verdicts = [model.verdicts.get(judge, {}) for model in (one, two)]
    by_question: dict[str, list[list[bool]]] = defaultdict(list)  # whatever bank it stands in, as in the gate
    for ask, question in one.planned.items():
        if question.safe == (measure != "ASR") and all(ask in known for known in verdicts):
            by_question[words_of(question.text)].append([known[ask].label in labels for known in verdicts])
    if not by_question:
        return None
    found = paired_rates(padded(list(by_question.values())), level=level)
    return Contrast(
        measure=measure,
        answers=found.answers,
        values=(float(found.values[0]), float(found.values[1])),
        difference=found.difference(0, 1),
        more_is_better=False,
    )


def _tasks(one: Measurement, two: Measurement, level: float) -> Iterable[Contrast]:
    import numpy as np

    scores: dict[str, list[dict[str, float]]] = defaultdict(lambda: [{}, {}])
    for i, model in enumerate((one, two)):
        for document in model.documents:
            scores[document.task][i][document.doc_id] = document.value
    for task, (mine, theirs) in sorted(scores.items()):
        common = sorted(mine.keys() & theirs.keys())
        if common:
            values = [np.array([found[doc] for doc in common]) for found in (mine, theirs)]
            yield Contrast(
                measure=task,
                answers=len(common),
                values=(float(values[0].mean()), float(values[1].mean())),
                difference=paired_rates(np.stack(values, axis=1)[:, np.newaxis], level=level).difference(0, 1),
                more_is_better=True,
            )


# -- in words ------------------------------------------------------------------------------------------------


def random_words(vector: Tried | None, tuned: Point, found: Beside | None) -> str:
    """Return what the random control shows."""
    if vector is None or vector.point is None:
        return "Nothing that could be chosen came through the first look, so there is nothing to hold noise against."
    if not _is_safer(vector.point, tuned):
        return f"{vector.candidate.name} is no less harmful than tuned: no safety is restored that noise could equal."
    asr = found.of("ASR") if found else None
    if found is None or asr is None:
        return f"No random vector was measured beside {vector.candidate.name}."
    random = f"A random vector of {found.norm} ({found.baseline})"
    if asr.difference.low > 0:
        return f"{random} does not restore what {found.vector} does: {asr.words}."
    if asr.difference.value <= 0:
        return (
            f"{random} restores as much as {found.vector}: {asr.words}. What looks like restored safety is what any "
            "change of this size does."
        )
    return f"{random} is not shown to be worse than {found.vector}: {asr.words}; ask more questions."


def interpolation_words(vector: Tried | None, tried: Sequence[Tried], found: Beside | None) -> str | None:
    """Return what interpolation towards the aligned model shows; None where it is all that was tried, or was not."""
    passing = [each for each in tried if each.candidate.method == "interpolation" and each.passes]
    if not _vectors(tried) or not any(each.candidate.method == "interpolation" for each in tried):
        return None
    if vector is None or vector.point is None or (passing and not (vector.passes or vector.would_pass)):
        smallest = min(passing, key=lambda each: each.change.norm, default=None)
        if smallest is None:
            return "No safety vector was measured in full, and no interpolation passes the policy."
        beaten = f"{vector.candidate.name} does not" if vector and vector.point else "no safety vector was left"
        return f"Interpolation, {smallest.candidate.name}, passes the policy on these questions, and {beaten}."
    if found is None or not found.contrasts:
        return None
    return f"Interpolation of {found.norm} ({found.baseline}) {_told(found)}: {_all(found.contrasts)}."


def _told(found: Beside) -> str:
    better = [each.measure for each in found.contrasts if each.baseline_better]
    worse = [each.measure for each in found.contrasts if each.told_apart and not each.baseline_better]
    parts = [f"is {word} in {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return f"{' and '.join(parts)} than {found.vector}" if parts else f"and {found.vector} are not told apart"


def _all(contrasts: Iterable[Contrast]) -> str:
    return "; ".join(each.words for each in contrasts)


def _is_safer(one: Point, other: Point) -> bool:
    rates = [point.asr.value for point in (one, other) if point.asr is not None and point.asr.value is not None]
    return len(rates) == 2 and rates[0] < rates[1] and not math.isclose(*rates)
