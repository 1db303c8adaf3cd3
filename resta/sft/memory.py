"""How much memory a recipe needs on each device: arithmetic on the base's config, no weights.

Parameters, gradients and optimiser state are exact counts. Activations are counted from what a Llama-like layer keeps
for its backward pass, per token: 8 h + 2 k + 4 i numbers (h hidden size, k width of keys, i width of the MLP), 2 h of
them in float32; with checkpointing, h per layer and one layer in full. Tests hold that count against what torch saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from resta.errors import RequestError
from resta.sft.recipe import Recipe
from resta.sft.train import Job, build_adapter, precision

GIB = 2**30
# Bytes of optimiser state per trained parameter; what is not listed is taken for AdamW with two float32
# moments.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
ADAMW_BYTES = 8
# 4 bits a weight, and a doubly quantised scale for every 64 of them.
NF4_BYTES = 0.5 + (8 + 32 / 256) / 64 / 8
# The trainer projects to the vocabulary in tiles of this many tokens by this many entries.
HEAD_TOKENS, HEAD_ENTRIES = 4096, 32768


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the base's config says about its size; widths in numbers, not bytes."""

    parameters: int
    trained: int
    linear: int  # parameters in the layers' linear maps, which 4-bit loading compresses
    layers: int
    hidden: int
    keys: int  # width of the keys of a layer, all heads together
    mlp: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one device, by purpose."""

    bytes: dict[str, float]
    host_bytes: float  # main memory while all processes of one machine load the base
    shape: Shape

    @property
    def total(self) -> float:
        """Bytes on one device, all purposes together."""
        return sum(self.bytes.values())


def estimate(job: Job) -> Estimate:
    """Estimate from the base's config alone. Raises RequestError if that cannot be read."""
    shape = read_shape(job)
    recipe = job.recipe
    width = 4 if _precision(job) == "float32" else 2
    tokens = recipe.train.per_device_batch * recipe.max_length
    state = _state_bytes(recipe, shape, width)
    activations = activation_bytes(
        shape,
        tokens,
        width=width,
        checkpointing=recipe.train.gradient_checkpointing,
        # Float32 weights under autocast; FSDP and DeepSpeed cast the weights themselves.
        float32_stream=recipe.method == "full" and recipe.parallel.strategy == "ddp",
    )
    head = min(tokens, HEAD_TOKENS) * min(shape.vocabulary, HEAD_ENTRIES) * (width + 4)
    if recipe.objective.kind == "distil":  # whole distributions: logits, their logarithms in float32, both gradients
        head = tokens * shape.vocabulary * (2 * width + 8)
    return Estimate(
        bytes={**state, "activations": activations, "vocabulary head": head},
        host_bytes=float(recipe.parallel.processes * shape.parameters * (4 if recipe.method == "full" else width)),
        shape=shape,
    )


def _precision(job: Job) -> str:
    """Return what the recipe's devices compute in; several of them are GPUs, whatever this machine has."""
    if job.recipe.train.precision == "auto" and job.recipe.parallel.processes > 1:
        return "bf16"
    return precision(job)


def read_shape(job: Job) -> Shape:
    """Count parameters on the meta device: exact, and without memory."""
    try:
        config: Any = AutoConfig.from_pretrained(job.base, revision=job.recipe.revision)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the library's failures here have no common class
        raise RequestError(f"base {job.recipe.base!r}: its config cannot be read: {error}") from error
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    adapter = build_adapter(job)
    if adapter is not None:
        with torch.device("meta"):
            model = get_peft_model(model, adapter)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        linear=linear,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        keys=heads * head_width,
        mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
    )


def activation_bytes(shape: Shape, tokens: int, *, width: int, checkpointing: bool, float32_stream: bool) -> float:
    """Return what is kept for the backward pass of `tokens` tokens, computed in numbers of `width` bytes.

    With a `float32_stream` between the layers, 10 h more bytes are kept in each for a width of 2.
    """
    numbers = 8 * shape.hidden + 2 * shape.keys + 4 * shape.mlp
    layer = tokens * (numbers * width + 2 * shape.hidden * (4 - width))
    if float32_stream and width < 4:
        layer += 10 * shape.hidden * tokens
    if not checkpointing:
        return float(layer * shape.layers)
    return float(tokens * shape.hidden * (4 if float32_stream else width) * shape.layers + layer)


def _state_bytes(recipe: Recipe, shape: Shape, width: int) -> dict[str, float]:
    """Return bytes of parameters, gradients and optimiser on one device, after sharding."""
    optimizer = OPTIMIZER_BYTES.get(recipe.train.optimizer, ADAMW_BYTES)
    copies = 0.0
    if recipe.method == "full":
        parameters = 4.0 * shape.parameters
        copies = float(width * shape.parameters) if width < 4 else 0.0
    elif recipe.method == "lora":
        parameters = width * shape.parameters + 4.0 * shape.trained
    else:
        parameters = NF4_BYTES * shape.linear + width * (shape.parameters - shape.linear) + 2.0 * shape.trained
    gradients = 4.0 * shape.trained
    shards = _shards(recipe)
    if recipe.parallel.strategy == "deepspeed" and recipe.method == "full" and width < 4:
        # ZeRO (arXiv 1910.02054): 16-bit parameters and gradients; the float32 weights go with the optimiser's state.
        copies, gradients = copies / shards["parameters"], float(width * shape.trained)
        shards |= {"parameters": shards["optimiser"]}
    elif shards["parameters"] > 1:
        # Only the layer at work and the one being fetched are ever whole.
        copies = 2 * width * shape.parameters / shape.layers
    return {
        "parameters": parameters / shards["parameters"],
        "copies to compute with": copies,
        "gradients": gradients / shards["gradients"],
        "optimiser": float(optimizer) * shape.trained / shards["optimiser"],
    }


def _shards(recipe: Recipe) -> dict[str, int]:
    """Return over how many devices each kind of state is split."""
    count, strategy = recipe.parallel.processes, recipe.parallel.strategy
    stage = 3 if strategy == "fsdp" else recipe.parallel.zero_stage
    return {
        "parameters": count if stage >= 3 else 1,
        "gradients": count if stage >= 2 else 1,
        "optimiser": count if stage >= 1 else 1,
    }


def table(job: Job, estimate: Estimate) -> str:
    """Return the estimate as text, with its arithmetic."""
    shape, processes = estimate.shape, job.recipe.parallel.processes
    lines = [
        f"{shape.parameters:,} parameters, {shape.trained:,} trained ({shape.trained / shape.parameters:.2%})",
        f"memory on each of {processes} device(s), computing in {_precision(job)}, estimated:",
    ]
    lines += [f"  {name:<24}{size / GIB:9.3f} GiB" for name, size in estimate.bytes.items() if size]
    lines.append(f"  {'total':<24}{estimate.total / GIB:9.3f} GiB, and 1 to 2 GiB of the libraries' own on a GPU")
    lines.append(f"main memory while {processes} process(es) load the base: {estimate.host_bytes / GIB:.3f} GiB")
    return "\n".join(lines)
