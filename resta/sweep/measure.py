"""What a sweep measures and where it lies: references first, then candidates in the one model that is loaded.

    OUT/sweep-request.json       of which models and under which settings; another sweep is refused
    OUT/files/                   config, tokenizer and templates as the candidates' merges would have them
    OUT/aligned, OUT/tuned       measurements (verify/measurement.py); `resta verify` takes them in place of the models.
                                 Several sweeps on the same questions may share them in a folder of their own
    OUT/tuned.yaml               the recipe of `tuned`, by which the swept model is loaded
    OUT/candidates/NAME/         a candidate's measurement, beside what it is and how far it moved:
        recipe.yaml              (of the random control: control.yaml), change.json

What lies in these folders is the truth: whatever was answered is not asked again, also when scales, methods, policy or
rule of choice change between two runs of the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from resta.errors import ResumeError
from resta.hub import locate
from resta.journal import FolderLock, differences, read_object, to_json, write_whole
from resta.recipe import dump_recipe
from resta.redeval.answering import answer_phase, missing_requests
from resta.redeval.judging import adopt_control, check_judges, judge_phase, note_judges
from resta.redeval.models import LocalModel, LocalSpec, fingerprint, load_local
from resta.redeval.progress import RunOptions
from resta.redeval.records import environment, load_run, start_run
from resta.redeval.targets import Target
from resta.sweep.apply import Change, apply, identity_text, tuned_tensors, write_files
from resta.sweep.candidates import Candidate, Family, plan_of, recipe_of, tuned_recipe
from resta.sweep.pruning import part_of, why_hopeless
from resta.sweep.search import EVERY, LAST, Job
from resta.verify.budget import Budget, check_budget
from resta.verify.documents import finished_tasks
from resta.verify.measure import measure
from resta.verify.measurement import Measurement, comparable_settings, read_measurement
from resta.verify.policy import Policy

SCHEMA = 2  # 1 called interpolation "wise"
REFERENCES = ("aligned", "tuned")
QUARTER = 4  # a candidate that is to be asked everything is looked at after one question in so many


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that decides what is measured. `settings` are LocalSpec's of every model: device, dtype, batch_rows, ...

    With `grid` every candidate is asked everything, else they are what a search chooses from, and may widen. `fresh` is
    how many harmful questions the choice will be verified on; None: as many as it takes.
    """

    family: Family
    candidates: tuple[Candidate, ...]
    references: Mapping[str, Target]  # "aligned", "tuned"
    budget: Budget
    policy: Policy
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: bool = False
    fresh: int | None = None
    verify: Mapping[str, Any] = field(default_factory=dict)  # options of `resta verify` that chosen.yaml carries
    shared: Path | None = None  # folder of the references' measurements; None: OUT
    baselines: bool = True  # whether noise and interpolation are measured beside the choice

    def reference(self, role: str) -> Path:
        """Return where the measurement of `aligned` or `tuned` lies."""
        return (self.shared or self.out) / role

    def folder(self, candidate: Candidate) -> Path:
        """Return where a candidate's measurement lies."""
        return self.out / "candidates" / candidate.name

    def target(self, candidate: Candidate) -> Target:
        """Return what a candidate is called and identified by, its recipe written down."""
        path = self.identity(candidate)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, identity_text(candidate, self.family))
        spec = LocalSpec(model=str(self.identity(candidate)), files=str(self.files), **self.settings)
        return Target(name=candidate.name, local=spec)

    def identity(self, candidate: Candidate) -> Path:
        """Return the file that says what a candidate is."""
        return self.folder(candidate) / ("control.yaml" if candidate.method == "random" else "recipe.yaml")

    @property
    def files(self) -> Path:
        """Return the folder of config, tokenizer and templates."""
        return self.out / "files"

    @property
    def tuned_recipe(self) -> Path:
        """Return the recipe of `tuned`, by which the model is loaded that candidates are applied to."""
        return self.out / "tuned.yaml"


def check_sweep(sweep: Sweep) -> None:
    """Refuse, before anything is loaded or written, what could not be carried out. Raises RequestError."""
    by_method = {candidate.method: candidate for candidate in sweep.candidates}
    for candidate in sweep.candidates:
        recipe_of(candidate, sweep.family)
    for candidate in by_method.values():  # what fits at one scale fits at all
        plan_of(candidate, sweep.family)
    _ = sweep.family.tuned_plan  # made now, and refused here if it cannot be
    check_budget(sweep.budget, sweep.references)


def open_sweep(sweep: Sweep) -> None:
    """Create OUT, or go on with the sweep that is there. Raises ResumeError, naming the differences."""
    path = sweep.out / "sweep-request.json"
    facts = request_facts(sweep)
    if path.is_file():
        there = read_object(path)
        if there.get("schema") != SCHEMA:
            raise ResumeError(
                f"{sweep.out} holds a sweep of another version of resta (schema {there.get('schema')}, not {SCHEMA}), "
                "which names its candidates otherwise: finish it with that version, or choose another -o"
            )
        found = differences(there, facts)
        if found:
            raise ResumeError(
                f"{sweep.out} holds another sweep; it differs in {'; '.join(found[:6])}. Choose another -o"
            )
    elif sweep.out.exists() and any(sweep.out.iterdir()):
        raise ResumeError(f"{sweep.out} is not empty and holds no sweep; choose another -o")
    sweep.out.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, to_json(facts, indent=2) + "\n")  # first of all, so that the folder says whose it is
    write_files(sweep.family, sweep.files)
    write_whole(sweep.tuned_recipe, dump_recipe(tuned_recipe(sweep.family)))


