"""A model directory that exists whole or not at all.

Work goes to `OUT.partial/`: `model/` holds the files, laid out at full size from the start, and `journal.jsonl` says
which stretches of which tensors are in place, with a checksum of each. The finished `model/` becomes `OUT` by one
rename after everything is on the disk. That rename replaces nothing; with --overwrite, the output of an earlier merge
makes room for it. This module knows nothing of arithmetic.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from resta.errors import RequestError, RestaError, ResumeError
from resta.files import OpenFiles, fsync_folder, named_io_errors
from resta.journal import Journal

MARK = "resta.json"  # in every finished output; --overwrite replaces nothing else
RESERVE_BYTES = 64 << 20  # journal, manifest, file system overhead
COMMIT = "commit"  # the journal's last entry: everything is on the disk, only renames are left
JOURNAL, MODEL, REPLACED = "journal.jsonl", "model", "replaced"  # all that OUT.partial ever holds
LONG_NAME = "x" * 128  # longer than the names of all files of an output
DIGEST_DIGITS = 32
RENAME_NOREPLACE = 1  # of renameat2
AT_FDCWD = -100


def check_place(out: Path, inputs: Mapping[Path, str]) -> None:
    """Refuse an output path that would harm an input, or where no directory could be made in the end.

    Args:
        out: the directory to be, absolute.
        inputs: input directories and the names of their models.

    Raises:
        RequestError: why not.
    """
    if out.name in ("", ".."):
        raise RequestError(f"{out}: is not a name for a new directory; give one, such as {out / 'restored'}")
    with _refusals(out):
        for place in (out, partial_of(out)):
            real = place.resolve()
            for folder, name in inputs.items():
                if real == folder or real.is_relative_to(folder) or folder.is_relative_to(real):
                    raise RequestError(
                        f"the output {place} and the model {name} in {folder} overlap; choose another output"
                    )
        if Path.cwd().is_relative_to(out.resolve()):
            raise RequestError(
                f"{out}: is the directory that this command runs in, or above it, and would be replaced; name a "
                f"new directory in it, such as {out / 'restored'}"
            )
        _check_makeable(out)


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Refuse an output whose name something has that a merge may not replace.

    Raises RequestError: what is there.
    """
    with _refusals(out):
        is_full = os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir()))
    if out.is_symlink() or (is_full and not out.is_dir()):
        raise RequestError(f"{out}: is not a directory; choose another output")
    if _is_mount_point(out):
        raise RequestError(
            f"{out}: is a mount point, and no directory can be renamed to one; name a directory in it, such as "
            f"{out / 'restored'}"
        )
    if not is_full:
        return
    if not overwrite:
        raise RequestError(f"{out}: already exists; choose another output, or replace it: overwrite=True (--overwrite)")
    if not (out / MARK).is_file():
        raise RequestError(f"{out}: was not made by resta (it has no {MARK}); remove it yourself if it may go")


def check_space(out: Path, needed: int) -> int:
    """Return the free bytes on the output's disk, what an unfinished attempt already holds included.

    Raises RequestError: they do not suffice.
    """
    with _refusals(out):
        partial = partial_of(out)
        place = _nearest(partial.parent)
        held = sum(file.lstat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
        free = shutil.disk_usage(place).free + held
    if free < needed + RESERVE_BYTES:
        raise RequestError(f"{out}: needs {needed + RESERVE_BYTES:,} bytes, and {place} has {free:,} free")
    return free


def recover(out: Path, plan_digest: str) -> bool:
    """Clean up after an attempt that was killed around its final renames.

    Returns:
        Whether `out` is the finished result of this very plan, so that nothing is left to do.

    Raises:
        ResumeError: another process is writing there.
    """
    partial = partial_of(out)
    if partial.is_symlink() or not (partial / JOURNAL).is_file():
        return False
    with named_io_errors(partial), Journal(partial / JOURNAL) as journal:
        entries = [entry for entry, _ in _valid_entries(journal.read())]
        if not entries:
            return False
        if (partial / REPLACED).is_dir() and not os.path.lexists(out):  # killed between the two renames: undo one
            rename_new(partial / REPLACED, out)
        if (partial / MODEL).exists() or not _is_result(out, entries[-1]):
            return False
        _remove_partial(partial)
        return bool(entries[0].get("plan") == plan_digest)


def partial_of(out: Path) -> Path:
    """Return the directory in which an output is made."""
    return out.with_name(out.name + ".partial")


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory to a name that nothing has.

    Where the system cannot promise that (renameat2), the name is looked up before: in the moment between, an empty
    directory could be replaced, but nothing else, since a directory is never renamed onto a file or a full directory.

    Raises OSError: FileExistsError if something has the name.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):  # this kernel, or this file system, does not know the flag
            raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


