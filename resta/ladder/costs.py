"""What a ladder will ask, how long that takes and how much memory, rung by rung, before anything is loaded.

Answers are counted at most: as if every rung were climbed, and every answer ran to its limit. Times are at least: what
the multiplications of so many tokens take at the speed of a large product, which is measured here and which no model
reaches. Weights in memory are counted as they are stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from resta.ladder.questions import CHOOSING
from resta.ladder.request import budget_on
from resta.ladder.rungs import FLOAT32, NOTHING, PATCH, PATCHED_WEIGHTS, RUNGS, STOCHASTIC, Ladder, grid_of
from resta.page import Table, table
from resta.redeval.answering import minutes
from resta.redeval.models import pick_device
from resta.sweep.candidates import candidates_of, searched
from resta.sweep.search import WIDER, series_of
from resta.verify.measurement import ROLES
from resta.verify.utility import count_documents

VERIFYING_ROW = "verifying"
SIDE = 1024  # of the matrices whose product is timed
TEMPLATE_TOKENS, LETTERS = 32, 4  # of a chat template's frame; in a token
TAUGHT, TAUGHT_TOKENS, STEPS, BATCH = 4 * 64, 24, 60, 12  # what `resta patch` asks and learns by default


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a rung takes: answers and documents at most, seconds at least, bytes in memory."""

    rung: str
    models: int  # measured in full, at most
    answers: int
    documents: int
    seconds: float
    bytes: int


def expected_costs(ladder: Ladder) -> list[Expected]:
    """Return what every rung takes if it is reached, and the verdict."""
    choosing, verifying = (_exam(ladder, name) for name in (CHOOSING, ladder.verifying))
    steps = ladder.family.tuned_plan.steps
    parameters = sum(math.prod(step.slot.spec.shape) for step in steps)
    stored = sum(step.slot.spec.nbytes for step in steps)
    rate = multiplications_a_second(str(ladder.choices.settings.get("device") or "auto"))

    def cost(rung: str, models: int, exam: tuple[int, int, float], size: int, learned: int = 0) -> Expected:
        answers, documents, tokens = exam
        seconds = 2 * parameters * (models * tokens + learned) / rate
        return Expected(
            rung=rung, models=models, answers=models * answers, documents=models * documents, seconds=seconds,
            bytes=size,
        )  # fmt: skip

    found = [cost(NOTHING, 2, choosing, stored)]
    for rung in (each for each in RUNGS if each != NOTHING):
        if ladder.choices.only and rung not in ladder.choices.only:
            continue
        if rung in (PATCH, PATCHED_WEIGHTS):
            learned = TAUGHT * TAUGHT_TOKENS + 3 * STEPS * BATCH * (TAUGHT_TOKENS + TEMPLATE_TOKENS)
            models = most_asked(3) if rung == PATCH else 1
            found += [cost(rung, models, choosing, stored, learned)] if ladder.task_prompts else []
        else:
            series = series_of(each for each in candidates_of(searched(grid_of(ladder.family))) if not each.baseline)
            size = max(stored, 4 * parameters) if rung == FLOAT32 else stored
            found.append(cost(rung, sum(most_asked(len(each)) for each in series), choosing, size))
    return [*found, cost(VERIFYING_ROW, len(ROLES), verifying, stored)]


def most_asked(scales: int) -> int:
    """Return how many scales of one method a search asks at most: bisection, the choice, and beyond either end."""
    return math.floor(math.log2(scales)) + 2 + 2 * WIDER


def _exam(ladder: Ladder, part: str) -> tuple[int, int, float]:
    """Return the answers, documents and tokens of one model on a part, each answer as long as it may be."""
    budget = budget_on(ladder, part)
    plan = budget.plan(ladder.target("tuned"))
    letters = sum(len(request.messages[0].content) for request in plan.requests)
    tokens = letters / LETTERS + len(plan.requests) * (TEMPLATE_TOKENS + plan.decoding.max_new_tokens)
    counts: Iterable[int | None] = count_documents(budget.suite, budget.documents).values() if budget.suite else ()
    return len(plan.requests), sum(count or 0 for count in counts), tokens


def multiplications_a_second(device: str) -> float:
    """Return how many multiplications and additions this machine does a second, from a product of large matrices."""
    import torch

    where = pick_device(device)
    one = torch.ones(SIDE, SIDE, device=where)
    best = math.inf
    for _ in range(3):  # the first warms up
        start = time.perf_counter()
        float((one @ one)[0, 0])  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def costs_table(costs: Iterable[Expected]) -> Table:
    """Return what is expected, a row for every rung."""

    def row(each: Expected) -> tuple[str, ...]:
        asked = f"at most {each.answers}" if each.rung not in (NOTHING, VERIFYING_ROW) else str(each.answers)
        return (
            each.rung,
            f"{RUNGS.get(each.rung, 'the verdict on what is chosen')}{_only_if(each.rung)}",
            str(each.models),
            asked,
            str(each.documents),
            f"{minutes(each.seconds)} or more",
            f"{each.bytes / 1e9:.2f} GB and the answers' memory",
        )

    header = ("rung", "what", "models", "answers", "documents", "time", "memory")
    return table("Each rung is tried only if none above it would pass", header, map(row, costs))


def _only_if(rung: str) -> str:
    return ", only if rounding lost much" if rung in (STOCHASTIC, FLOAT32) else ""
