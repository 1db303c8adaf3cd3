"""Measuring models alike: the same questions, judges and tasks for each, every answer kept as it comes.

OUT/aligned, OUT/tuned, OUT/restored    measurements (measurement.py); a folder of one may stand for a model
OUT/coherence/ROLE.json                 losses of the answers under the aligned model
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resta.errors import CompareError, ModelError
from resta.fingerprint import digest
from resta.journal import FolderLock, differences
from resta.redeval.judges import Judge, check_languages
from resta.redeval.judging import check_judges, judge_phase, make_ready, note_judges
from resta.redeval.models import LocalModel, load_local
from resta.redeval.plan import (
    Conditions,
    Plan,
    Request,
    answer_phase,
    check_fits,
    make_plan,
    missing_asks,
    plan_of,
    ready_target,
)
from resta.redeval.records import content_of, environment, find_run, load_run, start_run
from resta.redeval.targets import Target
from resta.verify.coherence import FIRST_TOKENS, Losses, answer_losses, read_losses, shuffled, write_losses
from resta.verify.comparison import Comparison, compare
from resta.verify.documents import finished_tasks
from resta.verify.measurement import (
    HUMAN,
    ROLES,
    Measurement,
    conditions_of,
    note_manifest,
    read_measurement,
)
from resta.verify.places import note_model
from resta.verify.policy import Policy

if TYPE_CHECKING:
    from resta.verify.utility import Served, Suite


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is measured of every model. `request` stands for any target: its own is replaced."""

    request: Request
    judges: tuple[Judge, ...]
    suite: Suite | None = None
    documents: int | None = None  # per utility task
    tokenizer: str | None = None  # directory of the served models' tokenizer, for utility
    allow_self_judge: bool = False

    def plan(self, target: Target) -> Plan:
        """Return what is asked of a model."""
        return make_plan(replace(self.request, target=target))

    def suite_facts(self, target: Target) -> dict[str, Any]:
        """Return what utility's documents depend on; empty where none are measured."""
        if self.suite is None:
            return {}
        from resta.verify.utility import suite_facts

        return suite_facts(
            self.suite, limit=self.documents, backend="local-completions" if target.local is None else "hf"
        )


def check_budget(budget: Budget, targets: Mapping[str, Target | Path]) -> None:
    """Refuse, before anything is loaded, what could not be compared later. Raises CompareError, ModelError, JudgeError.

    A path is a measurement that is there already, and must have been made as this budget would make it.
    """
    for role, target in targets.items():
        if isinstance(target, Target):
            check_judges(budget.judges, target, allow_self=budget.allow_self_judge)
            check_fits(target, budget.plan(target))
            if budget.suite is not None and target.local is None and (target.base_url is None or not budget.tokenizer):
                raise ModelError(
                    f"{role} ({target.name}) is served: utility needs its server's --base-url and, to count tokens, "
                    "--tokenizer DIR; or leave utility out with --no-utility"
                )
    fresh = next((target for target in targets.values() if isinstance(target, Target)), None)
    if fresh is None:
        return
    check_languages(budget.judges, budget.plan(fresh).questions)
    wanted = {
        "redeval": conditions_of(budget.plan(fresh).config),
        "utility": budget.suite_facts(fresh),
        "judges": sorted(judge.sha256 for judge in check_judges(budget.judges, None, allow_self=True)),
    }
    for role, path in targets.items():
        if isinstance(path, Path):
            there = read_measurement(path)
            judges = sorted(facts["sha256"] for name, facts in there.judges.items() if name != HUMAN)
            found = differences(
                {"redeval": conditions_of(there.config), "utility": dict(there.utility), "judges": judges}, wanted
            )
            if found:
                raise CompareError(
                    f"{role}: the measurement in {path} was not made with these settings: {'; '.join(found[:6])}. "
                    "Give the same settings, or the model itself in place of its measurement"
                )


def measure(
    target: Target, budget: Budget, path: Path, conditions: Conditions, *, local: LocalModel | None = None
) -> Measurement:
    """Measure one model into the folder `path`, or go on with what is missing there; its weights are loaded once.

    A model that is loaded already is handed over as `local`. Judges come last, when the model is freed. Raises
    UnansweredError where something could not be asked; what was answered is kept.
    """
    plan = budget.plan(target)
    judges = check_judges(budget.judges, target, allow_self=budget.allow_self_judge)
    there = find_run(path / "redeval", plan.config)
    asking = there is None or bool(missing_asks(there, plan))
    make_ready(judges, None if asking else there, conditions.judge_device)
    if asking and local is None:  # before anything is written: a model that cannot be asked leaves nothing behind
        local = ready_target(target, plan)
    run = start_run(path / "redeval", plan.config, plan.questions, environment())
    with FolderLock(run.path):
        note_judges(run, judges)
        _keep_manifest(target, path)
        tasks = {task.name for task in budget.suite.tasks} if budget.suite else set()
        unfinished = bool(missing_asks(run, plan) or tasks - finished_tasks(path / "utility"))
        if unfinished:
            if local is None and target.local is not None:
                local = load_local(target.local)
            answer_phase(run, plan, target, conditions, judges=judges, local=local)
            _measure_utility(target, budget, path / "utility", conditions, local)
        del local
        gc.collect()
        for judge in judges:
            judge_phase(run, judge, conditions)
        note_model(target, path, anew=unfinished)
    return read_measurement(path)


