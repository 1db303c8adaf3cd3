from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resta import stored
from resta.checkpoint import FileIdentity, Reader
from resta.header import Spec
from resta.stored import Array, Piece, Stored, Strides, View, gather, make_view


def stored_at(path: Path, values: Array, dtype: str = "I16") -> Stored:
    """A file with some bytes in front, as after a header, and one tensor."""
    path.write_bytes(bytes(24) + values.tobytes())
    return Stored(file=path, spec=Spec(dtype=dtype, shape=values.shape, start=24, nbytes=values.nbytes))


def reader_of(*tensors: Stored) -> Reader:
    identity = FileIdentity(bytes=0, mtime_ns=0, header_sha256=None, sha256=None)
    return Reader({tensor.file: identity for tensor in tensors})


LAYOUTS = ("rows", "alternating rows", "columns", "alternating columns")


def places(layout: str, rows: int, columns: int, which: int) -> Strides:
    """Where the first or the second of two matrices (rows, columns) lies in a tensor that holds both."""
    return {
        "rows": Strides(which * rows * columns, columns, 1),
        "alternating rows": Strides(which * columns, 2 * columns, 1),
        "columns": Strides(which * rows, 1, 2 * rows),
        "alternating columns": Strides(which, 2, 2 * rows),
    }[layout]


def laid_out(layout: str, pair: list[Array]) -> Array:
    """The same by numpy's own means."""
    if layout == "rows":
        return np.concatenate(pair)
    if layout == "alternating rows":
        return np.stack(pair, axis=1).reshape(-1, pair[0].shape[1])
    if layout == "columns":
        return np.concatenate(pair).T
    return np.stack(pair, axis=1).reshape(-1, pair[0].shape[1]).T


def by_rows(strides: Strides, rows: int, columns: int) -> bool:
    return strides.down > strides.across or columns == 1


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    experts=st.integers(1, 3),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    slab=st.sampled_from([1, 7, 1 << 18]),
    data=st.data(),
)
def test_any_stretch_of_a_view_is_what_numpy_lays_out(
    rows: int, columns: int, experts: int, layouts: tuple[str, str], slab: int, data: st.DataObject
) -> None:
    matrices = np.arange(experts * 2 * rows * columns, dtype=np.int16).reshape(experts, 2, rows, columns)
    source, want = (np.stack([laid_out(layout, list(pair)) for pair in matrices]) for layout in layouts)
    size = 2 * rows * columns
    pieces = []
    file = Path("/nowhere")
    spec = Spec(dtype="I16", shape=source.shape, start=0, nbytes=source.nbytes)
    for expert in range(experts):
        for which in range(2):
            sides = [places(layout, rows, columns, which) for layout in layouts]
            at = [Strides(side.first + expert * size, side.down, side.across) for side in sides]
            shape = (rows, columns)
            if not by_rows(at[1], rows, columns):
                at, shape = [Strides(side.first, side.across, side.down) for side in at], shape[::-1]
            pieces.append(
                Piece(stored=Stored(file=file, spec=spec), rows=shape[0], columns=shape[1], source=at[0], target=at[1])
            )
    view = View(spec=spec, pieces=tuple(sorted(pieces, key=lambda piece: piece.begin)))
    flat = source.ravel()
    largest = 0

    def read(_: Stored, first: int, step: int, lines: Array) -> None:
        nonlocal largest
        largest = max(largest, lines.size)
        for line in range(len(lines)):
            begin = first + line * step
            assert 0 <= begin <= begin + lines.shape[1] <= flat.size, "nothing outside of the tensor is read"
            lines[line] = flat[begin : begin + lines.shape[1]]

    first = data.draw(st.integers(0, want.size - 1))
    count = data.draw(st.integers(1, want.size - first))
    into = np.full(count, -1, np.int16)
    before, stored.SLAB = stored.SLAB, slab
    try:
        gather(view, first, into, read)
    finally:
        stored.SLAB = before
    assert into.tolist() == want.ravel()[first : first + count].tolist()
    assert largest <= max(slab, 2 * max(rows, columns) * 2, count)


def test_a_view_that_is_one_run_of_a_file_is_that_run(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 4, 3)
    tensor = stored_at(tmp_path / "a", values)
    piece = Piece(stored=tensor, rows=2, columns=3, source=Strides(12, 3, 1), target=Strides(0, 3, 1))
    made = make_view("I16", (2, 3), [piece])
    assert isinstance(made, Stored)
    into = bytearray(12)
    with reader_of(tensor) as reader:
        reader.read(made, 0, memoryview(into))
    assert into == values[1, :2].tobytes()


def test_a_reader_fills_any_stretch_of_a_view_of_several_files(tmp_path: Path) -> None:
    values = [np.arange(6, dtype=np.int16).reshape(2, 3) + 10 * number for number in range(3)]
    tensors = [stored_at(tmp_path / str(number), each) for number, each in enumerate(values)]
    view = make_view(
        "I16",
        (3, 3, 2),
        [
            Piece(stored=each, rows=3, columns=2, source=Strides(0, 1, 3), target=Strides(6 * number, 2, 1))
            for number, each in enumerate(tensors)
        ],
    )
    assert isinstance(view, View)
    assert view.files(5, 7) == (tmp_path / "0", tmp_path / "1")
    want = np.stack([each.T for each in values]).ravel()
    with reader_of(*tensors) as reader:
        for first in range(18):
            for count in range(18 - first + 1):
                into = bytearray(2 * count)
                reader.read(view, 2 * first, memoryview(into))
                assert into == want[first : first + count].tobytes()
        reader.read_ahead(view, 0, 36)
