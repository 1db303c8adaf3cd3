"""One chunk of one output tensor: operand bytes in, output bytes and what was measured out.

The only place where files meet kernels. A chunk is a run of elements that fits the second-level cache; its result does
not depend on where it begins or ends, nor on who computes it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resta import kernels
from resta.checkpoint import LowRank, Operand, Reader
from resta.header import DTYPE_BITS, FLOAT_DTYPES
from resta.plan import Step
from resta.stored import Stored, View

CHUNK = 1 << 18  # elements: half a megabyte of bfloat16 per model

Bytes = NDArray[np.uint8]
Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TermTotals:
    """Sums over a stretch of one tensor for one term, D = scale * mask * (to - from).

    With e, what rounding did to the sum of all terms: D^2, D e, (D + e)^2 - D^2, the entries that the mask
    keeps, and whether any entry of D is not zero. Of several terms, the second and third are sums over the
    entries that `count_measured` counts.
    """

    intended: float = 0.0
    loss: float = 0.0
    growth: float = 0.0
    selected: int = 0
    nonzero: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over a stretch of one tensor, and those of each of its terms.

    `non_finite` is above 0 if NaN or infinity was met anywhere.
    """

    start: float = 0.0
    intended: float = 0.0
    realised: float = 0.0
    product: float = 0.0
    changed: int = 0
    non_finite: int = 0
    terms: tuple[TermTotals, ...] = ()


def add_totals(parts: Sequence[Totals]) -> Totals:
    """Sum up the stretches of one tensor, in order."""
    return Totals(
        start=sum(part.start for part in parts),
        intended=sum(part.intended for part in parts),
        realised=sum(part.realised for part in parts),
        product=sum(part.product for part in parts),
        changed=sum(part.changed for part in parts),
        terms=tuple(
            TermTotals(
                intended=sum(term.intended for term in terms),
                loss=sum(term.loss for term in terms),
                growth=sum(term.growth for term in terms),
                selected=sum(term.selected for term in terms),
                nonzero=any(term.nonzero for term in terms),
            )
            for terms in zip(*(part.terms for part in parts), strict=True)
        ),
    )


