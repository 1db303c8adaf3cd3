"""SHA-256 of whole files, taken beside a merge: those that hashlib gives afterwards, however the merge came about."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import resta.digests
from resta import engine
from resta.auditing import audit
from resta.checkpoint import Reader
from resta.digests import Followed, Follower
from resta.errors import CheckFailedError, RestaError
from resta.fingerprint import sha256_file
from resta.output import Output
from resta.recipe import Recipe
from resta.show import digest_line
from tests.builders import RESTA, RESTA_D, everyday, interrupted, lora_models, recipe_of, run, save_model

NOT_HASHED = "not hashed"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "resta.json").read_text())
    return manifest


def assert_recorded(out: Path, places: dict[str, str]) -> None:
    """Every digest of the manifest is the one of the file, and no file is without one."""
    manifest = manifest_of(out)
    assert manifest["digests"] == "sha256 of every input and output file"
    files = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    del files["resta.json"]
    found = {name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for name, file in files.items()}
    assert manifest["outputs"] == found
    for name, facts in manifest["inputs"].items():
        folder = Path(places[name])
        assert facts["files"].keys() >= {file.name for file in folder.glob("*.safetensors")}
        for file, known in facts["files"].items():
            assert (known["sha256"], known["sha256_from"]) == (sha256(folder / file), "content")


@pytest.mark.parametrize("shard_size", ["5GB", "40kB"])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_input_and_output_has_the_digest_of_its_file(
    shard_size: str, workers: int, trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "UNIT", 1 << 12)  # several units of a tensor
    monkeypatch.setattr(engine, "CHUNK", 1 << 11)
    monkeypatch.setattr(resta.digests, "PIECE", 1000)
    recipe = recipe_of(trio, "base", RESTA_D, output={"shard_size": shard_size})
    result = engine.merge(recipe, tmp_path / "out", workers=workers, digests=True)
    assert_recorded(result.out, trio)
    assert result.digests is not None
    assert result.digests.core_s > 0
    plain = engine.merge(recipe, tmp_path / "plain").out
    for file in plain.iterdir():
        if file.name != "resta.json":
            assert file.read_bytes() == (result.out / file.name).read_bytes()


def test_adapters_and_rows_that_are_not_read_are_hashed_whole(tmp_path: Path) -> None:
    models = lora_models(tmp_path)
    places = {name: model["source"] if isinstance(model, dict) else model for name, model in models.items()}
    rules = [{"match": "*mlp*", "keep": True}]
    plain = {"models": models, "start": "tuned", "terms": RESTA, "rules": rules, "min_coverage": 0.8}
    recipe = Recipe.model_validate(plain)
    assert_recorded(engine.merge(recipe, tmp_path / "out", digests=True).out, places)


def test_without_digests_the_manifest_says_not_hashed(trio: dict[str, str], tmp_path: Path) -> None:
    out = engine.merge(recipe_of(trio, "tuned", RESTA), tmp_path / "out").out
    manifest = manifest_of(out)
    assert manifest["digests"] == NOT_HASHED
    for name, facts in manifest["outputs"].items():
        assert facts["bytes"] == (out / name).stat().st_size
        assert facts["sha256"] == (None if name.endswith(".safetensors") else sha256(out / name))
    assert {known["sha256"] for facts in manifest["inputs"].values() for known in facts["files"].values()} == {None}


@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_merge_rereads_what_it_did_not_write(before: bool, trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "tuned", RESTA, output={"shard_size": "60kB"})
    out = tmp_path / "out"
    interrupted(recipe, out, after=11)
    if before:  # and its data had rotted meanwhile
        file = min((tmp_path / "out.partial" / "model").glob("model-00001-*"))
        with file.open("r+b") as handle:
            handle.seek(-1, 2)
            handle.write(b"\xff")
    assert_recorded(engine.merge(recipe, out, digests=True).out, trio)


def test_what_the_hubs_cache_names_by_its_digest_is_not_read_and_said_to_be_the_hubs(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "hub" / "models--org--base", "c0ffee" + 34 * "0"
    snapshot = cache / "snapshots" / commit
    for folder in (snapshot, cache / "blobs"):
        folder.mkdir(parents=True)
    for file in Path(trio["base"]).iterdir():
        weights = file.suffix == ".safetensors"
        blob = cache / "blobs" / (sha256(file) if weights else hashlib.sha1(file.read_bytes()).hexdigest())
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("resta.hub._download", lambda source, hub_id, revision: snapshot)
    models = {**trio, "base": "org/base@main"}
    files = manifest_of(engine.merge(recipe_of(models, "tuned", RESTA), tmp_path / "plain").out)["inputs"]["base"]
    known = {"sha256": sha256(snapshot / "model.safetensors"), "sha256_from": "hub"}
    assert known.items() <= files["files"]["model.safetensors"].items()
    result = engine.merge(recipe_of(models, "tuned", RESTA), tmp_path / "out", digests=True)
    inputs = manifest_of(result.out)["inputs"]
    assert inputs["base"] == files
    assert inputs["tuned"]["files"]["model-00001-of-00003.safetensors"]["sha256_from"] == "content"
    assert result.digests is not None
    assert snapshot / "model.safetensors" not in result.digests.sha256
    local = {name: trio[name] for name in ("tuned", "aligned")}
    report = audit(result.out, moved=local)  # the Hub's model is found by its commit
    report.raise_if_any()
    assert not any("base" in line for line in report.not_proved)
    assert any(f"that base is org/base@main at commit {commit}" in x for x in audit(result.out, moved=trio).not_proved)
    with (snapshot / "model.safetensors").open("r+b") as file:  # a cache whose file is not what its name says
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(CheckFailedError, match=r"inputs\.base\.files\.model\.safetensors\.sha256"):
        audit(result.out, moved=local).raise_if_any()


def test_an_input_that_changes_while_it_is_hashed_is_no_digest(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(follower: Follower, original: Any = Follower.finish) -> Any:
        taken = original(follower)
        with (Path(trio["base"]) / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        return taken

    monkeypatch.setattr(Follower, "finish", finish)
    with pytest.raises(RestaError, match="changed while it was being read"):
        engine.merge(recipe_of(trio, "tuned", RESTA), tmp_path / "out", digests=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [Reader, Output])
def test_a_read_that_fails_for_the_digests_fails_the_merge_and_is_resumed(
    kind: type, trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, original: Any = kind.read) -> None:
        if threading.current_thread().name == "digests":
            raise RestaError("the disk failed")
        original(*arguments)

    recipe = recipe_of(trio, "tuned", RESTA)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "read", read)
        with pytest.raises(RestaError, match="the disk failed"):
            engine.merge(recipe, tmp_path / "out", digests=True)
    assert "digests" not in {thread.name for thread in threading.enumerate()}
    assert_recorded(engine.merge(recipe, tmp_path / "out", digests=True).out, trio)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.lists(st.integers(0, 5000), max_size=9), min_size=1, max_size=4),
    gap=st.integers(0, 50),
    seed=st.integers(0, 10**6),
    left_out=st.booleans(),
)
def test_no_byte_is_hashed_before_it_is_passed(sizes: list[list[int]], gap: int, seed: int, left_out: bool) -> None:
    """Stretches with gaps between them, passed in any order; some read twice; what is left out is hashed at the end."""
    chance = random.Random(seed)
    contents, begins, ready = [], [], []
    for stretches in sizes:
        content, starts = bytearray(gap), []
        for size in stretches:
            starts.append(len(content))
            content += chance.randbytes(size + gap)
        contents.append(content)
        begins.append(starts)
        ready.append(dict.fromkeys(starts, False))
    finishing = False

    def read(file: int, offset: int, into: memoryview) -> None:
        for begin in begins[file]:
            assert finishing or ready[file][begin] or offset + len(into) <= begin
        into[:] = contents[file][offset : offset + len(into)]

    followed = [
        Followed(name=str(i), size=len(c), read=lambda o, m, i=i: read(i, o, m), begins=[*begins[i], *begins[i][:1]])
        for i, c in enumerate(contents)
    ]
    work = [(i, begin) for i, starts in enumerate(begins) for begin in [*starts, *starts[:1]]]
    chance.shuffle(work)
    with Follower(followed) as follower:
        for i, begin in work[len(work) // 2 if left_out else 0 :]:
            ready[i][begin] = True
            follower.passed([(str(i), begin), ("not followed", 0)])
        finishing = True
        taken = follower.finish()
    assert taken.sha256 == {str(i): hashlib.sha256(content).hexdigest() for i, content in enumerate(contents)}


def test_the_command_prints_what_the_digests_took(trio: dict[str, str], tmp_path: Path) -> None:
    done = run(*everyday(trio, tmp_path / "out", "--scale", 0.5, "--digests"))
    assert done.exit_code == 0, done.output
    assert "SHA-256 of 7 files took 0.0 s of one core" in done.stdout
    assert_recorded(tmp_path / "out", trio)
    done = run(*everyday(trio, tmp_path / "json", "--scale", 0.5, "--digests", "--json"))
    assert json.loads(done.stdout)["digests"]["files"] == 7
    done = run(*everyday(trio, tmp_path / "none", "--scale", 0.5, "--json"))
    assert json.loads(done.stdout)["digests"] is None


@pytest.mark.parametrize("hashed", [True, False])
def test_what_an_earlier_run_completed_is_said_as_it_recorded_it(
    hashed: bool, trio: dict[str, str], tmp_path: Path
) -> None:
    result = engine.merge(recipe_of(trio, "tuned", RESTA), tmp_path / "out", digests=hashed)
    words = "sha256 of every input and output file" if hashed else NOT_HASHED
    assert f"{words}: so an earlier run wrote" in digest_line(replace(result, digests=None))


def test_a_file_that_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(RestaError, match="gone: cannot be read"):
        sha256_file(tmp_path / "gone")
    folder = save_model(tmp_path / "m", {})
    assert sha256_file(folder / "config.json") == sha256(folder / "config.json")
