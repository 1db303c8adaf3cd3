"""How far two checkpoints are apart: by tensor, by layer and by kind of module.

B - A is the term of a merge that starts at A, so the merge's own chunk computation measures it and nothing is written.
A merge refuses models that do not fit each other; here every misfit is a result, reported by name, and what fits is
compared. This module knows nothing of terminals.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resta.adapter import base_name, is_adapter
from resta.checkpoint import Operand, Reader, Weights
from resta.compute import CHUNK, Workspace
from resta.engine import UNIT, default_workers
from resta.errors import RequestError
from resta.figure import require_matplotlib
from resta.header import DTYPE_BITS, FLOAT_DTYPES, Spec
from resta.hub import locate
from resta.manifest import layer_of, layer_order
from resta.opened import open_models
from resta.plan import Slot, Step, StepTerm
from resta.recipe import named_models
from resta.version import VERSION

SCHEMA = 1
MOST_OTHERS = 16  # columns of the heat map for tensors outside of the layers
MOST_NUMBERED = 48  # layers up to which the cells of the heat map hold their numbers

Progress = Callable[[str, int, int], None]  # tensor name, bytes of A now compared, of how many in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """How far a tensor, or a group of them, moved from A to B.

    `norm_a` and `norm_diff` are the Frobenius norms of A and of B - A, over floating point tensors. `differing` of all
    `entries` have another value (a NaN always has); `non_finite` counts NaN and infinity in A and in B.
    """

    tensors: int
    entries: int
    norm_a: float
    norm_diff: float
    differing: int
    non_finite: int

    @property
    def relative(self) -> float | None:
        """|B - A| / |A|; None where A is zero and B is not, or where one is not finite."""
        if self.norm_diff == 0:
            return 0.0
        ratio = self.norm_diff / self.norm_a if self.norm_a else math.inf
        return ratio if math.isfinite(ratio) else None

    @property
    def share(self) -> float:
        """The share of entries that differ."""
        return self.differing / self.entries if self.entries else 0.0


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Two checkpoints compared; `mismatches` says by tensor what could not be compared, wholly or in part."""

    a: Weights
    b: Weights
    tensors: Mapping[str, Distance]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    mismatches: Mapping[str, str]

    @property
    def total(self) -> Distance:
        """Everything that was compared."""
        return join(self.tensors.values())

    @property
    def layers(self) -> dict[str, Distance]:
        """By layer, in the order of a model: embeddings, layers, and the rest by name."""
        groups = _groups(self.tensors, layer_of)
        return {layer: join(groups[layer]) for layer in sorted(groups, key=layer_order)}

    @property
    def modules(self) -> dict[str, Distance]:
        """By kind of module: q_proj, down_proj, ..."""
        return {key: join(group) for key, group in _groups(self.tensors, kind_of).items()}