def _measure_utility(
    target: Target, budget: Budget, folder: Path, conditions: Conditions, local: LocalModel | None
) -> None:
    if budget.suite is None:
        return
    from resta.verify.utility import measure as measure_suite

    subject = local if local is not None else _served(target, budget)
    measure_suite(subject, budget.suite, folder, limit=budget.documents, note=conditions.note)


def _served(target: Target, budget: Budget) -> Served:
    from resta.verify.utility import Served

    assert target.base_url is not None
    assert budget.tokenizer is not None
    return Served(base_url=target.base_url, model=target.name, tokenizer=budget.tokenizer)


def _keep_manifest(target: Target, path: Path) -> None:
    source = Path(target.name) / "resta.json"
    if target.local is not None and source.is_file():
        note_manifest(source, path)


def measure_all(
    targets: Mapping[str, Target | Path], budget: Budget, out: Path, conditions: Conditions
) -> dict[str, Measurement]:
    """Return the measurement of each role, those that are there already read and the rest made in OUT."""
    measured = {}
    for role in ROLES:
        target = targets[role]
        if isinstance(target, Path):
            measured[role] = read_measurement(target)
        else:
            conditions.note(f"{role}: {target.name}")
            measured[role] = measure(target, budget, out / role, conditions)
    return measured


def compare_all(
    models: Mapping[str, Measurement], aligned: Target | None, out: Path, policy: Policy, conditions: Conditions
) -> Comparison:
    """Return the comparison, with the answers' losses under the aligned model where they are to be had.

    Without `aligned` only losses that were measured earlier are used.
    """
    folder = out / "coherence"
    if aligned is not None and aligned.local is not None:
        measure_losses(models, aligned, folder, conditions)
    losses = {role: read_losses(folder / f"{role}.json", _raw(model)) for role, model in models.items()}
    known = {role: found for role, found in losses.items() if found is not None}
    return compare(models, judge=policy.judge, level=policy.level, losses=known if len(known) == len(models) else None)


def measure_losses(models: Mapping[str, Measurement], aligned: Target, folder: Path, conditions: Conditions) -> None:
    """Measure every answer's loss under the aligned model into `folder`, but for those that are there already."""
    assert aligned.local is not None
    local: LocalModel | None = None
    for role, model in models.items():
        answers, path = _raw(model), folder / f"{role}.json"
        by = digest({**content_of(aligned.facts), "rendering": model.config["rendering"]})
        kept = read_losses(path, answers)
        if kept is not None and kept.aligned == by:
            continue
        if local is None:
            conditions.note("how likely the aligned model finds every answer")
            local = load_local(aligned.local)
        by_answer, by_shuffled = _losses(local, model, answers)
        write_losses(
            path,
            Losses(
                aligned=by,
                answers=digest(answers),
                vocabulary=int(local.model.config.get_text_config().vocab_size),
                by_answer=by_answer,
                shuffled=by_shuffled,
            ),
        )


def _raw(model: Measurement) -> dict[str, str]:
    return {key: answer.raw for key, answer in model.answers.items()}


def _losses(
    local: LocalModel, model: Measurement, answers: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the losses of answers as they are, and of those with words enough in another order, by id."""
    plan = plan_of(load_run(model.path / "redeval"))
    asks = [ask for ask in plan.asks if ask.id in answers]
    prompts = {ask.id: local.chat_prompt(ask.id, ask.messages, plan.protocol.rendering) for ask in asks}
    heads = {key: local.clip(answers[key], FIRST_TOKENS) for key in prompts}  # the words whose losses are looked at
    mixed = {key: text for key, head in heads.items() if (text := shuffled(head)) is not None}

    def measured(texts: Mapping[str, str]) -> dict[str, float]:
        values = answer_losses(local, [prompts[key] for key in texts], list(texts.values()))
        return {key: value for key, value in zip(texts, values, strict=True) if value is not None}

    return measured({key: answers[key] for key in prompts}), measured(mixed)
