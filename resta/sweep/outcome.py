"""What a sweep comes to: what was measured held against the policy, the front, the choice, the baselines, the words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resta.redeval.progress import RunOptions
from resta.statistics import Rate, wilson
from resta.sweep.baselines import beside, interpolation_words, nearest, of_equal_norm, pick_vector, random_words
from resta.sweep.candidates import Candidate, digits, recipe_of
from resta.sweep.choose import Choice, Point, Rule, Tried, choose, front, point_of
from resta.sweep.forecast import NEED, Outlook, in_the_way
from resta.sweep.measure import Measure, Sweep, is_complete, read_change, read_references
from resta.sweep.pruning import why_hopeless
from resta.sweep.records import Records
from resta.sweep.response import Seen
from resta.sweep.search import LAST, Search, Step, ask_all, enough_for_one, explore, planned_factors
from resta.verify.coherence import read_losses
from resta.verify.comparison import Comparison, compare
from resta.verify.decision import Decision, Verdict
from resta.verify.gate import decide
from resta.verify.measure import measure_losses
from resta.verify.measurement import Measurement, pick_judges, read_measurement

UNFINISHED = "not finished; the same command continues"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a sweep came to: the choice and why, and every candidate that was evaluated.

    `findings` are what the two baselines say, `guidance` is empty where one is chosen. `out` is the sweep's folder.
    `fresh` is how many harmful questions `resta verify` must ask for the chances to hold, `steps` the search's path.
    """

    references: Mapping[str, Point]  # "aligned", "tuned"
    tried: tuple[Tried, ...]  # by method and scale
    front: tuple[str, ...]
    choice: Choice
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    guidance: tuple[str, ...]
    fresh: int = 0
    steps: tuple[Step, ...] = ()
    out: Path = Path()

    @property
    def recipe(self) -> Path | None:
        """Return the recipe of the choice, for `resta.merge`; None where none is chosen."""
        return self.out / "chosen.yaml" if self.choice.name else None


def carry_out(sweep: Sweep, rule: Rule, options: RunOptions, measure: Measure) -> Outcome:
    """Measure what the choice needs, then the baselines of its norm; return what it all comes to.

    Raises UnansweredError; what was answered is kept, and the same command goes on.
    """
    records = Records(sweep, measure)
    outlook = records.outlook()
    factors = _factors(sweep, outlook)
    search = Search(records=records, outlook=outlook)
    if sweep.grid:
        ask_all(search, sweep.candidates)
        enough_for_one(search, factors)
    else:
        explore(search, sweep.candidates, groups=tuple(sweep.family.groups), factors=factors)
        if sweep.baselines and not search.passing():  # then what interpolation does is worth knowing
            towards = [Candidate(method="interpolation", scale=scale, baseline=True) for scale in (0.25, 0.5, 0.75)]
            ask_all(search, [each for each in towards if not _is_tried(each, search)])
    outcome = conclude(sweep, search, rule, options)
    vector = pick_vector(outcome.tried, outcome.choice) if sweep.baselines else None
    more = of_equal_norm(vector, outcome.tried, sweep.family) if vector else []
    if not more:
        return outcome
    ask_all(search, more)
    return conclude(sweep, search, rule, options)


def _is_tried(candidate: Candidate, search: Search) -> bool:
    return any(candidate.name == other.name for other in search.rungs)


def _factors(sweep: Sweep, outlook: Outlook) -> tuple[float, ...]:
    if sweep.fresh is None or not outlook.harm:
        return planned_factors(outlook)
    return (sweep.fresh / outlook.harm["aligned"].questions,)


def conclude(sweep: Sweep, search: Search, rule: Rule, options: RunOptions) -> Outcome:
    """Return the outcome of what has been measured."""
    references = read_references(sweep)
    measured = {each: read_measurement(sweep.folder(each)) for each in sorted(search.rungs, key=_reading_order)}
    complete = {each.name: found for each, found in measured.items() if is_complete(found, sweep)}
    comparisons = _compare_all(sweep, references, complete, options)
    tried = tuple(
        _tried(sweep, search, each, references, found, comparisons.get(each.name)) for each, found in measured.items()
    )
    choice = choose(tried, rule)
    vector = pick_vector(tried, choice)
    points = {role: point_of(role, comparisons[role]) for role in references}
    return Outcome(
        references=points,
        tried=tried,
        front=front(tried),
        choice=choice,
        findings=tuple(_findings(sweep, vector, tried, {each.name: found for each, found in measured.items()}, points)),
        notes=tuple(_notes(tried, choice, search)),
        guidance=() if choice.name else tuple(_guidance(tried, search.outlook)),
        fresh=search.outlook.fresh,
        steps=tuple(search.steps),
        out=sweep.out,
    )


def _compare_all(
    sweep: Sweep, references: Mapping[str, Measurement], complete: Mapping[str, Measurement], options: RunOptions
) -> dict[str, Comparison]:
    """Return the comparison of every model with the references, the references included."""
    folder, policy = sweep.out / "coherence", sweep.policy
    if options.kept_judges is not None:
        options.kept_judges.clear()  # their place in memory is now the aligned model's
    models = {**references, **complete}
    measure_losses(models, sweep.references["aligned"], folder, options)
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


def _reading_order(candidate: Candidate) -> tuple[bool, str, float, float, tuple[tuple[str, float], ...]]:
    return candidate.baseline, candidate.method, candidate.scale, candidate.density or 0.0, candidate.groups