def diff(
    a: str | Path,
    b: str | Path,
    *,
    on: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints.

        for kind, distance in resta.diff("base", "tuned").modules.items():
            print(kind, distance.relative)

    Args:
        a: a directory, a Hub id, or a LoRA adapter.
        b: another.
        on: the model that adapters are applied to.
        workers: threads; by default the processors that this process may use, at most 8.
        progress: called from the workers, one at a time.

    Raises:
        RequestError: a model cannot be read, or an adapter came without `on`.
        RestaError: reading failed.
    """
    models = _read(str(a), str(b), None if on is None else str(on))
    weights_a, weights_b = models["A"], models["B"]
    pairs: dict[str, tuple[Operand, Operand, int]] = {}
    mismatches: dict[str, str] = {}
    for name, mine in weights_a.tensors.items():
        if name in weights_b.tensors:
            count, misfit = _comparable(mine, weights_b.tensors[name])
            if count is not None:
                pairs[name] = (mine, weights_b.tensors[name], count)
            if misfit:
                mismatches[name] = misfit
    return Diff(
        a=weights_a,
        b=weights_b,
        tensors=_compare(pairs, {**weights_a.files, **weights_b.files}, workers or default_workers(), progress),
        only_in_a=tuple(name for name in weights_a.tensors if name not in weights_b.tensors),
        only_in_b=tuple(name for name in weights_b.tensors if name not in weights_a.tensors),
        mismatches=mismatches,
    )


def kind_of(name: str) -> str:
    """Return what kind of module a tensor is of: the last word of its name that is no number, without `.weight`."""
    words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
    return ".".join(words[-2:] if words[-1] == "bias" else words[-1:]) if words else name


def join(distances: Iterable[Distance]) -> Distance:
    """Take several distances together."""
    distances = list(distances)
    return Distance(
        tensors=sum(each.tensors for each in distances),
        entries=sum(each.entries for each in distances),
        norm_a=math.hypot(*(each.norm_a for each in distances)),
        norm_diff=math.hypot(*(each.norm_diff for each in distances)),
        differing=sum(each.differing for each in distances),
        non_finite=sum(each.non_finite for each in distances),
    )


def describe(result: Diff) -> dict[str, Any]:
    """Return a diff as a versioned document."""

    def groups(distances: Mapping[str, Distance]) -> dict[str, Any]:
        return {name: _describe_one(distance) for name, distance in distances.items()}

    return {
        "schema": SCHEMA,
        "kind": "diff",
        "versions": {"resta": VERSION},
        "a": _describe_source(result.a),
        "b": _describe_source(result.b),
        "total": _describe_one(result.total),
        "layers": groups(result.layers),
        "modules": groups(result.modules),
        "tensors": groups(result.tensors),
        "only_in_a": list(result.only_in_a),
        "only_in_b": list(result.only_in_b),
        "mismatches": dict(result.mismatches),
    }


def write_json(result: Diff, path: Path) -> None:
    """Write `describe` to a file."""
    path.write_text(json.dumps(describe(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def write_plot(result: Diff, path: Path) -> None:
    """Draw the relative sizes as a heat map, layers by kinds of modules, into a PNG file.

    Raises RequestError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    inner, outer = _cells(result.tensors)
    layers = sorted({layer for layer, _ in inner})
    kinds = list(dict.fromkeys(kind for _, kind in inner))
    others = list(outer)[:MOST_OTHERS]
    shapes = [(len(layers), len(kinds)), (1, len(others))]
    heights = [max(2.0, (0.26 if len(layers) <= MOST_NUMBERED else 0.13) * len(layers)), 0.5]
    figure = Figure(figsize=(max(6.5, 0.95 * len(kinds) + 2), min(30.0, sum(heights) + 2.6)), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    grids = [np.full(shape, np.nan) for shape in shapes]
    for (layer, kind), distance in inner.items():
        grids[0][layers.index(layer), kinds.index(kind)] = _plotted(distance)
    for column, name in enumerate(others):
        grids[1][0, column] = _plotted(outer[name])
    image = _draw_grids(axes, grids, [kinds, others], [[str(layer) for layer in layers], [""]])
    axes[0].set_ylabel("layer")
    figure.suptitle(f"{_short_name(result.b)} relative to {_short_name(result.a)}", fontsize=11)
    figure.colorbar(
        image, ax=list(axes), label="|B − A| / |A|   (grey: no difference)", shrink=0.8, pad=0.02, aspect=35
    )
    figure.savefig(path, format="png", dpi=140)


def _draw_grids(axes: Any, grids: list[Any], columns: list[list[str]], rows: list[list[str]]) -> Any:
    """Fill both heat maps with one logarithmic colour scale; return what a colour bar needs."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    values = np.concatenate([grid[grid > 0] for grid in grids])
    lowest, highest = (values.min(), values.max()) if values.size else (1e-6, 1.0)
    norm = LogNorm(lowest / 1.05, highest * 1.05)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white", under="lightgrey")
    for axis, grid, columns_here, rows_here in zip(axes, grids, columns, rows, strict=True):
        if not grid.size:
            axis.set_axis_off()
            continue
        axis.imshow(np.where(grid == 0, lowest * 0.5, grid), aspect="auto", norm=norm, cmap=colours)
        axis.set_xticks(range(len(columns_here)), columns_here, rotation=30, ha="right", fontsize=8)
        every = -(-len(rows_here) // 60)
        axis.set_yticks(range(0, len(rows_here), every), rows_here[::every], fontsize=8)
        axis.tick_params(length=0)
        for (row, column), value in np.ndenumerate(grid if len(rows_here) <= MOST_NUMBERED else grid[:0]):
            if np.isfinite(value):
                colour = "black" if value == 0 or norm(value) > 0.55 else "white"
                axis.text(column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=7)
    return ScalarMappable(norm, colours)


def _cells(tensors: Mapping[str, Distance]) -> tuple[dict[tuple[int, str], Distance], dict[str, Distance]]:
    """Group by layer number and kind, and what has no layer by its own name."""
    inner: dict[tuple[int, str], list[Distance]] = {}
    outer = {}
    for name, distance in tensors.items():
        layer = layer_of(name)
        if number := re.fullmatch(r"layer (\d+)", layer):
            inner.setdefault((int(number[1]), kind_of(name)), []).append(distance)
        else:
            outer[layer] = distance
    return {cell: join(group) for cell, group in inner.items()}, outer


def _plotted(distance: Distance) -> float:
    return math.nan if distance.relative is None else distance.relative


def _short_name(weights: Weights) -> str:
    return weights.located.hub_id or weights.located.folder.name


def _read(a: str, b: str, on: str | None) -> dict[str, Weights]:
    """Read both models and, for adapters, the base that they are on."""
    folders = {name: locate(source).folder for name, source in (("A", a), ("B", b))}
    adapters = {name for name, folder in folders.items() if is_adapter(folder)}
    if adapters and on is None:
        name = a if "A" in adapters else b
        recorded = base_name(folders["A" if "A" in adapters else "B"])
        raise RequestError(f"{name}: is a LoRA adapter; name the model that it is on: --on {recorded or 'BASE'}")
    if on is not None and not adapters:
        raise RequestError(f"--on {on}: neither {a} nor {b} is a LoRA adapter; leave it out")
    named: dict[str, dict[str, str]] = {
        name: {"source": source, "on": "base", "recorded_base": base_name(folders[name])}
        if name in adapters
        else {"source": source}
        for name, source in (("A", a), ("B", b))
    }
    if on is not None:
        named["base"] = {"source": on}
    models = named_models(named)
    return open_models(models).of(models)


def _comparable(mine: Operand, theirs: Operand) -> tuple[int | None, str | None]:
    """Return how many elements of a pair can be compared, and what stands against comparing all of them."""
    pair = {mine.dtype, theirs.dtype}
    if len(pair) > 1 and not pair <= set(FLOAT_DTYPES):
        return None, f"{mine.dtype} in A, {theirs.dtype} in B"
    if mine.shape == theirs.shape:
        return mine.stored.spec.count, None
    shapes = f"shape {list(mine.shape)} in A, {list(theirs.shape)} in B"
    if len(mine.shape) != len(theirs.shape) or mine.shape[1:] != theirs.shape[1:]:
        return None, shapes
    rows = min(mine.shape[0], theirs.shape[0])
    return rows * math.prod(mine.shape[1:]), f"{shapes}; the first {rows} rows were compared"


def _compare(
    pairs: Mapping[str, tuple[Operand, Operand, int]],
    files: Mapping[Path, Any],
    workers: int,
    progress: Progress | None,
) -> dict[str, Distance]:
    """Measure every pair, in units that a few threads share; the order of all sums is fixed."""
    own = threading.local()
    lock = threading.Lock()
    total = sum(count * DTYPE_BITS[mine.dtype] // 8 for mine, _, count in pairs.values())
    steps = {name: _step(name, *pair) for name, pair in pairs.items() if pair[0].dtype in FLOAT_DTYPES}
    units = [(name, first) for name, (_, _, count) in pairs.items() for first in range(0, count, UNIT)]

    def measure(unit: tuple[str, int]) -> Distance:
        name, first = unit
        mine, theirs, count = pairs[name]
        stretch = range(first, min(first + UNIT, count))
        if name not in steps:
            distance = _compare_bytes(mine, theirs, stretch, reader)
        else:
            if not hasattr(own, "workspace"):
                own.workspace = Workspace(reader)
            distance = _measure(steps[name], stretch, own.workspace)
        if progress:
            with lock:
                progress(name, len(stretch) * DTYPE_BITS[mine.dtype] // 8, total)
        return distance

    parts: dict[str, list[Distance]] = {name: [] for name in pairs}
    with Reader(files) as reader, ThreadPoolExecutor(workers) as pool:
        for (name, _), part in zip(units, pool.map(measure, units), strict=True):
            parts[name].append(part)
        reader.check_unchanged()
    return {name: _as_one(join(group)) for name, group in parts.items()}


def _as_one(distance: Distance) -> Distance:
    return Distance(
        tensors=1,
        entries=distance.entries,
        norm_a=distance.norm_a,
        norm_diff=distance.norm_diff,
        differing=distance.differing,
        non_finite=distance.non_finite,
    )


def _step(name: str, mine: Operand, theirs: Operand, count: int) -> Step:
    """A + 1 * (B - A) over the first `count` elements, in a dtype wide enough that no difference is rounded away."""
    operands = (mine,) if mine == theirs else (mine, theirs)
    double = "F64" in (mine.dtype, theirs.dtype)
    return Step(
        name=name,
        operands=operands,
        owners=("A", "B")[: len(operands)],
        terms=(StepTerm(term=0, to=len(operands) - 1, from_=0, scale=1.0),),
        slot=Slot(file="", spec=Spec(dtype="F64" if double else "F32", shape=mine.shape, start=0, nbytes=0)),
        merged_count=count,
        rounding_key=None,
        allow_nonfinite=True,
    )


def _measure(step: Step, stretch: range, workspace: Workspace) -> Distance:
    start = intended = 0.0
    changed = non_finite = 0
    for first in stretch[::CHUNK]:
        count = min(CHUNK, stretch.stop - first)
        totals = workspace.run(step, first, count, measure=True)[1]
        start += totals.start
        intended += totals.intended
        changed += totals.changed
        if totals.non_finite:
            non_finite += sum(workspace.count_non_finite(step, row, first, count) for row in range(len(step.operands)))
    return Distance(
        tensors=1,
        entries=len(stretch),
        norm_a=math.sqrt(start),
        norm_diff=math.sqrt(intended),
        differing=changed,
        non_finite=non_finite,
    )


def _compare_bytes(mine: Operand, theirs: Operand, stretch: range, reader: Reader) -> Distance:
    """Count the elements that differ where numbers have no distance: integers, booleans, packed formats."""
    bits = DTYPE_BITS[mine.dtype]
    width = max(bits // 8, 1)  # of a format below a byte, bytes are counted
    differing = 0
    for first in stretch[::CHUNK]:
        count = min(CHUNK, stretch.stop - first)
        data = [np.empty(count * bits // 8, np.uint8) for _ in range(2)]
        for operand, part in zip((mine, theirs), data, strict=True):
            reader.read(operand.stored, first * bits // 8, part.data)
        unequal = data[0].reshape(-1, width) != data[1].reshape(-1, width)
        differing += int(np.count_nonzero(unequal.any(axis=1)))
    return Distance(tensors=1, entries=len(stretch), norm_a=0.0, norm_diff=0.0, differing=differing, non_finite=0)


def _groups(tensors: Mapping[str, Distance], key: Callable[[str], str]) -> dict[str, list[Distance]]:
    groups: dict[str, list[Distance]] = {}
    for name, distance in tensors.items():
        groups.setdefault(key(name), []).append(distance)
    return groups


def _describe_one(distance: Distance) -> dict[str, Any]:
    return {
        "tensors": distance.tensors,
        "entries": distance.entries,
        "norm_a": distance.norm_a if math.isfinite(distance.norm_a) else None,
        "norm_diff": distance.norm_diff if math.isfinite(distance.norm_diff) else None,
        "relative": distance.relative,
        "differing": distance.differing,
        "share_differing": distance.share,
        "non_finite": distance.non_finite,
    }


def _describe_source(weights: Weights) -> dict[str, Any]:
    located = weights.located
    return {"source": located.source, "folder": str(located.folder), "commit": located.commit}
