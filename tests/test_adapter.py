"""LoRA adapters that `peft` itself saved, against the models that `peft` itself merges, and the ones to refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import resta
from resta.adapter import CONFIG, FILE, base_name, is_adapter, read_adapter
from resta.checkpoint import read_weights
from resta.errors import RequestError
from resta.hub import Located
from resta.plan import make_plan
from resta.recipe import make_recipe
from tests.adapters import gpt2, llama, lora, recipe_of, save_adapter, save_base
from tests.builders import Tensors

pytestmark = [  # what the two libraries say to each other
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


def merged_by_peft(base: Path, adapter: Path) -> Tensors:
    """What peft makes of the two directories, computed in float64 throughout."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    mounted = PeftModel.from_pretrained(model, adapter).to(torch.float64)
    return dict(mounted.merge_and_unload().state_dict())


def assert_as_exact(base: Path, adapter: Path, *, unit: float) -> None:
    """Each entry of the merge is within `unit`, relative to the operands, of peft's in float64."""
    expected, original = merged_by_peft(base, adapter), load_file(base / "model.safetensors")
    mine = dict(resta.tensors(recipe_of(base, adapter)))
    assert mine.keys() == original.keys()
    changed = 0
    for name, tensor in mine.items():
        exact, start = expected[name], original[name].double()
        operand = torch.maximum(exact.abs(), start.abs() if unit < 1e-4 else exact.abs())
        delta = (exact - start).abs().max() if unit < 1e-4 else 0.0
        assert ((tensor.double() - exact).abs() <= unit * (operand + delta)).all(), name
        changed += not torch.equal(exact, start)
    assert changed > 0


