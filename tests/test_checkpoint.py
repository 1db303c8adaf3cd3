"""Checkpoint directories, honest and hostile, as real files; every refusal names the file and what to do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from resta.checkpoint import (
    INDEX,
    SINGLE,
    FileIdentity,
    Reader,
    Weights,
    identify,
    inside,
    read_json,
    read_weights,
)
from resta.engine import carry_out, compute_tensors
from resta.errors import RequestError, RestaError
from resta.hub import Located, locate
from resta.plan import make_plan
from resta.recipe import Recipe, make_recipe
from tests.builders import Tensors, llama_tensors, save_model


def read(folder: Path, **choices: str) -> Weights:
    return read_weights(locate(str(folder)), **choices)


def write_index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def bytes_of(weights: Weights, name: str) -> bytes:
    stored = weights.tensors[name].stored
    data = bytearray(stored.spec.nbytes)
    with Reader(weights.files) as reader:
        reader.read(stored, 0, memoryview(data))
    return bytes(data)


def half_trio(trio: dict[str, str]) -> Recipe:
    return make_recipe(
        {"models": trio, "start": "tuned", "terms": [{"delta": "aligned - base", "scale": 0.5}]},
    )


@pytest.fixture
def small() -> Tensors:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4), "c.weight": torch.zeros(2)}


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_checkpoint_in_any_number_of_shards_has_the_same_bytes(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors(0)
    weights = read(save_model(tmp_path / "model", tensors, shards=shards))
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bytes_of(weights, name) == tensor.view(torch.uint8).numpy().tobytes()
    assert len(weights.files) == shards
    assert weights.config["model_type"] == "llama"


def test_any_stretch_of_a_tensor_is_read_as_the_library_reads_it(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small)
    weights = read(folder)
    with safe_open(folder / SINGLE, framework="pt") as library, Reader(weights.files) as reader:
        for name in small:
            whole = library.get_tensor(name).numpy().tobytes()
            for first in range(len(whole)):
                data = bytearray(len(whole) - first)
                reader.read_ahead(weights.tensors[name].stored, first, len(data))
                reader.read(weights.tensors[name].stored, first, memoryview(data))
                assert bytes(data) == whole[first:]


def test_the_identity_of_a_file_is_its_size_time_and_header(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small)
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    expected = FileIdentity(
        bytes=len(raw),
        mtime_ns=(folder / SINGLE).stat().st_mtime_ns,
        header_sha256=hashlib.sha256(raw[8 : 8 + length]).hexdigest(),
        sha256=None,
    )
    assert read(folder).files == {folder.resolve() / SINGLE: expected}


def both_layouts(folder: Path, small: Tensors) -> str:
    write_index(folder, dict.fromkeys(small, SINGLE))
    return "both model.safetensors and model.safetensors.index.json"


def pickles_only(folder: Path, small: Tensors) -> str:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    return r"pytorch_model\.bin is a pickle, .*: resta convert \S+model -o \S+model-safetensors"


def nothing(folder: Path, small: Tensors) -> str:
    (folder / SINGLE).unlink()
    return "has neither model.safetensors nor"


def dangling_link(folder: Path, small: Tensors) -> str:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / "absent.safetensors")
    return "has neither model.safetensors nor"


def link_out(folder: Path, small: Tensors) -> str:
    (folder / SINGLE).rename(folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")
    return r"model\.safetensors: is a link out of its model directory, to .*elsewhere\.safetensors"


def link_out_by_two_steps(folder: Path, small: Tensors) -> str:
    link_out(folder, small)
    (folder / SINGLE).rename(folder / "inner.safetensors")
    (folder / SINGLE).symlink_to("inner.safetensors")
    return "is a link out of its model directory"


def directory_in_its_place(folder: Path, small: Tensors) -> str:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    return "is not a regular file"


def config_linked_out(folder: Path, small: Tensors) -> str:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")
    return r"config\.json: is a link out of its directory"


def config_with_a_repeated_key(folder: Path, small: Tensors) -> str:
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
    return r"config\.json: the key 'model_type' occurs twice"


def config_not_json(folder: Path, small: Tensors) -> str:
    (folder / "config.json").write_bytes(b"\xff{}")
    return r"config\.json: the JSON is not valid UTF-8"


def config_is_a_list(folder: Path, small: Tensors) -> str:
    (folder / "config.json").write_text("[]")
    return r"config\.json: expected a JSON object, found list"


SPOILED = [
    both_layouts, pickles_only, nothing, dangling_link, link_out, link_out_by_two_steps, directory_in_its_place,
    config_linked_out, config_with_a_repeated_key, config_not_json, config_is_a_list,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_directory_is_refused_by_name(
    tmp_path: Path, small: Tensors, spoil: Callable[[Path, Tensors], str]
) -> None:
    folder = save_model(tmp_path / "model", small)
    read(folder)
    expected = spoil(folder, small)
    with pytest.raises(RequestError, match=expected) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


HOSTILE_NAMES = [
    "../secret.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/part.safetensors", "", ".", "..",
    "part.bin", "part.safetensors/..", "n" * 300 + ".safetensors", None, 1, ["part.safetensors"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name)[:30])
def test_an_index_that_names_anything_but_a_plain_file_is_refused(tmp_path: Path, small: Tensors, name: object) -> None:
    save_file({"a.weight": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = write_index(save_model(tmp_path / "model", small), {"a.weight": name})
    (folder / SINGLE).unlink()
    with pytest.raises(RequestError, match="file name without a path") as caught:
        read(folder)
    assert INDEX in str(caught.value)
    assert "a.weight" in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, {}, [], "part.safetensors", 3])
def test_an_index_without_a_map_is_refused(tmp_path: Path, small: Tensors, weight_map: object) -> None:
    folder = write_index(save_model(tmp_path / "model", small), weight_map)
    (folder / SINGLE).unlink()
    with pytest.raises(RequestError, match="expected a weight_map"):
        read(folder)


@settings(deadline=None, max_examples=60)
@given(
    weight_map=st.dictionaries(
        st.text(max_size=5), st.one_of(st.text(max_size=8), st.text(max_size=5).map(lambda s: s + ".safetensors")),
        max_size=3,
    )
)  # fmt: skip
def test_no_index_raises_anything_but_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, weight_map: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    write_index(folder, weight_map)
    with pytest.raises(RequestError):
        read(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", llama_tensors(0), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RequestError, match=r"model-00002-of-00003\.safetensors: .* it is not there; download"):
        read(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small, shards=2)
    save_file(small, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(RequestError, match=r"tensor 'a\.weight' is also in model-00001"):
        read(folder)


def test_an_index_that_disagrees_with_the_headers_is_refused(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small, shards=2)
    honest = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(honest.values()))
    write_index(folder, honest | {"a.weight": second if honest["a.weight"] == first else first})
    with pytest.raises(RequestError, match=r"holds 'a\.weight', but it does not"):
        read(folder)
    write_index(folder, honest | {"ghost": first})
    with pytest.raises(RequestError, match="holds 'ghost', but it does not"):
        read(folder)
    write_index(folder, {name: file for name, file in honest.items() if name != "c.weight"})
    with pytest.raises(RequestError, match=r"holds 'c\.weight', which .* does not list; rebuild the index"):
        read(folder)


def test_a_shard_that_no_index_names_is_not_read(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small, shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"not safetensors at all")
    assert read(folder).tensors.keys() == small.keys()


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1])
def test_a_truncated_file_is_refused_before_any_merge(tmp_path: Path, small: Tensors, keep: int) -> None:
    folder = save_model(tmp_path / "model", small)
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:keep])
    with pytest.raises(RequestError, match=r"model\.safetensors: .*download it again"):
        read(folder)


@pytest.fixture
def hub_cache(tmp_path: Path, small: Tensors) -> Path:
    """The layout of the Hub's cache: snapshots/<commit>/file -> ../../blobs/<sha256>."""
    home = tmp_path / "models--org--name"
    folder = save_model(home / "snapshots" / ("ab" * 20), small)
    (home / "blobs").mkdir()
    for file in list(folder.iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(home / "blobs" / digest)
        file.symlink_to(Path("../../blobs") / digest)
    return folder


def test_links_into_the_blobs_of_the_same_hub_cache_are_followed(hub_cache: Path, small: Tensors) -> None:
    weights = read_weights(Located(source="org/name", folder=hub_cache, hub_id="org/name", commit=hub_cache.name))
    assert weights.tensors.keys() == small.keys()
    identity = weights.files[hub_cache / SINGLE]
    assert identity.sha256 == hashlib.sha256((hub_cache / SINGLE).read_bytes()).hexdigest()
    assert identify(hub_cache / SINGLE, Located(source="a directory", folder=hub_cache)).sha256 is None


def test_links_into_the_blobs_of_another_model_are_not(hub_cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "models--evil--name" / "blobs"
    other.mkdir(parents=True)
    digest = (hub_cache / SINGLE).resolve().name
    (hub_cache / SINGLE).resolve().rename(other / digest)
    (hub_cache / SINGLE).unlink()
    (hub_cache / SINGLE).symlink_to(other / digest)
    with pytest.raises(RequestError, match="is a link out of its model directory"):
        read(hub_cache)
    assert not inside(hub_cache / SINGLE, hub_cache)


def test_a_link_within_the_directory_is_followed(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small)
    (folder / SINGLE).rename(folder / "weights.safetensors")
    (folder / SINGLE).symlink_to("weights.safetensors")
    (tmp_path / "alias").symlink_to(folder)
    assert read(tmp_path / "alias").tensors.keys() == small.keys()


def test_strip_prefix_removes_it_from_the_names_that_have_it_and_nothing_else(tmp_path: Path, small: Tensors) -> None:
    prefixed = {f"module.{name}": tensor for name, tensor in small.items()} | {"extra": torch.ones(1)}
    folder = save_model(tmp_path / "model", prefixed)
    assert read(folder, strip_prefix="module.").tensors.keys() == {*small, "extra"}
    with pytest.raises(RequestError, match="strip_prefix is 'modul_' but no tensor's name begins with it"):
        read(folder, strip_prefix="modul_")


def test_a_prefix_that_would_join_two_tensors_is_refused(tmp_path: Path, small: Tensors) -> None:
    folder = save_model(tmp_path / "model", small | {"module.a.weight": torch.ones(2, 3)})
    with pytest.raises(RequestError, match="two tensors would have the same name"):
        read(folder, strip_prefix="module.")


def test_huge_json_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100_000_001)  # sparse: takes no disk
    with pytest.raises(RequestError, match="100,000,001 bytes; at most 100,000,000 are read"):
        read_json(tmp_path / "config.json")
    with pytest.raises(RequestError, match="cannot be read"):
        read_json(tmp_path / "absent.json")


def test_a_file_cut_after_planning_is_one_error_that_names_it(trio: dict[str, str], tmp_path: Path) -> None:
    plan = make_plan(half_trio(trio))
    victim = Path(trio["base"]).resolve() / SINGLE
    os.truncate(victim, victim.stat().st_size // 2)
    with pytest.raises(RestaError, match=rf"{victim}: ends at byte .* cut after it was planned") as caught:
        carry_out(plan, tmp_path / "out")
    assert not isinstance(caught.value, RequestError)
    assert not (tmp_path / "out").exists()


def test_a_file_removed_after_planning_is_one_error_that_names_it(trio: dict[str, str], tmp_path: Path) -> None:
    plan = make_plan(half_trio(trio))
    victim = Path(trio["base"]).resolve() / SINGLE
    victim.unlink()
    with pytest.raises(RestaError, match=f"{victim}: is gone since its header was read"):
        carry_out(plan, tmp_path / "out")


def rewrite(file: Path) -> None:
    """The same bytes at a later time, as a second download would leave them."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rewrite, Path.unlink], ids=["rewritten", "removed"])
def test_an_input_that_changes_during_the_merge_leaves_no_output(
    trio: dict[str, str], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    plan = make_plan(half_trio(trio))
    victim = Path(trio["aligned"]).resolve() / "model-00001-of-00002.safetensors"
    calls: list[str] = []

    def meddle(name: str, _: int) -> None:
        calls.append(name)
        if len(calls) == len(plan.steps):  # every input is open by now
            change(victim)

    with pytest.raises(RestaError, match=f"{victim}: (changed while|is gone)"):
        carry_out(plan, tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_the_iterator_over_tensors_notices_a_changed_input_too(trio: dict[str, str]) -> None:
    plan = make_plan(half_trio(trio))
    assert len(list(compute_tensors(plan))) == len(plan.steps)
    rewrite(Path(trio["base"]).resolve() / SINGLE)
    with pytest.raises(RestaError, match="changed while it was being read"):
        list(compute_tensors(plan))
