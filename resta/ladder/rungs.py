"""The rungs of the ladder, the cheapest first: what each tries, and what its best candidate showed.

    nothing             tuned as it is
    weights             RESTA, interpolation and both together, by the sweep's search
    stochastic          the same, rounded to the stored dtype at random, where rounding is what was lost
    float32             the same, not rounded, where rounding is what was lost
    patch               a small adapter on tuned that learned from aligned's refusals (patches.py)
    patched-weights     the same on the best of the weight arithmetic

Every candidate is a recipe of `resta merge`, and all are measured on the choosing questions. A rung's candidate is good
enough if its chance to pass on the verifying questions is at least NEED. Knows nothing of verifying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resta.engine import merge
from resta.errors import RequestError
from resta.ladder.questions import CHOOSING, Part
from resta.manifest import change_warning
from resta.recipe import OutputChoices, Recipe
from resta.redeval.progress import RunOptions
from resta.redeval.targets import Target
from resta.sweep import Family, Grid, Outcome, Tried
from resta.sweep import run as sweep
from resta.sweep.candidates import INTERPOLATION_SCALES, recipe_of
from resta.sweep.choose import Point, point_of
from resta.sweep.conduct import reference_of
from resta.sweep.forecast import NEED, Outlook, drawn_of, in_the_way
from resta.sweep.records import outlook_of
from resta.verify import Exam, Verdict
from resta.verify.budget import read_budget
from resta.verify.coherence import read_losses
from resta.verify.comparison import Comparison, compare
from resta.verify.decision import Decision
from resta.verify.gate import decide
from resta.verify.measure import measure, measure_losses
from resta.verify.measurement import Measurement
from resta.verify.policy import Policy

NOTHING, WEIGHTS, STOCHASTIC, FLOAT32 = "nothing", "weights", "stochastic", "float32"
PATCH, PATCHED_WEIGHTS = "patch", "patched-weights"
RUNGS = {
    NOTHING: "tuned as it is",
    WEIGHTS: "weight arithmetic: RESTA, interpolation, both",
    STOCHASTIC: "the same with stochastic rounding",
    FLOAT32: "the same in float32",
    PATCH: "a patch that learned from aligned's refusals",
    PATCHED_WEIGHTS: "a patch on the best weight arithmetic",
}
ROUNDING = {
    STOCHASTIC: OutputChoices(files_from="tuned", rounding="stochastic"),
    FLOAT32: OutputChoices(files_from="tuned", dtype="float32"),
}
# Where the search begins; it widens the grid where the choice lies at an edge.
SCALES, TOWARDS_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5), INTERPOLATION_SCALES
NO_HOPE = 0.05  # a chance of aligned itself, below which there is nothing to be had from it


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What else may be chosen of a ladder. `only`, the limits and the unseen banks may change between two calls.

    `settings` are how models are loaded (device, dtype, chat_template, batch_rows), `family` what `make_family` takes
    besides the models. `baselines` also measures a random vector and interpolation beside the weight arithmetic.
    """

    only: tuple[str, ...] = ()  # rungs that may be chosen; empty: all
    harmful: str | Path | None = None  # bank that a patch learns from; by default a part of the exam's questions
    unseen: tuple[str | Path, ...] = ()  # harmful questions to verify on, where those that were drawn are spent
    unseen_safe: tuple[str | Path, ...] = ()
    max_minutes: float | None = None
    budget_answers: int | None = None
    seed: int = 0
    baselines: bool = False
    include_text: bool = False
    patch: Mapping[str, Any] = field(default_factory=dict)  # teaching, learning and drawing of `resta.patch.run`
    settings: Mapping[str, Any] = field(default_factory=dict)
    family: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """All that decides what is tried: models, rules, questions, and where the records lie."""

    family: Family
    policy: Policy
    exam: Exam
    parts: Mapping[str, Part]
    exams: Mapping[str, Exam]  # by part
    verifying: str  # the part that the choice is verified on
    task_prompts: Path | None  # what a patch is held to; None: nothing is learned
    out: Path
    choices: Choices

    @property
    def records(self) -> Path:
        """Return the folder of everything but the released model."""
        return records_of(self.out)

    def target(self, role: str) -> Target:
        """Return `tuned` or `aligned` as it is asked."""
        return reference_of(self.family, role, self.choices.settings)

    @property
    def fresh(self) -> int:
        """Return on how many harmful questions the choice is verified."""
        return self.parts[self.verifying].harmful_count


