"""Merges as expressions: `(tuned + 0.5 * (aligned - base)).save("out")`.

A checkpoint is a point and a delta is a direction: points can be subtracted, directions scaled and added, and a
direction added to a point. Two points cannot be added, for the same reason as two dates. An expression reads
nothing and computes nothing until it is saved or iterated over; it is a recipe, and `.recipe()` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resta.errors import RecipeError
from resta.recipe import Recipe, dump_recipe, make_recipe

if TYPE_CHECKING:
    import torch

    from resta.engine import Result

Rescale = Literal["inverse_density", "l1_norm"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's weights, by name: nothing is read yet."""

    source: str
    name: str | None = None
    on: Checkpoint | None = None
    strip_prefix: str | None = None
    recorded_base: str | None = None

    def __sub__(self, other: object) -> Delta:
        """Return the delta from `other` to this checkpoint."""
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return Delta((_Term(self, other),))

    def __add__(self, other: object) -> Merge:
        """Return this checkpoint moved by a delta."""
        if isinstance(other, Checkpoint):
            raise TypeError(
                "two checkpoints cannot be added: their sum is not a model. Add a delta: "
                "tuned + 0.5 * (aligned - base); for the mean of two, a + 0.5 * (b - a)"
            )
        if not isinstance(other, Delta):
            return NotImplemented
        return Merge(self, other)

    def __mul__(self, other: object) -> Any:
        """Refuse: only deltas can be scaled."""
        raise TypeError("a checkpoint cannot be scaled; scale a delta: 0.5 * (aligned - base)")

    __rmul__ = __mul__

    __radd__ = __add__


@dataclass(frozen=True, eq=False)
class _Term:
    to: Checkpoint
    frm: Checkpoint
    scale: float = 1.0
    density: float | None = None
    rescale: Rescale = "inverse_density"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Delta:
    """A direction in weight space: a sum of scaled differences of checkpoints."""

    terms: tuple[_Term, ...]

    def __mul__(self, factor: object) -> Delta:
        """Return the delta scaled by a number."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return Delta(tuple(replace(term, scale=term.scale * factor) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        """Return the opposite delta."""
        return self * -1.0

    def __add__(self, other: object) -> Any:
        """Return the sum of two deltas, or a checkpoint moved by this one."""
        if isinstance(other, Checkpoint | Merge):
            return other + self
        if not isinstance(other, Delta):
            return NotImplemented
        return Delta(self.terms + other.terms)

    def __sub__(self, other: object) -> Delta:
        """Return the difference of two deltas."""
        if not isinstance(other, Delta):
            return NotImplemented
        return self + -other  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Merge:
    """A checkpoint moved by a delta: a merge that can be saved, iterated over or shown as a recipe."""

    start: Checkpoint
    delta: Delta
    _output: dict[str, Any] = field(default_factory=dict)
    _rules: tuple[dict[str, Any], ...] = ()
    _tokenizers: str = "same"

    def __add__(self, other: object) -> Merge:
        """Return this merge moved further."""
        if isinstance(other, Checkpoint | Merge):
            raise TypeError("two models cannot be added; add a delta, such as 0.5 * (aligned - base)")
        if not isinstance(other, Delta):
            return NotImplemented
        return replace(self, delta=self.delta + other)

    def __sub__(self, other: object) -> Merge:
        """Return this merge moved the other way."""
        if isinstance(other, Delta):
            return self + -other
        if isinstance(other, Checkpoint | Merge):
            raise TypeError("an unsaved merge has no delta to another model; save it first and load the result")
        return NotImplemented

    def options(
        self, *, rules: tuple[dict[str, Any], ...] | None = None, tokenizers: str | None = None, **output: Any
    ) -> Merge:
        """Return the merge with output choices (dtype, rounding, shard_size, files_from) and rules, as in a recipe.

        `files_from` may be a Checkpoint of the expression.
        """
        return replace(
            self,
            _output={**self._output, **output},
            _rules=self._rules if rules is None else tuple(rules),
            _tokenizers=tokenizers or self._tokenizers,
        )

    def to_recipe(self) -> Recipe:
        """Return the validated recipe.

        Raises:
            RecipeError: two DARE terms have different seeds, or an option is not valid.
        """
        names = _name_all(self)
        models = {name: _model(checkpoint, names) for checkpoint, name in names.items()}
        output = {
            key: names.get(value) if isinstance(value, Checkpoint) else value for key, value in self._output.items()
        }
        return make_recipe(
            {
                "models": models,
                "start": names[self.start],
                "terms": [_term(term, names) for term in self.delta.terms],
                "seed": _seed(self.delta),
                "tokenizers": self._tokenizers,
                "output": output,
                "rules": list(self._rules),
            }
        )

    def recipe(self) -> str:
        """Return the recipe as YAML."""
        return dump_recipe(self.to_recipe())

    def save(self, out: str | Path, *, workers: int | None = None, overwrite: bool = False) -> Result:
        """Write the merged model; see `resta.merge`."""
        from resta.engine import merge  # numba is imported when there is something to compute

        return merge(self.to_recipe(), out, workers=workers, overwrite=overwrite)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Compute the merge tensor by tensor, in memory; see `resta.tensors`."""
        from resta.engine import tensors

        return tensors(self.to_recipe())


