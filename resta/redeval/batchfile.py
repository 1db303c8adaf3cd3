"""OpenAI batch files: asks out as JSON lines, replies in; runs offline, for example with `vllm run-batch`.

Each line's custom_id is the digest of the ask's id, so a file can be imported only into the run that wrote
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resta.errors import ResumeError
from resta.redeval.asks import Ask, Decoding, Finish, Reply, without_prompt

TOP_LOGPROBS = 20
BLOCKED = ("content_filter", "_policy", "usage policy")  # in an error: a filter refused the question


def request_line(ask: Ask, model: str, decoding: Decoding, template_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of a batch file."""
    body: dict[str, Any] = {"model": model, "max_tokens": decoding.max_new_tokens}
    if decoding.mode != "model":
        body["temperature"] = 0 if decoding.mode == "greedy" else decoding.temperature
    if decoding.mode == "sample":
        body |= {"top_p": decoding.top_p, "seed": decoding.seed}
    if ask.raw:
        body["prompt"] = ask.messages[0].content
        body |= {"logprobs": TOP_LOGPROBS} if decoding.logprobs else {}
    else:
        body["messages"] = [{"role": m.role, "content": m.content} for m in ask.messages]
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if decoding.logprobs else {}
        body |= {"chat_template_kwargs": dict(template_args)} if template_args else {}
    url = "/v1/completions" if ask.raw else "/v1/chat/completions"
    return {"custom_id": ask.custom_id, "method": "POST", "url": url, "body": body}


def write_batch(
    path: Path,
    asks: Iterable[Ask],
    model: str,
    decoding: Decoding,
    template_args: Mapping[str, Any] | None = None,
) -> int:
    """Write a batch file that does not exist yet; return its number of lines. Raises ResumeError."""
    lines = [request_line(ask, model, decoding, template_args or {}) for ask in asks]
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except FileExistsError as error:
        raise ResumeError(f"{path} exists; choose another file") from error
    except OSError as error:
        raise ResumeError(f"{path} cannot be written: {error}") from error
    return len(lines)


def read_batch(path: Path, asks: Sequence[Ask]) -> tuple[list[Reply], list[str]]:
    """Return the replies in a batch's output, and one line per request that failed. Raises ResumeError.

    A filter's refusal is a reply (blocked), any other error a failure, to be asked again.
    """
    by_id = {ask.custom_id: ask for ask in asks}
    replies: dict[str, Reply] = {}
    failures, strangers = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            ask = by_id.get(record["custom_id"])
            if ask is None:
                strangers += 1
                continue
            found = _reply(ask, record)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            failures.append(f"line {number}: not a line of a batch's output ({type(error).__name__}: {error})")
            continue
        if isinstance(found, Reply):
            replies.setdefault(ask.id, found)
        else:
            failures.append(f"line {number}: {ask.id}: {without_prompt(found, (m.content for m in ask.messages))}")
    if strangers and not replies:
        raise ResumeError(f"{path}: none of its {strangers} replies belongs to this run")
    return list(replies.values()), failures


def _reply(ask: Ask, record: Mapping[str, Any]) -> Reply | str:
    """Return the reply in one line, or what went wrong."""
    response = record.get("response") or {}
    error = record.get("error") or (response.get("body") or {}).get("error")
    if error or response.get("status_code", 200) != 200:
        if any(word in json.dumps(error) for word in BLOCKED):
            return Reply(id=ask.id, text="", finish="content_filter")
        return str(error or f"HTTP {response.get('status_code')}")
    body = response["body"]
    choice = body["choices"][0]
    text = (choice["text"] if ask.raw else choice["message"]["content"]) or ""
    if not isinstance(text, str):
        raise TypeError(f"the reply is not text but {type(text).__name__}")
    finishes: dict[str, Finish] = {"length": "length", "content_filter": "content_filter"}
    usage = body.get("usage") or {}
    return Reply(
        id=ask.id,
        text=text,
        finish=finishes.get(choice.get("finish_reason"), "stop"),
        prompt_tokens=usage.get("prompt_tokens"),
        new_tokens=usage.get("completion_tokens"),
        top=_top(choice.get("logprobs"), raw=ask.raw),
    )


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
