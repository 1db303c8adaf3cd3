"""Directories made to hang, to fill the memory or to trace back: each is one sentence, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from resta.adapter import CONFIG, FILE, _steps, read_adapter
from resta.checkpoint import Weights, read_weights
from resta.cli import main
from resta.errors import RequestError
from resta.files import read_regular
from resta.header import MOST_MEMORY, count_memory, parse_header
from resta.hub import locate
from tests.builders import llama_tensors, nudged, save_model

# ---- what is no file


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["FIFO", "directory", "device"])
def test_what_is_no_regular_file_is_refused_or_left_out_and_never_waited_for(
    tmp_path: Path, name: str, kind: str
) -> None:
    from resta.plan import make_plan
    from resta.recipe import make_recipe

    for model in ("a", "b"):
        save_model(tmp_path / model, llama_tensors(ord(model)))
    (tmp_path / "a" / name).unlink(missing_ok=True)
    if name.endswith("index.json"):
        (tmp_path / "a" / "model.safetensors").unlink()
    if kind == "FIFO":
        os.mkfifo(tmp_path / "a" / name)
    elif kind == "directory":
        (tmp_path / "a" / name).mkdir()
    else:
        (tmp_path / "a" / name).symlink_to("/dev/zero")
    recipe = {"models": {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, "start": "a"}
    recipe["terms"] = [{"delta": "a - b", "scale": 1}]
    if name == "tokenizer.json":
        assert name not in {file.name for file in make_plan(make_recipe(recipe)).auxiliary_files}
        return
    with pytest.raises(RequestError) as caught:
        make_plan(make_recipe(recipe))
    assert name in str(caught.value) or "config.json" in str(caught.value)
    assert "download the model again" not in str(caught.value)


def test_a_file_that_becomes_a_fifo_between_look_and_open_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    opened = os.open

    def swapped(path: Path, *more: Any) -> int:
        file.unlink()
        os.mkfifo(file)
        return opened(path, *more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match="FIFO"):
        read_regular(file, 10)


# ---- headers


def tensors_of(size: int, pad: int = 30) -> tuple[bytes, int]:
    entries, data, length = [], 0, 0
    while length < size:
        offsets = f"[{data},{data + 2}]"
        entry = f'"{"x" * pad}.{len(entries)}":{{"dtype":"BF16","shape":[1,1],"data_offsets":{offsets}}}'
        entries.append(entry)
        data, length = data + 2, length + len(entry) + 1
    return ("{" + ",".join(entries) + "}").encode(), data


def metadata_of(value: bytes) -> tuple[bytes, int]:
    return b'{"__metadata__":{"a":"' + value + b'"}}', 0


# The format's largest, and the largest that are let through: of every kind of memory that a text may cost.
HEADERS: dict[str, Callable[[], tuple[bytes, int]]] = {
    "lists": lambda: (b'{"x":[' + b"[]," * 33_000_000 + b"[]]}", 0),
    "tensors": lambda: tensors_of(98_000_000, pad=400),
    "most tensors": lambda: tensors_of(14_500_000),
    "longest text": lambda: metadata_of(b"x" * 89_000_000),
    "widest text": lambda: metadata_of(b"x" * 29_000_000 + "\U0001f600".encode()),
    "escaped text": lambda: metadata_of(b"x" * 20_000_000 + rb"\ud83d\ude00"),
    "most keys": lambda: (json.dumps({"__metadata__": {f"{number:x}": "" for number in range(900_000)}}).encode(), 0),
}  # fmt: skip

READ = r"""
import re, sys
from pathlib import Path
import resta.engine
from resta.errors import RequestError
from resta.header import read_header
try:
    print(len(read_header(Path(sys.argv[1]))))
except RequestError as error:
    print(error)
# Not getrusage, which counts what the process was before it began to run this.
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("case", HEADERS)
def test_no_header_takes_400_mb(tmp_path: Path, case: str) -> None:
    text, data = HEADERS[case]()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    refused = count_memory(text) > MOST_MEMORY
    assert refused == (case in ("lists", "tensors"))
    del text
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True
    )
    said, peak = done.stdout.splitlines()
    assert said.isdigit() != refused
    assert int(peak) < 400_000, said  # KiB


def test_a_header_of_many_tensors_and_a_usual_one_are_not_refused() -> None:
    text, data = tensors_of(1_000_000)
    assert len(parse_header(text, data_bytes=data)) > 8_000
    assert (
        count_memory(b'"w":{"dtype":"BF16","shape":[4096,14336],"data_offsets":[0,117440512]},' * 91_000) < MOST_MEMORY
    )
    with pytest.raises(RequestError, match=r"would take about [\d,]+ MB of memory"):
        parse_header(b'{"x":[' + b"[]," * 2_000_000 + b"[]]}", data_bytes=0)


