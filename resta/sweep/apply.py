"""A candidate's tensors, computed from the checkpoints and copied into a model that is loaded already.

Each candidate is computed anew by the engine of `resta merge`, in the dtype that a written merge would have: what the
model holds does not depend on what was applied before, and no copy of a model is written. The random control is no
recipe: its vector is drawn here, for one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resta.engine import Made, compute_tensors
from resta.errors import RequestError
from resta.plan import derive_key
from resta.recipe import dump_recipe
from resta.sweep.candidates import Candidate, Family, Method, plan_of, recipe_of

if TYPE_CHECKING:
    import torch

    from resta.redeval.models import LocalModel

SLICE = 1 << 24  # elements compared at a time, in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How far a candidate is from `tuned`, as stored: Frobenius norms over all floating-point tensors."""

    norm: float
    tuned_norm: float
    changed: int  # entries that differ
    entries: int

    @property
    def relative(self) -> float:
        """Return the change as a share of the weights' norm."""
        return self.norm / self.tuned_norm if self.tuned_norm else 0.0


def write_files(family: Family, folder: Path) -> None:
    """Write config, tokenizer and templates as every candidate's merge would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in family.tuned_plan.auxiliary_files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.content)


def identity_text(candidate: Candidate, family: Family) -> str:
    """Return what names a candidate: its recipe, or for the control what it is drawn from."""
    recipe = dump_recipe(recipe_of(candidate, family))
    if candidate.method != "random":
        return recipe
    return f"# Not a recipe: a random vector, tensor by tensor of the norm of the one below.\nrandom: true\n{recipe}"


def apply(local: LocalModel, candidate: Candidate, family: Family) -> Change:
    """Overwrite a loaded model's weights with a candidate's. Raises RequestError where the names do not fit."""
    import torch

    places = local.model.state_dict(keep_vars=True)  # tied weights: several names of one memory
    written: dict[int, str] = {}
    sums = [0.0, 0.0]
    counts = [0, 0]
    with torch.no_grad():
        for name, tensor, tuned in _tensors(candidate, family):
            _add_change(tensor, tuned, sums, counts)
            if name in places:  # other names are those which this architecture does not load either
                _write(places[name], tensor, name, written, local.name)
    left = sorted(name for name, place in places.items() if place.data_ptr() not in written and place.numel())
    if left:
        raise RequestError(
            f"{local.name}: {len(left)} weights have no tensor of their name in the merge ({', '.join(left[:3])}); "
            "this architecture renames or joins tensors as it is loaded, so candidates cannot be applied in memory: "
            "write them with `resta merge` and compare them with `resta verify`"
        )
    return Change(norm=math.sqrt(sums[0]), tuned_norm=math.sqrt(sums[1]), changed=counts[0], entries=counts[1])


def unit_norm(method: Method, family: Family) -> float:
    """Return the norm of a method's change at scale 1, as meant, before any rounding: one pass over the weights."""
    plan = plan_of(Candidate(method=method, scale=1.0), family)
    return math.sqrt(sum(made.intended for made in compute_tensors(plan, measure=True)))


def tuned_tensors(family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of `tuned`, each in its output dtype."""
    return ((made.name, made.tensor) for made in compute_tensors(family.tuned_plan))


def _write(place: Any, tensor: torch.Tensor, name: str, written: dict[int, str], model: str) -> None:
    if place.shape != tensor.shape:
        raise RequestError(f"{model}: {name} has shape {list(place.shape)} but the merge {list(tensor.shape)}")
    other = written.setdefault(place.data_ptr(), name)
    if other == name:
        place.copy_(tensor)
    elif not place.cpu().equal(tensor.to(place.dtype)):
        raise RequestError(
            f"{model}: {other} and {name} are tied but differ in the merge; keep one of them with a rule"
        )


def _add_change(tensor: torch.Tensor, tuned: torch.Tensor, sums: list[float], counts: list[int]) -> None:
    if not tensor.is_floating_point():
        return
    mine, theirs = tensor.flatten(), tuned.flatten()
    for first in range(0, mine.numel(), SLICE):
        wide = theirs[first : first + SLICE].double()
        difference = mine[first : first + SLICE].double() - wide
        sums[0] += float(difference.square().sum())
        sums[1] += float(wide.square().sum())
        counts[0] += int(difference.count_nonzero())
    counts[1] += mine.numel()


def _tensors(candidate: Candidate, family: Family) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, the candidate's tensor, and that of `tuned`, each in its output dtype."""
    plan = plan_of(candidate, family)
    steps = {step.name: step for step in family.tuned_plan.steps}
    ordered = replace(family.tuned_plan, steps=tuple(steps[step.name] for step in plan.steps))
    is_random = candidate.method == "random"
    pairs = zip(compute_tensors(plan, measure=is_random), compute_tensors(ordered), strict=True)
    for made, tuned in pairs:
        yield made.name, _perturbed(made, tuned.tensor, family.seed) if is_random else made.tensor, tuned.tensor


def _perturbed(made: Made, tuned: torch.Tensor, seed: int) -> torch.Tensor:
    """Return `tuned` plus a Gaussian direction of the intended change's norm, drawn from (seed, tensor name)."""
    import torch

    if made.intended == 0:
        return tuned
    wide = torch.float64 if made.double else torch.float32
    draws = np.random.Generator(np.random.Philox(derive_key(seed, "random control", 0, made.name)))
    noise = torch.from_numpy(draws.standard_normal(made.merged_count, np.float32)).to(wide)
    noise *= math.sqrt(made.intended) / float(torch.linalg.vector_norm(noise, dtype=torch.float64))
    moved = tuned.flatten().to(wide, copy=True)
    moved[: made.merged_count] += noise
    return moved.to(tuned.dtype).reshape(tuned.shape)
