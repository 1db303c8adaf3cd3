"""The name OUT: what others put there is never deleted, and what cannot work is refused before any work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from resta import engine, output
from resta.adapter import CONFIG as ADAPTER_CONFIG
from resta.adapter import FILE as ADAPTER
from resta.auditing import audit
from resta.cli import main
from resta.errors import ChangedError, RequestError, RestaError, ResumeError
from resta.recipe import Recipe, make_recipe
from tests.builders import RESTA, RESTA_D, digests, interrupted, read, recipe_of, save_model


@pytest.fixture
def recipe(trio: dict[str, str]) -> Recipe:
    return recipe_of(trio, "tuned", RESTA, output={"shard_size": "100kB"})


@pytest.fixture
def other(trio: dict[str, str]) -> Recipe:
    return recipe_of(trio, "base", RESTA_D, output={"files_from": "tuned"})


def merge_while(recipe: Recipe, out: Path, happens: Callable[[], object], *, overwrite: bool = False) -> None:
    """Merge, and let something happen at OUT when the first tensor is in place."""
    done: list[object] = []
    engine.merge(
        recipe,
        out,
        workers=1,
        overwrite=overwrite,
        progress=lambda *_: done.append(happens()) if not done else None,
    )


# ---- what appears at OUT while the merge runs


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "link"])
def test_what_appears_at_out_during_the_merge_is_left_alone_and_the_work_kept(
    recipe: Recipe, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("years of work")

    def appears() -> None:
        if kind == "file":
            out.write_text("years of work")
        elif kind == "link":
            out.symlink_to(elsewhere)
        else:
            out.mkdir()
            if kind == "directory":
                (out / "thesis").write_text("years of work")

    with pytest.raises(RequestError, match=r"appeared while the merge was running and was left alone.*same command"):
        merge_while(recipe, out, appears, overwrite=overwrite)
    if kind == "file":
        assert out.read_text() == "years of work"
    elif kind == "empty directory":
        assert out.is_dir()
        assert not any(out.iterdir())
    else:
        assert (out / "thesis").read_text() == "years of work"
    assert (elsewhere / "thesis").read_text() == "years of work"
    out.rename(tmp_path / "moved")  # what the message says
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Run, "_compute", lambda *_: pytest.fail("computed what was there"))
        engine.merge(recipe, out, overwrite=overwrite)
    assert digests(out) == digests(engine.merge(recipe, tmp_path / "undisturbed").out)


def test_of_two_merges_to_one_name_the_second_replaces_nothing(recipe: Recipe, other: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second_looks_then_first_finishes(*_: object, **__: object) -> int:
        patch.undo()
        engine.merge(recipe, out)
        return 1 << 60

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "check_space", second_looks_then_first_finishes)  # after the second's look at OUT
        with pytest.raises(RequestError, match="already exists"):
            engine.merge(other, out)
    assert json.loads((out / "resta.json").read_text())["recipe_digest"] == recipe.digest
    assert not output.partial_of(out).exists()


def test_what_is_swapped_in_between_look_and_rename_is_put_back(
    recipe: Recipe, other: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, looks = engine.merge(other, tmp_path / "out").out, []
    check_vacant = output.check_vacant

    def swaps(place: Path, *, overwrite: bool) -> None:
        check_vacant(place, overwrite=overwrite)
        looks.append(place)
        if place == out and len(looks) == 2:  # under the lock, before the rename
            shutil.rmtree(out)
            out.mkdir()
            (out / "thesis").write_text("years of work")

    monkeypatch.setattr(output, "check_vacant", swaps)
    with pytest.raises(RequestError, match="not made by resta"):
        engine.merge(recipe, out, overwrite=True)
    assert (out / "thesis").read_text() == "years of work"


def test_an_empty_directory_that_was_there_before_is_used(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (engine.merge(recipe, tmp_path / "out").out / "resta.json").is_file()


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL])
def test_a_rename_to_a_new_name_replaces_nothing_whatever_the_system_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    class Libc:
        def __init__(self, *_: object, **__: object) -> None:
            if code is not None:
                self.renameat2 = lambda *_: -1

    if code is not None:
        monkeypatch.setattr("ctypes.get_errno", lambda: code)
    for library in (None, Libc):
        if library:
            monkeypatch.setattr("ctypes.CDLL", library)
        for name in ("source", "full", "empty"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "full" / "file").write_text("x")
        for name in ("full", "empty"):
            with pytest.raises(FileExistsError):
                output.rename_new(tmp_path / "source", tmp_path / name)
        output.rename_new(tmp_path / "source", tmp_path / "new")
        (tmp_path / "new").rmdir()
        if code is not None:
            break
    assert (tmp_path / "full" / "file").read_text() == "x"


def test_what_others_put_into_the_working_directory_stays(recipe: Recipe, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    merge_while(recipe, tmp_path / "out", lambda: (partial / "notes.txt").write_text("mine"))
    assert (tmp_path / "out" / "resta.json").is_file()
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]


# ---- what cannot work


def refused_before_work(recipe: Recipe, out: Path, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Output", lambda *_, **__: pytest.fail("work began"))
        with pytest.raises(RequestError, match=message):
            engine.merge(recipe, out)


def test_a_place_where_no_directory_can_be_made_is_refused_before_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused_before_work(recipe, tmp_path / "file" / "out", r"file is not a directory")
    refused_before_work(recipe, tmp_path / ("n" * 250), "name too long")
    refused_before_work(recipe, tmp_path.joinpath(*["deep" * 50] * 20), "name too long")
    refused_before_work(recipe, tmp_path / "circle" / "out", "choose another output")
    refused_before_work(recipe, Path("/"), "not a name for a new directory")
    refused_before_work(recipe, tmp_path / "..", "not a name for a new directory")
    refused_before_work(recipe, Path("a\0b"), "choose another output")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.partial").symlink_to(tmp_path / "elsewhere")
    refused_before_work(recipe, tmp_path / "link", "is not a plain directory")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    refused_before_work(recipe, Path(), "runs in.*restored")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user who may not; the tests may be run by root
    refused_before_work(recipe, tmp_path / "new" / "out", "cannot be written to")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_a_mount_point_is_refused_before_work(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused_before_work(recipe, Path("/proc"), "mount point.*restored")
    (tmp_path / "a b").mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 98:0 /x {str(tmp_path).replace(' ', chr(92) + '040')}/a\\040b rw - ext3 /dev/x rw\n")
    original = output.Path
    monkeypatch.setattr(output, "Path", lambda name="": table if name == "/proc/self/mountinfo" else original(name))
    assert output._is_mount_point(tmp_path / "a b")  # a bind mount of the same file system
    assert not output._is_mount_point(tmp_path)


@pytest.mark.parametrize("arguments", [["-o", "."], ["-o", "/"], ["-o", "x" * 250]])
def test_the_command_line_refuses_such_a_name_in_a_sentence(
    trio: dict[str, str], arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    flags = ["merge", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "--scale", "1", *arguments]
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, [*flags, *more])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.output
    assert not any(Path().iterdir())


# ---- resume


def test_an_input_that_changes_meanwhile_leaves_nothing_that_blocks_the_next_run(
    recipe: Recipe, trio: dict[str, str], tmp_path: Path
) -> None:
    file = Path(trio["base"]) / "model.safetensors"
    with pytest.raises(ChangedError, match="run the same command again"):
        merge_while(recipe, tmp_path / "out", lambda: os.utime(file, ns=(1, 1)))
    assert not (tmp_path / "out.partial").exists()
    engine.merge(recipe, tmp_path / "out")


def test_what_another_version_began_is_not_finished(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out", after=5)
    for name, value in (("VERSION", "9.9"), ("MERGE_CODE", 99)):
        with monkeypatch.context() as patch:
            patch.setattr(f"resta.plan.{name}", value)
            with pytest.raises(ResumeError, match="another version of resta"):
                engine.merge(recipe, tmp_path / "out")
    engine.merge(recipe, tmp_path / "out")


ODD_LINES = [b'{"unit":"3:0"}', b'{"unit":["3:0"],"checksum":[]}', b"[]", b"\xff\x00", b"null", b"{}", b'"' * 70]


@pytest.mark.parametrize("line", ODD_LINES)
def test_an_odd_line_in_the_journal_ends_what_is_believed(recipe: Recipe, tmp_path: Path, line: bytes) -> None:
    whole = digests(engine.merge(recipe, tmp_path / "whole").out)
    interrupted(recipe, tmp_path / "out", after=8)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:4], line + b"\n", *lines[4:]]))
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_an_altered_line_of_the_journal_is_not_believed(recipe: Recipe, tmp_path: Path) -> None:
    whole = digests(engine.merge(recipe, tmp_path / "whole").out)
    interrupted(recipe, tmp_path / "out", after=8)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"intended":', b'"intended":1', 3))
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_a_journal_that_resta_did_not_write_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_text('{"mine": true}\n')
    with pytest.raises(ResumeError, match="not an unfinished merge"):
        engine.merge(recipe, tmp_path / "out")
    assert journal.read_text() == '{"mine": true}\n'
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(RestaError, match="FIFO"):
        engine.merge(recipe, tmp_path / "out")


def test_the_line_that_commits_is_on_the_disk_before_anything_is_renamed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename_new = os.fsync, output.rename_new

    def note(descriptor: int) -> None:
        fsync(descriptor)
        target = Path(f"/proc/self/fd/{descriptor}").resolve()
        committed = target.name == "journal.jsonl" and b'"commit"' in target.read_bytes()
        calls.append("journal with commit" if committed else target.name)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(output, "rename_new", lambda *names: (calls.append("rename"), rename_new(*names))[1])
    engine.merge(recipe, tmp_path / "out")
    rename = calls.index("rename")
    assert calls.index("journal with commit") < calls.index("out.partial") < rename
    assert tmp_path.name in calls[rename:]


def test_a_disk_that_lost_the_line_that_commits_is_no_dead_end(recipe: Recipe, other: Recipe, tmp_path: Path) -> None:
    """As a disk leaves it that answers fsync and does not obey: both renames there, the line gone."""
    out = engine.merge(other, tmp_path / "out").out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_remove_partial", lambda _: None)
        engine.merge(recipe, out, overwrite=True)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    whole = digests(out)
    with pytest.raises(RequestError, match="--overwrite"):
        engine.merge(recipe, out)
    engine.merge(recipe, out, overwrite=True)
    assert digests(out) == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_commit_whose_result_is_not_there_is_not_taken_for_done(
    recipe: Recipe, other: Recipe, tmp_path: Path
) -> None:
    out = engine.merge(other, tmp_path / "out").out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.Output, "_appear", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.merge(recipe, out, overwrite=True)
    shutil.rmtree(tmp_path / "out.partial" / "model")  # somebody made room
    engine.merge(recipe, out, overwrite=True)
    assert json.loads((out / "resta.json").read_text())["recipe_digest"] == recipe.digest


def test_a_disk_full_while_only_the_journal_grows_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    whole = digests(engine.merge(recipe, tmp_path / "whole").out)
    write, lines = os.write, []

    def full(descriptor: int, data: memoryview) -> int:
        lines.append(data)
        if len(lines) == 6:
            return write(descriptor, data[:10])
        if len(lines) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RestaError, match=r"journal.jsonl: the disk is full.*make room, then.*resume"):
            engine.merge(recipe, tmp_path / "out", workers=2)
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_a_weight_file_that_is_cut_while_it_is_read_back_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    whole = digests(engine.merge(recipe, tmp_path / "whole").out)
    interrupted(recipe, tmp_path / "out", after=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(RestaError, match="ends at byte"):
            engine.merge(recipe, tmp_path / "out")
    engine.merge(recipe, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


# ---- adapters


def adapter_recipe(folder: Path, base: str, alpha: int) -> Recipe:
    """RESTA on a LoRA fine-tune of every up projection."""
    if not folder.exists():
        folder.mkdir()
        names = [f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_" for layer in range(2)]
        factors = {f"{name}A.weight": torch.ones(2, 64) / 64 for name in names}
        save_file(factors | {f"{name}B.weight": torch.ones(128, 2) for name in names}, folder / ADAPTER)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "base_model_name_or_path": "base"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return make_recipe(
        {
            "models": {"base": base, "tuned": {"source": str(folder), "on": "base"}},
            "start": "base",
            "terms": [{"delta": "tuned - base", "scale": 1.0}],
        }
    )


def test_an_adapter_whose_scaling_changed_is_not_resumed_and_the_manifest_holds_its_config(
    trio: dict[str, str], tmp_path: Path
) -> None:
    recipe = adapter_recipe(tmp_path / "lora", trio["base"], alpha=16)
    interrupted(recipe, tmp_path / "out", after=12)
    status = (tmp_path / "lora" / ADAPTER_CONFIG).stat()
    adapter_recipe(tmp_path / "lora", trio["base"], alpha=64)
    os.utime(tmp_path / "lora" / ADAPTER_CONFIG, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ResumeError, match="other inputs"):
        engine.merge(recipe, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.partial")
    out = engine.merge(recipe, tmp_path / "out").out
    recorded = json.loads((out / "resta.json").read_text())["inputs"]["tuned"]["files"]
    content = (tmp_path / "lora" / ADAPTER_CONFIG).read_bytes()
    assert recorded[ADAPTER_CONFIG]["sha256"] == hashlib.sha256(content).hexdigest()
    places = {"base": trio["base"], "tuned": str(tmp_path / "lora")}
    assert not audit(out, moved=places).findings
    adapter_recipe(tmp_path / "lora", trio["base"], alpha=16)
    assert ADAPTER_CONFIG in audit(out, moved=places).findings[0].what


# ---- many files


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from resta.cli import main
main(sys.argv[1:])
"""


def test_three_models_of_three_hundred_shards_merge_to_three_hundred_with_256_descriptors(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.w.weight": torch.full((16, 16), float(n)) for n in range(300)}
    for seed, name in enumerate(("base", "aligned", "tuned")):
        save_model(tmp_path / name, {key: value + seed for key, value in tensors.items()}, shards=300)
    arguments = ["merge", "tuned", "--aligned", "aligned", "--base", "base", "--scale", "0.5"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments, "--shard-size", "1kB", "--quiet", "--workers", "4", "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("model-*-of-00300.safetensors"))) == 300
    merged = read(tmp_path / "out")
    assert all(torch.equal(merged[name], value + 2.5) for name, value in tensors.items())
