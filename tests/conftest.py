"""How hypothesis runs, and three related models; what tests build lies in the builders.py of each folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

for folder in ("", "demo.", "ladder.", "redeval.", "sft.", "sweep.", "verify."):
    pytest.register_assert_rewrite(f"tests.{folder}builders")

# Before huggingface_hub is imported, which reads it once: else every file of a model that is not there is asked for six
# times, with pauses, in the hope of a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: models so small gain nothing by a second thread, and processes side by side lose by it.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.builders import llama_tensors, nudged, save_model  # noqa: E402

# The first example may compile a kernel; how long an example takes is no property of the code.
hypothesis.settings.register_profile("resta", deadline=None, derandomize=True)
hypothesis.settings.load_profile("resta")


@pytest.fixture
def trio(tmp_path: Path) -> dict[str, str]:
    """Directories of three related models: base, aligned, tuned, in one, two and three shards."""
    base = llama_tensors(0)
    return {
        "base": str(save_model(tmp_path / "base", base)),
        "aligned": str(save_model(tmp_path / "aligned", nudged(base, 1), shards=2)),
        "tuned": str(save_model(tmp_path / "tuned", nudged(base, 2), shards=3)),
    }


@pytest.fixture(autouse=True)
def _displays_are_each_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect keeps the first display of a process for good, even for runs that ask for none."""
    if active := sys.modules.get("inspect_ai._display.core.active"):
        monkeypatch.setattr(active, "_active_display", None)
