"""LoRA adapters as peft makes them, on tiny models of two kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from resta.recipe import Recipe, make_recipe


def llama(**choices: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"tie_word_embeddings": False} | choices)))


def gpt2(**choices: Any) -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"tie_word_embeddings": False} | choices)))


def save_base(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> Path:
    """A base whose biases and norms are not at their initial zeros and ones either."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as initialised, but the same in every run
                parameter.normal_(0, 0.02, generator=generator)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter on a saved base, with random factors, biases and saved modules."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data = (parameter + noise).to(dtype)
    model.save_pretrained(folder)
    return folder


def recipe_of(base: Path, adapter: Path, **tuned: Any) -> Recipe:
    models = {"base": str(base), "tuned": {"source": str(adapter), "on": "base"} | tuned}
    return make_recipe({"models": models, "start": "tuned", "terms": [{"delta": "tuned - base", "scale": 0}]})


def lora(targets: Any, **choices: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | choices))
