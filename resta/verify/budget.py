"""What is measured of every model: the same questions, judges and tasks, by name and as they were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resta.errors import RequestError
from resta.journal import differences
from resta.redeval.answering import check_fits
from resta.redeval.evaluation import JUDGES, read_judges
from resta.redeval.judges import Judge, check_languages
from resta.redeval.judging import check_judges
from resta.redeval.plan import RunPlan, RunSpec, make_plan, read_spec
from resta.redeval.profiles import Questions
from resta.redeval.targets import Target
from resta.verify.measurement import HUMAN, comparable_settings, read_measurement

if TYPE_CHECKING:
    from resta.verify.utility import Suite


@dataclass(frozen=True, kw_only=True, slots=True)
class Utility:
    """What a model must still be able to do, by lm_eval. Where nothing is named it is the built-in regression check.

    Utility(folder="tasks", names=["helpdesk"])
    """

    profile: str | None = None  # leaderboard-v1, starling, regression or smoke
    folder: str | Path | None = None  # of lm_eval task files of one's own
    names: Sequence[str] = ()  # NAME or NAME:METRIC: only these, of the profile, the folder, or all that lm_eval has
    num_fewshot: int | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of tasks that generate
    documents: int | None = None  # per task
    tokenizer: str | None = None  # directory of the served models' tokenizer
    part: tuple[int, int] | None = None  # (i, n): one of n parts of the documents, which share none

    def read(self) -> Suite:
        """Return the tasks. Raises RequestError."""
        from resta.verify.utility import read_suite

        nothing = self.profile is None and self.folder is None and not self.names
        suite = read_suite(
            "regression" if nothing else self.profile,
            None if self.folder is None else Path(self.folder),
            self.names,
            num_fewshot=self.num_fewshot,
            gen_kwargs=self.gen_kwargs,
        )
        return replace(suite, part=self.part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """What every model is asked, who judges the answers, and which tasks it is given (None: none)."""

    questions: Questions = Questions()
    judges: Sequence[str | Judge] = JUDGES
    utility: Utility | None = Utility()
    allow_self_judge: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is measured of every model."""

    spec: RunSpec
    judges: tuple[Judge, ...]
    suite: Suite | None = None
    documents: int | None = None  # per utility task
    tokenizer: str | None = None  # directory of the served models' tokenizer, for utility
    allow_self_judge: bool = False

    def plan(self, target: Target) -> RunPlan:
        """Return what is asked of a model."""
        return make_plan(self.spec, target)

    def suite_facts(self, target: Target) -> dict[str, Any]:
        """Return what utility's documents depend on; empty where none are measured."""
        if self.suite is None:
            return {}
        from resta.verify.utility import suite_facts

        return suite_facts(
            self.suite, limit=self.documents, backend="local-completions" if target.local is None else "hf"
        )


def read_budget(exam: Exam) -> Budget:
    """Return what an exam names, read. Raises the errors of banks, judges and tasks."""
    return Budget(
        spec=read_spec(exam.questions),
        judges=tuple(read_judges(exam.judges)),
        suite=exam.utility.read() if exam.utility else None,
        documents=exam.utility.documents if exam.utility else None,
        tokenizer=exam.utility.tokenizer if exam.utility else None,
        allow_self_judge=exam.allow_self_judge,
    )


def check_budget(budget: Budget, targets: Mapping[str, Target | Path]) -> None:
    """Refuse, before anything is loaded, what could not be compared later. Raises RequestError.

    A path is a measurement that is there already, and must have been made as this budget would make it.
    """
    for role, target in targets.items():
        if isinstance(target, Target):
            check_judges(budget.judges, target, allow_self=budget.allow_self_judge)
            check_fits(target, budget.plan(target))
            if budget.suite is not None and target.local is None and (target.base_url is None or not budget.tokenizer):
                raise RequestError(
                    f"{role} ({target.name}) is served: utility needs its server's --base-url and, to count tokens, "
                    "--tokenizer DIR; or leave utility out with --no-utility"
                )
    fresh = next((target for target in targets.values() if isinstance(target, Target)), None)
    if fresh is None:
        return
    check_languages(budget.judges, budget.plan(fresh).questions)
    wanted = {
        "redeval": comparable_settings(budget.plan(fresh).config),
        "utility": budget.suite_facts(fresh),
        "judges": sorted(judge.sha256 for judge in check_judges(budget.judges, None, allow_self=True)),
    }
    for role, path in targets.items():
        if isinstance(path, Path):
            there = read_measurement(path)
            judges = sorted(facts["sha256"] for name, facts in there.judges.items() if name != HUMAN)
            found = differences(
                {"redeval": comparable_settings(there.config), "utility": dict(there.utility), "judges": judges}, wanted
            )
            if found:
                raise RequestError(
                    f"{role}: the measurement in {path} was not made with these settings: {'; '.join(found[:6])}. "
                    "Give the same settings, or the model itself in place of its measurement"
                )
