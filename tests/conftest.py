"""Small real checkpoints, made in `tmp_path`, and helpers that every test file may use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

# The first example may compile a kernel; how long an example takes is no property of the code.
hypothesis.settings.register_profile("resta", deadline=None, derandomize=True)
hypothesis.settings.load_profile("resta")

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


@pytest.fixture
def trio(tmp_path: Path) -> dict[str, str]:
    """Directories of three related models: base, aligned, tuned, in one, two and three shards."""
    base = llama_tensors(0)
    return {
        "base": str(save_model(tmp_path / "base", base)),
        "aligned": str(save_model(tmp_path / "aligned", nudged(base, 1), shards=2)),
        "tuned": str(save_model(tmp_path / "tuned", nudged(base, 2), shards=3)),
    }
