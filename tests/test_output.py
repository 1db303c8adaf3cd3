from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resta import engine, output
from resta.errors import RequestError, RestaError, ResumeError
from resta.recipe import Recipe
from tests.builders import RESTA, RESTA_D, Crash, digests, interrupted, llama_tensors, nudged, recipe_of, save_model


@pytest.fixture
def recipe(trio: dict[str, str]) -> Recipe:
    return recipe_of(trio, "base", RESTA_D, output={"files_from": "tuned", "shard_size": "100kB"})


@pytest.fixture
def whole(recipe: Recipe, tmp_path: Path) -> dict[str, str]:
    """Digests of an undisturbed merge."""
    return digests(engine.merge(recipe, tmp_path / "whole").out)


CALLS = ("pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir", "open", "write")


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Make the process stop at its n-th change of the disk; returns how many calls were made."""
    made = 0

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == number:
                if call in (os_pwrite, os_write):  # a torn write: half of it arrives
                    call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                raise Crash
            if made > number:
                raise Crash
            return call(*args, **kwargs)

        return wrapped

    os_pwrite, os_write = os.pwrite, os.write
    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(output, "rename_new", wrap(output.rename_new))  # one call, whatever the system makes of it
    return lambda: made


@pytest.mark.parametrize("replacing", [False, True])
def test_a_crash_at_any_change_of_the_disk_resumes_to_the_same_bytes(
    recipe: Recipe, whole: dict[str, str], trio: dict[str, str], tmp_path: Path, replacing: bool
) -> None:
    out = tmp_path / "out"
    old = recipe_of(trio, "tuned", RESTA)
    if replacing:
        old_digests = digests(engine.merge(old, out).out)
    number, crashed = 0, True
    while crashed:
        number += 1
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, number)
            try:
                engine.merge(recipe, out, workers=1, overwrite=replacing)
                crashed = False
            except Crash:
                pass
        if out.exists():  # whole or not at all, at every moment
            assert digests(out) in ([whole, old_digests] if replacing else [whole])
        if crashed:
            cleaned_up = not any(output.partial_of(out).glob("*"))
            if not (out.exists() and digests(out) == whole and cleaned_up):  # else nothing tells it from finished
                engine.merge(recipe, out, workers=1, overwrite=replacing)
            assert digests(out) == whole
            for file in sorted(out.rglob("*"), reverse=True):
                file.unlink()
            out.rmdir()
            if replacing:
                engine.merge(old, out)
    assert number > 30
    assert digests(out) == whole


# A merge that kills itself at its n-th change of the disk, in the middle of it where that is a write.
SCRIPT = """
import os, signal, sys
from resta.engine import merge
left = int(sys.argv[3])
def deadly(call):
    def made(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            if call in (os_write, os_pwrite):
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return made
os_write, os_pwrite = os.write, os.pwrite
for name in ("write", "pwrite", "fsync", "rename", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
merge(sys.argv[1], sys.argv[2], workers=2)
"""
NEVER = "-1"


def test_kill_9_in_a_loop_ends_in_the_same_bytes(tmp_path: Path) -> None:
    base = {name: value.repeat(40, *[1] * (value.dim() - 1)) for name, value in llama_tensors(0).items()}
    for seed, name in enumerate(("base", "aligned", "tuned")):
        save_model(tmp_path / name, nudged(base, seed))
    (tmp_path / "r.yaml").write_text(
        "models: {tuned: tuned, aligned: aligned, base: base}\nstart: base\n"
        "terms: [{delta: tuned - base, scale: 1, sparsify: {density: 0.7}}, {delta: aligned - base, scale: 0.5}]\n"
        "output: {shard_size: 2MB}\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.yaml")]
    subprocess.run([*command, str(tmp_path / "whole"), NEVER], check=True)
    for change in (1, 8, 21, 3, 14, 9):
        killed = subprocess.run([*command, str(out), str(change)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
    subprocess.run([*command, str(out), NEVER], check=True)
    assert digests(out) == digests(tmp_path / "whole")
    again = subprocess.run([*command, str(out), NEVER], capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "already exists" in again.stderr
    assert digests(out) == digests(tmp_path / "whole")


def test_resume_does_not_compute_what_is_there(recipe: Recipe, whole: dict[str, str], tmp_path: Path) -> None:
    interrupted(recipe, tmp_path / "out", after=15)
    before = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    written: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (written.append(at), pwrite(fd, data, at))[1])
        engine.merge(recipe, tmp_path / "out", workers=1)
    units = len(list(engine.units_of(engine.make_plan(recipe))))
    headers = len([name for name in whole if name.endswith(".safetensors")])
    assert len(before) == 16
    assert len(written) <= units - 15 + headers
    assert digests(tmp_path / "out") == whole


def test_torn_and_altered_tensors_are_found_and_redone(recipe: Recipe, whole: dict[str, str], tmp_path: Path) -> None:
    model = interrupted(recipe, tmp_path / "out", after=15)
    for file in sorted(model.glob("*.safetensors"))[:2]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        data[-3] ^= 1
        file.write_bytes(data)
    (model / "stale.safetensors").write_bytes(b"left over")
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"unit":"20:0","check')  # torn by a power cut
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_another_recipe_or_a_changed_input_may_not_resume(recipe: Recipe, trio: dict[str, str], tmp_path: Path) -> None:
    interrupted(recipe, tmp_path / "out", after=5)
    with pytest.raises(ResumeError, match=r"begun with another recipe.*rm -r"):
        engine.merge(recipe.model_copy(update={"seed": 1}), tmp_path / "out")
    file = Path(trio["base"]) / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(ResumeError, match=r"other inputs"):
        engine.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_cannot_write_the_same_output(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tried = []

    def second(name: str, nbytes: int) -> None:
        if not tried:
            with pytest.raises(ResumeError, match="another process"):
                engine.merge(recipe, out)
            tried.append(name)

    engine.merge(recipe, out, workers=1, progress=second)
    assert tried


def test_a_foreign_partial_directory_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match="not an unfinished merge"):
        engine.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_is_one_error_and_is_resumed(recipe: Recipe, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import resource, sys\n"
        "from resta.engine import merge\n"
        "from resta.recipe import make_recipe\n"
        "import json\n"
        "recipe = make_recipe(json.loads(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
        "from resta.errors import RestaError\n"
        "try:\n    merge(recipe, sys.argv[2], workers=2)\n"
        "except RestaError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    plain = json.dumps(recipe.model_dump(mode="json"))
    done = subprocess.run([sys.executable, "-c", script, plain, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stdout
    assert "resume" in done.stdout
    assert not out.exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    engine.merge(recipe, out)
    assert digests(out) == whole


def test_a_disk_that_is_too_small_is_refused_before_writing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(RequestError, match="free"):
        engine.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_overwrite_replaces_an_output_of_resta_and_leaves_nothing_stale(
    recipe: Recipe, whole: dict[str, str], trio: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    engine.merge(recipe_of(trio, "tuned", RESTA, output={"shard_size": "10kB"}), out)
    with pytest.raises(RequestError, match="--overwrite"):
        engine.merge(recipe, out)
    engine.merge(recipe, out, overwrite=True)
    assert digests(out) == whole


def test_overwrite_never_replaces_what_resta_did_not_make(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photos.zip").write_bytes(b"1")
    with pytest.raises(RequestError, match="was not made by resta"):
        engine.merge(recipe, tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(RequestError, match="not a directory"):
        engine.merge(recipe, tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(RequestError, match="not a directory"):
        engine.merge(recipe, tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("place", ["base", "base/out", ".", "aligned/../base"])
def test_an_output_that_overlaps_an_input_is_refused(
    recipe: Recipe, trio: dict[str, str], tmp_path: Path, place: str
) -> None:
    before = digests(tmp_path)
    with pytest.raises(RequestError, match="overlap"):
        engine.merge(recipe, tmp_path / place, overwrite=True)
    assert digests(tmp_path) == before


def test_an_error_while_working_keeps_inputs_and_partial(
    recipe: Recipe, whole: dict[str, str], trio: dict[str, str], tmp_path: Path
) -> None:
    before = {name: digests(Path(path)) for name, path in trio.items()}
    calls = []

    def failing(fd: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if len(calls) == 12:
            raise OSError(5, "Input/output error")
        return pwrite(fd, data, at)

    pwrite = os.pwrite
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(RestaError, match="Input/output error"):
            engine.merge(recipe, tmp_path / "out", workers=3)
    assert {name: digests(Path(path)) for name, path in trio.items()} == before
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_an_error_of_a_background_fsync_is_not_lost(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def failing_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(engine, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(RestaError, match="Input/output error"):
        engine.merge(recipe, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    engine.merge(recipe, tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == whole
