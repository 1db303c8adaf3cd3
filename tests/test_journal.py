from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.errors import RestaError, ResumeError
from resta.journal import (
    FolderLock,
    Journal,
    differences,
    document,
    read_lines,
    read_object,
    read_rows,
    to_json,
    write_whole,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    number: int
    text: str = "a"
    parts: tuple[str, ...] = ("x",)
    schema: int = 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def finite(value: Any) -> Any:
    """Return plain data with None for what JSON has no word for."""
    if isinstance(value, float) and (math.isnan(value) or math.isinf(value)):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# -- journals ------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=50))
def test_any_text_survives_a_round_trip(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("journal") / "lines.jsonl"
    lines = [Line(number=0, text=text + "\u2028\x85\n"), Line(number=1, text=text)]
    with Journal(path) as journal:
        for line in lines:
            journal.append(line)
    assert read_rows(path, Line) == lines


def test_half_a_surrogate_pair_survives_too(tmp_path: Path) -> None:
    with Journal(tmp_path / "lines.jsonl") as journal:
        journal.append({"text": "\ud800x", "schema": 1})
    assert list(read_lines(tmp_path / "lines.jsonl")) == [{"text": "\ud800x", "schema": 1}]


def test_a_file_torn_at_any_byte_loses_the_torn_line_alone_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [Line(number=i, text="€" * i) for i in range(4)]
    with Journal(path) as journal:
        for line in lines:
            journal.append(line)
    data = path.read_bytes()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = lines[: data[:end].count(b"\n")]
        assert read_rows(path, Line) == whole
        with Journal(path) as journal:
            assert path.read_bytes() == data[:end]  # opening changes nothing
            journal.append(Line(number=9))
            journal.append(Line(number=10))
        assert read_rows(path, Line) == [*whole, Line(number=9), Line(number=10)]


def test_a_torn_line_of_any_length_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for length in (1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_000):
        path.write_bytes(b'{"schema": 1}\n' + b"x" * length)
        with Journal(path) as journal:
            journal.append({"schema": 1})
        assert path.read_bytes() == b'{"schema": 1}\n' * 2
        path.write_bytes(b"x" * length)
        with Journal(path) as journal:
            journal.append({"schema": 1})
        assert path.read_bytes() == b'{"schema": 1}\n'


def test_what_a_killed_process_appended_is_there_and_its_lock_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    script = (
        "import os, signal, sys; from pathlib import Path; from resta.journal import FolderLock, Journal\n"
        "lock = FolderLock(Path(sys.argv[1]).parent)\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for i in range(50): journal.append({'number': i, 'schema': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["number"] for line in read_lines(path)] == list(range(50))
    with FolderLock(tmp_path), Journal(path) as journal:
        journal.append({"number": 50, "schema": 1})
    assert len(list(read_lines(path))) == 51


@pytest.mark.parametrize("opened", [Journal, lambda path: FolderLock(path.parent)])
def test_a_second_writer_is_refused_in_another_process_and_in_this_one(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    script = (
        "import sys; from pathlib import Path; from resta.errors import ResumeError\n"
        "from resta.journal import FolderLock, Journal\n"
        "for kind, place in ((Journal, sys.argv[1]), (FolderLock, sys.argv[2])):\n"
        "    try: kind(Path(place)); print('open', end=' ')\n"
        "    except ResumeError as error: print('refused', 'another process is writing' in str(error), end=' ')\n"
    )
    with opened(path):
        with pytest.raises(ResumeError, match="another process is writing"):
            opened(path)
        found = subprocess.run(
            [sys.executable, "-c", script, str(path), str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert found.stdout.split() == (["refused", "True", "open"] if opened is Journal else ["open", "refused", "True"])
    with opened(path):  # it is free again
        pass


def test_threads_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "lines.jsonl") as journal:

        def write(number: int) -> None:
            for _ in range(50):
                journal.append(Line(number=number, text="x" * 500))

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(line.number for line in read_rows(tmp_path / "lines.jsonl", Line)) == sorted([*range(4)] * 50)


def test_an_append_that_fails_after_any_byte_leaves_nothing_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    write = os.write
    size = len(to_json({"number": 1, "schema": 1})) + 1
    for done in range(size):
        left = [done]

        def full(descriptor: int, data: memoryview, left: list[int] = left) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = write(descriptor, data[: left[0]])
            left[0] -= count
            return count

        path.unlink(missing_ok=True)
        with Journal(path) as journal:
            journal.append({"number": 0, "schema": 1})
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", full)
                with pytest.raises(RestaError, match=r"lines\.jsonl: the disk is full.*What is done is kept"):
                    journal.append({"number": 1, "schema": 1})
            journal.append({"number": 2, "schema": 1})
        assert [line["number"] for line in read_lines(path)] == [0, 2]


def test_a_link_or_a_pipe_in_the_place_of_a_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(RestaError, match=name):
            Journal(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "x"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}x\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"schema": 99}\n', "line 1 has schema 99, expected 1"),
        ("{}\n", "line 1 has schema None, expected 1"),
        ('{"number": 1, "schema": 1, "more": 2}\n', r"unknown keys \['more'\] in a Line"),
        ('{"schema": 1}\n', "no whole Line.*number"),
        ('{"number": "one", "schema": 1}\n', "no whole Line.*number"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_file_and_line(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(text)
    with pytest.raises(ResumeError, match=problem) as caught:
        read_rows(path, Line)
    assert str(path) in str(caught.value)


def test_a_journal_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "nothing")) == []


# -- whole files ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process at some call."""


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_leaves_the_old_content_or_the_new_and_the_next_attempt_writes(
    call: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_whole(path, "old")
    owner = Path if call == "replace" else os
    real = getattr(owner, call)

    def dies(*arguments: Any) -> None:
        found = real(*arguments) if after else None
        if isinstance(found, int):
            os.close(found)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, dies)
        with pytest.raises(Killed):
            write_whole(path, "new")
    assert path.read_text() == ("new" if call == "replace" and after else "old")
    write_whole(path, "newest")
    assert path.read_text() == "newest"
    assert [each.name for each in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> Path:
        order.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_whole(tmp_path / "facts.json", "text")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_a_file_that_is_replaced_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("old")
    path.chmod(mode)
    before = os.umask(0o077)
    try:
        write_whole(path, "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


def test_what_others_put_beside_a_file_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "a.part").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "b.part")
    write_whole(tmp_path / "a", "new")
    write_whole(tmp_path / "b", b"new")
    assert (tmp_path / "precious").read_text() == "x"
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "new"]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RestaError, match=r"nowhere/facts\.json\.part: No such file"):
        write_whole(tmp_path / "nowhere" / "facts.json", "x")


# -- JSON and configurations ---------------------------------------------------------------------------------


@given(plain)
def test_every_document_is_strict_json_whatever_its_numbers(value: Any) -> None:
    assert strict(to_json(value)) == finite(value)
    found = strict(document("test", {"value": value}, schema=3))
    assert found == {"schema": 3, "kind": "test", "value": finite(value)}
    assert list(found)[:2] == ["schema", "kind"]


def test_arrays_and_tuples_are_lists() -> None:
    assert strict(to_json({"a": np.array([[1.0, math.inf]]), "b": (1, math.nan)})) == {
        "a": [[1.0, None]],
        "b": [1, None],
    }


@pytest.mark.parametrize(("text", "problem"), [("{", "is not JSON"), ("[1]", "holds no JSON object")])
def test_a_document_that_is_damaged_is_one_sentence(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ResumeError, match=problem):
        read_object(tmp_path / "facts.json")


jsonable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(jsonable, jsonable)
def test_configurations_differ_in_nothing_only_where_they_are_equal_with_null_for_what_is_absent(
    old: Any, new: Any
) -> None:
    def without_null(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: without_null(item) for key, item in value.items()}
            return {key: item for key, item in kept.items() if item is not None and item != {}} or None
        return [without_null(item) for item in value] if isinstance(value, list) else value

    assert differences(old, old) == []
    assert differences(old, json.loads(json.dumps(old))) == []
    if not differences(old, new):
        assert without_null(old) == without_null(new)


def test_differences_name_the_setting_and_both_values() -> None:
    old = {"train": {"rate": 0.01, "steps": 5}, "banks": [{"name": "a"}, {"name": "b"}], "pair": (1, 2)}
    new = {"train": {"rate": 0.02, "steps": 5}, "banks": [{"name": "a"}, {"name": "c"}], "pair": [1, 2], "limit": 3}
    assert differences(old, new) == [
        'banks[1].name: "b" there, "c" now',
        "limit: null there, 3 now",
        "train.rate: 0.01 there, 0.02 now",
    ]
