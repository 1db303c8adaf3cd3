from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import resta
from resta.errors import RequestError, ResumeError
from resta.sft.adapters import carry, join, join_with, norm_of, rank_of, read_factors

IDS = torch.arange(5, 45)[None]


def base_of(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write an adapter whose B is not zero."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | config
    model = get_peft_model(base_of(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": str(base)}))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas of their own": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"q_proj": 11},
    },
    "of some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_a_base_that_carries_an_adapter_gives_what_peft_gives(
    config: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tiny_base, tmp_path / "a", **config)
    model = base_of(tiny_base)
    alone, names = logits(model), set(model.state_dict())
    carry(model, read_factors(folder), "a")
    expected = logits(PeftModel.from_pretrained(base_of(tiny_base), folder))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(alone, expected, atol=1e-2)
    assert set(model.state_dict()) == names
    assert not any("carried" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_two_adapters_joined_are_their_sum_and_peft_and_resta_read_it(
    config: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    first = save_adapter(tiny_base, tmp_path / "first", **config)
    second = save_adapter(tiny_base, tmp_path / "second", seed=1, r=4, lora_alpha=8, target_modules="all-linear")
    model = PeftModel.from_pretrained(base_of(tiny_base), first, adapter_name="first")
    model.load_adapter(str(second), "second")
    model.base_model.set_adapter(["first", "second"])
    expected = logits(model)
    join_with(read_factors(first), second)
    joined = PeftModel.from_pretrained(base_of(tiny_base), second)
    assert torch.allclose(logits(joined), expected, atol=1e-5)
    [found] = {len(both.a) for both in read_factors(second).values()}
    assert found == joined.peft_config["default"].r == max(len(b.a) for b in read_factors(first).values()) + 4
    base = resta.load(str(tiny_base))
    (base + 1.0 * (resta.load(str(second), on=base) - base)).save(tmp_path / "merged")
    assert torch.allclose(logits(base_of(tmp_path / "merged")), expected, atol=1e-4)


def test_joining_is_blind_to_the_order_but_for_rounding(tiny_base: Path, tmp_path: Path) -> None:
    first = read_factors(save_adapter(tiny_base, tmp_path / "first"))
    second = read_factors(save_adapter(tiny_base, tmp_path / "second", seed=1, target_modules=["k_proj", "q_proj"]))
    there, back = join(first, second), join(second, first)
    assert there.keys() == back.keys() == first.keys() | second.keys()
    for module, both in there.items():
        assert torch.allclose(both.b @ both.a, back[module].b @ back[module].a, atol=1e-6)
        parts = [factors[module] for factors in (first, second) if module in factors]
        assert torch.allclose(both.b @ both.a, sum((p.b @ p.a for p in parts), torch.zeros(())), atol=1e-6)


def test_the_norm_of_an_adapter_is_that_of_its_products(tiny_base: Path, tmp_path: Path) -> None:
    first = read_factors(save_adapter(tiny_base, tmp_path / "first"))
    second = read_factors(save_adapter(tiny_base, tmp_path / "second", seed=1, r=4))

    def by_products(factors: Any) -> float:
        return sum(float(((both.b @ both.a).double() ** 2).sum()) for both in factors.values()) ** 0.5

    assert norm_of(first) == pytest.approx(by_products(first), rel=1e-6)
    assert norm_of(join(first, second)) == pytest.approx(by_products(join(first, second)), rel=1e-6)
    assert norm_of(join(first, second), after=rank_of(first)) == pytest.approx(by_products(second), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"some_new_setting": 1}, "some_new_setting is 1"),
        ({"r": 7}, "not two of rank 7"),
    ],
)
def test_an_adapter_that_is_more_than_two_factors_is_refused_by_name(
    changes: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tiny_base, tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RequestError, match=said):
        read_factors(folder)


def test_an_adapter_with_other_tensors_or_none_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_base, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"lm_head.weight is no factor"):
        read_factors(folder)
    some = dict(list(tensors.items())[1:])
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="not two of rank 3"):
        read_factors(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestError, match="not a readable adapter"):
        read_factors(folder)


def test_an_adapter_of_another_base_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    factors = read_factors(save_adapter(tiny_base, tmp_path / "a"))
    model = base_of(tiny_base)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(RequestError, match=r"mine: adapts model.layers.1\S+, which the base does not have"):
        carry(model, factors, "mine")
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 4)
    with pytest.raises(
        RequestError, match=r"do not fit model.layers.0.self_attn.q_proj of the base, which is \(4, 3\)"
    ):
        carry(model, {k: v for k, v in factors.items() if "layers.0.self_attn" in k}, "mine")


# -- in a run ------------------------------------------------------------------------------------------------


def settings_of(base: Path, adapter: Path, rows: Path, **train: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "adapter": str(adapter),
        "chat_template": "vicuna_v1.1",
        "max_length": 128,
        "data": [{"name": "sums", "path": str(rows)}],
        "holdout": 0.0,
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {"max_steps": 4, "global_batch": 4, "per_device_batch": 4, "learning_rate": 1e-2, "save_every": 2}
        | {"log_every": 1, "gradient_checkpointing": False}
        | train,
    }


def test_what_is_trained_on_an_adapter_begins_at_it_and_comes_out_as_one(
    tiny_base: Path, sums_file: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(base_of(tiny_base), adapter))
    still = settings_of(tiny_base, adapter, sums_file, max_steps=1, learning_rate=1e-30)
    out = resta.sft.run(recipe=still, out=tmp_path / "still", device="cpu").out
    assert torch.allclose(logits(PeftModel.from_pretrained(base_of(tiny_base), out)), expected, atol=1e-5)
    out = resta.sft.run(recipe=settings_of(tiny_base, adapter, sums_file), out=tmp_path / "out", device="cpu").out
    assert not torch.allclose(logits(PeftModel.from_pretrained(base_of(tiny_base), out)), expected, atol=1e-2)
    config, facts = (json.loads((out / name).read_text()) for name in ("adapter_config.json", "resta.json"))
    assert config["r"] == 7
    assert Path(config["base_model_name_or_path"]) == tiny_base
    assert facts["adapter"]["source"] == str(adapter)
    assert facts["adapter"]["sha256"]


def test_a_run_on_an_adapter_goes_on_to_the_same_bytes_and_never_on_another_one(
    tiny_base: Path, sums_file: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter")
    recipe = settings_of(tiny_base, adapter, sums_file)
    whole = resta.sft.run(recipe=recipe, out=tmp_path / "whole", device="cpu").out

    class Killed(Exception):
        pass

    def kill(progress: Any) -> None:
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        resta.sft.run(recipe=recipe, out=tmp_path / "out", device="cpu", progress=kill)
    kept = (adapter / "adapter_model.safetensors").read_bytes()
    save_adapter(tiny_base, adapter, seed=5)
    with pytest.raises(ResumeError, match="the adapter changed"):
        resta.sft.run(recipe=recipe, out=tmp_path / "out", device="cpu")
    (adapter / "adapter_model.safetensors").write_bytes(kept)
    trained = resta.sft.run(recipe=recipe, out=tmp_path / "out", device="cpu")
    assert trained.resumed_from_step == 2
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (trained.out / name).read_bytes() == (whole / name).read_bytes()


def test_a_full_fine_tune_has_no_place_for_an_adapter(tiny_base: Path, sums_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a full fine-tune has no place for it"):
        resta.sft.run(
            recipe=settings_of(tiny_base, tmp_path, sums_file) | {"method": "full"}, out=tmp_path / "out", device="cpu"
        )
