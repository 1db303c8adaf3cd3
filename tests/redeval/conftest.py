"""Tiny models and a stub server: everything that a run meets, small enough for a test, without a network."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.redeval.builders import (
    Stub,
    save_llama,
    save_tokenizer,
)

# Both are extras; without them there is nothing here to test.
pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")


@pytest.fixture(autouse=True)
def _no_gpus_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RESTA_BANKS", "RESTA_API_KEY", "RESTA_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model's directory: adds BOS, has a chat template, stops at </s> or <|end|>."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_llama(path)
    save_tokenizer(path, adds_bos=True)
    return path


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another model's directory, to judge the first."""
    path = tmp_path_factory.mktemp("models") / "other"
    save_llama(path, seed=1)
    save_tokenizer(path, adds_bos=False)
    return path


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Return a bank of six questions in two categories, one of them repeated."""
    path = tmp_path / "six.json"
    path.write_text(json.dumps({"A:": {"x:": ["one?", "two?", "one?"]}, "B": {"y": ["three?", "four?", "five?"]}}))
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """Run a stub server on a free port of the loopback, which is tried again without a pause."""
    from resta.redeval import engine

    monkeypatch.setattr(engine, "_pause", lambda tried: 0)
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
