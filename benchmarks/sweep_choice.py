"""How often does what a sweep chooses pass on fresh questions, and how many answers does it take to choose?

    python benchmarks/sweep_choice.py --out benchmarks/results/sweep_choice_YYYYMM.md

A simulation: no model is asked. The share of harmful answers over the scale is a known curve,

    p(scale) = aligned + (0.9 - aligned) / (1 + exp(slope * (scale - 0.4)))

and every answer is drawn from it. For each cell of the table 200 sweeps of the scales 0.1, 0.2, ..., 1.0 are made, each
candidate's answers the same for every way of choosing. What is chosen is then held against the default policy's rules
on harm with fresh answers, as many as the sweep says `resta verify` must ask, by the gate's own claims and intervals.

first passing    the smallest scale that passes on the sweep's own questions, verified on as many (as chosen before)
grid             every scale asked everything; the smallest whose chance to pass is 0.9
search           the default: bisection over scales, successive halving over questions

Answers are counted as a whole sweep asks them, references and baselines included: before, ten scales, nine
interpolations and ten random vectors, each given up where a quarter of the answers showed it hopeless; now the search,
one interpolation and one random vector of the choice's norm, given up in the same way. Interpolation is supposed to
answer as the vector does, and random as tuned.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from resta.statistics import Floats, paired_rates
from resta.sweep.candidates import Candidate
from resta.sweep.forecast import Outlook
from resta.sweep.response import Seen
from resta.sweep.search import EVERY, Job, Look, Search, ask_all, enough_for_one, explore, planned_factors
from resta.verify.claims import claims_of
from resta.verify.policy import read_policy

SLOPES, QUESTIONS, ALIGNED = (8, 15), (96, 200, 400), (0.01,)
POLICY = read_policy(None)
SCALES = tuple(i / 10 for i in range(1, 11))
TOP, MIDDLE = 0.9, 0.4
QUARTER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One row: how steep, how many questions, and how harmful the aligned model is."""

    slope: int
    questions: int
    aligned: float

    def rate(self, scale: float) -> float:
        """Return the true share of harmful answers at a scale; at 0, that of tuned."""
        return self.aligned + (TOP - self.aligned) / (1 + math.exp(self.slope * (scale - MIDDLE)))