class Output:
    """The directory in the making. Thread-safe: every write has its own place."""

    def __init__(
        self, out: Path, *, plan_digest: str, headers: Mapping[str, bytes], sizes: Mapping[str, int], overwrite: bool
    ) -> None:
        self.out = out
        self._partial = partial_of(out)
        self._model = self._partial / MODEL
        self._plan_digest = plan_digest
        self._headers = headers
        self._sizes = sizes
        self._overwrite = overwrite
        self._empty: tuple[int, int] | None = None  # the empty directory that had the name OUT when the work began
        # What is closed early is put on the disk before: a later fsync may not hear of an error that befell it.
        self._files = OpenFiles(self._open_file, before_closing=os.fsync)
        self._journal: Journal | None = None
        self.done: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Output:
        try:
            with _refusals(self.out):
                self._partial.mkdir(parents=True, exist_ok=True)
            with named_io_errors(self._partial):
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
        self._files.close()
        if self._journal is not None:
            self._journal.close()

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Put bytes at their final place."""
        done = 0
        with named_io_errors(self._model / file), self._files.use(self._model / file) as descriptor:
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Read back what an earlier attempt wrote."""
        done = 0
        with named_io_errors(self._model / file), self._files.use(self._model / file) as descriptor:
            while done < len(into):
                got = os.preadv(descriptor, [into[done:]], offset + done)
                if got == 0:
                    raise RestaError(
                        f"{self._model / file}: ends at byte {offset + done}; it was cut meanwhile. Run the same "
                        "command again: it finds and redoes what is missing"
                    )
                done += got

    def record(self, unit: str, facts: Mapping[str, Any]) -> None:
        """Note that a stretch is in place."""
        self._append({"unit": unit, **facts})

    def flush(self, file: str) -> None:
        """Wait until a weight file is on the disk."""
        with named_io_errors(self._model / file), self._files.use(self._model / file) as descriptor:
            os.fsync(descriptor)

    def commit(self, texts: Mapping[str, bytes]) -> None:
        """Add the small files, put everything on the disk, and let the directory appear under its name.

        Args:
            texts: name -> content; MARK among them.

        Raises:
            RequestError: something else has the name by now; what was done is kept.
            RestaError: writing failed; what was done is kept.
        """
        with named_io_errors(self._model):
            for name, content in texts.items():
                path = self._model / name
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        for name in self._headers:
            self.flush(name)
        with named_io_errors(self._partial):
            for folder in {(self._model / name).parent for name in texts} | {self._model}:
                fsync_folder(folder)
            self._append({"unit": COMMIT, "manifest": hashlib.sha256(texts[MARK]).hexdigest()})
            assert self._journal is not None
            self._journal.sync()  # the renames must not reach the disk before the line that explains them
            fsync_folder(self._partial)
            self._appear()
            fsync_folder(self.out.parent)
            self.discard()

    def discard(self) -> None:
        """Remove the working directory, but for what is not resta's."""
        _remove_partial(self._partial)

    def _appear(self) -> None:
        """Rename the finished directory, and if told so what it replaces."""
        try:
            check_vacant(self.out, overwrite=self._overwrite)
            if not os.path.lexists(self.out):
                rename_new(self._model, self.out)
            elif any(self.out.iterdir()):
                self._replace()
            elif _identity(self.out) == self._empty:
                self.out.rmdir()  # which fails unless it still is empty
                rename_new(self._model, self.out)
            else:
                raise RequestError(f"{self.out}: is a directory that appeared meanwhile; choose another output")
        except (FileExistsError, RequestError) as error:
            reason = f"{self.out}: already exists" if isinstance(error, OSError) else error
            raise RequestError(
                f"{reason}. It appeared while the merge was running and was left alone; the result is kept in "
                f"{self._partial}: move away what is in its place, then run the same command, which only renames it"
            ) from error

    def _replace(self) -> None:
        replaced = self._partial / REPLACED
        if replaced.exists():  # an output that was to be replaced once already
            shutil.rmtree(replaced)
        rename_new(self.out, replaced)
        try:
            check_vacant(replaced, overwrite=True)  # what was moved may not be what was looked at a moment before
            rename_new(self._model, self.out)
        except BaseException:
            with suppress(OSError):
                rename_new(replaced, self.out)
            raise

    def _open_journal(self) -> None:
        names = {path.name for path in self._partial.iterdir()}
        if self._partial.is_symlink() or (names and JOURNAL not in names):
            raise self._foreign()
        self._journal = Journal(self._partial / JOURNAL)
        text = self._journal.read()
        entries = _valid_entries(text)
        if not entries and b"\n" in text:  # a first line that resta did not write; one that is torn may be its own
            raise self._foreign()
        try:
            check_vacant(self.out, overwrite=self._overwrite)
        except RequestError:
            if not entries:
                self.discard()
            raise
        self._empty = _identity(self.out)
        if entries and entries[0][0].get("plan") != self._plan_digest:
            raise ResumeError(
                f"{self._partial}: was begun with another recipe, other inputs, other choices or another version of "
                f"resta; to start anew, remove it: rm -r {self._partial}"
            )
        self._journal.cut(entries[-1][1] if entries else 0)
        self.done = {str(entry["unit"]): entry for entry, _ in entries[1:]}
        if not entries:
            self._append({"plan": self._plan_digest})

    def _foreign(self) -> ResumeError:
        return ResumeError(
            f"{self._partial}: exists and is not an unfinished merge; remove it or choose another output"
        )

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the journal: its checksum and the entry."""
        text = json.dumps(entry, separators=(",", ":")).encode()
        assert self._journal is not None
        self._journal.append_line(_line_digest(text) + b" " + text)

    def _open_file(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def _lay_out(self) -> None:
        self._model.mkdir(exist_ok=True)
        for path in self._model.iterdir():
            if path.name not in self._headers:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, head in self._headers.items():
            with self._files.use(self._model / name) as descriptor:
                os.ftruncate(descriptor, self._sizes[name])
            self.write(name, 0, memoryview(head))


def _valid_entries(journal: bytes) -> list[tuple[dict[str, Any], int]]:
    """Return the journal's entries and where each ends; a line torn by a crash, or altered since, ends the list."""
    entries = []
    end = 0
    for line in journal.splitlines(keepends=True):
        digest, _, text = line[:-1].partition(b" ")
        if not line.endswith(b"\n") or digest != _line_digest(text):
            break
        end += len(line)
        entries.append((json.loads(text), end))
    return entries


