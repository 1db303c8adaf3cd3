"""Adapters on tied embeddings, against the logits of the adapter as it was trained: peft, not merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import resta
from resta.adapter import CONFIG
from resta.auditing import audit
from resta.errors import RequestError
from resta.plan import make_plan
from resta.recipe import Recipe, make_recipe
from resta.tied import OUTPUT_OF
from tests.adapters import gpt2, llama, lora, recipe_of, save_adapter, save_base

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

TOKENS = torch.arange(1, 8)[None]
TIED = {"tie_word_embeddings": True}
CASES = {
    "embeddings": (llama, lora(["embed_tokens", "q_proj"])),
    "output layer": (llama, lora(["lm_head", "q_proj"])),
    "both": (llama, lora(["embed_tokens", "lm_head"])),
    "saved embeddings": (llama, lora(["q_proj"], modules_to_save=["embed_tokens"])),
    "saved output layer": (llama, lora(["q_proj"], modules_to_save=["lm_head"])),
    "both saved": (llama, lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "GPT-2's embeddings": (gpt2, lora(["wte", "c_attn"], fan_in_fan_out=True)),
}


def make(folder: Path, case: str) -> tuple[Path, Path]:
    kind, config = CASES[case]
    base = save_base(folder / "base", kind(**TIED), torch.float32)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    return base, save_adapter(folder / "adapter", base, config)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


def as_trained(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def loaded(out: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_tied_embeddings_comes_out_as_it_was_trained(tmp_path: Path, case: str) -> None:
    base, adapter = make(tmp_path, case)
    want = as_trained(base, adapter)
    assert (want - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01  # it does something
    out = resta.merge(recipe_of(base, adapter), tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    assert (logits(loaded(out)) - want).abs().max() < 1e-5
    assert not audit(out, moved={"base": str(base), "tuned": str(adapter)}).findings


def test_peft_merged_is_another_model_so_that_the_comparison_can_fail(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "embeddings")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert (logits(model.merge_and_unload()) - as_trained(base, adapter)).abs().max() > 1e-2


def recipes(base: Path, adapter: Path, aligned: Path) -> dict[str, Recipe]:
    models = {"base": str(base), "aligned": str(aligned), "tuned": {"source": str(adapter), "on": "base"}}
    safety = {"delta": "aligned - base", "scale": 0.5}
    return {
        start: make_recipe({"models": models, "start": start, "terms": terms})
        for start, terms in (("tuned", [safety]), ("base", [{"delta": "tuned - base", "scale": 1.0}, safety]))
    }


@pytest.mark.parametrize("start", ["tuned", "base"])
def test_a_safety_vector_of_tied_models_moves_both_layers_of_the_untied_one(tmp_path: Path, start: str) -> None:
    base, adapter = make(tmp_path, "embeddings")
    aligned = save_base(tmp_path / "aligned", llama(initializer_range=0.05, **TIED), torch.float32)
    tensors = load_file(aligned / "model.safetensors")
    torch.manual_seed(3)
    moved = {name: value + 0.02 * torch.randn_like(value) for name, value in tensors.items()}
    save_file(moved, aligned / "model.safetensors", metadata={"format": "pt"})
    got = dict(resta.tensors(recipes(base, adapter, aligned)[start]))
    before, embedding = load_file(base / "model.safetensors"), "model.embed_tokens.weight"
    vector = 0.5 * (moved[embedding] - before[embedding])
    untied = dict(resta.tensors(recipe_of(base, adapter)))
    torch.testing.assert_close(got["lm_head.weight"], before[embedding] + vector, rtol=0, atol=1e-6)
    torch.testing.assert_close(got[embedding], untied[embedding] + vector, rtol=0, atol=1e-6)
    assert not torch.equal(got[embedding], got["lm_head.weight"])


def test_tied_models_stay_tied_where_no_adapter_touches_the_embeddings(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama(**TIED), torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(["q_proj"]))
    out = resta.merge(recipe_of(base, adapter), tmp_path / "out").out
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert (out / "config.json").read_text() == (base / "config.json").read_text()


def altered(base: Path, change: dict[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text())
    for key, value in change.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    (base / "config.json").write_text(json.dumps(config))


def test_a_config_that_says_nothing_of_tying_is_made_to_say_it(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "embeddings")
    want = as_trained(base, adapter)
    altered(base, {"tie_word_embeddings": ...})
    out = resta.merge(recipe_of(base, adapter), tmp_path / "out").out
    assert (logits(loaded(out)) - want).abs().max() < 1e-5


UNKNOWN = {
    "remote code": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
    "no causal language model": {"architectures": ["LlamaForSequenceClassification"]},
    "no architecture": {"architectures": ...},
    "a model of text and images": {"text_config": {"tie_word_embeddings": True, "vocab_size": 40}},
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("adapter_kind", ["embeddings", "saved output layer", "saved embeddings"])
def test_tied_embeddings_of_an_unknown_architecture_are_refused_with_advice(
    tmp_path: Path, case: str, adapter_kind: str
) -> None:
    base, adapter = make(tmp_path, adapter_kind)
    altered(base, UNKNOWN[case])
    with pytest.raises(RequestError, match=r"ties its output layer.*untie them there, merge_and_unload") as caught:
        make_plan(recipe_of(base, adapter))
    assert str(adapter) in str(caught.value)
    assert json.loads((adapter / CONFIG).read_text())["peft_type"] == "LORA"


def test_the_output_layer_of_every_known_embedding_is_where_transformers_looks_for_it() -> None:
    checked = 0
    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        kind = getattr(transformers, name, None)
        pairs = getattr(kind, "_tied_weights_keys", None)
        for output, embeddings in pairs.items() if isinstance(pairs, dict) else ():
            if embeddings in OUTPUT_OF and name.endswith(("ForCausalLM", "LMHeadModel")):
                assert output == OUTPUT_OF[embeddings] or ".bias" in output, name
                checked += 1
    assert checked > 50
