"""A LoRA adapter that is there already, under a new one: on its base in memory as it stands, and joined on disk.

    W x + s1 B1 A1 x + s2 B2 A2 x  =  W x + [s1 B1, s2 B2] [A1; A2] x

so that both together are one adapter of rank r1 + r2 on the same base, exactly. It is never merged into the base, which
may be in 4 bits. What is more than B A on linear layers is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from resta.errors import RequestError
from resta.journal import to_json, write_whole

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MERGE_FIRST = "merge it into its base first, and begin from that"
# Settings that say how B A is applied, and those that only say how it was trained; any other that is on says more.
KNOWN = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}
KNOWN |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "target_modules"}
KNOWN |= {"exclude_modules", "auto_mapping", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"}
KNOWN |= {"qalora_group_size", "peft_version"}
# Initialisations that left the base's weights as they were.
BASE_KEEPING = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to one linear layer: b @ a @ x. Both are float32, and the scaling is in b."""

    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)

    def padded(self, rank: int) -> Factors:
        """Return the same with a larger rank: what is new is zero."""
        more = rank - len(self.a)
        pad = torch.nn.functional.pad
        return Factors(pad(self.a, (0, 0, 0, more)), pad(self.b, (0, more)))


def read_factors(folder: Path) -> dict[str, Factors]:
    """Return an adapter's factors by module. Raises RequestError for one that is more than B A on linear layers."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise RequestError(f"{folder}: not a readable adapter: {error}") from None
    beyond = sorted(key for key, value in config.items() if value and key not in KNOWN)
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": BASE_KEEPING}
    beyond += [key for key, values in plain.items() if config.get(key) not in values]
    if beyond:
        raise RequestError(
            f"{folder}: is more than a plain LoRA adapter ({beyond[0]} is {config.get(beyond[0])!r}); {MERGE_FIRST}"
        )
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = FACTOR.fullmatch(name)
        if found is None:
            raise RequestError(f"{folder / TENSORS}: {name} is no factor of a linear layer; {MERGE_FIRST}")
        halves.setdefault(found[1], {})[found[2]] = tensor.float()
    return {module: _factors(module, both, config, folder) for module, both in sorted(halves.items())}


def _factors(module: str, both: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> Factors:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha", 8))
    if both.keys() != {"A", "B"} or not both["A"].shape[0] == both["B"].shape[1] == rank:
        raise RequestError(f"{folder / TENSORS}: the factors of {module} are not two of rank {rank}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(both["A"], scaling * both["B"])


def carry(model: torch.nn.Module, factors: Mapping[str, Factors], name: str) -> None:
    """Let a model's linear layers give what they give with an adapter; nothing of it is trained or saved.

    Raises RequestError, naming the adapter, where it does not fit the model.
    """
    for place, both in factors.items():
        try:
            module = model.get_submodule(place)
        except AttributeError:
            raise RequestError(f"{name}: adapts {place}, which the base does not have; name its own base") from None
        shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if shape != (both.b.shape[0], both.a.shape[1]):
            raise RequestError(f"{name}: its factors do not fit {place} of the base, which is {shape}")
        # As buffers they go where the layer goes.
        module.register_buffer("carried_a", both.a, persistent=False)
        module.register_buffer("carried_b", both.b, persistent=False)
        module.register_forward_hook(_add)


def _add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    a, b = module.carried_a, module.carried_b
    added: torch.Tensor = inputs[0].to(a.dtype) @ a.T @ b.T
    return output + added.to(output.dtype)


def rank_of(factors: Mapping[str, Factors]) -> int:
    """Return the largest rank of an adapter's layers."""
    return max((len(both.a) for both in factors.values()), default=0)


def norm_of(factors: Mapping[str, Factors], *, after: int = 0) -> float:
    """Return the Frobenius norm of what an adapter adds to all weights, or of its ranks after the first ones alone."""
    total = 0.0
    for both in factors.values():
        a, b = both.a[after:].double(), both.b[:, after:].double()
        total += float(((b.T @ b) * (a @ a.T)).sum())  # |b a|^2, and never a whole matrix
    return math.sqrt(max(0.0, total))


def join(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the sum of two adapters as one: in every layer all the first one's ranks, then the second one's."""
    ranks = [rank_of(factors) for factors in (first, second)]
    joined = {}
    for module in sorted(first.keys() | second.keys()):
        some = next(factors[module] for factors in (first, second) if module in factors)
        nothing = Factors(some.a[:0], some.b[:, :0])
        parts = [
            factors.get(module, nothing).padded(rank) for factors, rank in zip((first, second), ranks, strict=True)
        ]
        joined[module] = Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))
    return joined


def join_with(first: Mapping[str, Factors], folder: Path) -> None:
    """Put the sum of an adapter and the one in a folder in the latter's place."""
    joined = join(first, read_factors(folder))
    rank = rank_of(joined)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": list(joined)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    tensors = {}
    for module, both in joined.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = both.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = both.b.contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_whole(folder / CONFIG, to_json(config, indent=2) + "\n")