ALL_BIASED = {"attention_bias": True, "mlp_bias": True}
PATTERNS = {  # the first that matches wins, in the order of the saved file, which peft sorts
    "rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp\..*": 8, "down_proj": 3},
    "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 5, "v_proj": 11},
}
CASES: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any], LoraConfig]] = {
    "attention": (llama, {}, lora(["q_proj", "v_proj"])),
    "every linear layer, rank-stabilised": (llama, {}, lora("all-linear", use_rslora=True)),
    "rank and alpha patterns": (llama, {}, lora(["q_proj", "v_proj", "down_proj", "up_proj"], **PATTERNS)),
    "patterns, rank-stabilised": (llama, {}, lora(["q_proj", "v_proj", "down_proj"], use_rslora=True, **PATTERNS)),
    "modules to save": (llama, {}, lora(["q_proj"], modules_to_save=["lm_head", "input_layernorm"])),
    "saved embeddings": (llama, {}, lora(["o_proj"], modules_to_save=["embed_tokens"])),
    "all biases": (llama, ALL_BIASED, lora(["q_proj", "up_proj"], bias="all")),
    "biases of the targets": (llama, ALL_BIASED, lora(["q_proj", "up_proj"], bias="lora_only")),
    "lora_bias": (llama, ALL_BIASED, lora(["q_proj", "up_proj"], lora_bias=True)),
    "lora_bias, rank-stabilised": (llama, ALL_BIASED, lora(["k_proj"], lora_bias=True, use_rslora=True)),
    "embeddings": (llama, {}, lora(["embed_tokens", "k_proj"])),
    "embeddings and output layer": (llama, {}, lora(["embed_tokens", "lm_head"], rank_pattern={"lm_head": 2})),
    "tied embeddings, not touched": (llama, {"tie_word_embeddings": True}, lora(["q_proj"])),
    "one layer": (llama, {}, lora(["gate_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "odd rank": (llama, {}, lora(["q_proj", "gate_proj"], r=7)),
    "gaussian": (llama, {}, lora(["q_proj"], init_lora_weights="gaussian")),
    "orthogonal": (llama, {}, lora(["q_proj"], init_lora_weights="orthogonal")),
    "Conv1D": (gpt2, {}, lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "Conv1D and embeddings": (gpt2, {}, lora(["c_attn", "wte"], fan_in_fan_out=True)),
    "Conv1D and a linear layer": (gpt2, {}, lora(["c_attn", "lm_head"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_float32_merge_is_that_of_peft(tmp_path: Path, case: str) -> None:
    make, sizes, config = CASES[case]
    base = save_base(tmp_path / "base", make(**sizes), torch.float32)
    assert_as_exact(base, save_adapter(tmp_path / "adapter", base, config), unit=1e-6)


@pytest.mark.parametrize("case", ["every linear layer, rank-stabilised", "embeddings", "lora_bias", "Conv1D"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_a_bfloat16_merge_is_rounded_once_from_what_peft_computes_in_float64(
    tmp_path: Path, case: str, factors: torch.dtype
) -> None:
    make, sizes, config = CASES[case]
    base = save_base(tmp_path / "base", make(**sizes), torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, config, factors)
    exact, before = merged_by_peft(base, adapter), load_file(base / "model.safetensors")
    wrong = entries = 0
    for name, tensor in resta.tensors(recipe_of(base, adapter)):
        assert tensor.dtype == torch.bfloat16
        error = (tensor.double() - exact[name]).abs()
        unit = 2.0 ** (torch.floor(torch.log2(exact[name].abs())) - 7)
        # Where base and product cancel, the rounding of either is left; that of a product is bounded by the largest.
        start = before[name].double()
        cancelled = 2.0**-22 * (start.abs() + (exact[name] - start).abs().max())
        assert (error <= torch.maximum(unit, cancelled)).all(), name
        wrong += int((error > 0.5 * unit * (1 + 1e-12)).sum())
        entries += tensor.numel()
    assert wrong <= 0.001 * entries


def test_peft_merges_in_steps_and_so_rounds_worse_than_one_rounding_does(tmp_path: Path) -> None:
    """The comparison above can fail: peft's own bfloat16 merge does not pass it."""
    base = save_base(tmp_path / "base", llama(), torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, lora("all-linear"), torch.bfloat16)
    exact = merged_by_peft(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rounded = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    mine = dict(resta.tensors(recipe_of(base, adapter)))
    errors = [sum((side[name].double() - exact[name]).square().sum() for name in mine) for side in (mine, rounded)]
    assert errors[0] < errors[1]


def test_factors_in_float64_are_not_narrowed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float64)
    adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj"]), torch.float64)
    assert_as_exact(base, adapter, unit=1e-15)


def test_float64_factors_on_a_narrower_base_are_computed_in_float64(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj"]), torch.float64)
    exact = merged_by_peft(base, adapter)
    for name, tensor in resta.tensors(recipe_of(base, adapter)):
        assert torch.equal(tensor, exact[name].float())


def test_a_delta_of_two_adapters_is_the_difference_of_what_peft_merges(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float32)
    safe = save_adapter(tmp_path / "safe", base, lora(["q_proj", "down_proj"], r=2))
    tuned = save_adapter(tmp_path / "tuned", base, lora(["q_proj", "v_proj"], r=3))
    recipe = make_recipe(
        {
            "models": {
                "base": str(base),
                "safe": {"source": str(safe), "on": "base"},
                "tuned": {"source": str(tuned), "on": "base"},
            },
            "start": "tuned",
            "terms": [{"delta": "safe - base", "scale": 0.5}],
        }
    )
    original, start, end = (
        load_file(base / "model.safetensors"),
        merged_by_peft(base, tuned),
        merged_by_peft(base, safe),
    )
    for name, tensor in resta.tensors(recipe):
        exact = start[name] + 0.5 * (end[name] - original[name].double())
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-6)
    untouched = {step.name for step in make_plan(recipe).steps if step.copies}
    assert "model.layers.0.mlp.up_proj.weight" in untouched
    assert not any("q_proj" in name for name in untouched)


def test_an_embedding_adapter_acts_on_the_rows_that_a_longer_vocabulary_shares(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float32)
    safe = save_adapter(tmp_path / "safe", base, lora(["embed_tokens"]))
    longer = save_base(tmp_path / "longer", llama(vocab_size=43), torch.float32)
    models = {"base": str(base), "safe": {"source": str(safe), "on": "base"}, "tuned": str(longer)}
    rules = [{"match": ["*embed_tokens*", "lm_head*"], "rows": "shared"}]
    terms = [{"delta": "safe - base", "scale": 0.5}]
    recipe = make_recipe({"models": models, "start": "tuned", "terms": terms, "rules": rules})
    name = "model.embed_tokens.weight"
    got, start = dict(resta.tensors(recipe))[name], load_file(longer / "model.safetensors")[name]
    delta = merged_by_peft(base, safe)[name] - load_file(base / "model.safetensors")[name].double()
    torch.testing.assert_close(got[:40].double(), start[:40].double() + 0.5 * delta, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[40:], start[40:])
    assert not torch.equal(got[:40], start[:40])


def test_a_merged_adapter_on_disk_is_loaded_by_transformers_as_the_same_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj", "embed_tokens"]))
    recipe = recipe_of(base, adapter)
    resta.merge(recipe, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in resta.tensors(recipe):
        assert torch.equal(loaded[name], tensor)


# ---- what is refused, by name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("pair")
    base = save_base(home / "base", llama(), torch.float32)
    return base, save_adapter(home / "adapter", base, lora(["q_proj", "v_proj"], modules_to_save=["lm_head"]))


def altered(pair: tuple[Path, Path], folder: Path, config: dict[str, Any], tensors: Tensors | None = None) -> Path:
    """A copy of the adapter with other settings and, if given, other tensors."""
    folder.mkdir()
    settings = json.loads((pair[1] / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(load_file(pair[1] / FILE) if tensors is None else tensors, folder / FILE)
    return folder


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'"),
    "an initialisation of tomorrow": ({"init_lora_weights": ["new"]}, "init_lora_weights"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "Megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "a setting of tomorrow": ({"invert_everything": True}, "invert_everything"),
    "another rank": ({"r": 5}, "rank 5 is configured"),
    "no rank": ({"r": 0}, "rank 0 is configured"),
    "rank as text": ({"r": "4"}, "r or its default|expected a number"),
    "rank null": ({"r": None}, "expected a number"),
    "alpha true": ({"lora_alpha": True}, "expected a number"),
    "pattern of text": ({"rank_pattern": {"q_proj": "four"}}, "rank_pattern .*'four'"),
    "pattern as a list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    "pattern as a number": ({"alpha_pattern": 3}, "alpha_pattern"),
    "pattern that is no expression": ({"rank_pattern": {"(": 4}}, "rank_pattern is not a mapping"),
    "lost module": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save names 'embed_tokens'"),
    "lost bias": ({"lora_bias": True}, "lora_bias is True"),
    "another base": (
        {"base_model_name_or_path": "org/other"},
        "was trained on 'org/other'.*recorded_base: 'org/other'",
    ),
    "no base": ({"base_model_name_or_path": None}, "a base that it does not name"),
    "a base of slashes": ({"base_model_name_or_path": "/"}, "was trained on"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_applied_exactly_is_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    config, expected = SETTINGS[case]
    make_plan(recipe_of(*pair))
    folder = altered(pair, tmp_path / "adapter", config)
    with pytest.raises(RequestError, match=expected) as caught:
        make_plan(recipe_of(pair[0], folder))
    assert str(folder) in str(caught.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nothing": (lambda t: {}, "holds no tensor"),
    "no B": (lambda t: {name: v for name, v in t.items() if name != f"{Q}.lora_B.weight"}, "q_proj' has lora_A.w"),
    "no A": (lambda t: {name: v for name, v in t.items() if "lora_A" not in name}, "q_proj' has lora_B.weight;"),
    "DoRA norms": (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "magnitude_vector"),
    "another rank": (lambda t: t | {f"{Q}.lora_B.weight": torch.ones(32, 3)}, "rank 4 is configured"),
    "another width": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 31)}, r"\(32, 31\), but the base"),
    "a convolution": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 32, 1, 1)}, "convolutions are not supported"),
    "integers": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}, "expected a float matrix"),
    "a layer that the base lacks": (
        lambda t: t | {name.replace(".0.", ".9."): v.clone() for name, v in t.items() if name.startswith(Q)},
        "targets 'model.layers.9.self_attn.q_proj.weight', a tensor that the base does not have",
    ),
    "a whole tensor that the base lacks": (lambda t: t | {f"{Q}.bias": torch.ones(32)}, "replaces .*q_proj.bias"),
    "a resized output layer": (lambda t: t | {HEAD: torch.ones(44, 32)}, r"replaces 'lm_head.weight' .*\(44, 32\)"),
    "the same tensor twice": (
        lambda t: t | {HEAD.replace(".weight", ".modules_to_save.weight"): t[HEAD].clone()}, "'lm_head.weight' twice",
    ),
    "whole tensor of integers": (lambda t: t | {HEAD: t[HEAD].int()}, "is I32; expected floating point"),
    "no prefix": (lambda t: t | {"model.norm.weight": torch.ones(32)}, "does not begin with 'base_model.model.'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_factors_that_cannot_be_applied_exactly_are_refused_by_name(
    pair: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    alter, expected = TENSORS[case]
    folder = altered(pair, tmp_path / "adapter", {}, alter(load_file(pair[1] / FILE)))
    with pytest.raises(RequestError, match=expected) as caught:
        make_plan(recipe_of(pair[0], folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("bias", [torch.ones(32, dtype=torch.int32), torch.ones(32, 1), torch.ones(31)], ids=str)
def test_a_factor_bias_that_is_no_vector_of_the_layer_is_refused(tmp_path: Path, bias: torch.Tensor) -> None:
    base = save_base(tmp_path / "base", llama(**ALL_BIASED), torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj"], lora_bias=True))
    tensors = load_file(adapter / FILE)
    save_file(tensors | {f"{Q}.lora_B.bias": bias}, adapter / FILE)
    with pytest.raises(RequestError, match="q_proj"):
        make_plan(recipe_of(base, adapter))


REAL_KINDS = {
    "DoRA": (lora(["q_proj"], use_dora=True), "DoRA"),
    "PiSSA": (lora(["q_proj"], init_lora_weights="pissa"), "pissa"),
    "tokens": (lora(["q_proj"], trainable_token_indices=[1, 3]), "trainable_token_indices"),
    "replicated layers": (lora(["q_proj"], layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
}


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_kinds_of_adapter_that_peft_itself_saves_are_refused(tmp_path: Path, kind: str) -> None:
    config, expected = REAL_KINDS[kind]
    base = save_base(tmp_path / "base", llama(), torch.float32)
    with pytest.raises(RequestError, match=expected):
        make_plan(recipe_of(base, save_adapter(tmp_path / "adapter", base, config)))


def test_a_square_layer_that_could_be_stored_either_way_is_refused(tmp_path: Path) -> None:
    """peft leaves fan_in_fan_out as the last layer had it: here lm_head's, though c_proj is a Conv1D."""
    base = save_base(tmp_path / "base", gpt2(), torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(r".*(attn\.c_proj|lm_head)", fan_in_fan_out=True))
    assert json.loads((adapter / CONFIG).read_text())["fan_in_fan_out"] is False
    with pytest.raises(RequestError, match="c_proj' is square: it could be either"):
        make_plan(recipe_of(base, adapter))


def test_lora_bias_on_a_layer_without_bias_is_refused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = save_base(tmp_path / "base", llama(), torch.float32)
    with pytest.warns(UserWarning, match="has no bias"):
        adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj"], lora_bias=True))
    with pytest.raises(RequestError, match=r"q_proj\.bias', a tensor that the base does not have"):
        make_plan(recipe_of(base, adapter))


def test_another_name_of_the_same_base_is_confirmed_by_saying_the_recorded_one(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = altered(pair, tmp_path / "adapter", {"base_model_name_or_path": "org/moved"})
    assert base_name(folder) == "org/moved"
    make_plan(recipe_of(pair[0], folder, recorded_base="org/moved"))
    for wrong in ("org/other", "moved", ""):
        with pytest.raises(RequestError, match="was trained on 'org/moved'"):
            make_plan(recipe_of(pair[0], folder, recorded_base=wrong))


def test_a_base_that_is_recorded_by_its_own_name_needs_no_confirmation(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, recorded in enumerate(("base", "org/base", "/somewhere/else/base/")):
        make_plan(recipe_of(pair[0], altered(pair, tmp_path / str(number), {"base_model_name_or_path": recorded})))


def test_a_hub_base_of_another_organisation_is_another_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = altered(pair, tmp_path / "adapter", {"base_model_name_or_path": "org/base"})
    adapter = Located(source=str(folder), folder=folder)
    mine, theirs = (
        read_weights(Located(source=name, folder=pair[0], hub_id=name, commit="a" * 40))
        for name in ("org/base", "other/base")
    )
    assert read_adapter(adapter, mine).is_adapter
    with pytest.raises(RequestError, match="was trained on 'org/base', and would be put on 'other/base'"):
        read_adapter(adapter, theirs)


def test_another_revision_of_the_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    trained, given = "a" * 40, "b" * 40
    folder = altered(pair, tmp_path / "adapter", {"base_model_name_or_path": "org/base", "revision": trained})
    adapter = Located(source=str(folder), folder=folder)
    for commit in (trained, given):
        base = read_weights(Located(source="org/base", folder=pair[0], hub_id="org/base", commit=commit))
        if commit == trained:
            assert read_adapter(adapter, base).is_adapter
        else:
            with pytest.raises(RequestError, match=f"trained on revision {trained}.*{given} is given"):
                read_adapter(adapter, base)


def test_an_adapter_on_an_adapter_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = map(str, pair)
    models: dict[str, Any] = {
        "base": base, "first": {"source": adapter, "on": "base"}, "second": {"source": adapter, "on": "first"},
    }  # fmt: skip
    recipe = {"models": models, "start": "second", "terms": [{"delta": "first - base", "scale": 1}]}
    with pytest.raises(RequestError, match="second is on first, which is an adapter itself"):
        make_plan(make_recipe(recipe))


def test_on_is_asked_of_adapters_and_refused_of_full_models(pair: tuple[Path, Path]) -> None:
    base, adapter = map(str, pair)
    terms = [{"delta": "tuned - base", "scale": 1}]
    with pytest.raises(RequestError, match="is a LoRA adapter: say which model it is `on`"):
        make_plan(make_recipe({"models": {"base": base, "tuned": adapter}, "start": "base", "terms": terms}))
    models = {"base": base, "tuned": {"source": base, "on": "base"}}
    with pytest.raises(RequestError, match="is a full model, not an adapter"):
        make_plan(make_recipe({"models": models, "start": "base", "terms": terms}))


def test_a_full_model_beside_a_left_over_adapter_config_is_a_full_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    assert is_adapter(pair[1])
    folder = altered(pair, tmp_path / "both", {})
    (folder / "model.safetensors").symlink_to(pair[0] / "model.safetensors")
    assert not is_adapter(folder)


def test_pickled_and_linked_adapters_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = altered(pair, tmp_path / "adapter", {})
    (folder / FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(RequestError, match=r"adapter_model\.bin is a pickle, which is never read"):
        make_plan(recipe_of(pair[0], folder))
    (folder / FILE).symlink_to(pair[1] / FILE)
    with pytest.raises(RequestError, match="is a link out of its directory"):
        make_plan(recipe_of(pair[0], folder))
