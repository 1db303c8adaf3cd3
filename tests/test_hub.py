"""The Hub, as a server on this machine that speaks what `huggingface_hub` asks of it; in processes of their own, since
the library reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import resta
from resta.checkpoint import read_weights
from resta.errors import RequestError
from resta.hub import locate
from tests.builders import CONFIG, assert_same_tensors, read, save_model

COMMIT = "c0ffee" + "0" * 34
WEIGHTS = save({"w": torch.arange(4.0)}, metadata={"format": "pt"})
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "LICENSE": b"free",
    "pytorch_model.bin": b"a pickle",
    "training_args.pt": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"# model",
    "onnx/model.safetensors": b"nested",
    "consolidated.safetensors": WEIGHTS,
    "model.fp16.safetensors": WEIGHTS,
    "additional_chat_templates/rag.jinja": b"{{ y }}",
    "original/params.json": b"{}",
}
TEMPLATE = "additional_chat_templates/rag.jinja"
FETCHED = {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", TEMPLATE}


def digest_of(name: str) -> str:
    """LFS files are known by their SHA-256, small ones by a git object id."""
    kind = hashlib.sha256 if name.endswith((".safetensors", ".bin", ".pt")) else hashlib.sha1
    return kind(FILES[name]).hexdigest()


def tree() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, content in FILES.items():
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(digest_of(name)) == 64:
            entry["lfs"] = {"oid": digest_of(name), "size": len(content), "pointerSize": 130}
        entries.append(entry)
    return entries


class Handler(BaseHTTPRequestHandler):
    requests: list[str]
    cut_short = False
    down = False

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(path)
        info, resolve = "/api/models/org/name", f"/org/name/resolve/{COMMIT}/"
        if self.down:
            self.send({"error": "come back later"}, body, status=503)
        elif path in (info, f"{info}/revision/v1", f"{info}/revision/main", f"{info}/revision/{COMMIT}"):
            self.send({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}, body)
        elif path == f"{info}/tree/{COMMIT}":
            self.send(tree(), body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in FILES:
            self.send_file(path.removeprefix(resolve), body)
        elif path.startswith(info):
            self.send({"error": "no such revision"}, body, status=404, code="RevisionNotFound")
        else:
            self.send({"error": "no such model"}, body, status=404, code="RepoNotFound")

    def send(self, value: Any, body: bool, status: int = 200, code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.finish_with(content, body)

    def send_file(self, name: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest_of(name)}"')
        self.finish_with(FILES[name], body, cut=self.cut_short and name == "model.safetensors")

    def finish_with(self, content: bytes, body: bool, cut: bool = False) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)


@contextmanager
def serving(*, cut_short: bool = False, down: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A Hub on a free port of this machine: its address, and the paths asked of it so far."""
    handler = type("OneHandler", (Handler,), {"requests": [], "cut_short": cut_short, "down": down})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


SCRIPT = """
import json, sys
from resta.checkpoint import read_weights
from resta.errors import RequestError
from resta.hub import locate
try:
    located = locate(sys.argv[1])
except RequestError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
weights = read_weights(located)
print(json.dumps({
    "source": located.source, "hub_id": located.hub_id, "commit": located.commit, "folder": str(located.folder),
    "tensors": sorted(weights.tensors), "sha256": {path.name: f.sha256 for path, f in weights.files.items()},
    "present": sorted(path.relative_to(located.folder).as_posix() for path in located.folder.rglob("*")),
}))
"""

CHECK = """
import json, sys
from resta.errors import RequestError
from resta.hub import check_there
try:
    check_there(sys.argv[1])
    print("{}")
except RequestError as error:
    print(json.dumps({"error": str(error)}))
"""


CONVERT = """
import json, shlex, sys
from click.testing import CliRunner
from resta.cli import main
done = CliRunner().invoke(main, shlex.split(sys.argv[1]))
print(json.dumps({"exit_code": done.exit_code, "output": done.output}))
"""


