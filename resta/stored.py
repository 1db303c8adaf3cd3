"""Where the elements of a tensor are stored: in one run of a file, or as pieces of several tensors, with strides.

A view is a tensor that no file holds as such, an expert out of a fused tensor or the fused tensor of single experts. It
costs nothing until it is read, and then only what is asked for. This module knows nothing of names and of numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resta.header import DTYPE_BITS, Spec

SLAB = 1 << 18  # elements that one read of lines close together takes at most, where a single line is no longer

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The bytes of one tensor in one file.

    `strides` says how far apart neighbours are, in elements, where they do not follow each other in the order of the
    tensor's indices, as in files of PyTorch; `spec.start` is then where its first element lies.
    """

    file: Path
    spec: Spec
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Strides:
    """Element (row, column) of a matrix is element `first + row * down + column * across` of a tensor, flattened."""

    first: int
    down: int
    across: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A matrix (rows, columns) of a view: where it is stored, and where it lies in the view, there row by row."""

    stored: Stored
    rows: int
    columns: int
    source: Strides
    target: Strides

    @property
    def is_run(self) -> bool:
        """Whether its elements follow one another, in the same order, in the file and in the view."""
        rows = (self.source.down, self.target.down)
        return (self.columns == 1 or self.source.across == self.target.across == 1) and (
            self.rows == 1 or rows == (self.columns, self.columns)
        )

    @property
    def begin(self) -> int:
        """The first element of the view that it holds."""
        return self.target.first

    @property
    def end(self) -> int:
        """One past the last element of the view that it holds."""
        return self.target.first + (self.rows - 1) * self.target.down + (self.columns - 1) * self.target.across + 1

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte of the stored tensor that it takes, and how many there are to the last."""
        last = (self.rows - 1) * self.source.down + (self.columns - 1) * self.source.across
        width = DTYPE_BITS[self.stored.spec.dtype] // 8
        return self.source.first * width, (last + 1) * width


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A tensor whose elements are stored elsewhere: its dtype and shape, and pieces, by beginning, that make all of it.

    The `start` of its spec means nothing.
    """

    spec: Spec
    pieces: tuple[Piece, ...]

    def between(self, first: int, last: int) -> tuple[Piece, ...]:
        """Return the pieces that may hold elements first..last."""
        begin = bisect_right(self.pieces, first, key=lambda piece: piece.end)
        return self.pieces[begin : bisect_left(self.pieces, last, key=lambda piece: piece.begin)]

    def files(self, first: int, last: int) -> tuple[Path, ...]:
        """Return the files that elements first..last lie in."""
        return tuple(dict.fromkeys(piece.stored.file for piece in self.between(first, last)))


# Fill lines (n, length) of elements from a stored tensor: line i from its element first + i * step on.
ReadLines = Callable[[Stored, int, int, Array], None]


def make_view(dtype: str, shape: tuple[int, ...], pieces: list[Piece]) -> Stored | View:
    """Return the tensor that pieces make: as if it were stored, where one run of a file holds all of it."""
    spec = Spec(dtype=dtype, shape=shape, start=0, nbytes=0)
    width = DTYPE_BITS[dtype] // 8
    spec = Spec(dtype=dtype, shape=shape, start=0, nbytes=spec.count * width)
    if len(pieces) == 1 and pieces[0].is_run:
        (piece,) = pieces
        start = piece.stored.spec.start + piece.source.first * width
        return Stored(file=piece.stored.file, spec=Spec(dtype=dtype, shape=shape, start=start, nbytes=spec.nbytes))
    return View(spec=spec, pieces=tuple(sorted(pieces, key=lambda piece: piece.begin)))


def gather(view: View, first: int, into: Array, read: ReadLines) -> None:
    """Fill `into` with a view's elements from `first` on; memory beside it is at most about as large.

    Args:
        view: what is read.
        first: flat index of the first element.
        into: (n,), unsigned integers as wide as the view's elements.
        read: how elements of a stored tensor are read.
    """
    last = first + into.size
    for piece in view.between(first, last):
        if piece.is_run:
            begin, end = max(first, piece.begin), min(last, piece.end)
            read(piece.stored, piece.source.first + begin - piece.begin, 0, into[None, begin - first : end - first])
            continue
        for rows, columns in _rectangles(piece, first, last):
            _spread(piece, rows, columns, _strided(into, piece.target, rows, columns, first), read)


def _rectangles(piece: Piece, first: int, last: int) -> Iterator[tuple[range, range]]:
    """Yield the rows and columns of a piece that lie in first..last of the view: rows at either end may be cut."""
    low, high = first - piece.begin, last - piece.begin
    down, across = piece.target.down, piece.target.across
    begin, end = max(0, low // down), min(piece.rows, -(-high // down))
    if begin >= end:
        return
    for row, stop in pairwise(sorted({begin, min(begin + 1, end), max(end - 1, begin), end})):
        columns = range(max(0, -(-(low - row * down) // across)), min(piece.columns, -(-(high - row * down) // across)))
        if columns:
            yield range(row, stop), columns


def _strided(flat: Array, strides: Strides, rows: range, columns: range, first: int) -> Array:
    """Return a rectangle of a matrix in a flat array that begins at element `first`; numpy checks its bounds."""
    begin = strides.first + rows.start * strides.down + columns.start * strides.across - first
    shape, steps = (len(rows), len(columns)), (strides.down * flat.itemsize, strides.across * flat.itemsize)
    return np.ndarray(shape, flat.dtype, flat.data, begin * flat.itemsize, steps)


def _spread(piece: Piece, rows: range, columns: range, target: Array, read: ReadLines) -> None:
    """Read a rectangle in lines, along which stored elements are closest, and lay them into the view's."""
    step, across = piece.source.down, piece.source.across
    at = piece.source.first + rows.start * step + columns.start * across
    if step < across:
        target, step, across = target.T, across, step
    lines, length = target.shape
    span = (length - 1) * across + 1
    close = 2 * span > step  # one read of several lines then takes little that is not wanted
    together = max(1, SLAB // (step if close else span))
    for begin in range(0, lines, together):
        part = target[begin : begin + together]
        if close:
            block = np.empty((1, (len(part) - 1) * step + span), target.dtype)
            read(piece.stored, at + begin * step, 0, block)
            part[...] = _strided(block[0], Strides(0, step, across), range(len(part)), range(length), 0)
        else:
            block = np.empty((len(part), span), target.dtype)
            read(piece.stored, at + begin * step, step, block)
            part[...] = block[:, ::across]