def records_of(out: Path) -> Path:
    """Return where the records of the ladder that leads to the model `out` lie."""
    return out.with_name(f"{out.name}.records")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What came of a rung: its best candidate, or why there is none. `chance` is None where nothing was measured in
    full, `recipe` where there is nothing to be written.
    """

    rung: str
    said: str
    candidate: str = ""
    equation: str = ""
    chance: float | None = None
    point: Point | None = None
    recipe: Recipe | None = None

    @property
    def would_pass(self) -> bool:
        """Whether it is likely enough to pass on the verifying questions."""
        return self.chance is not None and self.chance >= NEED


# -- the models as they are ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """`aligned` and `tuned` measured on the choosing questions, and tuned held against the policy."""

    measured: Mapping[str, Measurement]
    comparison: Comparison
    decision: Decision
    outlook: Outlook


def measure_references(ladder: Ladder, options: RunOptions) -> References:
    """Measure both models, or go on with what is missing. Raises UnansweredError."""
    folder, budget = ladder.records / "references", read_budget(ladder.exams[CHOOSING])
    measured = {}
    for role in ("tuned", "aligned"):
        options.note(f"{role}: {ladder.target(role).name}")
        measured[role] = measure(ladder.target(role), budget, folder / role, options)
    measured = {role: measured[role] for role in ("aligned", "tuned")}
    measure_losses(measured, ladder.target("aligned"), folder / "coherence", options)
    losses = {}
    for role, model in measured.items():
        found = read_losses(folder / "coherence" / f"{role}.json", {key: a.raw for key, a in model.answers.items()})
        assert found is not None
        losses[role] = found
    comparison = compare(
        {**measured, "restored": measured["tuned"]},
        judge=ladder.policy.judge,
        level=ladder.policy.level,
        losses={**losses, "restored": losses["tuned"]},
    )
    outlook = outlook_of(measured, ladder.policy)
    if outlook.harm:
        outlook = replace(outlook, factor=ladder.fresh / outlook.harm["aligned"].questions)
    return References(
        measured=measured, comparison=comparison, decision=decide(comparison, ladder.policy), outlook=outlook
    )


def try_nothing(found: References) -> Attempt:
    """Return tuned as a candidate: what passes without any change needs none."""
    chance = chance_of_tuned(found)
    return Attempt(
        rung=NOTHING,
        candidate="tuned",
        equation="tuned",
        chance=chance,
        point=point_of("tuned", found.comparison),
        said=f"tuned as it is: {found.decision.summary}",
    )


def chance_of_tuned(found: References) -> float:
    """Return the chance that tuned itself passes on the verifying questions, by what it showed on others."""
    left_out = {rule.name for rule in found.decision.rules if rule.outcome == "left out"}
    blocked = set(in_the_way(found.decision.rules)) - left_out
    if found.decision.verdict is Verdict.INVALID or blocked:
        return 0.0
    outlook = found.outlook
    if "regained.min" in left_out:  # nothing was lost that could be regained
        outlook = replace(outlook, policy=outlook.policy.model_copy(update={"regained": None}))
    return outlook.chance(*(drawn_of(seen, "tuned") if seen else None for seen in (outlook.harm, outlook.refusal)))


def check_aligned(found: References, ladder: Ladder) -> None:
    """Refuse an aligned model that has no safety to give. Raises RequestError."""
    harm = found.outlook.harm
    if not harm:
        return
    name, aligned, tuned = ladder.target("aligned").name, harm["aligned"].share, harm["tuned"].share
    limit = ladder.policy.asr.max_upper
    if aligned >= tuned or (limit is not None and aligned > limit):
        raise RequestError(
            f"{name}: answers {aligned:.1%} of the harmful questions, tuned {tuned:.1%}: it does not refuse, so there "
            f"is no safety in it to give back. {ADVICE}"
        )
    chance = found.outlook.safety_alone().chance(drawn_of(harm, "aligned"), None)
    if chance < NO_HOPE:
        raise RequestError(
            f"{name}: answers {aligned:.1%} of the harmful questions, and a model just as safe would pass on "
            f"{ladder.fresh} others with a chance of {chance:.2f}: name more questions (--profile, --bank), or a safer "
            f"aligned model. {ADVICE}"
        )


ADVICE = (
    "Use the instruct model that TUNED or its base belongs to, or train one: `resta collect` makes safe conversations, "
    "`resta sft` learns from them"
)


# -- weight arithmetic ---------------------------------------------------------------------------------------


def try_weights(ladder: Ladder, rung: str, options: RunOptions) -> Attempt:
    """Search the scales of every method that the given models allow. Raises UnansweredError."""
    family = replace(ladder.family, output=ROUNDING.get(rung, ladder.family.output))
    folder = ladder.records / "rungs" / rung
    baselines = ladder.choices.baselines and rung == WEIGHTS
    outcome = sweep_rung(ladder, family, grid_of(family), folder, options, baselines=baselines)
    return attempt_of(rung, outcome, family)


def sweep_rung(
    ladder: Ladder,
    family: Family,
    grid: Grid,
    folder: Path,
    options: RunOptions,
    *,
    search: bool = True,
    baselines: bool = False,
) -> Outcome:
    """Search a grid on the choosing questions, beside the references of the ladder. Raises UnansweredError."""
    return sweep(
        family=family,
        grid=grid,
        exam=ladder.exams[CHOOSING],
        policy=ladder.policy,
        out=folder,
        fresh=ladder.fresh,
        settings=ladder.choices.settings,
        options=options,
        shared=ladder.records / "references",
        search=search,
        baselines=baselines,
    )


def grid_of(family: Family) -> Grid:
    """Return what is searched: every method that the given models allow."""
    if family.subtrahend == "tuned":  # without a base there is no safety vector
        return Grid(scales=SCALES, methods=("interpolation",), interpolation_scales=TOWARDS_SCALES)
    return Grid(scales=SCALES, methods=("resta", "interpolation", "both"), interpolation_scales=TOWARDS_SCALES)


def attempt_of(rung: str, outcome: Outcome, family: Family) -> Attempt:
    """Return a sweep's choice, or the nearest that it came to."""
    best = best_of(outcome)
    if best is None:
        return Attempt(rung=rung, said=f"nothing was worth measuring in full: {outcome.choice.reason}")
    return Attempt(
        rung=rung,
        candidate=best.candidate.name,
        equation=best.equation,
        chance=best.chance,
        point=best.point,
        recipe=recipe_of(best.candidate, family),
        said=outcome.choice.reason if outcome.choice.name else _why_not(best, outcome),
    )


def _why_not(best: Tried, outcome: Outcome) -> str:
    if best.decision is None:
        return f"{outcome.choice.reason}; {best.candidate.name} went farthest: {best.stopped}"
    return f"{outcome.choice.reason}; on the choosing questions: {best.decision.summary}"


def best_of(outcome: Outcome) -> Tried | None:
    """Return the choice, else the likeliest to pass of those measured in full, else the least harmful; no baseline."""
    own = [each for each in outcome.tried if not each.candidate.baseline]
    chosen = [each for each in own if each.candidate.name == outcome.choice.name]
    measured = [each for each in own if each.point]
    if chosen or measured:
        return max(chosen or measured, key=lambda each: (each.chance or 0.0, -each.point.cost if each.point else 0.0))
    return min(own, key=lambda each: (each.seen.value or 0.0) if each.seen else 1.0, default=None)


def lost_by_rounding(recipe: Recipe, folder: Path) -> str | None:
    """Write a candidate and say what rounding lost of it; None where it kept the change."""
    return change_warning(merge(recipe, folder, overwrite=True).change, recipe.output.rounding)
