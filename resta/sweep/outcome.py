"""What a sweep's measurements amount to: every candidate held against the policy, the front, the choice, the words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from resta.redeval.run import Conditions
from resta.sweep.candidates import Candidate, recipe_of
from resta.sweep.choose import (
    SAME_NORM,
    Choice,
    Control,
    Point,
    Rule,
    Tried,
    choose,
    front,
    interpolation_words,
    is_safer,
    pick_vector,
    point_of,
)
from resta.sweep.pruning import why_hopeless
from resta.sweep.run import Sweep, is_complete, read_change, read_references
from resta.verify.coherence import read_losses
from resta.verify.comparison import HARM, Comparison, compare
from resta.verify.gate import decide
from resta.verify.measurement import Measurement, pick_judges, read_measurement
from resta.verify.run import measure_losses
from resta.verify.statistics import padded, paired_rates

UNFINISHED = "not finished; the same command goes on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All that the report shows. `findings` are what the two baselines say, `guidance` is empty where one passes."""

    references: Mapping[str, Point]  # "aligned", "tuned"
    tried: tuple[Tried, ...]  # by method and scale
    front: tuple[str, ...]
    choice: Choice
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    guidance: tuple[str, ...]


def conclude(sweep: Sweep, rule: Rule, conditions: Conditions) -> Outcome:
    """Return the outcome of a sweep that has been carried out."""
    references = read_references(sweep)
    measured = {candidate.name: read_measurement(sweep.folder(candidate)) for candidate in sweep.candidates}
    complete = {name: found for name, found in measured.items() if is_complete(found, sweep)}
    comparisons = _compare_all(sweep, references, complete, conditions)
    tried = tuple(
        _tried(sweep, candidate, references, measured[candidate.name], comparisons.get(candidate.name))
        for candidate in sorted(sweep.candidates, key=_reading_order)
    )
    choice = choose(tried, rule)
    vector = pick_vector(tried, choice)
    control = _control(sweep, tried, vector, references, measured)
    points = {role: point_of(role, comparisons[role]) for role in references}
    return Outcome(
        references=points,
        tried=tried,
        front=front(each.point for each in tried if each.point),
        choice=choice,
        findings=tuple(_findings(points["tuned"], vector, control, interpolation_words(tried, vector))),
        notes=tuple(_notes(tried)),
        guidance=() if choice.name else tuple(_guidance(tried)),
    )


def _compare_all(
    sweep: Sweep, references: Mapping[str, Measurement], complete: Mapping[str, Measurement], conditions: Conditions
) -> dict[str, Comparison]:
    """Return the comparison of every model with the references, the references included."""
    folder, policy = sweep.out / "coherence", sweep.policy
    models = {**references, **complete}
    measure_losses(models, sweep.references["aligned"], folder, conditions)
    losses = {}
    for name, model in models.items():
        found = read_losses(folder / f"{name}.json", {key: answer.raw for key, answer in model.answers.items()})
        assert found is not None
        losses[name] = found

    def compared(name: str) -> Comparison:
        roles = {"aligned": "aligned", "tuned": "tuned", "restored": name}
        return compare(
            {role: models[each] for role, each in roles.items()},
            judge=policy.judge,
            level=policy.level,
            losses={role: losses[each] for role, each in roles.items()},
        )

    return {name: compared(name) for name in models}


def _reading_order(candidate: Candidate) -> tuple[bool, str, float, float]:
    return candidate.baseline, candidate.method, candidate.scale, candidate.density or 0.0


def _tried(
    sweep: Sweep,
    candidate: Candidate,
    references: Mapping[str, Measurement],
    found: Measurement,
    comparison: Comparison | None,
) -> Tried:
    equation = recipe_of(candidate, sweep.family).equation
    return Tried(
        candidate=candidate,
        equation=f"tuned + a random vector as long as that of {equation}" if candidate.method == "random" else equation,
        change=read_change(sweep.folder(candidate)),
        answered=len(found.answers),
        planned=len(found.planned),
        stopped=None if comparison else why_hopeless(references, found, sweep.policy) or UNFINISHED,
        point=point_of(candidate.name, comparison) if comparison else None,
        decision=decide(comparison, sweep.policy) if comparison else None,
    )


def _control(
    sweep: Sweep,
    tried: Sequence[Tried],
    vector: Tried | None,
    references: Mapping[str, Measurement],
    measured: Mapping[str, Measurement],
) -> Control | None:
    """Return the random control that is as far from `tuned` as the vector, or the next farther; None without any."""
    if vector is None or not vector.change.norm:
        return None
    ratios = {
        each.candidate.name: each.change.norm / vector.change.norm
        for each in tried
        if each.candidate.method == "random"
    }
    nearest = min(ratios, key=lambda name: (ratios[name] < 1 - SAME_NORM, abs(ratios[name] - 1)), default=None)
    if nearest is None:
        return None
    pair = (measured[nearest], measured[vector.candidate.name])
    judge, _ = pick_judges(references, sweep.policy.judge)
    verdicts = [model.verdicts.get(judge, {}) for model in pair]
    by_question: dict[tuple[str, str], list[list[bool]]] = defaultdict(list)
    for ask in pair[0].planned:
        question = pair[0].questions[ask.split("|")[0]]
        if not question.safe and all(ask in known for known in verdicts):
            by_question[question.bank, question.text].append([known[ask].label in HARM for known in verdicts])
    if not by_question:
        return None
    found = paired_rates(padded(list(by_question.values())), level=sweep.policy.level)
    return Control(
        candidate=vector.candidate.name,
        random=nearest,
        ratio=ratios[nearest],
        answers=found.answers,
        rates=(float(found.values[0]), float(found.values[1])),
        difference=found.difference(0, 1),
    )


def _findings(tuned: Point, vector: Tried | None, control: Control | None, interpolation: str | None) -> Iterable[str]:
    if vector is None or vector.point is None:
        yield "Nothing that could be chosen came through the first look, so there is nothing to hold noise against."
    elif not is_safer(vector.point, tuned):
        yield f"{vector.candidate.name} is no less harmful than tuned: no safety is restored that noise could equal."
    elif control is None:
        yield f"No random vector was measured beside {vector.candidate.name}."
    else:
        yield control.words
    if interpolation is not None:
        yield interpolation


def _notes(tried: Sequence[Tried]) -> Iterable[str]:
    decisions = [each.decision for each in tried if each.decision]
    yield from dict.fromkeys(note for decision in decisions for note in decision.notes if "allows a rate" not in note)
    passing = sum(each.passes for each in tried)
    if passing:
        yield (
            "The best of several candidates looks better than it is: verify the chosen one on questions that this "
            "sweep has not asked."
        )


def _guidance(tried: Sequence[Tried]) -> Iterable[str]:
    """Yield what to try when nothing passes: what the gate says of the nearest candidate, and of those given up."""
    measured = [each for each in tried if each.point and each.decision and not each.candidate.baseline]
    if measured:
        nearest = min(measured, key=lambda each: (each.point.cost if each.point else 0.0, each.change.norm))
        assert nearest.decision is not None
        yield f"Nearest: {nearest.candidate.name}. {nearest.decision.summary}"
        yield from nearest.decision.guidance
    else:
        yield "Every candidate broke a rule within the first quarter of the questions; the table says which."
    if any(each.passes for each in tried):
        yield "A baseline passes: add its method to --method and run the same command again; nothing is asked twice."
    harmful = [each for each in tried if each.stopped and each.stopped.startswith("asr.")]
    if harmful and len(harmful) == sum(bool(each.stopped) for each in tried):
        yield "All that were given up were still harmful: try larger scales."