# ---- adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return read_weights(locate(str(save_model(tmp_path_factory.mktemp("models") / "base", llama_tensors(0)))))


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({f"{name}A.weight": torch.ones(2, 64), f"{name}B.weight": torch.ones(128, 2)}, folder / FILE)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
    (folder / CONFIG).write_text(json.dumps(plain | config))
    return folder


BOMBS = ["(([a-z._0-9])+)+!", "(a|a)*!", "(.*)*!", "(?:x+x+)+y", "(?=(.+)+!)x", ".*.*.*.*.*.*.*.*!", "(a|b|.)" * 30]
BOMBS += ["[a-z.0-9]?" * 40 + "!", "(.|.){40}!"]


@pytest.mark.parametrize("pattern", BOMBS)
def test_a_regular_expression_that_could_take_for_ever_is_refused_at_once(
    tmp_path: Path, base: Weights, pattern: str
) -> None:
    with pytest.raises(RequestError, match="could take for ever"):
        read_adapter(locate(str(adapter(tmp_path / "a", rank_pattern={pattern: 2}))), base)


@pytest.mark.parametrize(
    "pattern",
    [
        "up_proj", r"model\.layers\.0\.mlp\.up_proj", "^model.layers.0.mlp.up_proj", r".*layers\.(0|1|2)\.mlp\..*",
        r"layers\.\d+\.mlp\.(up|gate|down)_proj", r"model.layers.[0-9]{1,2}.mlp.up_proj", "(?:up|down)_proj",
    ],
)  # fmt: skip
def test_patterns_that_users_write_are_matched_as_peft_matches_them(
    tmp_path: Path, base: Weights, pattern: str
) -> None:
    assert re.match(rf"(.*\.)?({pattern})$", "model.layers.0.mlp.up_proj")
    read = read_adapter(locate(str(adapter(tmp_path / "a", r=7, rank_pattern={pattern: 2}, lora_alpha=6))), base)
    (low_rank,) = read.tensors["model.layers.0.mlp.up_proj.weight"].low_ranks
    assert low_rank.scaling == 3.0


@given(pattern=st.text(alphabet="ab.|()[]*+?{}2,\\^$", max_size=12))
def test_what_is_not_refused_as_a_bomb_has_no_repeated_group(pattern: str) -> None:
    if _steps(pattern, "a.b") < 1e300:
        assert not re.search(r"(?<!\\)\)[*+?]", re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", pattern))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(
    key=st.sampled_from(["modules_to_save", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "revision", "bias"]),
    value=st.recursive(
        SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2)
    ),
)
def test_an_adapter_config_of_any_types_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, base: Weights, key: str, value: Any
) -> None:
    folder = adapter(tmp_path_factory.mktemp("adapters") / "a", **{key: value})
    (folder / "resta.json").write_text(json.dumps({"kind": "sft", "base": value}))
    with contextlib.suppress(RequestError):
        read_adapter(locate(str(folder)), base)


def test_a_checkpoint_error_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(RequestError, match="directory"):
        read_weights(locate(str(tmp_path)))


# ---- links


def test_links_to_a_common_store_are_followed_when_the_user_says_so_and_only_then(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "aligned", "tuned")):
        store = save_model(tmp_path / "store" / name, nudged(llama_tensors(0), seed))
        (tmp_path / name).mkdir()
        for file in store.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    models = ["--aligned", str(tmp_path / "aligned"), "--base", str(tmp_path / "base"), "--scale", "1"]
    command = ["merge", str(tmp_path / "tuned"), *models, "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "say --follow-links" in refused.stderr
    assert CliRunner().invoke(main, [*command, "--follow-links"]).exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()
    places = [flag for name in ("base", "aligned", "tuned") for flag in ("--model", f"{name}={tmp_path / name}")]
    audited = CliRunner().invoke(main, ["audit", str(tmp_path / "out"), *places, "--follow-links"])
    assert audited.exit_code == 0, audited.output
    assert CliRunner().invoke(main, ["audit", str(tmp_path / "out"), *places]).exit_code != 0
    pair = ["diff", str(tmp_path / "base"), str(tmp_path / "tuned")]
    assert CliRunner().invoke(main, pair).exit_code == 2
    assert CliRunner().invoke(main, [*pair, "--follow-links"]).exit_code == 0
