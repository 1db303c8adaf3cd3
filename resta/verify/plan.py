"""What a run asks of the three models, said before any of it is asked: how much that is, and what it can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from resta.redeval.questions import Question, words_of
from resta.redeval.targets import Target
from resta.statistics import Rate
from resta.verify.budget import Budget
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision
from resta.verify.measurement import read_measurement
from resta.verify.policy import Policy
from resta.verify.power import AS_GOOD, Power, Sample, Three, power


def plan_power(policy: Policy, budget: Budget, targets: Mapping[str, Target | Path]) -> Power:
    """Return what a run can show; where all three models are measured already, what their measurements can."""
    fresh = next((target for target in targets.values() if isinstance(target, Target)), None)
    if fresh is None:
        found = read_measurement(next(path for path in targets.values() if isinstance(path, Path)))
        counts: Mapping[str, int | None] = Counter(document.task for document in found.documents)
        sample = sample_of(found.questions.values(), (t["name"] for t in found.config["templates"]), _known(counts))
    else:
        plan, counts = budget.plan(fresh), _documents(budget)
        sample = sample_of(plan.questions, (t["name"] for t in plan.config["templates"]), _known(counts))
    return power(policy, sample, unknown=[task for task, count in counts.items() if count is None])


def sample_of(questions: Iterable[Question], templates: Iterable[str], documents: Mapping[str, int]) -> Sample:
    """Return how much is asked; a question that is asked twice, also in two banks, is one."""
    banks = {(question.safe, words_of(question.text)): question.bank for question in questions}
    harmful, safe = (
        Counter(sorted(bank for (kind, _), bank in banks.items() if kind == wanted)) for wanted in (False, True)
    )
    return Sample(harmful=harmful, safe=safe, templates=tuple(templates), documents=documents)


def _documents(budget: Budget) -> dict[str, int | None]:
    if budget.suite is None:
        return {}
    from resta.verify.utility import count_documents

    return count_documents(budget.suite, budget.documents)


def _known(counts: Mapping[str, int | None]) -> dict[str, int]:
    return {task: count for task, count in counts.items() if count}


def with_power(decision: Decision, comparison: Comparison, policy: Policy) -> Decision:
    """Return a decision that says what the same questions could have shown, had restored been as good as aligned.

    Aligned and tuned are supposed to be as they were measured.
    """
    cells = comparison.cells
    sample = Sample(
        harmful={cell.bank: cell.paired.questions for cell in cells if not cell.safe},
        safe={cell.bank: cell.paired.questions for cell in cells if cell.safe},
        templates=tuple(sorted({cell.template for cell in cells})) or ("none",),
        documents={task.task: task.documents for task in comparison.utility if task.documents},
    )
    asr, refused, alike = comparison.asr, comparison.over_refusal, comparison.one_answer
    broken = {role: conduct.degenerate for role, conduct in comparison.conduct.items()}
    truth = replace(
        AS_GOOD,
        harm=_as_aligned(asr.rates) if asr else AS_GOOD.harm,
        refusal=_as_aligned(refused.rates) if refused else AS_GOOD.refusal,
        degenerate=_as_aligned(broken),
        alike=_as_aligned(alike.rates) if alike else AS_GOOD.alike,
        scores={task.task: _as_tuned(task.means["tuned"].value) for task in comparison.utility if task.documents},
    )
    return replace(decision, power=power(policy, sample, truth).lines)


def _as_aligned(rates: Mapping[str, Rate]) -> Three:
    """Return the rates of aligned and tuned, and aligned's again for restored; no rate is quite 0 or 1."""
    aligned, tuned = ((rates[role].hits + 0.5) / (rates[role].total + 1) for role in ("aligned", "tuned"))
    return aligned, tuned, aligned


def _as_tuned(score: float) -> Three:
    return score, score, score
