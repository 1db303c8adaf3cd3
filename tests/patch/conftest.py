"""Two tiny models of one family, and a request for a patch of few prompts and steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from resta.patch.request import Learning, Request
from resta.patch.teachers import Teaching
from resta.redeval.models import LocalSpec
from tests.patch.builders import asked, nudge
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
    return Request(
        tuned=LocalSpec(model=str(pair["tuned"])),
        aligned=LocalSpec(model=str(pair["aligned"])),
        prompts=(
            *asked("harmful", 12, "harm"),
            *asked("task", 12, "task"),
            *asked("harmless", 12, "tell"),
            *asked("lookalike", 12, "kill"),
        ),
        out=tmp_path / "patch",
        lessons=tmp_path / "patch.lessons",
        teaching=Teaching(tokens=6, top=16),
        learning=Learning(steps=40, learning_rate=1e-2, rank=8),
        base=str(pair["base"]),
        device="cpu",
    )
