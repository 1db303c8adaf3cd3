"""One call to an OpenAI-compatible chat endpoint, with a rate limit and retries; it knows nothing of what is asked."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from resta.errors import RequestError, UnansweredError
from resta.served import request
from resta.sft.data import Message
from resta.sft.recipe import Positive
from resta.strict import Strict

RETRIED = {408, 409, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 60.0


class Endpoint(Strict):
    """Where a model is served, and how it is asked."""

    url: str = Field(pattern=r"^https?://", description="The server's address, up to and including /v1.")
    model: str = Field(min_length=1)
    api_key_env: str | None = Field(
        default=None, description="The name of the environment variable that holds the key: keys never stand in a file."
    )
    temperature: float = Field(default=0.7, ge=0.0)
    max_tokens: Positive = 512
    timeout_s: float = Field(default=120.0, gt=0.0)
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    concurrency: Positive = 4
    tries: Annotated[int, Field(ge=1)] = 5


@dataclass
class Client:
    """An endpoint in use: its key, the time of its next free request, and how many were made."""

    endpoint: Endpoint
    key: str | None
    wait_s: float = 1.0  # before the second try; doubled for each further one
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_start: float = 0.0
    requests: int = 0


def open_client(endpoint: Endpoint, wait_s: float = 1.0) -> Client:
    """Return a client. Raises RequestError if the key's environment variable is not set."""
    key = None
    if endpoint.api_key_env is not None:
        key = os.environ.get(endpoint.api_key_env, "").strip()  # a key read from a file ends in a line break
        if not key:
            raise RequestError(f"api_key_env: the environment variable {endpoint.api_key_env} is not set")
    return Client(endpoint=endpoint, key=key, wait_s=wait_s)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said, and whether it was cut off at `max_tokens`."""

    text: str
    cut: bool


def ask(client: Client, messages: list[Message], seed: int) -> Reply:
    """Return the model's answer. Raises UnansweredError when it cannot be had, naming the endpoint and the cause."""
    endpoint = client.endpoint
    body = {
        "model": endpoint.model,
        "messages": messages,
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "seed": seed,
    }
    cause = ""
    for attempt in range(endpoint.tries):
        _wait_for_turn(client)
        try:
            url = f"{endpoint.url.rstrip('/')}/chat/completions"
            return _read_reply(
                json.loads(request(url, key=client.key, body=body, timeout_s=endpoint.timeout_s)), endpoint
            )
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace").strip()
            cause = f"HTTP {error.code}: {said}"
            if error.code not in RETRIED:
                break
            pause = _retry_after(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, cut off, or not JSON
            cause, pause = str(error) or type(error).__name__, None
        if attempt + 1 < endpoint.tries:
            time.sleep(pause if pause is not None else min(client.wait_s * 2**attempt, LONGEST_WAIT_S))
    raise UnansweredError(
        f"{endpoint.url} ({endpoint.model}) gave no answer: {cause}. What was collected is kept; "
        "run the same command again to go on"
    )


def _wait_for_turn(client: Client) -> None:
    """Sleep until this request may start, so that starts are evenly spaced over all threads."""
    with client.lock:
        client.requests += 1
        now = time.monotonic()
        start = max(now, client.next_start)
        if client.endpoint.requests_per_minute is not None:
            client.next_start = start + 60.0 / client.endpoint.requests_per_minute
    time.sleep(start - now)


def _read_reply(reply: Any, endpoint: Endpoint) -> Reply:
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise UnansweredError(
            f"{endpoint.url} does not answer as a chat completions endpoint: no choices[0].message.content in the reply"
        ) from None
    return Reply(text=text.strip() if isinstance(text, str) else "", cut=choice.get("finish_reason") == "length")


def _retry_after(header: str | None) -> float | None:
    """Return the seconds that a server asks to wait, if it says so in a number."""
    try:
        return min(max(float(header or ""), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return None
