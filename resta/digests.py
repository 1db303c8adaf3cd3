"""SHA-256 of whole files: of those that a merge reads and writes, taken beside it, and of any file afterwards.

A whole-file digest is what others can compare: the Hub shows it, and signatures are made over it. This module knows
nothing of recipes, tensors or directories.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from resta.fingerprint import sha256_file

PIECE = 1 << 22  # bytes read at a time

Read = Callable[[int, memoryview], None]  # fills a buffer from a byte offset of the file


@dataclass(frozen=True, kw_only=True)
class Digests:
    """SHA-256 by file, and what taking them cost.

    `core_s` is processor time, nearly all of it beside the merge; `after_s` is how long the merge waited at its end.
    """

    sha256: dict[str | Path, str]
    core_s: float
    after_s: float


def hash_files(
    paths: Iterable[Path], workers: int, progress: Callable[[Path], None] | None = None
) -> tuple[dict[Path, str], float]:
    """Return the SHA-256 of files, several at a time, and the seconds of processor time that they took.

    `progress` is called with each file that is done.

    Raises RestaError: a file cannot be read.
    """

    def timed(path: Path) -> tuple[Path, str, float]:
        before = time.thread_time()
        return path, sha256_file(path), time.thread_time() - before

    taken, core_s = {}, 0.0
    with ThreadPoolExecutor(workers) as pool:
        for path, digest, seconds in pool.map(timed, dict.fromkeys(paths)):
            taken[path] = digest
            core_s += seconds
            if progress:
                progress(path)
    return taken, core_s


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A file whose content others are still reading or writing, in stretches that begin at these offsets."""

    name: str | Path
    size: int
    read: Read
    begins: Iterable[int]


class Follower:
    """One thread that hashes files in file order and stays behind those who read and write them.

    So it finds their bytes in the system's cache, and hashes what is in the file and not what was meant for it.
    """

    def __init__(self, files: Iterable[Followed]) -> None:
        self._files = {file.name: _Progress(file) for file in files}
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._core_s = 0.0
        self._thread = threading.Thread(target=self._work, name="digests", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def passed(self, stretches: Iterable[tuple[str | Path, int]]) -> None:
        """Note that stretches, by file and beginning, are read or written; files that are not followed are ignored.

        Raises RestaError: a file could not be read.
        """
        with self._changed:
            if self._error:
                raise self._error
            for name, begin in stretches:
                if name in self._files:
                    self._files[name].passed(begin)
            self._changed.notify()

    def finish(self) -> Digests:
        """Hash what is left, wherever it was not passed, and return all digests.

        Raises RestaError: a file could not be read.
        """
        began = time.perf_counter()
        with self._changed:
            for file in self._files.values():
                file.end = file.followed.size
            self._changed.notify()
        self._thread.join()
        if self._error:
            raise self._error
        return Digests(
            sha256={name: file.sha256.hexdigest() for name, file in self._files.items()},
            core_s=self._core_s,
            after_s=time.perf_counter() - began,
        )

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE))
        try:
            while file := self._next():
                part = buffer[: min(PIECE, file.end - file.done)]
                file.followed.read(file.done, part)
                file.sha256.update(part)
                file.done += len(part)
        except BaseException as error:  # raised again in the thread of the merge
            self._error = error
        self._core_s = time.thread_time()

    def _next(self) -> _Progress | None:
        """Return a file of which there is more to hash; wait for one; None if there is none left."""
        with self._changed:
            while not self._stopped:
                left = [file for file in self._files.values() if file.done < file.followed.size]
                if not left:
                    return None
                ready = next((file for file in left if file.done < file.end), None)
                if ready:
                    return ready
                self._changed.wait()
        return None


class _Progress:
    """How far a file has been hashed (`done`), and may be (`end`): to where a stretch is still to come."""

    def __init__(self, followed: Followed) -> None:
        self.followed = followed
        self.sha256 = hashlib.sha256()
        self.done = 0
        self._begins = sorted(followed.begins)
        self._left: dict[int, int] = {}
        for begin in self._begins:
            self._left[begin] = self._left.get(begin, 0) + 1
        self._at = 0
        self.end = self._begins[0] if self._begins else followed.size

    def passed(self, begin: int) -> None:
        self._left[begin] -= 1
        while self._at < len(self._begins) and self._left[self._begins[self._at]] == 0:
            self._at += 1
        self.end = self._begins[self._at] if self._at < len(self._begins) else self.followed.size
