"""Tiny models and a stub server: everything that a run meets, small enough for a test, without a network."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# Both are extras; without them there is nothing here to test.
pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RESTA_BANKS", "RESTA_API_KEY", "RESTA_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


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


def save_model(path: Path, *, seed: int = 0, context: int = 2048) -> None:
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

    save_model(path, seed=seed)
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model's directory: adds BOS, has a chat template, stops at </s> or <|end|>."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
    save_tokenizer(path, adds_bos=True)
    return path


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another model's directory, to judge the first."""
    path = tmp_path_factory.mktemp("models") / "other"
    save_model(path, seed=1)
    save_tokenizer(path, adds_bos=False)
    return path


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Return a bank of six questions in two categories, one of them repeated."""
    path = tmp_path / "six.json"
    path.write_text(json.dumps({"A:": {"x:": ["one?", "two?", "one?"]}, "B": {"y": ["three?", "four?", "five?"]}}))
    return path


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


@pytest.fixture
def stub() -> Iterator[Stub]:
    """Run a stub server on a free port of the loopback."""
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def send(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                self.wfile.write(data)

        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.paths.append(self.path)
            state.bodies.append(body)
            self.send(*state.answer(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
