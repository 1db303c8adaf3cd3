"""Opening what others put into a directory: only regular files, and never more at a time than the system allows. What
the system says against it becomes one sentence.

A FIFO would be waited for without end, a device read without end; models of hundreds of shards meet `ulimit -n`.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resta.errors import RestaError

OTHERS = 64  # descriptors left to everything else in the process
MOST_OPEN = 512


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file.

    Raises OSError: it cannot be opened, or is a directory, a FIFO, a socket or a device; `strerror` says which.
    """
    _require_regular(path.stat())
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # it may have become a FIFO since
    try:
        _require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return a regular file's content.

    Raises OSError: as `open_regular` does, or the file is larger than `most_bytes`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {most_bytes:,} are read")
        return file.read(most_bytes)


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")


class OpenFiles:
    """Descriptors by path. Thread-safe; those least recently used are closed when there are too many."""

    def __init__(
        self, opener: Callable[[Path], int], *, before_closing: Callable[[int], None] = lambda descriptor: None
    ) -> None:
        self._opener = opener
        self._before_closing = before_closing
        self._most = most_open()
        self._open: dict[Path, list[int]] = {}  # [descriptor, users], the most recently used last
        self._lock = threading.Lock()
        self._close = os.close  # kept here: a reader may outlive the interpreter's modules

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """Lend a file's descriptor, which stays open as long as it is lent."""
        with self._lock:
            entry = self._open.pop(path, None) or [self._opener(path), 0]
            self._open[path] = entry
            entry[1] += 1
            idle = [other for other, (_, users) in self._open.items() if not users]
            surplus = [self._open.pop(other)[0] for other in idle[: max(0, len(self._open) - self._most)]]
        try:
            for descriptor in surplus:
                self._finish(descriptor)
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def close(self) -> None:
        """Close every file."""
        while self._open:
            self._close(self._open.popitem()[1][0])

    def _finish(self, descriptor: int) -> None:
        try:
            self._before_closing(descriptor)
        finally:
            self._close(descriptor)


def most_open() -> int:
    """Return how many files one of two users of many files, a reader and a writer, may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(4, min(MOST_OPEN, (soft - OTHERS) // 2))


def fsync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_io_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        full = _is_disk_full(error)
        reason = "the disk is full" if full else (error.strerror or str(error))
        mend = "make room" if full else "when the cause is mended"
        raise RestaError(
            f"{path}: {reason}. What is done is kept; {mend}{', then' if full else ','} run the same command to resume"
        ) from error


def _is_disk_full(error: OSError) -> bool:
    """Whether an I/O error means that the disk, the quota or the file size limit is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