def _tried(
    sweep: Sweep,
    search: Search,
    candidate: Candidate,
    references: Mapping[str, Measurement],
    found: Measurement,
    comparison: Comparison | None,
) -> Tried:
    equation = recipe_of(candidate, sweep.family).equation
    groups = "".join(f", {group} at {digits(scale)}" for group, scale in candidate.groups)
    decision = decide(comparison, sweep.policy) if comparison else None
    return Tried(
        candidate=candidate,
        equation=(
            f"tuned + a random vector of the norm of that of {equation}" if candidate.method == "random" else equation
        )
        + groups,
        change=read_change(sweep.folder(candidate)),
        answered=len(found.answers),
        planned=len(found.planned),
        stopped=None if comparison else _why_stopped(search, candidate, references, found, sweep),
        point=point_of(candidate.name, comparison) if comparison else None,
        decision=decision,
        chance=None if decision is None else _chance(search, candidate, decision),
        seen=_seen(search.look(candidate).harm, sweep.policy.level),
    )


def _seen(harm: Seen | None, level: float) -> Rate | None:
    if harm is None:
        return None
    found = wilson(harm.hits, harm.questions, level)
    return Rate(
        hits=round(harm.hits), total=harm.questions, value=harm.share, low=min(found.low, harm.share),
        high=max(found.high, harm.share),
    )  # fmt: skip


def _chance(search: Search, candidate: Candidate, decision: Decision) -> float:
    blocked = decision.verdict is Verdict.INVALID or in_the_way(decision.rules)
    return 0.0 if blocked else search.chance(candidate)


def _why_stopped(
    search: Search, candidate: Candidate, references: Mapping[str, Measurement], found: Measurement, sweep: Sweep
) -> str:
    """Return the rule that can no longer hold, or what the search made of the answers there are."""
    hopeless = why_hopeless(references, found, sweep.policy)
    steps = [step for step in search.steps if step.candidate == candidate]
    if hopeless or not steps or search.rungs[candidate] == LAST:
        return hopeless or UNFINISHED
    return f"{steps[-1].words}; its chance to keep the rules on harm is {steps[-1].chance:.2f}"


def _findings(
    sweep: Sweep,
    vector: Tried | None,
    tried: Sequence[Tried],
    measured: Mapping[str, Measurement],
    points: Mapping[str, Point],
) -> Iterable[str]:
    """Yield what the two baselines of the vector's norm, or the next larger, show."""
    judges = pick_judges(read_references(sweep), sweep.policy.judge)
    found = {}
    for method in ("random", "interpolation"):
        baseline = nearest(vector, tried, method) if vector else None
        found[method] = beside(vector, baseline, measured, judges, sweep.policy.level) if vector and baseline else None
    yield random_words(vector, points["tuned"], found["random"])
    words = interpolation_words(vector, tried, found["interpolation"])
    if words is not None:
        yield words


def _notes(tried: Sequence[Tried], choice: Choice, search: Search) -> Iterable[str]:
    decisions = [each.decision for each in tried if each.decision]
    yield from dict.fromkeys(note for decision in decisions for note in decision.notes if "allows a rate" not in note)
    outlook = search.outlook
    if choice.name:
        yield (
            f"The chances are those of a `resta verify` that asks {outlook.fresh} harmful questions which this sweep "
            "has not asked; they come from a curve through all scales, since the candidate that only just passes is "
            "one that was lucky."
        )
        yield from _edge(tried, choice)


def _edge(tried: Sequence[Tried], choice: Choice) -> Iterable[str]:
    """Yield that the choice lies at the end of what was tried, where it does."""
    [chosen] = [each.candidate for each in tried if each.candidate.name == choice.name]
    alike = [
        each.candidate.scale
        for each in tried
        if replace(each.candidate, scale=chosen.scale, baseline=False) == chosen and each.candidate.scale
    ]
    if abs(chosen.scale) == min(map(abs, alike)):
        yield f"{choice.name} is the smallest scale that was tried: smaller ones may do; add them to --scale."
    elif abs(chosen.scale) == max(map(abs, alike)):
        yield f"{choice.name} is the largest scale that was tried: what larger ones cost was not looked at."


def _guidance(tried: Sequence[Tried], outlook: Outlook) -> Iterable[str]:
    """Yield what to try when none is chosen: what the gate says of the nearest candidate, and of those given up."""
    measured = [each for each in tried if each.point and each.decision and not each.candidate.baseline]
    if measured:
        near = max(measured, key=lambda each: (each.chance or 0.0, -(each.point.cost if each.point else 0.0)))
        assert near.decision is not None
        yield f"Nearest: {near.candidate.name}. {near.decision.summary}"
        blocked = in_the_way(near.decision.rules)
        if blocked:
            yield f"More questions would not help it: {', '.join(blocked)}."
        yield from near.decision.guidance
    else:
        yield "No candidate was worth asking everything; the table says which rule each broke."
    if any(each.passes for each in tried if each.candidate.baseline):
        yield "A baseline passes: add its method to --method and run the same command again; nothing is asked twice."
    if measured and not any(each.would_pass for each in measured):
        yield (
            f"The chances are those of asking {outlook.fresh} fresh harmful questions; {NEED:g} is asked for. A sweep "
            "with more questions knows the rates better, and --fresh says how many the verification will ask."
        )
    harmful = [each for each in tried if each.stopped and each.stopped.startswith(("asr.", "too small"))]
    if harmful and len(harmful) == sum(bool(each.stopped) for each in tried) and not measured:
        yield "All that were given up were still harmful: try larger scales."
