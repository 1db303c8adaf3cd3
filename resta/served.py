"""One request to a model server, by the standard library alone; what a failure means is for the caller to say."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def request(url: str, *, key: str | None, timeout_s: float, body: Any = None) -> bytes:
    """Return what a server answers: to a POST of `body` as JSON, or without one to a GET.

    Raises:
        urllib.error.HTTPError: it answers with an error; close it.
        OSError, http.client.HTTPException: it cannot be reached, or breaks off.
        ValueError: the URL or the key cannot be sent.
    """
    asked = urllib.request.Request(url)
    if key:
        asked.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        asked.data = json.dumps(body).encode()
        asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked, timeout=timeout_s) as answer:
        found: bytes = answer.read()
        return found
