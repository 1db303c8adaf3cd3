"""Two tiny models of one family, and a request for a patch of few prompts and steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from resta.patch.request import Request
from tests.patch.builders import nudge, request_for
from tests.redeval.builders import save_llama, save_tokenizer


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return base, tuned and aligned, each near to the one before."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("base", "tuned", "aligned"):
        save_llama(folder / name, seed=1)
        save_tokenizer(folder / name, adds_bos=True)
    nudge(folder / "tuned", size=0.05)
    nudge(folder / "aligned", size=0.2)
    return {name: folder / name for name in ("base", "tuned", "aligned")}


@pytest.fixture
def request_(pair: dict[str, Path], tmp_path: Path) -> Request:
    """Return a request of twelve prompts a kind and a few steps."""
    return request_for(pair, tmp_path, steps=40)
