"""The weights of a file of torch.save (`pytorch_model.bin`): {tensor name: where its bytes are}, nothing in it run.

What its pickle describes is held against the records that the archive has. This module reads no tensor.
"""

from __future__ import annotations

import math
from pathlib import Path

from resta.archive import Archive, Record, read_archive, read_record
from resta.checkpoint import FileFormat
from resta.errors import RequestError
from resta.header import DTYPE_BITS, MAX_ELEMENTS, Spec
from resta.pickled import MOST_BYTES, Described, read_views
from resta.stored import Stored

PICKLE, ORDER = "data.pkl", "byteorder"


def read_stored(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file by name, in the order of its pickle.

    Raises RequestError: it is no archive of torch.save, holds more than a state dict of plain tensors, or a tensor
    reaches beyond the record that holds it.
    """
    archive = read_archive(path)
    try:
        views = read_views(_small(path, archive, PICKLE, MOST_BYTES))
        if ORDER in archive.records and _small(path, archive, ORDER, 16) != b"little":
            raise RequestError("was written on a machine with another byte order; save it again on this one")
        return {name: _place(path, name, view, archive) for name, view in views.items()}
    except RequestError as error:
        raise RequestError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


PYTORCH = FileFormat(single="pytorch_model.bin", index="pytorch_model.bin.index.json", suffix=".bin", read=read_stored)


def _small(path: Path, archive: Archive, name: str, most: int) -> bytes:
    record = archive.records.get(name)
    if record is None:
        raise RequestError(f"is an archive without {name}, and so none of torch.save; download it again")
    if record.nbytes > most:
        raise RequestError(f"its record {name} has {record.nbytes:,} bytes; at most {most:,} are read")
    return read_record(path, record)


def _place(path: Path, name: str, view: Described, archive: Archive) -> Stored:
    """Return where a tensor's bytes lie in the file."""
    storage, width = view.storage, DTYPE_BITS[view.dtype] // 8
    record = archive.records.get(f"data/{storage.key}")
    if record is None:
        raise RequestError(
            f"tensor {name!r} is in the storage {storage.key}, and there is no record data/{storage.key}"
        )
    said = storage.count * (DTYPE_BITS[storage.dtype] // 8 if storage.dtype else 1)
    if said != record.nbytes:
        raise RequestError(
            f"tensor {name!r} is in the storage {storage.key} of {said} bytes, but its record has {record.nbytes}"
        )
    count = math.prod(view.shape)
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if count > MAX_ELEMENTS or (count and (last + 1) * width > record.nbytes) or view.offset * width > record.nbytes:
        raise RequestError(
            f"tensor {name!r}: {view.dtype} of shape {list(view.shape)} at element {view.offset}, strides "
            f"{list(view.strides)}, reaches beyond its storage of {record.nbytes} bytes"
        )
    if count * width > record.nbytes:
        raise RequestError(
            f"tensor {name!r}: shape {list(view.shape)} repeats the {record.nbytes} bytes of its storage; save what it "
            "stands for: tensor.contiguous()"
        )
    return _stored(path, view, record, count * width)


def _stored(path: Path, view: Described, record: Record, nbytes: int) -> Stored:
    start = record.start + view.offset * DTYPE_BITS[view.dtype] // 8
    strides = None if _is_contiguous(view) else view.strides
    return Stored(file=path, spec=Spec(dtype=view.dtype, shape=view.shape, start=start, nbytes=nbytes), strides=strides)


def _is_contiguous(view: Described) -> bool:
    """Whether a tensor's elements follow each other in the order of its indices, the last the fastest."""
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and stride != step:
            return 0 in view.shape
        step *= size
    return True
