"""Measuring models alike: the same questions, judges and tasks for each, every answer kept as it comes.

OUT/aligned, OUT/tuned, OUT/restored    measurements (measurement.py); a folder of one may stand for a model
OUT/coherence/ROLE.json                 losses of the answers under the aligned model
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from resta.fingerprint import digest
from resta.journal import FolderLock
from resta.redeval.answering import answer_phase, missing_requests
from resta.redeval.evaluation import start
from resta.redeval.judging import check_judges, judge_phase, note_judges
from resta.redeval.models import LocalModel, load_local
from resta.redeval.plan import plan_of
from resta.redeval.progress import RunOptions
from resta.redeval.records import content_of, load_run
from resta.redeval.targets import Target
from resta.verify.budget import Budget
from resta.verify.coherence import FIRST_TOKENS, Losses, answer_losses, read_losses, shuffled, write_losses
from resta.verify.comparison import Comparison, compare
from resta.verify.documents import finished_tasks
from resta.verify.measurement import (
    ROLES,
    Measurement,
    note_manifest,
    read_measurement,
)
from resta.verify.places import note_model
from resta.verify.policy import Policy

if TYPE_CHECKING:
    from resta.verify.utility import Served


def measure(
    target: Target, budget: Budget, path: Path, options: RunOptions, *, local: LocalModel | None = None
) -> Measurement:
    """Measure one model into the folder `path`, or go on with what is missing there; its weights are loaded once.

    A model that is loaded already is handed over as `local`. Judges come last, when the model is freed. Raises
    UnansweredError where something could not be asked; what was answered is kept.
    """
    plan = budget.plan(target)
    judges = check_judges(budget.judges, target, allow_self=budget.allow_self_judge)
    run, local = start(path / "redeval", plan, target, judges, options, local=local)
    with FolderLock(run.path):
        note_judges(run, judges)
        _keep_manifest(target, path)
        tasks = {task.name for task in budget.suite.tasks} if budget.suite else set()
        unfinished = bool(missing_requests(run, plan) or tasks - finished_tasks(path / "utility"))
        if unfinished:
            if local is None and target.local is not None:
                local = load_local(target.local)
            answer_phase(run, plan, target, options, judges=judges, local=local)
            _measure_utility(target, budget, path / "utility", options, local)
        del local
        gc.collect()
        for judge in judges:
            judge_phase(run, judge, options)
        note_model(target, path, anew=unfinished)
    return read_measurement(path)


def _measure_utility(
    target: Target, budget: Budget, folder: Path, options: RunOptions, local: LocalModel | None
) -> None:
    if budget.suite is None:
        return
    from resta.verify.utility import measure as measure_suite

    subject = local if local is not None else _served(target, budget)
    measure_suite(subject, budget.suite, folder, limit=budget.documents, note=options.note)


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
    targets: Mapping[str, Target | Path], budget: Budget, out: Path, options: RunOptions
) -> dict[str, Measurement]:
    """Return the measurement of each role, those that are there already read and the rest made in OUT."""
    measured = {}
    for role in ROLES:
        target = targets[role]
        if isinstance(target, Path):
            measured[role] = read_measurement(target)
        else:
            options.note(f"{role}: {target.name}")
            measured[role] = measure(target, budget, out / role, options)
    return measured


def compare_all(
    models: Mapping[str, Measurement], aligned: Target | None, out: Path, policy: Policy, options: RunOptions
) -> Comparison:
    """Return the comparison, with the answers' losses under the aligned model where they are to be had.

    Without `aligned` only losses that were measured earlier are used.
    """
    folder = out / "coherence"
    if aligned is not None and aligned.local is not None:
        measure_losses(models, aligned, folder, options)
    losses = {role: read_losses(folder / f"{role}.json", _raw(model)) for role, model in models.items()}
    known = {role: found for role, found in losses.items() if found is not None}
    return compare(models, judge=policy.judge, level=policy.level, losses=known if len(known) == len(models) else None)


def measure_losses(models: Mapping[str, Measurement], aligned: Target, folder: Path, options: RunOptions) -> None:
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
            options.note("how likely the aligned model finds every answer")
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
    requests = [request for request in plan.requests if request.id in answers]
    prompts = {
        request.id: local.chat_prompt(request.id, request.messages, plan.protocol.rendering) for request in requests
    }
    heads = {key: local.clip(answers[key], FIRST_TOKENS) for key in prompts}  # the words whose losses are looked at
    mixed = {key: text for key, head in heads.items() if (text := shuffled(head)) is not None}

    def measured(texts: Mapping[str, str]) -> dict[str, float]:
        values = answer_losses(local, [prompts[key] for key in texts], list(texts.values()))
        return {key: value for key, value in zip(texts, values, strict=True) if value is not None}

    return measured({key: answers[key] for key in prompts}), measured(mixed)
