"""Three related tiny models with tokenizers, and made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

from tests.redeval.builders import save_llama, save_refusing, save_tokenizer
from tests.sweep.builders import Trio, arguments, invoke

# The models refuse, but eight questions show little, and by far not all that a gate asks for.
LENIENT = """
judge: refusal-strings
coherence: false
degenerate: {max_increase: null}
one_answer: {max_increase: null}
asr: {max_upper: 0.9}
"""


@pytest.fixture(autouse=True)
def _no_gpus_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
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
    save_llama(folder / "base")
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


@pytest.fixture(scope="session")
def done(trio: Trio, bank: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished sweep."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    shown = invoke(arguments(trio, bank, policy), out)
    assert "Chosen: resta-0.5 (smallest-passing)" in shown
    return out