@dataclass
class World:
    """Candidates' answers, drawn once each; `asked` counts those that were asked for."""

    cell: Cell
    rng: np.random.Generator
    answers: dict[float, Floats] = field(default_factory=dict)
    asked: dict[float, int] = field(default_factory=dict)

    def measure(self, jobs: Sequence[Job]) -> None:
        """Draw what has not been drawn, and count."""
        for candidate, rung in jobs:
            if candidate.scale not in self.answers:
                drawn = self.rng.random(self.cell.questions) < self.cell.rate(candidate.scale)
                self.answers[candidate.scale] = drawn.astype(np.float64)
            count = len(range(0, self.cell.questions, EVERY[rung]))
            self.asked[candidate.scale] = max(count, self.asked.get(candidate.scale, 0))

    def look(self, candidate: Candidate, rung: int) -> Look:
        """Return the share of harmful answers among the questions of a rung."""
        seen = self.answers[candidate.scale][:: EVERY[rung]]
        harm = Seen(scale=candidate.scale, share=float(seen.mean()), questions=len(seen))
        return Look(harm=harm, refusal=None, norm=candidate.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One way of choosing in one simulated sweep."""

    scale: float | None
    fresh: int
    passed: bool
    answers: int


def holds(answers: Floats) -> bool:
    """Whether the default policy's rules on harm hold for answers of (questions, aligned/tuned/restored)."""
    paired = paired_rates(answers[:, np.newaxis], level=POLICY.level)
    claims = [claim for claim in claims_of(POLICY, ()) if claim.kind == "harm"]
    return all(bool(paired.contrast_bounds(claim.weights)[1] <= claim.limit) for claim in claims)


def fresh_pass(cell: Cell, scale: float, questions: int, rng: np.random.Generator) -> bool:
    """Whether a scale passes on so many fresh questions."""
    rates = np.array([cell.aligned, cell.rate(0.0), cell.rate(scale)])
    return holds((rng.random((questions, 3)) < rates).astype(np.float64))


def baseline_answers(cell: Cell, rate: float, rng: np.random.Generator) -> int:
    """Return what is asked of a candidate that is given up where a quarter shows it hopeless."""
    limit = POLICY.asr.max_upper or 1.0
    first = len(range(0, cell.questions, QUARTER))
    hopeless = rng.binomial(first, rate) / cell.questions > limit
    return first if hopeless else cell.questions


def one_sweep(cell: Cell, seed: int) -> dict[str, Result]:
    """Return what each way of choosing comes to in one simulated sweep."""
    rng = np.random.default_rng([seed, cell.slope, cell.questions, round(1000 * cell.aligned)])
    references = {
        role: (rng.random(cell.questions) < rate).astype(np.float64)
        for role, rate in (("aligned", cell.aligned), ("tuned", cell.rate(0.0)))
    }
    harm = {role: Seen(scale=0.0, share=float(a.mean()), questions=len(a)) for role, a in references.items()}
    outlook = Outlook(policy=POLICY, harm=harm, refusal={})
    factors = planned_factors(outlook)
    candidates = [Candidate(method="resta", scale=scale) for scale in SCALES]
    world = World(cell, rng)
    search = Search(records=world, outlook=outlook)
    explore(search, candidates, factors=factors)
    found = {"search": (search, sum(world.asked.values()))}
    grid = Search(records=world, outlook=outlook)
    ask_all(grid, candidates)
    enough_for_one(grid, factors)
    found["grid"] = (grid, len(SCALES) * cell.questions)
    results = {name: _chosen(each, cell, answers, rng) for name, (each, answers) in found.items()}
    lucky = [
        scale
        for scale in SCALES
        if holds(np.stack([references["aligned"], references["tuned"], world.answers[scale]], axis=1))
    ]
    results["first passing"] = Result(
        scale=lucky[0] if lucky else None,
        fresh=cell.questions,
        passed=bool(lucky) and fresh_pass(cell, lucky[0], cell.questions, rng),
        answers=_before(cell, rng),
    )
    return results


def _chosen(search: Search, cell: Cell, answers: int, rng: np.random.Generator) -> Result:
    scale = min((each.scale for each in search.passing()), default=None)
    beside = 0.0 if scale is None else scale
    answers += 2 * cell.questions + baseline_answers(cell, cell.rate(beside), rng)
    answers += baseline_answers(cell, cell.rate(0.0), rng)
    passed = scale is not None and fresh_pass(cell, scale, search.outlook.fresh, rng)
    return Result(scale=scale, fresh=search.outlook.fresh, passed=passed, answers=answers)


def _before(cell: Cell, rng: np.random.Generator) -> int:
    """Return how many answers the full grid took: its candidates, and both baselines at all their scales."""
    own = [cell.rate(scale) for scale in (*SCALES, *SCALES[:9])]
    return 2 * cell.questions + sum(baseline_answers(cell, rate, rng) for rate in (*own, *[cell.rate(0.0)] * 10))


# -- the table -----------------------------------------------------------------------------------------------


def row(cell: Cell, sweeps: int) -> str:
    """Return a cell's results as a row of Markdown."""
    results = [one_sweep(cell, seed) for seed in range(sweeps)]
    parts = [f"{cell.slope}", f"{cell.questions}", f"{100 * cell.aligned:g} %"]
    for name in ("first passing", "grid", "search"):
        made = [each[name] for each in results if each[name].scale is not None]
        passed = sum(each.passed for each in made)
        share = f"{100 * passed / len(made):.0f} %" if made else "-"
        parts.append(f"{share} of {len(made)}")
    both = [(e["grid"].scale, e["search"].scale) for e in results if e["grid"].scale and e["search"].scale]
    apart = [abs(one - two) for one, two in both if one is not None and two is not None]
    parts.append(f"{100 * np.mean([x < 0.05 for x in apart]):.0f} % / {100 * np.mean([x < 0.15 for x in apart]):.0f} %")
    fresh = [each["search"].fresh for each in results if each["search"].scale is not None]
    before, after = (np.mean([each[name].answers for each in results]) for name in ("first passing", "search"))
    whole = (2 + 29) * cell.questions
    parts += [f"{np.median(fresh):.0f}", f"{whole:,}", f"{before:,.0f}", f"{after:,.0f}"]
    parts += [f"{100 * after / whole:.0f} %", f"{100 * after / before:.0f} %"]
    return "| " + " | ".join(parts) + " |"


COLUMNS = (
    "slope", "questions", "aligned's ASR", "first passing: passes", "grid: passes", "search: passes",
    "search as grid: same / within a step", "fresh questions (median)", "answers: every candidate", "answers: before",
    "answers: search", "of every", "of before",
)  # fmt: skip


def main() -> None:
    """Simulate, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    began = time.process_time(), time.monotonic()
    cells = [Cell(slope=s, questions=q, aligned=a) for a in ALIGNED for s in SLOPES for q in QUESTIONS]
    with ProcessPoolExecutor(given.workers) as pool:
        rows = list(pool.map(partial(row, sweeps=given.sweeps), cells))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("resta", "numpy"))
    text = [
        "# What a sweep chooses, and what it costs: a simulation",
        "",
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}; {given.sweeps} sweeps in each row, "
        f"{time.monotonic() - began[1]:.0f} s with {given.workers} process(es).",
        "",
        f"    python benchmarks/sweep_choice.py --sweeps {given.sweeps} --workers {given.workers} --out "
        f"benchmarks/results/{given.out.name}",
        "",
        (__doc__ or "")
        .split("\n\n", 2)[2]
        .replace("first passing    ", "- first passing: ")
        .replace("grid             ", "- grid: ")
        .replace("search           ", "- search: "),
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *rows,
        "",
        "`passes`: of the sweeps that made a choice, the share whose choice passed on the fresh questions, and of how "
        "many. A sweep whose rates leave no scale a chance of 0.9, even with eight times the questions, makes none and "
        "says so. `before` and `search` have the baselines in them; a hopeless candidate counts a quarter.",
    ]
    given.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
