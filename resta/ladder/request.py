"""A request for the ladder, read and checked: what cannot be carried out is refused before anything is loaded.

Writes nothing until `open_ladder`, which notes what must not change between two calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resta.errors import RequestError, ResumeError
from resta.fingerprint import sha256_file
from resta.journal import differences, read_object, to_json, write_whole
from resta.ladder.patches import check_patch, wants_patch
from resta.ladder.questions import (
    CALIBRATING,
    CHOOSING,
    VERIFYING,
    Part,
    draw,
    exam_on,
    keep,
    known_of,
    seen_before,
)
from resta.ladder.rungs import ADVICE, PATCH, PATCHED_WEIGHTS, RUNGS, Choices, Ladder, grid_of, records_of
from resta.redeval.models import LocalSpec, read_tokenizer
from resta.redeval.plan import read_spec
from resta.redeval.questions import check_apart, read_bank
from resta.redeval.targets import INSPECT
from resta.strict import did_you_mean
from resta.sweep import Family, make_family
from resta.sweep.candidates import candidates_of, check_methods
from resta.sweep.measure import REFERENCES, Sweep, check_sweep, identity, request_facts
from resta.verify import Exam
from resta.verify.budget import Budget, read_budget
from resta.verify.gate import check_tasks
from resta.verify.plan import plan_power
from resta.verify.policy import Policy, read_policy


def read_ladder(
    models: Mapping[str, str | None],
    policy: str | Path | Policy | None,
    exam: Exam,
    out: Path,
    choices: Choices,
    task_prompts: Path | None,
) -> Ladder:
    """Return what is to be done: `models` by role, aligned among them. Raises RequestError."""
    _check_names(models, choices)
    rules = policy if isinstance(policy, Policy) else read_policy(None if policy is None else Path(policy))
    family = make_family(**{role: name for role, name in models.items() if name}, **choices.family)  # type: ignore[arg-type]
    _check_models(family, choices)
    if task_prompts is not None and not task_prompts.is_file():
        raise RequestError(f"{task_prompts}: no such file of task prompts")
    if task_prompts is None and choices.only and set(choices.only) <= {PATCH, PATCHED_WEIGHTS}:
        raise RequestError(f"--only {', '.join(choices.only)}: a patch needs --task-prompts, what it is held to")
    parts = _parts(exam, out, choices)
    verifying = next(reversed(parts))  # unseen questions, or else those that were drawn
    return Ladder(
        family=family,
        policy=rules,
        exam=exam,
        parts=parts,
        exams={name: exam_on(part, exam, int(name != CHOOSING)) for name, part in parts.items()},
        verifying=verifying,
        task_prompts=task_prompts,
        out=out.absolute(),
        choices=choices,
    )


def _check_names(models: Mapping[str, str | None], choices: Choices) -> None:
    if models["aligned"] is None:
        raise RequestError(f"there is no aligned model (--aligned) that safety could come from. {ADVICE}")
    for role, name in models.items():
        if name is not None and name.startswith((INSPECT, "http://", "https://")):
            raise RequestError(
                f"{role}: {name} is served, and its weights are needed: they are what is changed. Name its folder, or "
                "org/name@revision on the Hub"
            )
    for name in choices.only:
        if name not in RUNGS:
            raise RequestError(f"there is no rung {name!r}{did_you_mean(name, RUNGS)}; there are {', '.join(RUNGS)}")


def _check_models(family: Family, choices: Choices) -> None:
    """Refuse models that are one, and a tuned model that cannot be asked."""
    tuned, aligned = (family.models[role] for role in ("tuned", "aligned"))
    if identity(family, "tuned") == identity(family, "aligned"):
        raise RequestError(
            f"{tuned.source} and {aligned.source} are the same model: there is nothing in ALIGNED that TUNED lacks. "
            f"{ADVICE}"
        )
    if choices.settings.get("chat_template") is None:
        base = family.models[tuned.on].source if tuned.on else None
        if not read_tokenizer(LocalSpec(model=tuned.source, base=base)).chat_template:
            raise RequestError(
                f"{tuned.source}: its tokenizer has no chat template, so nobody knows how it is asked; name one with "
                "--chat-template, such as the one that it was trained with"
            )


def _parts(exam: Exam, out: Path, choices: Choices) -> dict[str, Part]:
    folder = records_of(out.absolute()) / "questions"
    harmful = None if choices.harmful is None else read_bank(str(choices.harmful), bank_dirs=exam.questions.bank_dirs)
    parts = draw(read_spec(exam.questions), folder, seed=choices.seed, calibrating=harmful)
    if not choices.unseen:
        return parts
    asks_safe = any(question.safe for question in parts[VERIFYING].questions)
    if asks_safe and not choices.unseen_safe:
        raise RequestError("--unseen-bank names harmful questions; name safe ones as well: --unseen-safe-bank")
    banks = [
        *(read_bank(str(name), bank_dirs=exam.questions.bank_dirs) for name in choices.unseen),
        *(read_bank(str(name), bank_dirs=exam.questions.bank_dirs, safe=True) for name in choices.unseen_safe),
    ]
    unseen = Part(folder=folder, banks=tuple(banks))
    unseen = replace(unseen, folder=folder / f"unseen-{unseen.sha256[:8]}")
    known = seen_before(folder, {unseen.name}) | known_of(parts.values())
    check_apart({bank.source: bank.texts for bank in banks}, known=known)
    return {**parts, unseen.name: unseen}


# -- opening -------------------------------------------------------------------------------------------------


def check_ladder(ladder: Ladder) -> None:
    """Refuse what could not be carried out, and what could not end in a PASS. Raises RequestError."""
    sweep = _whole(ladder)
    check_methods(grid_of(ladder.family), ladder.family)
    check_tasks(ladder.policy, [task.name for task in sweep.budget.suite.tasks] if sweep.budget.suite else [])
    check_sweep(sweep)
    if wants_patch(ladder):
        check_patch(ladder)
    power = plan_power(ladder.policy, budget_on(ladder, ladder.verifying), sweep.references)
    if not power.can_pass:
        cannot = "; ".join(f"{rule.rule} {rule.words}" for rule in power.rules if not rule.can_hold)
        raise RequestError(
            f"the verifying questions and documents cannot show what the policy asks for: {cannot}. Half of what is "
            "named is for choosing: name more (--profile quick, --bank, --safe-bank, --tasks)"
        )


def budget_on(ladder: Ladder, name: str) -> Budget:
    """Return what is measured on a part of the questions, whether it is written yet or not."""
    budget = read_budget(ladder.exam)
    suite = budget.suite and replace(budget.suite, part=(int(name != CHOOSING), 2))
    return replace(budget, spec=replace(budget.spec, banks=ladder.parts[name].banks), suite=suite)


def open_ladder(ladder: Ladder) -> None:
    """Create the records, or go on with those that are there. Raises ResumeError, naming the differences."""
    records, path = ladder.records, ladder.records / "request.json"
    facts = facts_of(ladder)
    if path.is_file():
        found = differences(read_object(path), facts)
        if found:
            raise ResumeError(
                f"{records} is of another request; it differs in {'; '.join(found[:6])}. Choose another -o"
            )
    elif ladder.out.exists():
        raise ResumeError(f"{ladder.out} already exists, and {records} does not say from what; choose another -o")
    elif records.exists() and any(each.name != ".lock" for each in records.iterdir()):
        raise ResumeError(f"{records} is not empty and holds no records of a ladder; choose another -o")
    write_whole(path, to_json(facts, indent=2) + "\n")
    keep(records / "questions", ladder.parts)


def facts_of(ladder: Ladder) -> dict[str, Any]:
    """Return what must not change between two calls: models, policy, questions and their parts, judges, tasks."""
    return {
        **request_facts(_whole(ladder)),
        "policy": ladder.policy.model_dump(mode="json"),
        "seed": ladder.choices.seed,
        "task_prompts": None if ladder.task_prompts is None else sha256_file(ladder.task_prompts),
        "patch": {name: asdict(each) for name, each in ladder.choices.patch.items()},
        "calibrating": ladder.parts[CALIBRATING].sha256 if ladder.choices.harmful else None,
    }


def _whole(ladder: Ladder) -> Sweep:
    """Return the sweep that would ask all questions, which is never run."""
    return Sweep(
        family=ladder.family,
        candidates=candidates_of(replace(grid_of(ladder.family), interpolation_scales=(0.5,), random_scales=())),
        references={role: ladder.target(role) for role in REFERENCES},
        budget=read_budget(ladder.exam),
        policy=ladder.policy,
        out=ladder.records,
        settings=ladder.choices.settings,
    )
