"""Merges as expressions: `(tuned + 0.5 * (aligned - base)).save("out")`.

A checkpoint is a point and a delta is a direction: points can be subtracted, directions scaled and added, and a
direction added to a point. Two points cannot be added, for the same reason as two dates. An expression reads nothing
and computes nothing until it is saved or iterated over; it is a recipe, and `.recipe()` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resta.errors import RequestError
from resta.hub import check_source
from resta.recipe import OutputChoices, Recipe, dump_recipe, make_recipe, show_term
from resta.strict import did_you_mean

if TYPE_CHECKING:
    import torch

    from resta.engine import Progress, Result

Rescale = Literal["inverse_density", "l1_norm"]


class _Operand:
    """What numbers of numpy and torch leave to the expressions here, instead of looking for an array in them."""

    __array_ufunc__ = None


@dataclass(frozen=True, eq=False)
class Checkpoint(_Operand):
    """A model's weights, by name: nothing is read yet."""

    source: str
    name: str | None = None
    on: Checkpoint | None = None
    strip_prefix: str | None = None
    recorded_base: str | None = None

    def __repr__(self) -> str:
        """Show what makes it up: Checkpoint('/models/tuned')."""
        said = [repr(self.source)]
        said += [f"{key}={getattr(self, key)!r}" for key in ("name", "on") if getattr(self, key) is not None]
        return f"Checkpoint({', '.join(said)})"

    def __sub__(self, other: object) -> Any:
        """Return the delta from another checkpoint to this one, or this one moved against a delta."""
        if isinstance(other, Delta):
            return self + -other
        if isinstance(other, Merge):
            raise TypeError(_UNSAVED)
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
    from_: Checkpoint
    scale: float = 1.0
    density: float | None = None
    rescale: Rescale = "inverse_density"
    seed: int | None = None
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Delta(_Operand):
    """A direction in weight space: a sum of scaled differences of checkpoints.

    It can be added, subtracted, scaled and divided by a number (Python's, numpy's or a torch tensor of one element),
    and summed: `sum([a - base, b - base])`.
    """

    terms: tuple[_Term, ...]

    def __repr__(self) -> str:
        """Show the sum in the checkpoints' names: Delta(0.5 * (aligned - base))."""
        return f"Delta({_sum_of(self.terms, _names(_ends(self))).removeprefix('+ ')})"

    def named(self, name: str) -> Delta:
        """Return the delta with a name, by which rules and reports speak of it: `(aligned - base).named("safety")`.

        Raises RequestError: the delta is a sum, whose parts are named one by one.
        """
        if len(self.terms) != 1:
            raise RequestError("a name is given to one difference: (a - b).named(...); name the parts of a sum alone")
        return Delta((replace(self.terms[0], name=name),))

    def __mul__(self, factor: object) -> Delta:
        """Return the delta scaled by a number."""
        number = _number(factor)
        if number is None:
            return NotImplemented
        return Delta(tuple(replace(term, scale=term.scale * number) for term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Delta:
        """Return the delta divided by a number."""
        number = _number(divisor)
        if number is None:
            return NotImplemented
        return Delta(tuple(replace(term, scale=term.scale / number) for term in self.terms))

    def __radd__(self, other: object) -> Delta:
        """Let `sum` begin with its zero."""
        return self if type(other) is int and other == 0 else NotImplemented

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
class Merge(_Operand):
    """A checkpoint moved by a delta: a merge that can be saved, iterated over or shown as a recipe."""

    start: Checkpoint
    delta: Delta
    _output: dict[str, Any] = field(default_factory=dict)
    _choices: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Show the equation: Merge(tuned + 0.5 * (aligned - base))."""
        names = _names(_checkpoints(self))
        return f"Merge({names[self.start]} {_sum_of(self.delta.terms, names)})"

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
            raise TypeError(_UNSAVED)
        return NotImplemented

    def options(self, **choices: Any) -> Merge:
        """Return the merge with choices of a recipe.

        Args:
            **choices: `rules`, `seed`, `tokenizers`, `min_coverage` and the like as in a recipe; and what a
                recipe says under `output`: dtype, rounding, shard_size, files_from. `files_from` may be a
                Checkpoint of the expression.

        Raises:
            RequestError: no choice of that name.
        """
        expression = {"models", "start", "terms", "output"}  # what an expression says by itself
        known = (OutputChoices.model_fields.keys() | Recipe.model_fields.keys()) - expression
        for key in choices.keys() - known:
            raise RequestError(f"options: {key} is no choice of a recipe{did_you_mean(key, known)}")
        output = {key: value for key, value in choices.items() if key in OutputChoices.model_fields}
        rest = {key: value for key, value in choices.items() if key not in output}
        return replace(self, _output={**self._output, **output}, _choices={**self._choices, **rest})

    def to_recipe(self) -> Recipe:
        """Return the validated recipe.

        Raises RequestError: two seeds are said, or an option is not valid.
        """
        names = _names(_checkpoints(self))
        output = {
            key: names.get(value) if isinstance(value, Checkpoint) else value for key, value in self._output.items()
        }
        return make_recipe(
            {
                **self._choices,
                "models": {name: _model(checkpoint, names) for checkpoint, name in names.items()},
                "start": names[self.start],
                "terms": [_term(term, names) for term in self.delta.terms],
                "seed": _seed(self.delta, self._choices.get("seed")),
                "output": output,
            }
        )

    def recipe(self) -> str:
        """Return the recipe as YAML."""
        return dump_recipe(self.to_recipe())

    def save(
        self,
        out: str | Path,
        *,
        workers: int | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
        digests: bool = False,
    ) -> Result:
        """Write the merged model; see `resta.merge`."""
        from resta.engine import merge  # numba is imported when there is something to compute

        return merge(self.to_recipe(), out, workers=workers, overwrite=overwrite, progress=progress, digests=digests)

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

    Raises:
        RequestError: there is no such directory, and it is no Hub id either.
    """
    path = check_source(str(source))
    return Checkpoint(str(path) if path else str(source), name, on, strip_prefix, recorded_base)


def dare(delta: Delta, *, density: float, seed: int | None = None, rescale: Rescale = "inverse_density") -> Delta:
    """Keep a random share of a delta's entries and rescale them (DARE, arXiv 2311.03099).

    Args:
        delta: one difference of two checkpoints, possibly scaled.
        density: share of entries kept; the paper's 1 - p.
        seed: of the mask, by default the merge's. Entries kept at a lower density are also kept at a higher one.
        rescale: divide by the density (the paper), or match the L1 norm.

    Raises:
        TypeError: it is no delta.
        RequestError: the delta is a sum, or sparsified already.
    """
    if not isinstance(delta, Delta):
        raise TypeError(f"dare takes a delta, dare(a - b, density=...); found a {type(delta).__name__}")
    if len(delta.terms) != 1 or delta.terms[0].density is not None:
        raise RequestError("dare takes one difference, dare(a - b, density=...); sparsify each part of a sum alone")
    return Delta((replace(delta.terms[0], density=density, seed=seed, rescale=rescale),))


_UNSAVED = "an unsaved merge has no delta to another model; save it first and load the result"


def _number(value: object) -> float | None:
    """Return a number of Python, numpy or torch (one element of no dimension) as Python's own; None if it is none."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value)


def _ends(delta: Delta) -> list[Checkpoint]:
    return [end for term in delta.terms for end in (term.to, term.from_)]


def _checkpoints(merge: Merge) -> list[Checkpoint]:
    chosen = [value for value in merge._output.values() if isinstance(value, Checkpoint)]
    return [merge.start, *_ends(merge.delta), *chosen]


def _names(checkpoints: list[Checkpoint]) -> dict[Checkpoint, str]:
    """Give every checkpoint of an expression, and every base that one is on, a name of its own."""
    bases = [checkpoint.on for checkpoint in checkpoints if checkpoint.on]
    names: dict[Checkpoint, str] = {}
    for checkpoint in dict.fromkeys([*checkpoints, *bases]):
        stem = checkpoint.name or re.sub(r"\W", "_", checkpoint.source.partition("@")[0].rstrip("/").rpartition("/")[2])
        stem = stem if checkpoint.name or re.match(r"[^\W\d]", stem) else f"model_{stem}"
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}_{number}", number + 1
        names[checkpoint] = name
    return names


def _sum_of(terms: Iterable[_Term], names: dict[Checkpoint, str]) -> str:
    return " ".join(show_term(term.scale, f"{names[term.to]} - {names[term.from_]}", term.density) for term in terms)


def _model(checkpoint: Checkpoint, names: dict[Checkpoint, str]) -> dict[str, Any]:
    return {
        "source": checkpoint.source,
        "on": names[checkpoint.on] if checkpoint.on else None,
        "strip_prefix": checkpoint.strip_prefix,
        "recorded_base": checkpoint.recorded_base,
    }


def _term(term: _Term, names: dict[Checkpoint, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {"delta": f"{names[term.to]} - {names[term.from_]}", "scale": term.scale}
    if term.name is not None:
        plain["name"] = term.name
    if term.density is not None:
        plain["sparsify"] = {"density": term.density, "rescale": term.rescale}
    return plain


def _seed(delta: Delta, chosen: Any) -> Any:
    """Return the one seed of a recipe: what the options say, and what the DARE terms do."""
    said = {term.seed for term in delta.terms if term.density is not None and term.seed is not None}
    said |= set() if chosen is None else {chosen}
    if len(said) > 1:
        raise RequestError(
            f"the seeds {', '.join(map(str, sorted(said)))} are set; a recipe has one, and its terms draw differently "
            "from it anyway"
        )
    return said.pop() if said else 0
