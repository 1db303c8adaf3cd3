"""A model directory that exists whole or not at all.

Work goes to `OUT.partial/`: `model/` holds the files, laid out at full size from the start, and `journal.jsonl`
says which stretches of which tensors are in place, with a checksum of each. The finished `model/` becomes
`OUT` by one rename after everything is on the disk. This module knows nothing of arithmetic.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from resta.checkpoint import is_disk_full
from resta.errors import PlanError, RestaError, ResumeError

MARK = "resta.json"  # in every finished output; --overwrite replaces nothing else
RESERVE_BYTES = 64 << 20  # journal, manifest, file system overhead
COMMIT = "commit"  # the journal's last entry: everything is on the disk, only renames are left


def check_target(out: Path, inputs: Mapping[Path, str], *, overwrite: bool) -> None:
    """Refuse an output path that would harm an input or something that resta did not make.

    Args:
        out: the directory to be.
        inputs: input directories and the names of their models.
        overwrite: whether an earlier output may be replaced.

    Raises:
        PlanError: why not.
    """
    for place in (out, partial_of(out)):
        real = place.resolve()
        for folder, name in inputs.items():
            if real == folder or real.is_relative_to(folder) or folder.is_relative_to(real):
                raise PlanError(f"the output {place} and the model {name} in {folder} overlap; choose another output")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise PlanError(f"{out}: is not a directory; choose another output")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise PlanError(f"{out}: already exists; choose another output, or replace it with --overwrite")
    if not (out / MARK).is_file():
        raise PlanError(f"{out}: was not made by resta (it has no {MARK}); remove it yourself if it may go")


def check_space(out: Path, needed: int) -> int:
    """Return the free bytes on the output's disk, what an unfinished attempt already holds included.

    Raises:
        PlanError: they do not suffice.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    held = sum(file.stat().st_blocks * 512 for file in partial_of(out).rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + held
    if free < needed + RESERVE_BYTES:
        raise PlanError(f"{out}: needs {needed + RESERVE_BYTES:,} bytes, and {place} has {free:,} free")
    return free


def recover(out: Path, plan_digest: str) -> bool:
    """Clean up after an attempt that was killed around its final renames.

    Returns:
        Whether `out` is the finished result of this very plan, so that nothing is left to do.
    """
    partial = partial_of(out)
    replaced, journal = partial / "replaced", partial / "journal.jsonl"
    if replaced.exists() and not out.exists():  # killed between the two renames of a replacement: undo the first
        replaced.rename(out)
    if not out.is_dir() or not journal.is_file() or (partial / "model").exists():
        return False
    entries = [entry for entry, _ in _valid_entries(journal.read_bytes())]
    if not entries or entries[-1].get("unit") != COMMIT:
        return False
    _remove_partial(partial)
    return bool(entries[0].get("plan") == plan_digest)


def partial_of(out: Path) -> Path:
    """Return the directory in which an output is made."""
    return out.with_name(out.name + ".partial")


class Output:
    """The directory in the making. Thread-safe: every write has its own place."""

    def __init__(self, out: Path, *, plan_digest: str, heads: Mapping[str, bytes], sizes: Mapping[str, int]) -> None:
        self.out = out
        self._partial = partial_of(out)
        self._model = self._partial / "model"
        self._plan_digest = plan_digest
        self._heads = heads
        self._sizes = sizes
        self._files: dict[str, int] = {}
        self._journal: IO[bytes] | None = None
        self._lock = threading.Lock()
        self.done: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Output:
        try:
            with named_io_errors(self._partial):
                self._partial.mkdir(parents=True, exist_ok=True)
                self._open_journal()
                self._lay_out()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._journal:
            self._journal.close()

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Put bytes at their final place."""
        done = 0
        with named_io_errors(self._model / file):
            while done < len(data):
                done += os.pwrite(self._files[file], data[done:], offset + done)

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Read back what an earlier attempt wrote."""
        done = 0
        with named_io_errors(self._model / file):
            while done < len(into):
                done += os.preadv(self._files[file], [into[done:]], offset + done)

    def record(self, unit: str, facts: Mapping[str, Any]) -> None:
        """Note that a stretch is in place."""
        line = json.dumps({"unit": unit, **facts}, separators=(",", ":")).encode() + b"\n"
        with self._lock, named_io_errors(self._partial / "journal.jsonl"):
            assert self._journal is not None
            self._journal.write(line)
            self._journal.flush()

    def flush(self, file: str) -> None:
        """Wait until a weight file is on the disk."""
        with named_io_errors(self._model / file):
            os.fsync(self._files[file])

    def commit(self, texts: Mapping[str, bytes]) -> None:
        """Add the small files, put everything on the disk, and let the directory appear under its name."""
        with named_io_errors(self._model):
            for name, content in texts.items():
                path = self._model / name
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in self._files:
                self.flush(name)
            for folder in {(self._model / name).parent for name in texts} | {self._model}:
                _fsync_folder(folder)
            self.record(COMMIT, {})
            if self.out.exists():
                self.out.rename(self._partial / "replaced")
            self._model.rename(self.out)
            _fsync_folder(self.out.parent)
            self.discard()

    def discard(self) -> None:
        """Remove the working directory."""
        _remove_partial(self._partial)

    def _open_journal(self) -> None:
        path = self._partial / "journal.jsonl"
        if not path.exists() and any(self._partial.iterdir()):
            raise ResumeError(
                f"{self._partial}: exists and is not an unfinished merge; remove it or choose another output"
            )
        self._journal = path.open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(f"{self._partial}: another process is writing there; wait for it") from None
        self._journal.seek(0)
        entries = _valid_entries(self._journal.read())
        if entries and entries[0][0].get("plan") != self._plan_digest:
            raise ResumeError(
                f"{self._partial}: was begun with another recipe, other inputs or other choices; to start anew, "
                f"remove it: rm -r {self._partial}"
            )
        self._journal.truncate(entries[-1][1] if entries else 0)
        self.done = {entry["unit"]: entry for entry, _ in entries[1:]}
        if not entries:
            self._journal.write(json.dumps({"plan": self._plan_digest}).encode() + b"\n")
            self._journal.flush()

    def _lay_out(self) -> None:
        self._model.mkdir(exist_ok=True)
        for path in self._model.iterdir():
            if path.name not in self._heads:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, head in self._heads.items():
            descriptor = os.open(self._model / name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files[name] = descriptor
            os.ftruncate(descriptor, self._sizes[name])
            self.write(name, 0, memoryview(head))


def _valid_entries(journal: bytes) -> list[tuple[dict[str, Any], int]]:
    """Return the journal's entries and where each ends; a line torn by a crash ends the list."""
    entries = []
    end = 0
    for line in journal.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            break
        end += len(line)
        entries.append((entry, end))
    return entries


def _remove_partial(partial: Path) -> None:
    """Remove a working directory, its journal last, so that being killed here is recovered from as well."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    for path in partial.iterdir():
        path.unlink()
    partial.rmdir()


def _fsync_folder(folder: Path) -> None:
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
        reason = "the disk is full" if is_disk_full(error) else (error.strerror or str(error))
        raise RestaError(
            f"{path}: {reason}. What is done is kept; make room or mend the disk, then run the same command to resume"
        ) from error
