"""Hub datasets, from a server on this machine that speaks what the `datasets` library asks of it; in processes of their
own, since the library reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

OLD, NEW = "a1" * 20, "b2" * 20
FILE = "data_for_hub.json"


def thread(said: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "Placeholder?"}, {"from": "gpt", "value": said}]


def row(said: str, *keys: str) -> dict[str, Any]:
    """A row of HarmfulQA's shape, whose threads are not numbered alike."""
    blue = {key: thread(f"{said} {key}") for key in keys}
    return {"topic": "t", "subtopic": "s", "question": "Placeholder?", "blue_conversations": blue}


FILES = {
    OLD: json.dumps([row("old", "0", "2") | {"red_conversations": {"4": thread("red")}}, row("old", "1")]).encode(),
    NEW: json.dumps([row("new", "0")]).encode(),
}
REVISIONS = {"v1": OLD, "main": NEW, OLD: OLD, NEW: NEW}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, info = self.path.partition("?")[0], "/api/datasets/org/name"
        kind, _, rest = path.removeprefix(info).strip("/").partition("/")
        revision = rest.partition("/")[0]
        headers, content, status = {}, b"{}", 200
        if path == info or (kind == "revision" and revision in REVISIONS):
            commit = REVISIONS[revision or "main"]
            content = json.dumps({"id": "org/name", "sha": commit, "siblings": [{"rfilename": FILE}]}).encode()
        elif path in (f"{info}/tree/{OLD}", f"{info}/tree/{NEW}"):
            entry = {"type": "file", "path": FILE, "size": len(FILES[revision]), "oid": self.oid(revision)}
            content = json.dumps([entry]).encode()
        elif path.endswith(f"/{FILE}"):
            commit = path.split("/")[-2]
            content, headers = FILES[commit], {"X-Repo-Commit": commit, "ETag": f'"{self.oid(commit)}"'}
        else:
            known = any(f"/{name}/" in path for name in REVISIONS)
            status, headers = 404, {"X-Error-Code": "EntryNotFound" if known else "RevisionNotFound"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    @staticmethod
    def oid(commit: str) -> str:
        return hashlib.sha1(FILES[commit]).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# Each wish is [revision, side]; each answer what resta.json will say, the answers that were read, or the refusal.
SCRIPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from resta.errors import RequestError
from resta.sft.data import load
from resta.sft.save import data_facts
from resta.sft.recipe import Source
for revision, side in json.loads(sys.argv[1]):
    source = Source(name="a", hub="org/name", revision=revision, side=side)
    try:
        loaded = load(source, Path(), bad_rows="refuse")
    except RequestError as error:
        print(json.dumps({"error": str(error)}))
        continue
    job = SimpleNamespace(recipe=SimpleNamespace(objective=SimpleNamespace(kind="sft")))
    fitted = SimpleNamespace(mixture=SimpleNamespace(sources=[loaded], drawn={"a": 0}))
    said = [c.messages[-1]["content"] for c in loaded.conversations]
    print(json.dumps(data_facts(job, fitted)[0] | {"said": said}))
"""


def ask(endpoint: str, home: Path, *wishes: tuple[str | None, str], **environment: str) -> list[dict[str, Any]]:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(wishes)],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_a_hub_dataset_is_read_at_its_revision_and_the_commit_is_recorded(hub: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    newest, old, pinned, red, absent = ask(
        hub, home, (None, "blue"), ("v1", "blue"), (OLD, "blue"), ("v1", "red"), ("v2", "blue")
    )
    assert (newest["said"], newest["revision"], newest["commit"]) == (["new 0"], None, NEW)
    assert (old["said"], old["revision"], old["commit"]) == (["old 0", "old 2", "old 1"], "v1", OLD)
    assert (pinned["said"], pinned["digest"]) == (old["said"], old["digest"])
    assert newest["digest"] != old["digest"]
    assert red["said"] == ["red"]
    assert sum(red["dropped"].values()) > 0  # the row without a red thread
    assert "cannot load 'org/name@v2'" in absent["error"]


def test_without_the_hub_another_commit_is_never_taken_for_the_one_asked_for(hub: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ask(hub, home, (NEW, "blue"))
    same, other, tag = ask(hub, home, (NEW, "blue"), (OLD, "blue"), ("v1", "blue"), HF_HUB_OFFLINE="1")
    assert (same.get("said"), same.get("commit")) == (["new 0"], NEW), same
    for refused in (other, tag):
        assert f"the Hub cannot be reached, and the copy in the cache is of commit {NEW}" in refused["error"]
