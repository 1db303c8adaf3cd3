"""Three related tiny models with tokenizers, and made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

from resta.cli import main
from resta.journal import read_rows
from resta.redeval.records import Answer
from tests.redeval.conftest import save_model, save_refusing, save_tokenizer

Trio = dict[str, Path]

# The models refuse, but eight questions show little, and by far not all that a gate asks for.
LENIENT = """
judge: refusal-strings
coherence: false
degenerate: {max_increase: null}
one_answer: {max_increase: null}
asr: {max_upper: 0.9}
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RESTA_BANKS", "RESTA_API_KEY", "RESTA_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def nudge(source: Path, path: Path, seed: int) -> Path:
    """Write a copy of a model whose floating-point tensors have moved a little."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of base, aligned and tuned, which refuse whatever they are asked."""
    folder = tmp_path_factory.mktemp("trio")
    save_refusing(folder / "base")
    return _related(folder)


@pytest.fixture(scope="session")
def babbling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of base, aligned and tuned, which answer gibberish."""
    folder = tmp_path_factory.mktemp("babbling")
    save_model(folder / "base")
    save_tokenizer(folder / "base", adds_bos=True)
    return _related(folder)


def _related(folder: Path) -> Trio:
    base = folder / "base"
    return {
        "base": base,
        "aligned": nudge(base, folder / "aligned", 1),
        "tuned": nudge(base, folder / "tuned", 2),
    }


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bank of eight questions."""
    path = tmp_path_factory.mktemp("bank") / "eight.json"
    path.write_text(json.dumps({"A": {"x": [f"question {i}?" for i in range(8)]}}))
    return path


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a policy that every model passes."""
    path = tmp_path_factory.mktemp("policy") / "lenient.yaml"
    path.write_text(LENIENT)
    return path


def arguments(trio: dict[str, Path], bank: Path, policy: Path, **more: Any) -> list[str]:
    """Return the command line of a small grid; an option that is None is left out."""
    given = {
        "--aligned": trio["aligned"], "--base": trio["base"], "--scale": "0:1:0.5", "--interpolation-scale": "0.5",
        "--bank": bank, "--template": "standard", "--max-new-tokens": 9, "--device": "cpu", "--policy": policy,
    }  # fmt: skip
    given |= {"--" + key.replace("_", "-"): value for key, value in more.items()}
    words = [str(word) for key, value in given.items() if value is not None for word in (key, value)]
    return ["sweep", str(trio["tuned"]), "--no-utility", "--grid", *words]


def invoke(words: list[str], out: Path, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, [*words, "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return str(result.output)


def answers(folder: Path) -> list[Answer]:
    return read_rows(folder / "redeval" / "answers.jsonl", Answer)


def results(out: Path) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads((out / "sweep.json").read_text())["candidates"]}


def records(out: Path) -> dict[str, Any]:
    """Return all that was answered, decided and computed, by candidate."""
    return {
        folder.name: (
            sorted((a.id, a.raw) for a in answers(folder)),
            json.loads((folder / "change.json").read_text()),
        )
        for folder in (out / "candidates").iterdir()
    }


@pytest.fixture(scope="session")
def done(trio: Trio, bank: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished sweep."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    shown = invoke(arguments(trio, bank, policy), out)
    assert "Chosen: resta-0.5 (smallest-passing)" in shown
    return out
