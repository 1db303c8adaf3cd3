"""What is said of a merge before anything is written: cautions, and what a sample of its tensors shows."""

from __future__ import annotations

import math

from resta.cautions import cautions, name_cautions
from resta.checkpoint import Reader
from resta.compute import CHUNK, Workspace
from resta.manifest import size_warnings
from resta.plan import Plan

MOST_TENSORS = 24  # of which one chunk each is read: about 40 MB of three bfloat16 models


def plan_warnings(plan: Plan) -> list[str]:
    """Return all that whoever merges should know before anything is written, each in a sentence. Raises RestaError."""
    return [*cautions(plan), *name_cautions(plan), *forecast_warnings(plan)]


def forecast_warnings(plan: Plan) -> list[str]:
    """Return what a chunk of each of a few tensors, spread over the model, warns of.

    Of each term the norm is compared with that of the start in the same elements. A term whose rescaling needs a whole
    tensor (`l1_norm`) is taken at 1 / density.

    Raises RestaError: a file cannot be read.
    """
    steps = [step for step in plan.steps if step.terms and step.merged_count]
    steps = [steps[i * len(steps) // MOST_TENSORS] for i in range(MOST_TENSORS)] if len(steps) > MOST_TENSORS else steps
    start, sums, seen = 0.0, [0.0] * len(plan.recipe.terms), 0
    identities = {path: identity for weights in plan.weights.values() for path, identity in weights.files.items()}
    with Reader(identities) as reader:
        workspace = Workspace(reader)
        for step in steps:
            count = min(CHUNK, step.slot.spec.count)
            _, totals = workspace.run(step, 0, count, measure=True)
            start, seen = start + totals.start, seen + count
            for taking_part, part in zip(step.terms, totals.terms, strict=True):
                sums[taking_part.term] += part.intended
    basis = f" in a sample of {seen:,} elements"
    found: list[str] = []
    for term, intended in zip(plan.recipe.terms, sums, strict=True):
        found += size_warnings(term, math.sqrt(intended / start) if start > 0 else 0.0, basis)
    return found