def _line_digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST_DIGITS // 2).hexdigest().encode()


def _is_result(out: Path, last: Mapping[str, Any]) -> bool:
    """Whether a directory is what the journal's last entry says was about to appear there."""
    if last.get("unit") != COMMIT or not (out / MARK).is_file():
        return False
    return hashlib.sha256((out / MARK).read_bytes()).hexdigest() == last.get("manifest")


def _remove_partial(partial: Path) -> None:
    """Remove a working directory, its journal last, so that being killed here is recovered from as well."""
    for name in (MODEL, REPLACED):
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
    (partial / JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):  # what others put there stays, and the directory with it
        partial.rmdir()


def _check_makeable(out: Path) -> None:
    """Refuse a place where no directory can be made."""
    partial = partial_of(out)
    for place in (out, partial / MODEL / LONG_NAME):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)  # a name or a path too long
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir() or _is_mount_point(partial)):
        raise RequestError(f"{partial}: is needed for the work and is not a plain directory; choose another output")
    place = partial if partial.is_dir() else _nearest(out.parent)
    if not place.is_dir():
        raise RequestError(f"{out}: cannot be made, since {place} is not a directory; choose another output")
    for folder in {place, _nearest(out.parent)}:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RequestError(f"{out}: cannot be made, since {folder} cannot be written to; choose another output")


def _nearest(place: Path) -> Path:
    """Return a path or the first above it that exists."""
    while not os.path.lexists(place):
        place = place.parent
    return place


def _is_mount_point(folder: Path) -> bool:
    """Whether another file system, or another directory of the same one (a bind mount), lies over a directory."""
    if os.path.ismount(folder):
        return True
    table = Path("/proc/self/mountinfo")  # Linux; the fifth field of a line is the place, with \040 for a space
    if not table.is_file():
        return False
    name = str(folder.resolve()).replace("\\", r"\134").replace(" ", r"\040").replace("\n", r"\012")
    return any(line.split(" ")[4] == name for line in table.read_text(errors="surrogateescape").splitlines())


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a directory from another that has its name later, or None if there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """Turn the operating system's refusal of a path, before any work, into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long; a zero byte; links in a circle
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise RequestError(f"{out}: cannot be made: {reason}; choose another output") from error