def request_facts(sweep: Sweep) -> dict[str, Any]:
    """Return what must not change between two runs of a sweep: models, shared choices, questions, judges, tasks."""
    aligned, family = sweep.references["aligned"], sweep.family
    recipe = tuned_recipe(family).model_dump(mode="json", exclude={"models", "terms"})
    recipe |= {"start": family.start, "output": family.output.model_dump(mode="json")}
    judges = check_judges(sweep.budget.judges, None, allow_self=True)
    return {
        "schema": SCHEMA,
        "models": {name: identity(family, name) for name in family.models},
        "recipe": {**recipe, "origin": family.origin, "rescale": family.rescale},
        "redeval": comparable_settings(sweep.budget.plan(aligned).config),
        "utility": sweep.budget.suite_facts(aligned),
        "judges": {judge.id: judge.sha256 for judge in judges},
    }


def identity(family: Family, name: str) -> dict[str, str]:
    """Return what identifies a model of a family: a Hub id, or digests of its files and of those it is on."""
    models = family.models
    on = models[name].on
    folders = [str(locate(models[each].source).folder) for each in (name, on) if each is not None]
    return fingerprint(LocalSpec(model=folders[0], base=folders[1] if on else None))


# -- one process, one model ----------------------------------------------------------------------------------


class Worker:
    """Measures references and candidates, one after the other; the swept model is loaded once, when it is needed."""

    def __init__(self, sweep: Sweep, options: RunOptions):
        kept = {} if options.kept_judges is None else options.kept_judges
        self._sweep, self._options = sweep, replace(options, kept_judges=kept)
        self._loaded: LocalModel | None = None
        self._applied_last: Candidate | None = None

    def reference(self, role: str) -> None:
        """Measure `aligned` or `tuned`, or go on with what is missing. Raises UnansweredError."""
        sweep = self._sweep
        measure(sweep.references[role], sweep.budget, sweep.reference(role), self._options)

    def candidate(self, candidate: Candidate, rung: int = LAST) -> None:
        """Ask a candidate the questions of a rung; of the last one everything, unless a quarter shows it hopeless.

        Raises UnansweredError.
        """
        sweep, last = self._sweep, rung == LAST
        target, folder, budget = sweep.target(candidate), sweep.folder(candidate), sweep.budget
        plan = budget.plan(target)
        run = start_run(folder / "redeval", plan.config, plan.questions, environment())
        judges = check_judges(budget.judges, target, allow_self=True)
        part = part_of(plan, QUARTER if last else EVERY[rung])
        with FolderLock(run.path):
            note_judges(run, judges)
            adopt_control(run, load_run(sweep.reference("aligned") / "redeval"))
            if missing_requests(run, part):
                answer_phase(run, part, target, self._options, judges=judges, local=self._applied(candidate))
            for judge in judges:
                judge_phase(run, judge, self._options)
        unasked = missing_requests(run, plan)
        if not last or (unasked and why_hopeless(self._references, read_measurement(folder), sweep.policy)):
            return
        local = self._applied(candidate) if unasked or _missing_tasks(budget, folder) else None
        measure(target, budget, folder, self._options, local=local)

    @cached_property
    def _references(self) -> dict[str, Measurement]:
        return read_references(self._sweep)

    def _applied(self, candidate: Candidate) -> LocalModel:
        """Return the loaded model with a candidate's weights, and note how far they are from `tuned`."""
        sweep = self._sweep
        if self._loaded is None:
            spec = LocalSpec(model=str(sweep.tuned_recipe), files=str(sweep.files), **sweep.settings)
            self._loaded = load_local(spec, tensors=tuned_tensors(sweep.family))
        if candidate != self._applied_last:
            self._applied_last = None  # until all of it is there
            change = apply(self._loaded, candidate, sweep.family)
            write_whole(sweep.folder(candidate) / "change.json", to_json(asdict(change)) + "\n")
            self._applied_last = candidate
        return self._loaded


Measure = Callable[[Sequence[Job]], None]  # raises UnansweredError; what was answered is kept


@contextmanager
def in_this_process(sweep: Sweep, options: RunOptions) -> Iterator[Measure]:
    """Measure the references, and yield what measures candidates, one after the other."""
    worker = Worker(sweep, options)
    for role in REFERENCES:
        options.note(f"{role}: {sweep.references[role].name}")
        worker.reference(role)

    def measure_jobs(jobs: Sequence[Job]) -> None:
        for candidate, rung in jobs:
            options.note(asked_words(candidate, rung))
            worker.candidate(candidate, rung)

    yield measure_jobs


def asked_words(candidate: Candidate, rung: int) -> str:
    """Return what is asked of a candidate, for a progress line."""
    return candidate.name if rung == LAST else f"{candidate.name}, one question in {EVERY[rung]}"


def read_references(sweep: Sweep) -> dict[str, Measurement]:
    """Return the measurements of `aligned` and `tuned`."""
    return {role: read_measurement(sweep.reference(role)) for role in REFERENCES}


def read_change(folder: Path) -> Change:
    """Return how far a candidate is from `tuned`."""
    return Change(**json.loads((folder / "change.json").read_text()))


def is_complete(measured: Measurement, sweep: Sweep) -> bool:
    """Whether nothing that the sweep asks of a candidate is missing."""
    return set(measured.planned) <= measured.answers.keys() and not _missing_tasks(sweep.budget, measured.path)


def _missing_tasks(budget: Budget, folder: Path) -> frozenset[str]:
    tasks = frozenset(task.name for task in budget.suite.tasks) if budget.suite else frozenset()
    return tasks - finished_tasks(folder / "utility")
