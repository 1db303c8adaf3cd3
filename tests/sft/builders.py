"""Tiny tokenizers, models and rows, built where they are used: nothing is downloaded."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. USER: ASSISTANT: system user assistant model",
    "I cannot help with that, but here is something safe that you could do instead.",
    "What is the sum of 12 and 30? The sum is 42. Answer: 42",
    "[INST] [/INST] <<SYS>> <</SYS>> A chat between a curious user and an artificial intelligence assistant.",
] * 4
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: words start with a visible space, BOS is added to text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials + bytes_, show_progress=False, max_token_length=8
    )
    core.train_from_iterator(CORPUS, trainer)
    settings = json.loads(core.to_str())
    settings["added_tokens"] = [t for t in settings["added_tokens"] if t["content"] in specials]
    core = Tokenizer.from_str(json.dumps(settings))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def byte_level(bos: str | None = None) -> PreTrainedTokenizerFast:
    """A GPT-like tokenizer with the control tokens of ChatML, Llama-3 and Gemma; adds `bos` to text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|begin|>", "<|end|>", *MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<pad>")


def tiny_config(vocabulary: int, **changes: Any) -> LlamaConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(settings | changes))


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