def load(
    source: str | Path,
    *,
    name: str | None = None,
    on: Checkpoint | None = None,
    strip_prefix: str | None = None,
    recorded_base: str | None = None,
) -> Checkpoint:
    """Name a checkpoint: a directory or `org/name@revision`; a LoRA adapter with the checkpoint that it is `on`.

    Args:
        source: where the model lies.
        name: what the recipe calls it; by default the last part of the source.
        on: for an adapter, its base.
        strip_prefix: removed from tensor names.
        recorded_base: confirms the base that the adapter records under another name.
    """
    path = Path(source).expanduser()
    text = str(path.resolve()) if path.is_dir() else str(source)
    return Checkpoint(text, name, on, strip_prefix, recorded_base)


def dare(delta: Delta, *, density: float, seed: int = 0, rescale: Rescale = "inverse_density") -> Delta:
    """Keep a random share of a delta's entries and rescale them (DARE, arXiv 2311.03099).

    Args:
        delta: one difference of two checkpoints, possibly scaled.
        density: share of entries kept; the paper's 1 - p.
        seed: of the mask. Entries kept at a lower density are also kept at a higher one.
        rescale: divide by the density (the paper), or match the L1 norm.

    Raises:
        RecipeError: the delta is a sum, or sparsified already.
    """
    if len(delta.terms) != 1 or delta.terms[0].density is not None:
        raise RecipeError("dare takes one difference, dare(a - b, density=...); sparsify each part of a sum alone")
    return Delta((replace(delta.terms[0], density=density, seed=seed, rescale=rescale),))


def _name_all(merge: Merge) -> dict[Checkpoint, str]:
    """Give every checkpoint of an expression its own name."""
    checkpoints = [merge.start, *(end for term in merge.delta.terms for end in (term.to, term.frm))]
    checkpoints += [value for value in merge._output.values() if isinstance(value, Checkpoint)]
    checkpoints += [checkpoint.on for checkpoint in checkpoints if checkpoint.on]
    names: dict[Checkpoint, str] = {}
    for checkpoint in dict.fromkeys(checkpoints):
        stem = checkpoint.name or re.sub(r"\W", "_", checkpoint.source.partition("@")[0].rstrip("/").rpartition("/")[2])
        stem = stem if re.match(r"[A-Za-z_]", stem) else f"model_{stem}"
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}_{number}", number + 1
        names[checkpoint] = name
    return names


def _model(checkpoint: Checkpoint, names: dict[Checkpoint, str]) -> dict[str, Any]:
    return {
        "source": checkpoint.source,
        "on": names[checkpoint.on] if checkpoint.on else None,
        "strip_prefix": checkpoint.strip_prefix,
        "recorded_base": checkpoint.recorded_base,
    }


def _term(term: _Term, names: dict[Checkpoint, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {"delta": f"{names[term.to]} - {names[term.frm]}", "scale": term.scale}
    if term.density is not None:
        plain["sparsify"] = {"density": term.density, "rescale": term.rescale}
    return plain


def _seed(delta: Delta) -> int:
    seeds = {term.seed for term in delta.terms if term.density is not None}
    if len(seeds) > 1:
        raise RecipeError(f"DARE terms have the seeds {sorted(seeds)}; a recipe has one, and its terms differ anyway")
    return seeds.pop() if seeds else 0
