"""Files that outlive a crash: JSON lines to which one process appends, and files that are written whole or not at all.

A journal holds a JSON object in each line. A record is handed to the system as soon as it is appended; a line torn by a
crash is not read, and cut off before the next is appended. Lines of records carry `schema`, the version of their shape,
and documents `schema` and `kind`. Knows nothing of what the records are about.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from resta.errors import ResumeError
from resta.files import fsync_folder, named_io_errors, open_regular

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

BLOCK = 1 << 16  # bytes read at a time on the way back to the last whole line


# -- one writer ----------------------------------------------------------------------------------------------


class Journal:
    """An append-only file of lines with one writer: opening it holds it against every other.

    Opening changes nothing in a file that is there. Threads may share a journal. An append that fails, as on a full
    disk, leaves nothing of its line.

    Raises ResumeError: somebody else is writing to it; RestaError: it cannot be opened, or is a link or no regular
    file; of the methods: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._whole = False  # whether the file is known to end with a whole line
        with named_io_errors(path):
            self._descriptor = _open_alone(path, path)

    def append(self, record: DataclassInstance | Mapping[str, Any]) -> None:
        """Add a record as a line of JSON."""
        facts = record if isinstance(record, Mapping) else asdict(record)
        # Half a surrogate pair, which a server may send, becomes the escape that JSON has for it.
        self.append_line(to_json(facts).encode("utf-8", "backslashreplace"))

    def append_line(self, line: bytes) -> None:
        """Add a line, or nothing."""
        left = memoryview(line + b"\n")
        with self._lock, named_io_errors(self.path):
            if not self._whole:
                os.ftruncate(self._descriptor, _end_of_last_line(self._descriptor))
                self._whole = True
            end = os.fstat(self._descriptor).st_size
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except BaseException:
                self._whole = False  # in case that this fails too
                with suppress(OSError):
                    os.ftruncate(self._descriptor, end)
                raise

    def read(self) -> bytes:
        """Return all that is in the file, a torn last line too."""
        with named_io_errors(self.path), open(os.dup(self._descriptor), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            return file.read()

    def cut(self, end: int) -> None:
        """Drop all behind a byte."""
        with named_io_errors(self.path):
            os.ftruncate(self._descriptor, end)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        with named_io_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and let others write; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FolderLock:
    """One process at a time writes to a folder; the lock goes with the process, however it ends.

    Raises ResumeError: another process has it; RestaError: it cannot be made.
    """

    def __init__(self, folder: Path):
        with named_io_errors(folder / ".lock"):
            self._descriptor = _open_alone(folder / ".lock", folder)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _open_alone(path: Path, held: Path) -> int:
    """Return a descriptor of a regular file, made if need be, that nobody else has open so until it is closed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
    descriptor = open_regular(path, flags) if path.exists() else os.open(path, flags | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(path.lstat(), os.fstat(descriptor)):
            raise BlockingIOError  # whoever had it has finished and removed it
    except BlockingIOError as error:
        os.close(descriptor)
        raise ResumeError(f"{held}: another process is writing there; wait until it has ended") from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _end_of_last_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that, whenever the machine stops, its name has the old content or the new one.

    The new content is put on the disk beside it, as `path`.part, and takes the name by a rename. What is replaced
    leaves its permissions to the new file. Half surrogate pairs in a text become escapes.

    Raises RestaError: it cannot be written; the old content is still there.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    part = path.with_name(f"{path.name}.part")
    with named_io_errors(part):
        part.unlink(missing_ok=True)  # of an attempt that was killed
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:  # noqa: PTH123
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_folder(path.parent)


# -- JSON ----------------------------------------------------------------------------------------------------


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return plain data as JSON; NaN and infinite numbers, for which it has no word, are null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def document(kind: str, content: Mapping[str, Any], *, schema: int) -> str:
    """Return a document as JSON that begins with the version of its shape and what it is."""
    return to_json({"schema": schema, "kind": kind, **content}, indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # an array or a number of numpy, which a command that needs none does not import
        return _finite(value.tolist())
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises FileNotFoundError: there is no such file; ResumeError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ResumeError(f"{path} holds no JSON object")
    return found


# -- records -------------------------------------------------------------------------------------------------


def read_lines(path: Path, *, schema: int | None = 1) -> Iterator[dict[str, Any]]:
    """Yield a journal's records; an absent file has none, a torn last line is left out.

    Raises ResumeError: a line is damaged, or of another schema (None: whatever each says).
    """
    if not path.exists():
        return
    # Split on the newline byte alone: answers may hold the other characters that count as line ends in text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResumeError(f"{path}: line {number} is not JSON ({error}); remove that line") from error
        if not isinstance(record, dict):
            raise ResumeError(f"{path}: line {number} is no JSON object; remove that line")
        found = record.get("schema")
        if schema not in (None, found):
            raise ResumeError(f"{path}: line {number} has schema {found}, expected {schema}")
        yield record


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return a journal's records as the dataclass that they are. Raises ResumeError as `read_lines` does."""
    return [to_row(line, kind, path) for line in read_lines(path)]


def to_row(record: dict[str, Any], kind: type[Row], path: Path) -> Row:
    """Return one line of `path` as a record. Raises ResumeError where its keys are not those of such a record."""
    known = {f.name for f in fields(kind)}
    if not record.keys() <= known:
        raise ResumeError(f"{path}: unknown keys {sorted(record.keys() - known)} in a {kind.__name__}")
    try:
        found: Row = checked(kind, record)
    except ValueError as error:
        raise ResumeError(f"{path}: a line that is no whole {kind.__name__} ({error}); remove that line") from error
    return found


def checked(kind: Any, facts: Any) -> Any:
    """Return plain data as the dataclass that it should be. Raises ValueError in one line."""
    check(kind, facts)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()})


def check(kind: Any, facts: Any) -> None:
    """Check plain data against a dataclass or model. Raises ValueError in one line."""
    try:
        _adapter(kind).validate_python(_encodable(facts))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _encodable(value: Any) -> Any:
    """Replace halves of surrogate pairs, which a server may send and pydantic does not take for text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


# -- going on ------------------------------------------------------------------------------------------------


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return a line for each setting in which the configuration that was begun with and the one of now differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}")]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    # Through JSON once, so that a tuple and the list it was written as are equal.
    if json.dumps(old) == json.dumps(new):
        return []
    return [f"{where.lstrip('.')}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
