"""Three small related checkpoints to try a merge on: a base, an aligned model and a fine-tune, with random weights.

They show the arithmetic, the report and the files, on any machine, in a second. They have learnt nothing, so they
say nothing about safety.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from resta.errors import PlanError
from resta.header import lay_out

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 256, 512, 6, 4, 1024
# Standard deviations: of the weights, and of what alignment and fine-tuning change; about 1/100 as in real models.
WEIGHT, CHANGE = 0.02, 2e-4


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """Write `base`, `aligned` and `tuned` (Llama architecture, bfloat16, about 8 MB each) under `folder`.

    Raises:
        PlanError: the folder exists already.
    """
    if folder.exists():
        raise PlanError(f"{folder}: already exists; remove it or choose another folder")
    made = {}
    for seed, name in enumerate(("base", "aligned", "tuned")):
        made[name] = folder / name
        made[name].mkdir(parents=True)
        (made[name] / "config.json").write_text(json.dumps(_config(), indent=2) + "\n")
        head, slots = lay_out((tensor, "BF16", shape) for tensor, shape in _shapes().items())
        with (made[name] / "model.safetensors").open("wb") as file:
            file.write(head)
            for tensor, slot in slots.items():
                file.seek(slot.start)
                file.write(_weights(tensor, slot.shape, seed).tobytes())
    return made


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{side}_proj.weight": (HIDDEN, HIDDEN) for side in "qkvo"}
        shapes |= {f"{block}.mlp.{side}_proj.weight": (INNER, HIDDEN) for side in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{block}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _weights(tensor: str, shape: tuple[int, ...], seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Return bfloat16 bits: the same random base for every seed, and beyond seed 0 a small change of its own."""
    name = list(tensor.encode())
    values = np.random.default_rng([0, *name]).standard_normal(shape, np.float32) * np.float32(WEIGHT)
    if len(shape) == 1:
        values += 1
    if seed:
        values += np.random.default_rng([seed, *name]).standard_normal(shape, np.float32) * np.float32(CHANGE)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