def run(source: str, endpoint: str, home: Path, script: str = SCRIPT, **environment: str) -> dict[str, Any]:
    """What a script (`locate` and `read_weights`) makes of a source, in a process with this endpoint and own cache."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    done = subprocess.run(
        [sys.executable, "-c", script, source],
        env=os.environ | settings | environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_model_is_fetched_by_id_and_revision_and_then_works_offline(home: Path) -> None:
    with serving() as (endpoint, requests):
        first = run("org/name@v1", endpoint, home)
        files = {path.partition(f"/resolve/{COMMIT}/")[2] for path in requests if "/resolve/" in path}
    assert files == FETCHED  # not one request for a pickle, code or a nested file
    assert set(first["present"]) == FETCHED | {"additional_chat_templates"}
    assert (first["hub_id"], first["commit"], first["source"]) == ("org/name", COMMIT, "org/name@v1")
    assert first["tensors"] == ["w"]
    assert first["sha256"] == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    assert run("org/name@v1", endpoint, home, HF_HUB_OFFLINE="1") == first
    assert run(f"org/name@{COMMIT}", endpoint, home, HF_HUB_OFFLINE="1")["commit"] == COMMIT


def test_what_the_hub_does_not_have_is_one_clear_refusal(home: Path) -> None:
    with serving() as (endpoint, _):
        for source in ("org/absent", "org/name@absent"):
            error = run(source, endpoint, home)["error"]
            assert error.startswith(f"{source}: there is no such directory, and it could not be fetched from the Hub: ")
            assert "\n" not in error


def test_a_hub_that_cannot_be_reached_is_one_clear_refusal(home: Path) -> None:
    with serving() as (endpoint, _):
        pass  # the port is free again, and nobody answers there
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        error = run("org/name", endpoint, home, **environment)["error"]
        assert error.startswith("org/name: there is no such directory, and it could not be fetched from the Hub: ")
        assert "\n" not in error


def test_a_hub_that_fails_is_asked_once_whether_a_model_is_there(home: Path) -> None:
    with serving(down=True) as (endpoint, requests):
        error = run("org/name@v1", endpoint, home, script=CHECK)["error"]
    assert error.startswith("org/name@v1: there is no such directory, and it could not be fetched from the Hub: ")
    assert requests == ["/api/models/org/name/revision/v1"]
    with serving() as (endpoint, requests):
        run("org/name@v1", endpoint, home, script=CHECK)
    assert not [path for path in requests if "/resolve/" in path]  # none of its files is fetched


def test_a_download_that_breaks_off_is_one_clear_refusal_and_leaves_no_model(home: Path) -> None:
    with serving(cut_short=True) as (endpoint, _):
        error = run("org/name", endpoint, home)["error"]
        assert error.startswith("org/name: there is no such directory, and it could not be fetched from the Hub: ")
    assert "error" in run("org/name", endpoint, home, HF_HUB_OFFLINE="1")


def test_a_directory_of_that_name_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    located = locate("org/name")
    assert located.folder == tmp_path / "org" / "name"
    assert (located.hub_id, located.commit) == (None, None)


@pytest.mark.parametrize(
    "source",
    [
        "name", "a/b/c", "./org/name", "../org/name", "/org/name", "~nobody-of-that-name/x", "", " ", "org/name@",
        "org/name@v 1", "org/name\n", "n" * 5000, "org/" + "n" * 5000 + "/x", "a\0b", "hf://org/name", "org//name",
    ],
)  # fmt: skip
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused_without_asking_anyone(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        locate(source)
    assert str(caught.value).startswith(source)


def test_a_file_is_refused_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    with pytest.raises(RequestError, match=r"expected a model directory .* it is a file"):
        locate(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/model", "s3:// is not read from; copy the model into a directory"),
        ("gs://bucket/model", "gs:// is not read from"),
        ("https://example.org/model.safetensors", "https:// is not read from"),
        ("hf://org/name", "by its id alone: org/name"),
        ("https://huggingface.co/org/name/tree/main", "by its id alone: org/name"),
        ("org/name.gguf", "GGUF"),
    ],
)
def test_what_is_known_by_its_looks_and_not_read_is_refused_with_what_to_do(source: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        locate(source)
    assert message in str(caught.value)


def test_a_directory_or_a_file_of_gguf_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match="GGUF"):
        locate(str(tmp_path / "model.Q4_K_M.gguf"))
    with pytest.raises(RequestError, match="GGUF"):
        read_weights(locate(str(tmp_path)))


def test_of_the_weights_those_that_the_index_names_are_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"model-0000{number}-of-00002.safetensors": save({f"w{number}": torch.ones(2)}) for number in (1, 2)}
    index = {"weight_map": {f"w{name[10]}": name for name in shards}}
    files = {name: content for name, content in FILES.items() if name != "model.safetensors"}
    files |= {**shards, "model.safetensors.index.json": json.dumps(index).encode()}
    monkeypatch.setattr(sys.modules[__name__], "FILES", files)
    with serving() as (endpoint, _):
        assert run("org/name", endpoint, home)["tensors"] == ["w1", "w2"]
        present = set(run("org/name", endpoint, home)["present"])
    assert {name for name in present if name.endswith(".safetensors")} == shards.keys()


def pickled(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def test_from_a_hub_id_with_pytorch_files_alone_it_is_two_commands_to_a_merge(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w1": torch.arange(4.0), "w2": torch.ones(2, 3)}
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    shards = {name: pickled({key: tensors[key]}) for name, key in zip(names, tensors, strict=True)}
    index = {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
    files = {name: content for name, content in FILES.items() if not name.endswith((".safetensors", "model.bin"))}
    files |= {**shards, "pytorch_model.bin.index.json": json.dumps(index).encode()}
    monkeypatch.setattr(sys.modules[__name__], "FILES", files)
    with serving() as (endpoint, requests):
        error = run("org/name@v1", endpoint, home)["error"]
        assert not [path for path in requests if path.endswith(".bin")]
        _, _, command = error.partition("what comes of it: resta ")
        assert command == "convert org/name@v1 -o ./name"
        done = run(command, endpoint, home, script=CONVERT)
        assert done["exit_code"] == 0, done["output"]
    fetched = {path.rpartition("/")[2] for path in requests if "/resolve/" in path}
    assert not {name for name in fetched if name.endswith((".py", ".pt"))}
    converted = home.parent / "name"
    assert json.loads((converted / "resta.json").read_text())["inputs"]["model"]["commit"] == COMMIT
    base = resta.load(converted)
    save_model(home.parent / "aligned", {name: value + 2 for name, value in tensors.items()})
    (base + 0.5 * (resta.load(home.parent / "aligned") - base)).save(home.parent / "merged")
    assert_same_tensors(read(home.parent / "merged"), {name: value + 1 for name, value in tensors.items()})


def test_a_repository_with_safetensors_is_not_converted(home: Path) -> None:
    with serving() as (endpoint, requests):
        done = run("convert org/name -o ./name", endpoint, home, script=CONVERT)
    assert done["exit_code"] == 2
    assert "its repository has model.safetensors, which every command reads as it is" in done["output"]
    assert not [path for path in requests if path.endswith(".bin")]
    assert not (home.parent / "name").exists()
