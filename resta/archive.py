"""The zip archive that torch.save writes: where each of its records lies, by a directory that is distrusted.

An archive is `records | directory | end`, each record behind a local header. torch.save never compresses, so that a
record's bytes can be read from the file where they lie; nothing is ever unpacked. Stricter than torch, so that no two
readers find different records: a record that is compressed or encrypted, lies on another or outside of the file, has
another name in its own header, or is called as another but for its case is refused; so is a directory of more than
MOST_DIRECTORY bytes (some 160,000 records). This module knows nothing of pickles and tensors.

Format: PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (64 bit sizes).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from resta.errors import RequestError
from resta.files import open_regular

MOST_DIRECTORY = 16 << 20
RECORD, ENTRY, END, END64, LOCATOR64 = (b"PK" + mark for mark in (b"\3\4", b"\1\2", b"\5\6", b"\6\6", b"\6\7"))
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64 bit field"
WIDE = 1  # the extra field of 64 bit sizes
ENCRYPTED = 0x2041  # flags: encrypted, strongly, or with its header hidden

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s2B4HL2L2H")
OLD_ADVICE = (
    "such a file can only be read by running it. If you trust whoever made it, load it and save it again where it may "
    "do no harm: torch.save(torch.load(FILE, weights_only=True), FILE)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record's bytes in the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """An archive's records by name, without the folder that all lie in, and what identifies its directory.

    The directory holds a checksum (CRC-32) of every record, so that its SHA-256 tells one version from another.
    """

    records: Mapping[str, Record]
    directory_sha256: str


def read_archive(path: Path) -> Archive:
    """Read and check an archive's directory.

    Raises RequestError: it is no archive of torch.save, is torn, or could be read in two ways.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return _read(file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def read_record(path: Path, record: Record) -> bytes:
    """Return the bytes of a small record. Raises RequestError."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return _pread(file.fileno(), record.start, record.nbytes)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _read(descriptor: int, size: int) -> Archive:
    begin = os.pread(descriptor, 4, 0)
    if begin != RECORD:
        if begin[:1] in (b"\x80", b"("):  # how a pickle begins: torch.save's format before 1.6
            raise RequestError(f"is a bare pickle and not a zip archive: {OLD_ADVICE}")
        raise RequestError("does not begin as a zip archive of torch.save; download it again")
    count, start, end = _find_directory(descriptor, size)
    if end - start > MOST_DIRECTORY:
        raise RequestError(f"its directory has {end - start:,} bytes; at most {MOST_DIRECTORY:,} are read")
    directory = _pread(descriptor, start, end - start)
    spans: list[tuple[int, int]] = []
    records: dict[str, Record] = {}
    known: set[str] = set()
    root = None
    for name, offset, nbytes in _entries(directory, count):
        record = _locate(descriptor, name, offset, nbytes, start)
        spans.append((offset, record.start + nbytes))
        folder, slash, inner = name.partition("/")
        root = folder if root is None else root
        if not slash or folder != root or not _is_plain(name):
            raise RequestError(f"its record {name!r} is not called as torch.save calls one, {root}/data/0 for example")
        if inner.casefold() in known:
            raise RequestError(f"two of its records are called {name!r}")
        known.add(inner.casefold())
        records[inner] = record
    spans.sort()
    for (_, before), (after, _) in pairwise(spans):
        if after < before:
            raise RequestError(f"two of its records lie on each other, at byte {after}")
    return Archive(records=records, directory_sha256=hashlib.sha256(directory).hexdigest())


def _find_directory(descriptor: int, size: int) -> tuple[int, int, int]:
    """Return the number of entries, and where the directory begins and ends."""
    end = size - _END.size
    torn = RequestError("does not end as a zip archive of torch.save does; it is cut or has trailing data")
    if end < _LOCATOR64.size:
        raise torn
    mark, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(_pread(descriptor, end, _END.size))
    if mark != END or comment:
        raise torn
    mark64, disk64, place, _ = _LOCATOR64.unpack(_pread(descriptor, end - _LOCATOR64.size, _LOCATOR64.size))
    small = (here, count, nbytes, start)
    if mark64 == LOCATOR64:
        if place != end - _LOCATOR64.size - _END64.size:
            raise torn
        mark64, _, _, _, disk, first_disk, *large = _END64.unpack(_pread(descriptor, place, _END64.size))
        full = (FULL16, FULL16, FULL32, FULL32)
        if mark64 != END64 or disk64 or any(a not in (b, f) for a, b, f in zip(small, large, full, strict=True)):
            raise torn
        here, count, nbytes, start = large
        end = place
    if disk or first_disk or here != count or start + nbytes != end:
        raise torn
    return count, start, end


def _entries(directory: bytes, count: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the offset of the local header and the size of each entry of the directory."""
    at = 0
    for _ in range(count):
        if len(directory) - at < _ENTRY.size:
            raise RequestError("its directory is cut short")
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, packed, nbytes, lengths, offset = (
            entry[5],
            entry[6],
            entry[10],
            entry[11],
            entry[12:15],
            entry[18],
        )
        ends = [at + _ENTRY.size + sum(lengths[:place]) for place in range(4)]
        name = _text(directory[ends[0] : ends[1]])
        if entry[0] != ENTRY or ends[3] > len(directory):
            raise RequestError(f"its directory is broken at {name!r}")
        if flags & ENCRYPTED:
            raise RequestError(f"its record {name!r} is encrypted; torch.save encrypts nothing")
        if method:
            raise RequestError(
                f"its record {name!r} is compressed (method {method}); torch.save compresses nothing, and what could "
                "grow without end is not unpacked. If you trust it, load it with torch and save it again"
            )
        nbytes, packed, offset = _widened(directory[ends[1] : ends[2]], (nbytes, packed, offset), name)
        if packed != nbytes:
            raise RequestError(f"its record {name!r} has {nbytes} bytes and takes {packed}")
        yield name, offset, nbytes
        at = ends[3]
    if at != len(directory):
        raise RequestError("its directory has trailing data")


def _widened(extra: bytes, fields: tuple[int, int, int], name: str) -> tuple[int, ...]:
    """Return size, packed size and offset, those that 32 bits do not hold from the field that has them with 64."""
    wide, found = b"", []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        wide = extra[4 : 4 + length] if kind == WIDE else wide
        extra = extra[4 + length :]
    for value in fields:
        if value == FULL32:
            if len(wide) < 8:
                raise RequestError(f"its record {name!r} lacks its 64 bit sizes")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(value)
    return tuple(found)


def _locate(descriptor: int, name: str, offset: int, nbytes: int, most: int) -> Record:
    """Return where a record's bytes lie, by its own header, which must agree with the directory."""
    if offset + _LOCAL.size > most:
        raise RequestError(f"its record {name!r} should begin at byte {offset}, beyond all records")
    local = _LOCAL.unpack(_pread(descriptor, offset, _LOCAL.size))
    flags, method, length, extra = local[3], local[4], local[10], local[11]
    own = _text(_pread(descriptor, offset + _LOCAL.size, length)) if offset + _LOCAL.size + length <= most else ""
    if local[0] != RECORD or own != name or method or flags & ENCRYPTED:
        raise RequestError(f"its record {name!r} has another header of its own at byte {offset}")
    start = offset + _LOCAL.size + length + extra
    if start + nbytes > most:
        raise RequestError(f"its record {name!r} of {nbytes} bytes at byte {start} reaches beyond all records ({most})")
    return Record(start=start, nbytes=nbytes)


def _is_plain(name: str) -> bool:
    """Whether a record's name is that of a file in a folder, and of no other place."""
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeError:
        raise RequestError(f"the name {name[:80]!r} in its directory is not UTF-8") from None


def _pread(descriptor: int, offset: int, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = os.pread(descriptor, nbytes - len(data), offset + len(data))
        if not more:
            raise RequestError(f"ends at byte {offset + len(data)}; it was cut while it was read")
        data += more
    return data
