"""A request reaches the server as it was meant, and its errors reach the caller as they are."""

from __future__ import annotations

import json
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from resta.served import request

Seen = list[tuple[str, str | None, str | None, bytes]]


@pytest.fixture
def server() -> Iterator[tuple[str, Seen]]:
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            kind, key = self.headers.get("Content-Type"), self.headers.get("Authorization")
            seen.append((self.command, kind, key, self.rfile.read(length)))
            self.send_response(503 if self.path == "/busy" else 200)
            self.end_headers()
            self.wfile.write(b"said")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", seen
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_body_is_posted_as_json_and_none_is_a_get(server: tuple[str, Seen]) -> None:
    url, seen = server
    assert request(f"{url}/x", key="k", body={"a": "ü"}, timeout_s=60) == b"said"
    assert request(f"{url}/x", key=None, timeout_s=60) == b"said"
    (posted, kind, key, body), got = seen
    assert (posted, kind, key, json.loads(body)) == ("POST", "application/json", "Bearer k", {"a": "ü"})
    assert got == ("GET", None, None, b"")


def test_an_answer_that_is_an_error_is_raised_with_what_was_said(server: tuple[str, Seen]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        request(f"{server[0]}/busy", key=None, timeout_s=60)
    with caught.value as error:
        assert error.read() == b"said"


def test_a_key_that_no_header_may_hold_is_refused(server: tuple[str, Seen]) -> None:
    with pytest.raises(ValueError, match="header"):
        request(server[0], key="k\nX-Other: 1", timeout_s=60)
    assert server[1] == []
