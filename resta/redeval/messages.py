"""What is sent to any model and what comes back: the nouns that engine, batch files, judges and runs share.

Knows nothing of banks, judges, files or any library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from resta.fingerprint import sha256_text

Finish = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question to one model: chat `messages`, or for `raw` the one message's text as the whole prompt."""

    id: str
    messages: tuple[Message, ...]
    raw: bool = False
    facts: dict[str, str] = field(default_factory=dict)  # for people who browse the log; the model never sees it

    @property
    def custom_id(self) -> str:
        """Return the id in a form that every batch service takes: 32 hexadecimal digits."""
        return sha256_text(self.id)[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a model said. `top` holds, per generated token, {token text: log-probability} where asked for.

    A thought is part of `text`, between its marks, or apart from it as `thought` where a server took it out. `opened`
    is the mark of a thought with which the prompt ended, so that the text goes on with it. `rows` is the most prompts
    that its batch could hold, of a model in this process.
    """

    id: str
    text: str
    finish: Finish
    thought: str = ""
    opened: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    rows: int | None = None
    top: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NoReply:
    """An ask that got no answer after all its retries; `reason` never holds the prompt.

    `own`: it is the question's own fault, such as its length, and tells nothing of whether others get an answer.
    """

    id: str
    reason: str
    own: bool = False


Outcome = Reply | NoReply


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are chosen.

    `greedy`: the most likely token, always. `sample`: `temperature` and `top_p`, each draw keyed by `seed`, the ask's
    id and the position. `model`: as the model's own generation config (or the server) says.
    """

    max_new_tokens: int
    mode: Literal["greedy", "sample", "model"] = "greedy"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False  # ask for the 20 likeliest tokens at each position


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """How a local model's prompt is made from messages; part of the protocol, so part of the run's digest."""

    generation_prompt: bool = True
    template_args: dict[str, Any] = field(default_factory=dict)
    parts: bool = False  # message content as a list of typed parts (Llama Guard 4)
    suffix: str = ""  # forced start of the reply
    whole_sequence: bool = False  # decode prompt and reply, then cut the prompt's text out, as red-instruct does


def without_prompt(text: str, prompts: Iterable[str]) -> str:
    """Return what others said about a prompt, such as a server's error, in 300 characters and without the prompt.

    Where a part of it remains, for the server had cut or changed it, nothing of what was said is shown.
    """
    spellings = _spellings(prompts)
    text = _without(text, spellings)
    if any(s[i : i + REPEATED] in text for s in spellings for i in range(len(s) - REPEATED + 1)):
        return "[withheld: it repeats a part of the prompt]"
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def hidden(text: str, prompts: Iterable[str]) -> str:
    """Return text in which the prompts, where they stand whole, are left out."""
    return _without(text, _spellings(prompts))


def _spellings(prompts: Iterable[str]) -> list[str]:
    as_they_are = [prompt.strip() for prompt in prompts if prompt.strip()]
    in_json = [json.dumps(prompt, ensure_ascii=ascii)[1:-1] for prompt in as_they_are for ascii in (True, False)]
    return [*as_they_are, *in_json, *(repr(prompt)[1:-1] for prompt in as_they_are)]


def _without(text: str, spellings: Iterable[str]) -> str:
    for spelling in spellings:
        text = text.replace(spelling, "[prompt]")
    return text


REPEATED = 24  # characters in a row that no error shares with a prompt by chance
