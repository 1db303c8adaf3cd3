"""A whole sweep in one call: refused before anything is loaded, measured or gone on with, concluded and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from resta.figure import require_matplotlib
from resta.redeval.progress import RunOptions
from resta.redeval.records import environment, private_files
from resta.redeval.targets import Target, parse_target
from resta.shorthand import Roles, read_roles
from resta.sweep.candidates import Family, Grid, candidates_of, check_groups, check_methods, searched
from resta.sweep.choose import Rule
from resta.sweep.measure import REFERENCES, Measure, Sweep, check_sweep, in_this_process, open_sweep
from resta.sweep.outcome import Outcome, carry_out
from resta.sweep.report import write_reports
from resta.verify.budget import Exam, read_budget
from resta.verify.gate import check_tasks
from resta.verify.policy import Policy, read_policy

Place = Callable[[Sweep, RunOptions], AbstractContextManager[Measure]]


def make_family(
    *,
    tuned: str,
    aligned: str,
    base: str | None = None,
    unaligned: str | None = None,
    tuned_from: str | None = None,
    recorded_base: tuple[str, ...] = (),
    **choices: Any,
) -> Family:
    """Return what all candidates share, of models named as for `resta merge`.

    Args:
        tuned: the fine-tuned model whose safety is to be restored: a directory, adapter or org/name@revision.
        aligned: the model that safety comes from.
        base: what is subtracted from it: the model before alignment.
        unaligned: subtracted in place of `base`.
        tuned_from: what the fine-tune began from: "base" (the default), "aligned" or another model.
        recorded_base: bases that adapters record under other names, confirmed.
        **choices: other fields of `Family`: seed, output, rescale, groups, and the like.

    Raises RequestError: something is missing, or does not fit together; or a model is not there.
    """
    roles = Roles(
        tuned=tuned,
        aligned=aligned,
        base=base,
        unaligned=unaligned,
        tuned_from=tuned_from,
        recorded_base=recorded_base,
    )
    return Family(models=read_roles(roles), origin=roles.origin, **choices)


def run(
    *,
    family: Family,
    grid: Grid,
    exam: Exam = Exam(),
    policy: str | Path | Policy | None = None,
    out: str | Path = "sweep",
    rule: Rule = "smallest-passing",
    search: bool = True,
    fresh: int | None = None,
    settings: Mapping[str, Any] | None = None,
    verify: Mapping[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    place: Place = in_this_process,
    shared: Path | None = None,
    baselines: bool = True,
) -> Outcome:
    """Find the scale (and density) that restores safety at the least cost; write the folder `out`.

        from resta.redeval import Questions
        from resta.sweep import Grid, make_family
        from resta.verify import Exam

        family = make_family(tuned="tuned", aligned="aligned", base="base")
        questions = Questions(banks=["questions.json"], safe_banks=["smoke-safe"], templates=["standard"])
        exam = Exam(questions=questions, utility=None)
        grid = Grid(scales=(0.25, 0.5, 1.0))
        outcome = resta.sweep.run(family=family, grid=grid, exam=exam, policy="policy.yaml")
        print(outcome.choice.name, outcome.choice.reason)
        if outcome.recipe is not None:
            resta.merge(outcome.recipe, "merged")

    What was answered is kept as it comes: the same call goes on where an earlier one was, and more scales, methods or
    another policy may be given.

    Args:
        family: the models, and what all candidates share; `make_family` names them.
        grid: methods, scales and densities.
        exam: what every model is asked, by whom it is judged, and which tasks it is given.
        policy: the rules that a candidate must pass, or their file; by default those of `resta verify policy`.
        out: the sweep's folder; it holds the reports, and chosen.yaml where a candidate is chosen.
        rule: which of the candidates that would pass is chosen.
        search: bisect the scales, asking more questions only where it is close; else ask every candidate everything.
        fresh: how many harmful questions the choice will be verified on; by default as many as it takes.
        settings: how models are loaded: device, dtype, chat_template, batch_rows.
        verify: options of `resta verify` that chosen.yaml is to carry, by parameter.
        options: how fast, on what device judges run, and what is called as it goes on.
        place: where candidates are measured; `resta.sweep.ray.on_cluster` is another place.
        shared: the folder in which `aligned` and `tuned` are measured, for several sweeps; by default `out`.
        baselines: whether a random vector and interpolation of the choice's norm are measured beside it.

    Returns:
        The choice and why, every candidate with its rates, and where the recipe of the choice lies.

    Raises:
        RequestError: the request cannot be carried out; nothing was written.
        UnansweredError: questions got no answer; those that did are kept.
    """
    require_matplotlib()
    rules = policy if isinstance(policy, Policy) else read_policy(None if policy is None else Path(policy))
    check_methods(grid, family)
    check_groups(family)
    budget = read_budget(exam)
    check_tasks(rules, [task.name for task in budget.suite.tasks] if budget.suite else [])
    settings = dict(settings or {})
    sweep = Sweep(
        family=family,
        candidates=candidates_of(searched(grid) if search else grid, groups=() if search else family.groups),
        references={role: reference_of(family, role, settings) for role in REFERENCES},
        budget=budget,
        policy=rules,
        out=Path(out).absolute(),
        settings=settings,
        grid=not search,
        fresh=fresh,
        verify=verify or {},
        shared=shared,
        baselines=baselines,
    )
    check_sweep(sweep)
    with private_files():
        open_sweep(sweep)
        for line in budget.spec.notes:
            options.note(f"note: {line}")
        options = replace(options, kept_judges={})
        with place(sweep, options) as measure:
            outcome = carry_out(sweep, rule, options, measure)
        write_reports(sweep, outcome, environment())
    return outcome


def reference_of(family: Family, role: str, settings: Mapping[str, Any]) -> Target:
    """Return a reference as `resta verify` would ask it: an adapter on its base."""
    model = family.models[role]
    return parse_target(model.source, None, base=family.models[model.on].source if model.on else None, **settings)
