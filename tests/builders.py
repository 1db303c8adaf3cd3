"""Small real checkpoints and recipes, and what tests ask of them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from resta import engine, output
from resta.cli import main
from resta.recipe import Recipe, make_recipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


Tensors = dict[str, torch.Tensor]


def llama_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The tensors of a two-layer Llama with the sizes of CONFIG; norms are ones plus noise."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 32
    shapes = {"model.embed_tokens.weight": (96, hidden), "lm_head.weight": (96, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{side}_proj.weight": (hidden, hidden) for side in ("q", "o")}
        shapes |= {f"{block}.self_attn.{side}_proj.weight": (kv, hidden) for side in ("k", "v")}
        shapes |= {f"{block}.mlp.{side}_proj.weight": (inner, hidden) for side in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{block}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: ((1 + 0.01 * value) if len(value.shape) == 1 else 0.02 * value).to(dtype) for name, value in noise.items()
    }


def nudged(tensors: Mapping[str, torch.Tensor], seed: int, size: float = 2e-3) -> Tensors:
    """The tensors plus noise of the given standard deviation, in the same dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.float() + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in tensors.items()
    }


def save_model(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    """Write a model directory as the Hub has it: shards and index, config; returns the directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


RESTA = [{"delta": "aligned - base", "scale": 0.5}]


RESTA_D = [
    {"delta": "tuned - base", "scale": 1.0, "sparsify": {"density": 0.7}},
    {"delta": "aligned - base", "scale": 0.5},
]


def recipe_of(models: dict[str, str], start: str, terms: list[dict[str, Any]], **rest: Any) -> Recipe:
    used = {start, *(name for term in terms for name in term["delta"].split(" - "))}
    used |= {rest["output"]["files_from"]} if "files_from" in rest.get("output", {}) else set()
    return make_recipe(
        {"models": {name: models[name] for name in sorted(used)}, "start": start, "terms": terms, **rest}
    )


def read(folder: str | Path) -> Tensors:
    """Every tensor of a model directory, by the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), name


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class Crash(BaseException):
    """The machine stops: nothing may catch this."""


def interrupted(recipe: Recipe, out: Path, after: int) -> Path:
    """Leave a partial output in which `after` units are in place; returns its weight folder."""

    def stop(name: str, nbytes: int) -> None:
        nonlocal after
        after -= 1
        if after <= 0:
            raise Crash

    with pytest.raises(Crash):
        engine.merge(recipe, out, workers=1, progress=stop)
    return output.partial_of(out) / "model"


def save_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """A LoRA on the embedding and three projections, factors of all dtypes, and biases of their own."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    prefix, rank = "base_model.model.", 6

    def random(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    tensors = {
        f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight": random(rank, 64),
        f"{prefix}model.layers.0.self_attn.q_proj.lora_B.weight": random(64, rank),
        f"{prefix}model.layers.1.mlp.down_proj.lora_A.weight": random(rank, 128).bfloat16(),
        f"{prefix}model.layers.1.mlp.down_proj.lora_B.weight": random(64, rank).half(),
        f"{prefix}model.embed_tokens.lora_embedding_A": random(rank, 96),
        f"{prefix}model.embed_tokens.lora_embedding_B": random(64, rank).double(),
        f"{prefix}big.lora_A.weight": random(rank, 521),
        f"{prefix}big.lora_B.weight": random(701, rank),
    }
    for module, rows in (("model.layers.0.self_attn.q_proj", 64), ("model.layers.1.mlp.down_proj", 64), ("big", 701)):
        tensors[f"{prefix}{module}.lora_B.bias"] = random(rows)
    save_file(tensors, folder / "adapter_model.safetensors")
    chosen = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 9,
        "lora_bias": True,
        "base_model_name_or_path": str(base),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(chosen))
    return folder


def lora_models(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"big.weight": (701, 521), "big.bias": (701,)}
    shapes |= dict.fromkeys(("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.down_proj.bias"), (64,))
    extra = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base: Tensors = {**llama_tensors(0), **{name: value.to(dtype) for name, value in extra.items()}}
    folder = save_model(tmp_path / "base", base)
    return {
        "base": str(folder),
        "aligned": str(save_model(tmp_path / "aligned", nudged(base, 1))),
        "tuned": {"source": str(save_adapter(tmp_path / "lora", folder)), "on": "base"},
    }


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def everyday(trio: dict[str, str], out: Path, *more: object) -> list[object]:
    return ["merge", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "-o", out, *more]


def zip_of(records: Mapping[str, bytes], *, packed: str = "", comment: bytes = b"", wide: bool = False) -> bytes:
    """A zip archive of stored records, as torch.save makes one: with one compressed, a comment, or sizes of 64 bits."""
    buffer = io.BytesIO()
    limit = -1 if wide else zipfile.ZIP64_LIMIT
    with mock.patch.object(zipfile, "ZIP64_LIMIT", limit), zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for name, content in records.items():
            method = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()
