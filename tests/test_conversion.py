"""PyTorch files to safetensors: transformers reads the result as it read the files; what is hostile writes nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import resta
from resta import engine, output
from resta.cli import main
from resta.errors import RequestError
from resta.hub import refuse_pytorch
from tests.builders import (
    CONFIG,
    Crash,
    Tensors,
    assert_same_tensors,
    digests,
    llama_tensors,
    nudged,
    read,
    save_model,
    zip_of,
)

FILE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def save_pytorch(folder: Path, tensors: Tensors, *, shards: int = 1, **config: Any) -> Path:
    """Write a model directory as it was before safetensors; returns the directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer_config.json").write_text("{}")
    if shards == 1:
        torch.save(OrderedDict(tensors), folder / FILE)
        return folder
    weight_map, names = {}, list(tensors)
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def a_llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes, **config))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "tied": lambda: a_llama(tie_word_embeddings=True),
    "untied, in bfloat16": lambda: a_llama(tie_word_embeddings=False).to(torch.bfloat16),
    "float16 in a config of bfloat16": lambda: a_llama(dtype="bfloat16").to(torch.float16),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_result_as_it_read_the_files(tmp_path: Path, name: str) -> None:
    model, folder = MODELS[name](), tmp_path / "model"
    model.config.architectures = [type(model).__name__]
    said = model.config.to_dict()
    model.config.save_pretrained(folder)
    if name == "float16 in a config of bfloat16":
        said["dtype"] = "bfloat16"
        (folder / "config.json").write_text(json.dumps(said))
    torch.save(model.state_dict(), folder / FILE)
    config = (folder / "config.json").read_bytes()
    result = resta.convert(folder, tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, tmp_path / "out"))
    assert_same_tensors(after.state_dict(), before.state_dict())
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    assert any("tied" in each for each in result.plan.left_out) == (name in ("tied", "GPT-2"))


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_keeps_its_dtype_shape_and_bytes(tmp_path: Path, shards: int) -> None:
    tensors = llama_tensors(0) | {
        "turned": torch.arange(6000.0).reshape(60, 100).t(),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "mask": torch.tensor([True, False]),
        "narrow": torch.ones(3).to(torch.float8_e4m3fn),
        "empty": torch.ones(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    folder = save_pytorch(tmp_path / "model", tensors, shards=shards)
    resta.convert(folder, tmp_path / "out", shard_size="40kB")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert_same_tensors(read(tmp_path / "out"), plain)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json", "model.safetensors.index.json", "resta.json"} <= written
    assert not [name for name in written if ".bin" in name]
    assert resta.audit(tmp_path / "out", moved={"model": str(folder)}).findings == ()


def test_a_shared_output_layer_that_the_config_does_not_tie_is_written_out(tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    resta.convert(save_pytorch(tmp_path / "model", tensors), tmp_path / "out")
    assert_same_tensors(read(tmp_path / "out"), tensors)


def test_an_audit_finds_what_is_no_more_what_it_was(tmp_path: Path) -> None:
    folder = save_pytorch(tmp_path / "model", llama_tensors(0))
    resta.convert(folder, tmp_path / "out", digests=True)
    assert resta.audit(tmp_path / "out", moved={"model": str(folder)}).findings == ()
    weights = tmp_path / "out" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    found = resta.audit(tmp_path / "out", moved={"model": str(folder)}).findings
    assert any("not what recipe and inputs give" in each.problem for each in found)
    whole[-1] ^= 1
    weights.write_bytes(whole)
    original = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(original.replace(raw(llama_tensors(0)["model.norm.weight"]), bytes(128)))
    found = resta.audit(tmp_path / "out", moved={"model": str(folder)}).findings
    assert any("model.norm.weight" in each.what for each in found)  # the directory's checksums were left as they were
    manifest = tmp_path / "out" / "resta.json"
    manifest.write_text(manifest.read_text().replace('"kind": "convert"', '"kind": "merge"'))
    (folder / FILE).write_bytes(original)
    found = resta.audit(
        tmp_path / "out", moved={"model": str(save_model(tmp_path / "other", llama_tensors(0)))}
    ).findings
    assert any("is of a merge, and its recipe has 0 terms" in each.problem for each in found)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).numpy())


@pytest.mark.parametrize("after", [1, 5, 20])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(tmp_path: Path, after: int) -> None:
    folder = save_pytorch(tmp_path / "model", llama_tensors(0), shards=3)
    resta.convert(folder, tmp_path / "whole")

    def stop(name: str, nbytes: int) -> None:
        nonlocal after
        after -= 1
        if not after:
            raise Crash

    with pytest.raises(Crash):
        resta.convert(folder, tmp_path / "out", workers=1, progress=stop)
    assert not (tmp_path / "out").exists()
    resta.convert(folder, tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


KILLED = """
import os, signal, sys, resta
left = int(sys.argv[3])
def stop(name, nbytes):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
resta.convert(sys.argv[1], sys.argv[2], workers=1, progress=stop)
"""


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder, out = save_pytorch(tmp_path / "model", llama_tensors(0), shards=2), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out), "12"], check=False)
    assert done.returncode == -9
    assert output.partial_of(out).is_dir()
    assert not out.exists()
    resta.convert(folder, out)
    resta.convert(folder, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
    assert not output.partial_of(out).exists()


class Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def hostile(folder: Path) -> None:
    pickled = pickle.dumps({"w": Opens(folder.parent / "planted")}, protocol=2)
    (folder / FILE).write_bytes(zip_of({"x/data.pkl": pickled, "x/version": b"3\n"}))


def reindexed(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def doubled(folder: Path) -> None:
    shards = sorted(folder.glob("*.bin"))
    torch.save(torch.load(shards[0]) | torch.load(shards[1]), shards[1])


FIRST = "pytorch_model-00001-of-00002.bin"
SPOILED: dict[str, tuple[int, Callable[[Path], Any], str]] = {
    "a call": (1, hostile, r"pytorch_model\.bin: its pickle asks for io\.open at 'w', and was not run"),
    "an old file": (
        1,
        lambda folder: torch.save({"w": torch.ones(1)}, folder / FILE, _use_new_zipfile_serialization=False),
        r"pytorch_model\.bin: is a bare pickle",
    ),
    "a tensor twice": (2, doubled, "is also in pytorch_model-00001-of-00002.bin"),
    "a missing shard": (2, lambda folder: (folder / FIRST).unlink(), f"{FIRST}: .* names it but it is not there"),
    "a missing tensor": (2, lambda folder: reindexed(folder, lambda map: map.update(ghost=FIRST)), "'ghost', but it"),
    "an unlisted tensor": (
        2,
        lambda folder: reindexed(folder, lambda map: map.pop("model.norm.weight")),
        "'model.norm.weight', which pytorch_model.bin.index.json does not list",
    ),
    "a path": (2, lambda folder: reindexed(folder, lambda map: map.update(w="../x.bin")), r"'w' is in '\.\./x\.bin'"),
    "another suffix": (2, lambda folder: reindexed(folder, lambda map: map.update(w="x.pt")), "expected a .bin file"),
    "both layouts": (2, lambda folder: torch.save({}, folder / FILE), "has both pytorch_model.bin and"),
    "safetensors": (1, lambda folder: (folder / "model.safetensors").touch(), "there is nothing to convert"),
    "nothing": (1, lambda folder: (folder / FILE).unlink(), "has neither pytorch_model.bin nor"),
    "no tensors": (1, lambda folder: torch.save({}, folder / FILE), "hold no tensor"),
    "a reserved name": (1, lambda folder: torch.save({"__metadata__": torch.ones(1)}, folder / FILE), "__metadata__"),
    "half a character": (1, lambda folder: torch.save({"\ud800": torch.ones(1)}, folder / FILE), "is not UTF-8"),
    "a FIFO": (1, lambda folder: ((folder / FILE).unlink(), os.mkfifo(folder / FILE)), "is not a regular file"),
    "a link out": (
        1,
        lambda folder: ((folder / FILE).rename(folder.parent / FILE), (folder / FILE).symlink_to(folder.parent / FILE)),
        "is a link out of its model directory",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_converted_is_refused_by_name_and_writes_nothing(tmp_path: Path, case: str) -> None:
    shards, spoil, message = SPOILED[case]
    folder = save_pytorch(tmp_path / "model", llama_tensors(0), shards=shards)
    spoil(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RequestError, match=message):
        resta.convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # no output, and nothing that a pickle planted


def test_a_merge_names_the_command_that_converts_and_takes_what_comes_of_it(tmp_path: Path) -> None:
    base = llama_tensors(0)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", nudged(base, 1))
    save_pytorch(tmp_path / "aligned", nudged(base, 2), shards=2)

    def merge(aligned: str) -> Any:
        models = ["--aligned", aligned, "--base", str(tmp_path / "base"), "--scale", "0.5"]
        return CliRunner().invoke(main, ["merge", str(tmp_path / "tuned"), *models, "-o", str(tmp_path / "out")])

    refused = merge(str(tmp_path / "aligned"))
    assert refused.exit_code == 2
    words = shlex.split(re.search(r"resta (convert .*)", refused.stderr)[1])  # type: ignore[index]
    converted = CliRunner().invoke(main, words)
    assert converted.exit_code == 0, converted.output
    check = shlex.split(re.search(r"resta (audit .*)", converted.stdout)[1])  # type: ignore[index]
    assert CliRunner().invoke(main, check).exit_code == 0
    assert merge(words[-1]).exit_code == 0
    assert (tmp_path / "out" / "resta.json").is_file()


def test_what_would_load_pytorch_files_is_refused_before_a_library_does(tmp_path: Path) -> None:
    from resta.redeval.models import LocalSpec, load_classifier, load_local

    folder = str(save_pytorch(tmp_path / "a model", llama_tensors(0)))
    command = re.escape(f"resta convert '{folder}' -o '{folder}-safetensors'")
    for load in (lambda: refuse_pytorch(folder), lambda: load_local(LocalSpec(model=folder)),
                 lambda: load_classifier(LocalSpec(model=folder))):  # fmt: skip
        with pytest.raises(RequestError, match=command):
            load()
    refuse_pytorch(str(save_model(tmp_path / "other", llama_tensors(0))))


def test_a_conversion_runs_without_torch_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder = str(save_pytorch(tmp_path / "model", llama_tensors(0)))
    script = "import sys, resta; resta.convert(*sys.argv[1:]); assert 'torch' not in sys.modules"
    dry = CliRunner().invoke(main, ["convert", folder, "-o", str(tmp_path / "out"), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "21 tensors of 1 files would be written" in dry.stdout
    assert not (tmp_path / "out").exists()
    subprocess.run([sys.executable, "-c", script, folder, str(tmp_path / "out")], check=True)
    wrong = CliRunner().invoke(main, ["convert", folder, "-o", str(tmp_path / "new"), "--shard-size", "much"])
    assert wrong.exit_code == 2
    told = CliRunner().invoke(main, ["convert", folder, "-o", str(tmp_path / "new"), "--json", "--digests"])
    assert json.loads(told.stdout)["tensors"] == 21


def test_a_merge_without_terms_is_no_merge(tmp_path: Path) -> None:
    from resta.recipe import Recipe

    recipe = Recipe(models={"a": str(tmp_path)}, start="a", terms=())
    with pytest.raises(RequestError, match="terms is empty"):
        engine.merge(recipe, tmp_path / "out")
