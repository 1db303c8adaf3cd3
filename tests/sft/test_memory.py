from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from resta.sft import memory
from resta.sft.recipe import Recipe
from resta.sft.train import Job
from tests.sft.builders import tiny_config


def job_of(base: Path, **changes: Any) -> Job:
    settings = {"base": str(base), "data": [{"name": "a", "path": "a.jsonl"}], "max_length": 64}
    return Job(recipe=Recipe.model_validate(settings | changes), root=base, out=base / "out", device="cpu")


def saved_bytes(model: Any, tokens: torch.Tensor) -> int:
    """What torch keeps for the backward pass of the layers: the size of every distinct saved storage."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(tokens, use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hidden", "mlp", "keys"), [(64, 176, 4), (64, 256, 1), (128, 344, 2)])
def test_activations_per_layer_are_what_torch_saves(
    checkpointing: bool, hidden: int, mlp: int, keys: int, bf16: bool
) -> None:
    kept = []
    # The difference of two counts of tokens leaves out the copies of weights that autocast keeps; the difference of
    # two counts of layers is two layers, and leaves out what is kept once.
    for layers, tokens in ((2, 32), (2, 64), (4, 32), (4, 64)):
        config = tiny_config(
            64, hidden_size=hidden, intermediate_size=mlp, num_key_value_heads=keys, num_hidden_layers=layers
        )
        model = LlamaForCausalLM(config).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            kept.append(saved_bytes(model, torch.randint(0, 64, (2, tokens))))
    sizes = {"hidden": hidden, "keys": keys * hidden // 4, "mlp": mlp, "vocabulary": 64}
    shapes = [memory.Shape(parameters=0, trained=0, linear=0, layers=layers, **sizes) for layers in (2, 4)]
    options: dict[str, Any] = {"width": 2 if bf16 else 4, "checkpointing": checkpointing, "float32_stream": True}
    few, many = (memory.activation_bytes(s, 64, **options) for s in shapes)
    assert many - few == pytest.approx((kept[3] - kept[2]) - (kept[1] - kept[0]), rel=0.05)


def test_parameters_gradients_and_optimiser_are_counted_exactly(tiny_base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    count = sum(p.numel() for p in model.parameters())
    estimate = memory.estimate(job_of(tiny_base, method="full"))
    assert estimate.shape.parameters == estimate.shape.trained == count
    assert estimate.bytes["parameters"] == 4 * count
    assert estimate.bytes["gradients"] == 4 * count
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    assert estimate.bytes["optimiser"] == sum(t.numel() * t.element_size() for t in states)


def test_an_adapter_trains_the_parameters_that_peft_adds(tiny_base: Path) -> None:
    estimate = memory.estimate(job_of(tiny_base, lora={"rank": 4}))
    # Per layer: q and o 32 -> 32, k and v 32 -> 16, gate and up 32 -> 64, down 64 -> 32; rank times (in +
    # out).
    per_layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert estimate.shape.trained == 2 * per_layer


@pytest.mark.parametrize(
    ("parallel", "split"),
    [
        ({"processes": 8}, {"optimiser": 1, "gradients": 1, "parameters": 1}),
        ({"processes": 8, "strategy": "fsdp"}, {"optimiser": 8, "gradients": 8, "parameters": 8}),
        (
            {"processes": 8, "strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}},
            {"optimiser": 8, "gradients": 16, "parameters": 8},  # gradients of 16 bits
        ),
    ],
)
def test_each_strategy_splits_what_it_says(tiny_base: Path, parallel: dict[str, Any], split: dict[str, int]) -> None:
    alone = memory.estimate(job_of(tiny_base, method="full")).bytes
    shared = memory.estimate(job_of(tiny_base, method="full", parallel=parallel)).bytes
    for purpose, parts in split.items():
        assert shared[purpose] == pytest.approx(alone[purpose] / parts)


@pytest.mark.parametrize(("stage", "whole", "split"), [(1, 4, 12), (2, 2, 14), (3, 0, 16)])
def test_zero_needs_what_its_paper_says(tiny_base: Path, stage: int, whole: int, split: int) -> None:
    """ZeRO, arXiv 1910.02054, section 3.1 and figure 1: bytes for each parameter, K = 12."""
    gather = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    parallel = {"processes": 8, "strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage} | gather}}
    estimate = memory.estimate(job_of(tiny_base, method="full", parallel=parallel))
    state = estimate.total - estimate.bytes["activations"] - estimate.bytes["vocabulary head"]
    assert state == pytest.approx((whole + split / 8) * estimate.shape.parameters)


def test_a_recipe_that_computes_in_float32_is_counted_in_float32_on_any_number_of_gpus(tiny_base: Path) -> None:
    settings = {"method": "full", "train": {"precision": "float32"}}
    one, eight = (memory.estimate(job_of(tiny_base, parallel={"processes": n}, **settings)) for n in (1, 8))
    assert eight.bytes == one.bytes
    assert eight.host_bytes == 8 * one.host_bytes == 8 * 4 * one.shape.parameters


def test_every_advice_given_when_memory_is_full_lowers_the_estimate(tiny_base: Path) -> None:
    full = {"method": "full", "train": {"gradient_checkpointing": False, "per_device_batch": 4}}
    most = memory.estimate(job_of(tiny_base, **full)).total
    lower = [
        full | {"train": {"gradient_checkpointing": True, "per_device_batch": 4}},
        full | {"train": {"gradient_checkpointing": False, "per_device_batch": 1}},
        full | {"max_length": 16},
        full | {"method": "lora"},
        full | {"parallel": {"processes": 8, "strategy": "fsdp"}},
    ]
    for settings in lower:
        assert memory.estimate(job_of(tiny_base, **settings)).total < most
