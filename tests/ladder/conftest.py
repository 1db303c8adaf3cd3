"""Tiny models of which one has lost its safety, and banks of questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

from resta.ladder import Restoration
from tests.ladder.builders import climb, exam, save_bank, save_trio, two


@pytest.fixture(autouse=True, scope="session")
def _few_scales() -> Iterator[None]:
    """Search two scales of each method: what is chosen of many is the sweep's affair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resta.ladder.rungs.SCALES", (0.5, 1.0))
        patch.setattr("resta.ladder.rungs.TOWARDS_SCALES", (0.5, 1.0))
        yield


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RESTA_BANKS", "RESTA_API_KEY", "RESTA_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return base, aligned and tuned: aligned refuses everything, the others nothing."""
    return save_trio(tmp_path_factory.mktemp("ladder-trio"))


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bank of thirty questions."""
    return save_bank(tmp_path_factory.mktemp("ladder-bank") / "thirty.json", 30)


@pytest.fixture(scope="session")
def safe_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bank of twenty questions that are safe to answer."""
    return save_bank(tmp_path_factory.mktemp("ladder-safe") / "safe.json", 20, "recipe")


@pytest.fixture(scope="session")
def restored(trio: dict[str, Path], bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Restoration:
    """Return what a ladder came to that ended with a released model."""
    return climb(two(trio), exam(bank), tmp_path_factory.mktemp("ladder-restored") / "out")
