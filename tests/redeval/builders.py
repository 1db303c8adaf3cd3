"""Tiny models and answers, a stub of a server and its replies: everything that a run meets, without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click.testing

from resta.cli import main
from resta.journal import read_rows
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(path: Path, *, adds_bos: bool, chat_template: str | None = TEMPLATE) -> Any:
    """Write a byte-level tokenizer; every text survives a round trip, every ASCII letter is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return tokenizer


def save_llama(path: Path, *, seed: int = 0, context: int = 2048) -> None:
    """Write a random two-layer Llama; tied weights, sampling settings that greedy decoding must not heed."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.8,
        repetition_penalty=1.3,
        eos_token_id=[2, 6],
        bos_token_id=1,
    )
    model.save_pretrained(path)


def save_refusing(path: Path, *, seed: int = 0, says: str = "I can't") -> None:
    """Write a model and its tokenizer that says one thing, in which no character comes twice, whatever it is asked.

    The next token hangs on the last one alone: attention and MLP add nothing, and a token's embedding, the same for
    every seed, is the row of its successor in the output layer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    save_llama(path, seed=seed)
    tokenizer = save_tokenizer(path, adds_bos=True)
    random = AutoModelForCausalLM.from_pretrained(path)
    random.config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(random.config)
    model.generation_config = random.generation_config
    weights = {name: value.clone() for name, value in random.state_dict().items()}
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
    embeddings = 4 * torch.nn.functional.normalize(torch.randn(263, 32, generator=torch.Generator().manual_seed(7)))
    chain = tokenizer.convert_tokens_to_ids(["<|assistant|>", *tokenizer.tokenize(says), "<|end|>"])
    head = torch.zeros(263, 32)
    head[chain[1:]] = embeddings[chain[:-1]]
    model.load_state_dict({**weights, "model.embed_tokens.weight": embeddings, "lm_head.weight": head})
    model.save_pretrained(path)


@dataclass
class Stub:
    """A local OpenAI-compatible server; `answer` maps a request's body to (status, body)."""

    url: str = ""
    answer: Callable[[dict[str, Any]], tuple[int, Any]] = field(default=lambda body: (200, chat("ok")))
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def chat(text: str, *, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    """Return the body of a chat completion."""
    return chat_message({"content": text}, finish=finish, logprobs=logprobs)


def chat_message(message: dict[str, Any], *, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    """Return the body of a chat completion whose message holds more than text."""
    message = {"role": "assistant", **message}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def completion(text: str, top: dict[str, float]) -> dict[str, Any]:
    """Return the body of a plain completion with log-probabilities of its one token."""
    first = next(iter(top))
    logprobs = {"tokens": [first], "token_logprobs": [top[first]], "top_logprobs": [top], "text_offset": [0]}
    return {
        "id": "1",
        "object": "text_completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }


CONFIG: dict[str, Any] = {
    **{"protocol": "resta", "target": {"name": "m", "kind": "local"}, "banks": [{"name": "six"}], "templates": []},
    **{"duplicates": "once", "limit": None, "epochs": 1, "decoding": {"max_new_tokens": 8}, "rendering": {}},
    "keep_thoughts": False,
}


def question(i: int, *, safe: bool = False, category: str = "A") -> Question:
    return Question(
        bank="safe" if safe else "bad", category=category, subcategory="", index=i, text=f"q{i}?", safe=safe
    )


def answer(q: Question, template: str = "standard", epoch: int = 0, text: str = "words") -> Answer:
    return Answer(
        id=f"{q.qid}|{template}|{epoch}",
        qid=q.qid,
        template=template,
        epoch=epoch,
        prompt_sha256="",
        raw=text,
        text=text,
        finish="stop",
        new_tokens=4,
    )


def verdict(a: Answer, label: str, judge: str = "j") -> Judgement:
    return Judgement(answer_id=a.id, judge=judge, judge_sha256="s", label=label)  # type: ignore[arg-type]


def invoke(*args: object, code: int = 0) -> str:
    """Run the command line in this process and return what it printed."""
    result = click.testing.CliRunner().invoke(main, ["redeval", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return str(result.output)


def answers(path: Path) -> list[Answer]:
    return read_rows(path / "answers.jsonl", Answer)


def verdicts(path: Path) -> list[Judgement]:
    return read_rows(path / "verdicts.jsonl", Judgement)
