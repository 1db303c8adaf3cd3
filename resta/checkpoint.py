"""Read a checkpoint: one file of weights, or shards and their index, as {tensor name: where its bytes are}.

A directory is taken as hostile until its files agree with each other. This module reads headers and byte ranges; it
knows nothing of recipes, and of arithmetic only that a tensor may have a low-rank term on top.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from resta.archive import read_archive
from resta.errors import ChangedError, RequestError, RestaError
from resta.files import OpenFiles, open_regular, read_regular
from resta.header import DTYPE_BITS, MOST_MEMORY, load_strict_json, read_header
from resta.hub import INDEX, Located, convert_advice
from resta.stored import Stored, View, gather

SINGLE = "model.safetensors"
MAX_JSON_BYTES = 100_000_000
MAX_NAME_BYTES = 255  # of a file name, on every file system that models lie on
PROBE_BYTES = 1 << 12  # of each tensor, before two models are read whole to see whether they are one
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

LINK_ADVICE = (
    "copy the file in, or say --follow-links (merge, convert, diff, audit) if you trust the links of your models"
)

_LINKS_TRUSTED: ContextVar[bool] = ContextVar("links_trusted", default=False)
_SHA256 = re.compile(r"[0-9a-f]{64}")  # how the Hub's cache calls the files that the Hub keeps in LFS


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A term `scaling * left @ right` on top of a stored tensor, as LoRA keeps it (arXiv 2106.09685, eq. 3).

    `left` (rows, rank) and `right` (rank, columns) are stored as such or transposed; a vector (rows,) has `right` None,
    which stands for one column of ones. The product lies in the tensor from its element `first` on: an adapter of
    fused experts has one for each of them.
    """

    left: Stored | View
    right: Stored | View | None
    transposed: bool
    scaling: float
    first: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of left @ right."""
        if self.right is None:
            return self.left.spec.shape
        left, right = self.left.spec.shape, self.right.spec.shape
        return (left[1], right[0]) if self.transposed else (left[0], right[1])

    @property
    def end(self) -> int:
        """One past the last element of the tensor that the product reaches."""
        return self.first + math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """One tensor of one model: stored bytes, and what an adapter adds to them, in the order in which it lies there."""

    stored: Stored | View
    low_ranks: tuple[LowRank, ...] = ()

    @property
    def dtype(self) -> str:
        """The dtype of the stored bytes, which is the tensor's own."""
        return self.stored.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.stored.spec.shape


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIdentity:
    """What tells one version of an input file from another.

    `sha256` is of the whole file and None where it is not known; `sha256_from` says who says so: "hub", the name that
    the file has in the Hub's cache, without reading it, or "content", which was read.
    """

    bytes: int
    mtime_ns: int
    header_sha256: str | None
    sha256: str | None
    sha256_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint's tensors in file order, its config, and the identity of every file they come from.

    `is_untied` says that the output layer was given a matrix of its own, which the config's file does not know.
    """

    located: Located
    tensors: Mapping[str, Operand]
    files: Mapping[Path, FileIdentity]
    config: Mapping[str, Any]
    config_folder: Path
    tokenizer_folders: tuple[Path, ...]
    is_adapter: bool = False
    is_untied: bool = False

    @cached_property
    def expert_layout(self) -> Literal["one by one", "fused"] | None:
        """How the experts of its layers are stored; None without any."""
        names = (name for name in self.tensors if ".experts." in name)
        return next(("one by one" if ONE_EXPERT.search(name) else "fused" for name in names), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFormat:
    """A format of weight files: what one alone and the index of several are called, and how one is read."""

    single: str
    index: str
    suffix: str
    read: Callable[[Path], Mapping[str, Stored]]


def _read_safetensors(file: Path) -> dict[str, Stored]:
    return {name: Stored(file=file, spec=spec) for name, spec in read_header(file).items()}


SAFETENSORS = FileFormat(single=SINGLE, index=INDEX, suffix=".safetensors", read=_read_safetensors)


def read_weights(located: Located, *, strip_prefix: str | None = None, format: FileFormat = SAFETENSORS) -> Weights:
    """Read the headers of a full checkpoint.

    Args:
        located: the directory.
        strip_prefix: removed from the names that begin with it (`module.`, `_orig_mod.`, ...).
        format: of its weight files.

    Raises RequestError: no complete, unambiguous checkpoint of that format is there, or one of its files is malformed.
    """
    folder = located.folder
    files = _weight_files(located, format)
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in format.read(file).items():
            if name in found:
                other = found[name].file.name
                raise RequestError(f"{file}: tensor {name!r} is also in {other}; remove the stale file")
            found[name] = stored
    _check_index(folder / format.index, found)
    tensors = {name: Operand(stored=stored) for name, stored in found.items()}
    return Weights(
        located=located,
        tensors=_strip(tensors, strip_prefix, folder) if strip_prefix else tensors,
        files={file: identify(file, located) for file in files},
        config=read_json(folder / "config.json") if (folder / "config.json").is_file() else {},
        config_folder=folder,
        tokenizer_folders=(folder,),
    )


def read_json(path: Path, *, most_memory: int = MOST_MEMORY) -> dict[str, Any]:
    """Read one JSON object strictly.

    Raises RequestError: too large, a link out of its directory, or not an object that every reader would read alike.
    """
    try:
        if not inside(path, path.parent):
            raise RequestError(f"{path}: is a link out of its directory, to {path.resolve()}; {LINK_ADVICE}")
        text = read_regular(path, MAX_JSON_BYTES)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return load_strict_json(text, most_memory=most_memory)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def identify(file: Path, located: Located) -> FileIdentity:
    """Return the identity of an input file.

    The digest of the whole file is known where the Hub's cache names it, and taken of a config, which is small. What
    counts as the header of an archive of PyTorch is its directory, which has a checksum of every record.
    """
    with os.fdopen(open_regular(file), "rb") as handle:
        status = os.fstat(handle.fileno())
        header, content = None, None
        if file.suffix == ".safetensors":
            length = int.from_bytes(handle.read(8), "little")
            header = hashlib.sha256(handle.read(length)).hexdigest()
        elif file.suffix == ".bin":
            header = read_archive(file).directory_sha256
        else:
            content = hashlib.sha256(handle.read(MAX_JSON_BYTES)).hexdigest()
    blob = file.resolve().name if located.commit else ""
    known = _SHA256.fullmatch(blob) is not None
    return FileIdentity(
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        header_sha256=header,
        sha256=blob if known else content,
        sha256_from="hub" if known else "content" if content else None,
    )


@contextmanager
def following_links(*, trusted: bool) -> Iterator[None]:
    """While it lasts, take links out of a model's directory for files in it, if the user says that they are trusted.

    Directories of links to a common store are usual on clusters. In a directory from elsewhere a link could send any
    file of this machine into the result, so nobody but the user of the moment may say so, and no recipe.
    """
    token = _LINKS_TRUSTED.set(trusted)
    try:
        yield
    finally:
        _LINKS_TRUSTED.reset(token)


def inside(path: Path, folder: Path) -> bool:
    """Whether a file truly lies in a model directory, links followed, or in the Hub cache that the directory is of."""
    if _LINKS_TRUSTED.get():
        return True
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


class Reader:
    """Positional reads from many files at once, shared by all workers; notices an input that changes meanwhile."""

    def __init__(self, files: Mapping[Path, FileIdentity]) -> None:
        self._files = files
        self._open = OpenFiles(_open_input)
        self._read: set[Path] = set()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, stored: Stored | View, first_byte: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from `first_byte`; of a view, whole elements.

        Raises ChangedError: the file is gone, or shorter than when it was planned; RestaError: the disk failed.
        """
        if isinstance(stored, View):
            if into:
                width = DTYPE_BITS[stored.spec.dtype] // 8
                gather(stored, first_byte // width, np.frombuffer(into, f"u{width}"), self._read_lines)
            return
        self._read.add(stored.file)
        if stored.strides is not None:
            with self._open.use(stored.file) as descriptor:
                into[:] = _gathered(descriptor, stored, stored.strides, first_byte, len(into)).data
            return
        with self._open.use(stored.file) as descriptor:
            _fill(descriptor, stored.file, stored.spec.start + first_byte, into)

    def _read_lines(self, stored: Stored, first: int, step: int, lines: NDArray[Any]) -> None:
        self._read.add(stored.file)
        nbytes, data = lines[0].nbytes, lines.data.cast("B")
        offset = stored.spec.start + first * lines.itemsize
        with self._open.use(stored.file) as descriptor:
            for line in range(len(lines)):
                part = data[line * nbytes : (line + 1) * nbytes]
                _fill(descriptor, stored.file, offset + line * step * lines.itemsize, part)

    def read_ahead(self, stored: Stored | View, first_byte: int, length: int) -> None:
        """Ask the kernel to have these bytes ready soon; a hint that may do nothing."""
        if isinstance(stored, View):
            width = DTYPE_BITS[stored.spec.dtype] // 8
            for piece in stored.between(first_byte // width, (first_byte + length) // width):
                self.read_ahead(piece.stored, *piece.extent)
        elif hasattr(os, "posix_fadvise"):
            with self._open.use(stored.file) as descriptor:
                os.posix_fadvise(descriptor, stored.spec.start + first_byte, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise ChangedError if an input that was read is no longer what the plan saw."""
        for path in sorted(self._read):
            try:
                status = path.stat()
            except OSError as error:
                raise ChangedError(f"{path}: is gone since it was first read: {error.strerror}") from error
            identity = self._files[path]
            if (status.st_size, status.st_mtime_ns) != (identity.bytes, identity.mtime_ns):
                raise ChangedError(f"{path}: changed while it was being read; run the same command again")


def _fill(descriptor: int, file: Path, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        try:
            got = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise RestaError(f"{file}: reading at byte {offset + done} failed: {error.strerror}") from error
        if got == 0:
            raise ChangedError(f"{file}: ends at byte {offset + done}; the file was cut after it was planned")
        done += got


def _open_input(path: Path) -> int:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise ChangedError(f"{path}: is gone since its header was read") from error
    except OSError as error:
        raise RestaError(f"{path}: cannot be opened: {error.strerror}") from error


def same_bytes(mine: Stored | View, theirs: Stored | View, reader: Reader, *, most: int | None = None) -> bool:
    """Whether two stored tensors of one size begin with the same bytes, `most` of them or all."""
    nbytes, block = mine.spec.nbytes if most is None else min(most, mine.spec.nbytes), 1 << 20
    for offset in range(0, nbytes, block):
        parts = [bytearray(min(block, nbytes - offset)) for _ in range(2)]
        for stored, part in zip((mine, theirs), parts, strict=True):
            reader.read(stored, offset, memoryview(part))
        if parts[0] != parts[1]:
            return False
    return True


def _gathered(descriptor: int, stored: Stored, strides: tuple[int, ...], first_byte: int, nbytes: int) -> Any:
    """Return bytes of a tensor in the order of its indices, gathered from where its elements lie in the file."""
    spec, width = stored.spec, DTYPE_BITS[stored.spec.dtype] // 8
    reach = sum((size - 1) * stride for size, stride in zip(spec.shape, strides, strict=True)) * width + width
    if os.fstat(descriptor).st_size < spec.start + reach:
        raise ChangedError(f"{stored.file}: ends within a tensor; the file was cut after it was planned")
    with mmap.mmap(descriptor, spec.start + reach, access=mmap.ACCESS_READ) as mapped:
        flat = np.frombuffer(mapped, f"u{width}", count=reach // width, offset=spec.start)
        view = np.lib.stride_tricks.as_strided(flat, spec.shape, [stride * width for stride in strides])
        found = view.flat[first_byte // width : (first_byte + nbytes) // width].copy()
        del flat, view
    return found.view(np.uint8)


def _weight_files(located: Located, format: FileFormat) -> list[Path]:
    folder = located.folder
    single, index = folder / format.single, folder / format.index
    for path in (single, index):
        if path.exists() and not path.is_file():
            raise RequestError(f"{path}: is not a regular file but a directory, a FIFO or a device; remove it")
    if single.exists() and index.exists():
        raise RequestError(
            f"{folder}: has both {single.name} and {index.name}, and readers disagree on which one counts; remove the "
            "stale one"
        )
    if single.exists():
        names = [single.name]
    elif index.exists():
        names = _index_names(index, format.suffix)
    else:
        other = _other_weights(located) if format is SAFETENSORS else ""
        raise RequestError(f"{folder}: has neither {single.name} nor {index.name}{other}")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise RequestError(f"{file}: {index.name} names it but it is not there; download the model again")
        if not inside(file, folder):
            raise RequestError(f"{file}: is a link out of its model directory, to {file.resolve()}; {LINK_ADVICE}")
    return files


def _other_weights(located: Located) -> str:
    """Say which weights of another kind a directory holds, and what to do about them."""
    names = sorted(path.name for path in located.folder.iterdir())
    if advice := convert_advice(located.source, names):
        return f"; {advice}"
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"; {pickles[0]} is a pickle, which is never read: save it as safetensors with the program that made it"
    if any(name.endswith(".gguf") for name in names):
        gguf = next(name for name in names if name.endswith(".gguf"))
        return f"; {gguf} is GGUF, made for llama.cpp: name the safetensors model that it was converted from"
    return ""


def _index_names(index: Path, suffix: str) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index}: expected a weight_map from tensor names to files")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == os.path.basename(name) and len(name.encode()) <= MAX_NAME_BYTES  # noqa: PTH119
        if not plain or not name.endswith(suffix):
            raise RequestError(
                f"{index}: says that {tensor!r} is in {name!r}; expected a {suffix} file name without a path"
            )
    return sorted(set(weight_map.values()))


def _check_index(index: Path, tensors: Mapping[str, Stored]) -> None:
    if not index.exists():
        return
    weight_map = read_json(index)["weight_map"]
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise RequestError(f"{index}: says that {file} holds {name!r}, but it does not")
    unlisted = sorted(tensors.keys() - weight_map.keys())
    if unlisted:
        file = tensors[unlisted[0]].file
        raise RequestError(f"{file}: holds {unlisted[0]!r}, which {index.name} does not list; rebuild the index")


def _strip(tensors: Mapping[str, Operand], prefix: str, folder: Path) -> dict[str, Operand]:
    if not any(name.startswith(prefix) for name in tensors):
        raise RequestError(f"{folder}: strip_prefix is {prefix!r} but no tensor's name begins with it")
    stripped = {name.removeprefix(prefix): operand for name, operand in tensors.items()}
    if len(stripped) != len(tensors):
        raise RequestError(f"{folder}: without the prefix {prefix!r} two tensors would have the same name")
    return stripped
