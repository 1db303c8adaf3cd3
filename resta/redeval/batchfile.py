"""OpenAI batch files: asks out as JSON lines, replies in; runs offline, for example with `vllm run-batch`.

Each line's custom_id is the digest of the ask's id, so a file can be imported only into the run that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resta.errors import ResumeError
from resta.redeval.messages import Decoding, NoReply, Reply, Request, without_prompt
from resta.redeval.wire import GarbledError, blocked, is_filter, path_of, read_body, request_body


def request_line(request: Request, model: str, decoding: Decoding, template_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of a batch file."""
    body = request_body(request, model, decoding, template_args)
    return {"custom_id": request.custom_id, "method": "POST", "url": f"/v1{path_of(request)}", "body": body}


def check_new(path: Path) -> None:
    """Raise ResumeError where a batch file cannot be made: it is there, or its folder is not."""
    if path.exists():
        raise ResumeError(f"{path} exists; choose another file")
    if not path.parent.is_dir():
        raise ResumeError(f"{path} cannot be written: there is no folder {path.parent}")


def write_batch(
    path: Path,
    requests: Iterable[Request],
    model: str,
    decoding: Decoding,
    template_args: Mapping[str, Any] | None = None,
) -> int:
    """Write a batch file that does not exist yet; return its number of lines. Raises ResumeError."""
    lines = [request_line(request, model, decoding, template_args or {}) for request in requests]
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except FileExistsError as error:
        raise ResumeError(f"{path} exists; choose another file") from error
    except OSError as error:
        raise ResumeError(f"{path} cannot be written: {error}") from error
    return len(lines)


def read_batch(path: Path, requests: Sequence[Request]) -> tuple[list[Reply], list[NoReply]]:
    """Return the replies in a batch's output, and the requests that failed or whose line is torn.

    A filter's refusal is a reply (blocked), any other error a failure, to be asked again. Raises ResumeError where
    nothing in the file belongs to these asks.
    """
    by_id = {request.custom_id: request for request in requests}
    replies: dict[str, Reply] = {}
    failures: list[NoReply] = []
    strange: list[str] = []
    strangers = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            request = by_id.get(record["custom_id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            strange.append(f"line {number}: not a line of a batch's output ({type(error).__name__}: {error})")
            continue
        if request is None:
            strangers += 1
            continue
        found = _outcome(request, record)
        if isinstance(found, Reply):
            replies.setdefault(request.id, found)
        else:
            failures.append(found)
    if not replies and not failures:
        why = strange[0] if strange else f"{strangers} are to those of another"
        raise ResumeError(f"{path} holds no reply to a request of this run: {why}")
    return list(replies.values()), [*failures, *(NoReply(id=path.name, reason=line) for line in strange)]


def _outcome(request: Request, record: Mapping[str, Any]) -> Reply | NoReply:
    try:
        found = _reply(request, record)
    except (GarbledError, AttributeError, TypeError) as error:
        found = f"not a response: {error}"
    if isinstance(found, Reply):
        return found
    return NoReply(id=request.id, reason=without_prompt(found, (m.content for m in request.messages)))


def _reply(request: Request, record: Mapping[str, Any]) -> Reply | str:
    """Return the reply in one line, or what went wrong. Raises GarbledError."""
    response = record.get("response") or {}
    body = response.get("body")
    error = record.get("error") or (body.get("error") if isinstance(body, dict) else body)
    if record.get("error") or response.get("status_code", 200) != 200:
        if is_filter(error, (m.content for m in request.messages)):
            return blocked(request)
        return str(error or f"HTTP {response.get('status_code')}")
    return read_body(request, body)