@dataclass
class Workspace:
    """One worker's reused buffers, and the low-rank factors of the tensor that it is at."""

    reader: Reader
    _buffers: dict[tuple[str, str], Array] = field(default_factory=dict)
    _factors: dict[tuple[int, int], tuple[Array, Array]] = field(default_factory=dict)
    _step: Step | None = None
    _terms: tuple[Array, ...] = ()

    def run(self, step: Step, first: int, count: int, *, measure: bool) -> tuple[Bytes, Totals]:
        """Compute elements first..first+count of a step; `first` is a multiple of the kernels' tile.

        Args:
            step: what to compute.
            first: flat index of the first element.
            count: number of elements, at most CHUNK.
            measure: whether to sum up the intended and the realised change; whether a term is zero is always noted.

        Returns:
            The output bytes, in a buffer that the next call reuses, and the sums.
        """
        if self._step is not step:
            self._step, self._terms = step, _terms_of(step)
            self._factors.clear()
        out = self._bytes("out", count * DTYPE_BITS[step.slot.spec.dtype] // 8)
        if step.copies:
            return out, self._copy(step, first, count, out)
        work_type = np.float64 if step.double else np.float32
        raw, codes = self._load(step, first, count, work_type)
        sums = np.zeros(kernels.SUMS, np.float64)
        term_sums = np.zeros((len(step.terms), kernels.TERM_SUMS), np.float64)
        non_finite = kernels.combine(
            raw,
            codes,
            *self._terms,
            (first, count, max(0, min(count, step.merged_count - first)), _measuring(step) if measure else 0),
            out,
            kernels.CODES[step.slot.spec.dtype],
            step.rounding_key is not None,
            self._array("work", (len(step.operands) + 4, kernels.TILE), work_type),
            sums,
            term_sums,
        )
        return out, _totals(sums, term_sums, int(non_finite))

    def read_ahead(self, step: Step, first: int, count: int) -> None:
        """Ask the kernel to fetch what elements first..first+count will need."""
        for operand in step.operands:
            itemsize = DTYPE_BITS[operand.dtype] // 8
            self.reader.read_ahead(operand.stored, first * itemsize, count * itemsize)

    def l1_norms(self, step: Step, term: int) -> tuple[float, float]:
        """Return the L1 norms of a term's difference over the tensor, whole and masked."""
        planned = step.terms[term]
        pair = tuple(step.operands[row] for row in (planned.to, planned.from_))
        work_type = np.float64 if step.double else np.float32
        sums = np.zeros(2, np.float64)
        self._factors.clear()
        for first in range(0, step.merged_count, CHUNK):
            count = min(CHUNK, step.merged_count - first)
            raw, codes = self._load_operands(pair, first, [count, count], work_type)
            work = self._array("work", (2, kernels.TILE), work_type)
            key = np.array(split_key(planned.key), np.uint32)
            kernels.absolute_sums(raw, codes, np.uint64(planned.keep), key, first, count, work, sums)
        self._factors.clear()
        return float(sums[0]), float(sums[1])

    def count_non_finite(self, step: Step, row: int, first: int, count: int) -> int:
        """Return how many elements first..first+count, at most CHUNK, of one operand of a step are NaN or infinite."""
        self._factors.clear()
        work_type = np.float64 if step.double else np.float32  # as the step itself loads it
        raw, codes = self._load_operands((step.operands[row],), first, [count], work_type)
        self._factors.clear()
        return self._count(raw[0], int(codes[0]), count)

    def _copy(self, step: Step, first: int, count: int, out: Bytes) -> Totals:
        start, bits = step.operands[0], DTYPE_BITS[step.operands[0].dtype]
        self.reader.read(start.stored, first * bits // 8, out.data)
        if start.dtype not in FLOAT_DTYPES:
            return Totals()
        return Totals(non_finite=self._count(out, kernels.CODES[start.dtype], count))

    def _count(self, raw: Bytes, code: int, count: int) -> int:
        row = self._array("work", (1, kernels.TILE), np.float64)[0]
        return int(kernels.count_non_finite(raw, code, count, row))

    def _load(self, step: Step, first: int, count: int, work_type: type) -> tuple[Bytes, NDArray[np.int64]]:
        merged_count = max(0, min(count, step.merged_count - first))
        counts = [count] + [merged_count] * (len(step.operands) - 1)
        return self._load_operands(step.operands, first, counts, work_type)

    def _load_operands(
        self, operands: tuple[Operand, ...], first: int, counts: list[int], work_type: type
    ) -> tuple[Bytes, NDArray[np.int64]]:
        width = max(np.dtype(work_type).itemsize, 4)
        raw = self._array("raw", (len(operands), CHUNK * width), np.uint8)
        codes = np.empty(len(operands), np.int64)
        for row, (operand, count) in enumerate(zip(operands, counts, strict=True)):
            code, itemsize = kernels.CODES[operand.dtype], DTYPE_BITS[operand.dtype] // 8
            target = self._bytes("narrow", CHUNK * width) if operand.low_ranks else raw[row]
            assert count <= CHUNK  # the kernels trust that the buffers hold what they are told
            assert itemsize <= width, f"{operand.dtype} in buffers for {np.dtype(work_type).name}"
            self.reader.read(operand.stored, first * itemsize, target[: count * itemsize].data)
            if operand.low_ranks:
                values = raw[row].view(work_type)[:count]
                kernels.widen(target, code, count, values)
                self._add_low_ranks(row, operand.low_ranks, first, values)
                code = kernels.F64 if values.dtype == np.float64 else kernels.F32
            codes[row] = code
        return raw, codes

    def _add_low_ranks(self, row: int, low_ranks: tuple[LowRank, ...], first: int, values: Array) -> None:
        begin = bisect_right(low_ranks, first, key=lambda part: part.end)
        end = bisect_left(low_ranks, first + values.size, key=lambda part: part.first)
        for key in [key for key in self._factors if key[0] == row and not begin <= key[1] < end]:
            del self._factors[key]  # of hundreds of experts only those that are near
        for place in range(begin, end):
            part = low_ranks[place]
            if (row, place) not in self._factors:
                self._factors[row, place] = self._read_factors(part, values.dtype.type)
            left, right = self._factors[row, place]
            at = max(first, part.first)
            into = values[at - first : part.end - first]
            kernels.add_low_rank(into, left, right, values.dtype.type(part.scaling), at - part.first)

    def _read_factors(self, low_rank: LowRank, work_type: type) -> tuple[Array, Array]:
        left = self._read_factor(low_rank.left, low_rank.transposed, work_type)
        if low_rank.right is None:
            return left, np.ones((1, 1), work_type)
        return left, self._read_factor(low_rank.right, low_rank.transposed, work_type)

    def _read_factor(self, stored: Stored | View, transposed: bool, work_type: type) -> Array:
        raw = np.empty(stored.spec.nbytes, np.uint8)
        self.reader.read(stored, 0, raw.data)
        values: Array = np.empty(stored.spec.count, work_type)
        kernels.widen(raw, kernels.CODES[stored.spec.dtype], values.size, values)
        matrix = values.reshape(stored.spec.shape if len(stored.spec.shape) == 2 else (-1, 1))
        return np.ascontiguousarray(matrix.T) if transposed else matrix

    def _bytes(self, name: str, nbytes: int) -> Bytes:
        assert nbytes <= CHUNK * 8
        return self._array(name, (CHUNK * 8,), np.uint8)[:nbytes]

    def _array(self, name: str, shape: tuple[int, ...], dtype: type) -> Array:
        """Return a named buffer of at least this shape; the same memory serves every chunk."""
        key = (name, np.dtype(dtype).name)
        held = self._buffers.get(key)
        if held is None or held.shape[0] < shape[0] or held.shape[1:] != shape[1:]:
            held = self._buffers[key] = np.zeros(shape, dtype)
        return held[: shape[0]]


def _terms_of(step: Step) -> tuple[Array, Array, Array, Array]:
    """Return a step's terms as the kernel takes them: rows, scales, thresholds, and keys with the rounding's last."""
    keys = [term.key for term in step.terms] + [step.rounding_key or 0]
    return (
        np.array([(term.to, term.from_) for term in step.terms], np.int64).reshape(-1, 2),
        np.array([term.scale * term.factor for term in step.terms], np.float64 if step.double else np.float32),
        np.array([term.keep for term in step.terms], np.uint64),
        np.array([split_key(key) for key in keys], np.uint32),
    )


def _totals(sums: Array, term_sums: Array, non_finite: int) -> Totals:
    start, intended, realised, product, changed = sums.tolist()
    terms = term_sums.tolist()
    if len(terms) == 1:  # then the sum of all terms is the term
        terms[0][: kernels.TERM_SELECTED] = intended, product - intended, realised - intended
    return Totals(
        start=start,
        intended=intended,
        realised=realised,
        product=product,
        changed=int(changed),
        non_finite=non_finite,
        terms=tuple(
            TermTotals(intended=square, loss=loss, growth=growth, selected=int(selected), nonzero=bool(nonzero))
            for square, loss, growth, selected, nonzero in terms
        ),
    )


def count_measured(step: Step) -> int:
    """Return over how many of a step's elements the kernel measures what rounding did to each of its terms."""
    if len(step.terms) < 2:
        return step.merged_count
    tiles, rest = divmod(step.merged_count, kernels.TILE)
    whole = -(-tiles // kernels.LOSS_EVERY) * kernels.TILE
    return whole + (rest if tiles % kernels.LOSS_EVERY == 0 else 0)


def _measuring(step: Step) -> int:
    start = step.operands[0]
    exact = not start.low_ranks and start.dtype == step.slot.spec.dtype
    return 1 if exact else 2


def split_key(key: int) -> tuple[int, int]:
    """Split a 64-bit key into Philox's two words."""
    return key & 0xFFFFFFFF, key >> 32
