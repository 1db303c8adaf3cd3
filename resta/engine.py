"""The loop: a plan's steps, cut into units, read, computed and written by a few threads.

Kernels, reads and writes all release the interpreter's lock. Units, chunks and the order of all sums are fixed by the
plan alone, so the bytes and the reported figures do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resta import kernels
from resta.checkpoint import FileIdentity, Reader
from resta.compute import CHUNK, Totals, Workspace, add_totals, count_measured
from resta.digests import Digests, Followed, Follower
from resta.directory import small_files, weight_bytes, with_digests
from resta.errors import ChangedError, NoChangeError, NonFiniteError
from resta.header import DTYPE_BITS, Spec
from resta.manifest import Change, TensorFacts, from_json, result_warnings, tensor_facts, total_change
from resta.output import Output, check_place, check_space, check_vacant, recover
from resta.plan import Plan, Step, make_plan
from resta.recipe import Recipe, load_recipe
from resta.stored import Stored, View

if TYPE_CHECKING:
    import torch

FLUSH_BYTES = 1 << 28  # written between two requests to put a file on the disk, so that little is left at the end
UNIT = 1 << 24  # elements: what one worker takes at a time, and what the journal speaks of

Progress = Callable[[str, int], None]  # tensor name, bytes now in place


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A stretch of one step: elements first..first+count."""

    step: int
    first: int
    count: int

    @property
    def key(self) -> str:
        """What the journal calls it."""
        return f"{self.step}:{self.first}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished merge."""

    out: Path
    plan: Plan
    tensors: Mapping[str, TensorFacts]
    digests: Digests | None = None

    def __repr__(self) -> str:
        """Show the equation, what came of it, and what to know first; the facts of each tensor are in `tensors`."""
        change = self.change
        cosine = "-" if change.cosine is None else f"{change.cosine:.3f}"
        shown = [f"Result({self.plan.recipe.equation}", f"out={str(self.out)!r}", f"tensors={len(self.tensors)}"]
        shown += [f"change={change.relative_size:.2e} of the weights", f"cosine={cosine}"]
        return ", ".join([*shown, *(f"warning={each!r}" for each in self.warnings)]) + ")"

    @property
    def change(self) -> Change:
        """The intended against the realised change, over the whole model."""
        return total_change(self.tensors.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever uses the result should know first, each in a sentence."""
        return tuple(result_warnings(self.plan, self.tensors))


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    digests: bool = False,
) -> Result:
    """Carry out a recipe: write the model directory `out`.

    Args:
        recipe: a recipe, or the path of one.
        out: the directory to be; it appears when it is complete. A killed merge resumes when called again.
        workers: threads; by default the processors that this process may use, at most 8.
        overwrite: replace an earlier output of resta.
        progress: called from the workers, one at a time.
        digests: record the SHA-256 of every input and output file, which takes half a second or more of one core for a
            gigabyte, beside the merge; what the Hub's cache names by its digest is not read for it.

    Raises:
        RequestError: the request cannot be carried out; nothing was written.
        NonFiniteError: a tensor holds NaN or infinity and no rule allows it.
        NoChangeError: a term whose scale is not 0 changes nothing, or rounding lost every change.
        RestaError: reading or writing failed; the work done is kept for the next attempt.
    """
    plan = make_plan(_as_recipe(recipe))
    return carry_out(plan, Path(out), workers=workers, overwrite=overwrite, progress=progress, digests=digests)


def _as_recipe(recipe: Recipe | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return load_recipe(Path(recipe))
    raise TypeError(
        f"merge takes a Recipe or a recipe's path, found a {type(recipe).__name__}: an expression is saved by its own "
        ".save(out) and iterated over by its .tensors()"
    )


def carry_out(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    digests: bool = False,
) -> Result:
    """Write a plan's output; see `merge`."""
    out, digest = out.absolute(), plan.digest
    check_place(out, input_folders(plan))
    if recover(out, digest):
        return Result(out=out, plan=plan, tensors=read_facts(out))
    check_vacant(out, overwrite=overwrite)
    check_space(out, plan.bytes_written)
    workers = workers or default_workers()
    sizes = weight_bytes(plan)
    identities = {path: identity for weights in plan.weights.values() for path, identity in weights.files.items()}
    with (
        Reader(identities) as reader,
        Output(out, plan_digest=digest, headers=plan.headers, sizes=sizes, overwrite=overwrite) as output,
        Follower(_followed(plan, identities, sizes, reader, output)) if digests else nullcontext() as follower,
    ):
        try:
            records = _Run(settle(plan, reader, workers), reader, output, progress, follower).go(workers)
            reader.check_unchanged()
            _check_terms(plan, _nonzero_terms(plan, records))
            facts = {
                step.name: tensor_facts(step, [records[unit.key] for unit in units], measured=count_measured(step))
                for step, units in _by_step(plan)
            }
            _check_realised(plan, facts)
            taken = follower.finish() if follower else None
            reader.check_unchanged()
        except (NonFiniteError, NoChangeError, ChangedError):
            output.discard()  # the same inputs would fail again, and others need another plan: nothing to resume
            raise
        output.commit(small_files(with_digests(plan, taken) if taken else plan, facts, taken))
    return Result(out=out, plan=plan, tensors=facts, digests=taken)


def tensors(recipe: Recipe | str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Compute a merge tensor by tensor, in memory: the same bytes as `merge` writes, and no files.

    Yields:
        (name, tensor in the output dtype), in the order of the start's files.

    Raises:
        RequestError, NonFiniteError: as `merge` does.
        NoChangeError: after the last tensor, where a term whose scale is not 0 is zero in all of them.
    """
    for made in compute_tensors(make_plan(_as_recipe(recipe))):
        yield made.name, made.tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """One tensor of a merge, in memory.

    `intended` is the sum of squares of what its terms add to the first `merged_count` elements, before any rounding; 0
    where it was not measured. `double` says that the arithmetic was in float64.
    """

    name: str
    tensor: torch.Tensor
    merged_count: int
    double: bool
    intended: float


def compute_tensors(plan: Plan, *, measure: bool = False) -> Iterator[Made]:
    """Compute a plan's tensors in memory, in its order; see `tensors`. `measure` what its terms add to each."""
    for step, data, totals in _computed(plan, measure=measure):
        yield Made(
            name=step.name,
            tensor=_as_tensor(step, data),
            merged_count=step.merged_count,
            double=step.double,
            intended=totals.intended if step.terms else 0.0,
        )


def _as_tensor(step: Step, data: NDArray[np.uint8]) -> torch.Tensor:
    """Return a step's output bytes as the tensor that they are, without a copy."""
    import torch  # only scripts that want tensors pay for it

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    names |= {
        f"{sign}{bits}": f"{word}{bits}" for sign, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    }
    dtype = getattr(torch, names[step.slot.spec.dtype])
    flat = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
    return flat.reshape(step.slot.spec.shape)


def _computed(plan: Plan, *, measure: bool) -> Iterator[tuple[Step, NDArray[np.uint8], Totals]]:
    """Yield each step, its output bytes, freshly allocated, and if `measure` the sums over its changes.

    Raises NonFiniteError, NoChangeError: as `tensors` does.
    """
    nonzero: set[int] = set()
    identities = {path: identity for weights in plan.weights.values() for path, identity in weights.files.items()}
    with Reader(identities) as reader:
        workspace = Workspace(reader)
        for step in settle(plan, reader, 1).steps:
            data = np.empty(step.slot.spec.nbytes, np.uint8)
            width = DTYPE_BITS[step.slot.spec.dtype] // 8
            parts = []
            for first in range(0, step.slot.spec.count, CHUNK):
                count = min(CHUNK, step.slot.spec.count - first)
                out, totals = workspace.run(step, first, count, measure=measure)
                _check_finite(step, totals, reader)
                data[first * width : first * width + out.size] = out
                parts.append(totals)
            sums = add_totals(parts)
            nonzero |= {term.term for term, part in zip(step.terms, sums.terms, strict=False) if part.nonzero}
            yield step, data, sums
        reader.check_unchanged()
    _check_terms(plan, nonzero)


def settle(plan: Plan, reader: Reader, workers: int) -> Plan:
    """Return the plan with the factors that only a pass over a tensor can tell: those of the L1 rule."""

    def settled(step: Step) -> Step:
        if all(term.rescale != "l1_norm" or term.density == 1 for term in step.terms):
            return step
        workspace, terms = Workspace(reader), []
        for index, term in enumerate(step.terms):
            if term.rescale == "l1_norm" and term.density < 1:
                whole, kept = workspace.l1_norms(step, index)
                term = replace(term, factor=whole / kept if kept > 0 else 1.0)
            terms.append(term)
        return replace(step, terms=tuple(terms))

    with ThreadPoolExecutor(workers) as pool:
        return replace(plan, steps=tuple(pool.map(settled, plan.steps)))


def units_of(plan: Plan) -> Iterator[Unit]:
    """Cut every step into units, in the order in which their bytes lie on the disk."""
    for index, step in enumerate(plan.steps):
        for first in range(0, max(step.slot.spec.count, 1), UNIT):
            yield Unit(step=index, first=first, count=min(UNIT, step.slot.spec.count - first))


def default_workers() -> int:
    """Return how many threads a merge uses by itself: a disk is busy long before a large machine is."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def input_folders(plan: Plan) -> dict[Path, str]:
    """Return every directory that the merge reads from, and the model it is of."""
    return {path.parent.resolve(): name for path, name in plan.files.items()}


def read_facts(out: Path) -> dict[str, TensorFacts]:
    """Read the per-tensor facts of a finished merge from its manifest."""
    manifest = json.loads((out / "resta.json").read_bytes())
    return {name: from_json(facts) for name, facts in manifest["tensors"].items()}


def _stretches(step: Step, unit: Unit) -> Iterator[tuple[str | Path, int]]:
    """Yield the files that a unit reads and writes, and the offset at which it begins there."""
    spec = step.slot.spec
    yield step.slot.file, spec.start + unit.first * DTYPE_BITS[spec.dtype] // 8
    for stored in (operand.stored for operand in step.operands):
        if isinstance(stored, View):
            for piece in stored.between(unit.first, unit.first + unit.count):
                yield piece.stored.file, piece.stored.spec.start + piece.extent[0]
        else:
            first = 0 if stored.strides else unit.first  # what lies out of order is read from anywhere behind its start
            yield stored.file, stored.spec.start + first * DTYPE_BITS[stored.spec.dtype] // 8


def _followed(
    plan: Plan, inputs: Mapping[Path, FileIdentity], sizes: Mapping[str, int], reader: Reader, output: Output
) -> Iterator[Followed]:
    """Yield the files to be hashed beside a merge: what it writes, and the inputs whose digest is not known."""
    begins: dict[str | Path, list[int]] = {}
    for unit in units_of(plan):
        for name, begin in _stretches(plan.steps[unit.step], unit):
            begins.setdefault(name, []).append(begin)
    for name, size in sizes.items():
        yield Followed(name=name, size=size, read=partial(output.read, name), begins=begins.get(name, ()))
    for path, identity in inputs.items():
        if identity.sha256 is None:
            whole = Stored(file=path, spec=Spec(dtype="U8", shape=(identity.bytes,), start=0, nbytes=identity.bytes))
            yield Followed(
                name=path, size=identity.bytes, read=partial(reader.read, whole), begins=begins.get(path, ())
            )


class _Run:
    """One attempt: workers that take units until there are none, or until one of them fails."""

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        output: Output,
        progress: Progress | None,
        follower: Follower | None,
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._output = output
        self._progress = progress
        self._follower = follower
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._todo = units_of(plan)
        self._unflushed = 0
        self._flushes: list[Future[None]] = []
        self._records: dict[str, dict[str, Any]] = {}

    def go(self, workers: int) -> dict[str, dict[str, Any]]:
        """Return every unit's record by its key."""
        # One thread more, which waits for what is written to reach the disk while the others go on.
        with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as self._flusher:
            futures = [pool.submit(self._work) for _ in range(workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
            for future in (*futures, *self._flushes):  # an error of fsync is reported once, perhaps only here
                future.result()
        return self._records

    def _work(self) -> None:
        workspace = Workspace(self._reader)
        try:
            while not self._stop.is_set():
                with self._lock:
                    unit = next(self._todo, None)
                if unit is None:
                    return
                record = self._verified(unit) or self._compute(unit, workspace)
                if record is None:
                    return
                self._finish(unit, record)
        except BaseException:
            self._stop.set()
            raise

    def _finish(self, unit: Unit, record: dict[str, Any]) -> None:
        step = self._plan.steps[unit.step]
        if self._follower:
            self._follower.passed(_stretches(step, unit))
        with self._lock:
            self._records[unit.key] = record
            nbytes = unit.count * DTYPE_BITS[step.slot.spec.dtype] // 8
            self._unflushed += nbytes
            if self._unflushed >= FLUSH_BYTES:
                self._unflushed = 0
                self._flushes.append(self._flusher.submit(self._output.flush, step.slot.file))
            if self._progress:
                self._progress(step.name, nbytes)

    def _verified(self, unit: Unit) -> dict[str, Any] | None:
        """Return the record of an earlier attempt if the bytes that it speaks of are still there."""
        record = self._output.done.get(unit.key)
        if record is None:
            return None
        spec = self._plan.steps[unit.step].slot.spec
        width = DTYPE_BITS[spec.dtype] // 8
        checksum = Checksum()
        data = np.empty(CHUNK * width, np.uint8)
        for first in range(unit.first, unit.first + unit.count, CHUNK):
            part = data[: min(CHUNK, unit.first + unit.count - first) * width]
            self._output.read(self._plan.steps[unit.step].slot.file, spec.start + first * width, part.data)
            checksum.add(part)
        return record if checksum.digest() == record["checksum"] else None

    def _compute(self, unit: Unit, workspace: Workspace) -> dict[str, Any] | None:
        """Compute and write one unit; None if another worker failed meanwhile."""
        step = self._plan.steps[unit.step]
        spec = step.slot.spec
        width = DTYPE_BITS[spec.dtype] // 8
        checksum = Checksum()
        parts = []
        workspace.read_ahead(step, unit.first, unit.count)
        for first in range(unit.first, unit.first + unit.count, CHUNK):
            if self._stop.is_set():
                return None
            count = min(CHUNK, unit.first + unit.count - first)
            out, totals = workspace.run(step, first, count, measure=True)
            _check_finite(step, totals, self._reader)
            self._output.write(step.slot.file, spec.start + first * width, out.data)
            checksum.add(out)
            parts.append(totals)
        record = {"checksum": checksum.digest(), **asdict(add_totals(parts))}
        del record["non_finite"]
        self._output.record(unit.key, record)
        return record


class Checksum:
    """A running checksum of bytes, for finding torn and decayed data at memory speed; no defence against forgery."""

    def __init__(self) -> None:
        self._state = np.zeros(kernels.FOLD_LANES, np.uint64)
        self._length = 0

    def add(self, data: NDArray[np.uint8]) -> None:
        """Add bytes; every piece but the last must be a multiple of 128 bytes long."""
        whole = data.size - data.size % kernels.FOLD_BYTES
        kernels.fold(data[:whole], self._state)
        if whole < data.size:
            end = np.zeros(kernels.FOLD_BYTES, np.uint8)
            end[: data.size - whole] = data[whole:]
            kernels.fold(end, self._state)
        self._length += data.size

    def digest(self) -> str:
        """Return 32 hexadecimal digits."""
        text = self._state.astype("<u8").tobytes() + self._length.to_bytes(8, "little")
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def _check_finite(step: Step, totals: Totals, reader: Reader) -> None:
    """Raise if a stretch met NaN or infinity, naming the first model that has them and counting over its tensor."""
    if not totals.non_finite or step.allow_nonfinite:
        return
    workspace = Workspace(reader)
    for row, (operand, owner) in enumerate(zip(step.operands, step.owners, strict=True)):
        size = operand.stored.spec.count
        counts = {
            first: workspace.count_non_finite(step, row, first, min(CHUNK, size - first))
            for first in range(0, size, CHUNK)
        }
        if count := sum(counts.values()):
            raise NonFiniteError(
                f"{_where(operand.stored, counts)}: tensor {step.name!r} of {owner} holds {count} NaN or infinite "
                "values; the model is damaged, or allow them with a rule: nonfinite: allow"
            )
    raise NonFiniteError(
        f"tensor {step.name!r}: the inputs are finite but the result overflows {step.slot.spec.dtype}; "
        "choose a wider output dtype or a smaller scale"
    )


def _where(stored: Stored | View, counts: Mapping[int, int]) -> str:
    """Return the file that a tensor is in; of a view those that its damaged chunks are in."""
    if isinstance(stored, Stored):
        return str(stored.file)
    files = [file for first, count in counts.items() if count for file in stored.files(first, first + CHUNK)]
    return ", ".join(map(str, dict.fromkeys(files)))


def _nonzero_terms(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> set[int]:
    """Return which terms of the recipe have an entry that is not zero, by the records of all units."""
    return {
        term.term
        for unit in units_of(plan)
        for term, part in zip(plan.steps[unit.step].terms, records[unit.key]["terms"], strict=False)
        if part["nonzero"]
    }


def _check_terms(plan: Plan, nonzero: set[int]) -> None:
    """Raise unless every term whose scale is not 0 is among those of which some entry is not zero."""
    for index, term in enumerate(plan.recipe.terms):
        if term.scale != 0 and index not in nonzero:
            to, from_ = term.ends
            thinned = ", or DARE dropped each entry that differs" if term.sparsify else ""
            raise NoChangeError(
                f"{term.label}: {term.scale:g} * ({term.delta}) is zero in every entry, so that it would change "
                f"nothing: {to} and {from_} hold the same values wherever the term acts (or differ by so little that "
                f"the product with the scale vanishes{thinned}). Name two models that differ"
            )


def _check_realised(plan: Plan, facts: Mapping[str, TensorFacts]) -> None:
    """Raise if terms were added and the result is nevertheless the start in every entry."""
    merged = [fact for fact in facts.values() if fact.action == "merged"]
    if merged and not any(fact.changed for fact in merged):
        if not any(fact.intended_norm for fact in merged):
            raise NoChangeError(f"{plan.recipe.equation}: the terms cancel each other out; nothing would change")
        raise NoChangeError(
            f"{plan.recipe.equation}: rounding to {', '.join(sorted({fact.dtype for fact in merged}))} lost every "
            f"change, so that the result would be {plan.recipe.start} unchanged. Keep the change with output dtype "
            "float32, or on average with rounding stochastic; or choose a larger scale"
        )


def _by_step(plan: Plan) -> Iterator[tuple[Step, list[Unit]]]:
    units: list[list[Unit]] = [[] for _ in plan.steps]
    for unit in units_of(plan):
        units[unit.step].append(unit)
    yield from zip(plan.steps, units, strict=True)
