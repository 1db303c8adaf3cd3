"""The OpenAI-compatible protocol: an ask as a request's body, a response's body as a reply, an error as what it means.

One rule for a server that answers now and for a batch file that is answered elsewhere. Knows no transport.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from resta.fingerprint import sha256_text
from resta.redeval.messages import Decoding, Finish, Reply, Request, hidden, without_prompt

TOP_LOGPROBS = 20
SEEDS = 1 << 31  # some servers take no larger one

# Why a server says that it stopped, where it is neither done nor asked for a tool.
FINISHES: dict[str, Finish] = {
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "content_filtered": "content_filter",
    "guardrail_intervened": "content_filter",
    "safety": "content_filter",
    "prohibited_content": "content_filter",
    "sensitive": "content_filter",
}

# What is in an error by which a provider's filter refuses a question or keeps back an answer.
FILTER = re.compile(
    r"content[_ ]?filter"  # Azure, Moonshot, Anthropic
    r"|ResponsibleAIPolicy"  # Azure
    r"|content_policy_violation|\b(?:bio|cyber)_policy\b|\binvalid_prompt\b|our usage polic|our safety system"  # OpenAI
    r"|Content Exists Risk"  # DeepSeek
    r"|data_?inspection_?failed|inappropriate content"  # Alibaba
    r"|considered high risk"  # Moonshot
    r"|Content violates usage guidelines|SAFETY_CHECK_TYPE"  # xAI
    r"|your input was flagged|moderation_blocked"  # OpenRouter
    r"|\"code\": ?\"1301\"|(?:input|output) new_sensitive",  # Zhipu, MiniMax
    re.IGNORECASE,
)

# Where a server with a reasoning parser puts the thought, apart from the answer.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class GarbledError(ValueError):
    """A response that is not what the protocol says, such as one torn on its way; another try may be whole."""


def seed_of(seed: int, ask_id: str) -> int:
    """Return the seed of one request: a server that is given the same one for the same prompt repeats its answer.

    The id names question, template and epoch, so each epoch is a draw of its own, and the same one when asked again.
    """
    return int(sha256_text(f"{seed}|{ask_id}")[:15], 16) % SEEDS


def request_body(request: Request, model: str, decoding: Decoding, template_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON body of one request to path_of(ask)."""
    body: dict[str, Any] = {"model": model, "max_tokens": decoding.max_new_tokens}
    if decoding.mode != "model":
        body["temperature"] = 0 if decoding.mode == "greedy" else decoding.temperature
    if decoding.mode == "sample":
        body |= {"top_p": decoding.top_p, "seed": seed_of(decoding.seed, request.id)}
    if request.raw:
        body["prompt"] = request.messages[0].content
        body |= {"logprobs": TOP_LOGPROBS} if decoding.logprobs else {}
    else:
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if decoding.logprobs else {}
        body |= {"chat_template_kwargs": dict(template_args)} if template_args else {}
    return body


def path_of(request: Request) -> str:
    """Return where a request is sent to, below the server's /v1."""
    return "/completions" if request.raw else "/chat/completions"


def is_filter(error: object, prompts: Iterable[str]) -> bool:
    """Whether an error, as text or JSON-able facts, says that a filter refused; the prompt in it says nothing."""
    text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False, default=str)
    return FILTER.search(hidden(text, prompts)) is not None


def blocked(request: Request) -> Reply:
    """Return the reply that a filter kept back; what it said of its reasons is nobody's answer."""
    return Reply(id=request.id, text="", finish="content_filter")


def read_body(request: Request, body: object) -> Reply:
    """Return the reply in a response's body. Raises GarbledError where it holds none."""
    if isinstance(body, dict) and body.get("error"):  # some routers report a failed upstream with status 200
        prompts = [message.content for message in request.messages]
        if is_filter(body["error"], prompts):
            return blocked(request)
        raise GarbledError(f"an error with status 200: {without_prompt(str(body['error']), prompts)}")
    try:
        return _reply(request, body)  # type: ignore[arg-type]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        shape = type(body).__name__ if not isinstance(body, dict) else "{" + ", ".join(sorted(body)) + "}"
        raise GarbledError(f"not a completion but {shape} ({type(error).__name__}: {error})") from error


def _reply(request: Request, body: Mapping[str, Any]) -> Reply:
    if not body["choices"]:
        raise ValueError("no choices")
    choice = body["choices"][0]
    thought, text = ("", choice["text"]) if request.raw else _said(choice["message"])
    if not isinstance(text, str) or not isinstance(thought, str):
        raise TypeError(f"the reply is not text but {type(text).__name__}")
    usage = body.get("usage") or {}
    return Reply(
        id=request.id,
        text=text,
        thought=thought,
        finish=FINISHES.get(str(choice.get("finish_reason")).lower(), "stop"),
        prompt_tokens=usage.get("prompt_tokens"),
        new_tokens=usage.get("completion_tokens"),
        top=_top(choice.get("logprobs"), raw=request.raw),
    )


def _said(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return (thought, answer) of a message; a refusal in its own field is an answer like any other."""
    thought = next((message[key] for key in THOUGHT_KEYS if message.get(key)), "")
    content = message.get("content") if "content" in message or thought else message["content"]
    if isinstance(content, list):  # typed parts, the thought among them
        parts = [(part.get("type"), part) for part in content]
        thought = thought or "".join(_part(part["thinking"]) for kind, part in parts if kind == "thinking")
        content = "".join(part["text"] for kind, part in parts if kind == "text")
    return thought, content or message.get("refusal") or ""


def _part(thinking: Any) -> str:
    return thinking if isinstance(thinking, str) else "".join(part.get("text", "") for part in thinking)


def _top(logprobs: Mapping[str, Any] | None, *, raw: bool) -> tuple[dict[str, float], ...]:
    """Return per token {text: log-probability}, the generated one first, from either endpoint's shape."""
    if not logprobs:
        return ()
    if raw:
        rows = zip(
            logprobs.get("tokens") or [],
            logprobs.get("token_logprobs") or [],
            logprobs.get("top_logprobs") or [],
            strict=False,
        )
        return tuple({token: value, **(top or {})} for token, value, top in rows)
    return tuple(
        {item["token"]: item["logprob"], **{t["token"]: t["logprob"] for t in item.get("top_logprobs") or []}}
        for item in logprobs.get("content") or []
    )
