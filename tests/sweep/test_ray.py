from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.sweep.builders import Trio, arguments, invoke, records


def test_a_cluster_writes_what_one_process_writes(
    done: Path, trio: Trio, bank: Path, policy: Path, tmp_path: Path
) -> None:
    invoke([*arguments(trio, bank, policy), "--ray", "local", "--ray-workers", "2"], tmp_path / "out")
    assert records(tmp_path / "out") == records(done)
    one, two = (json.loads((folder / "sweep.json").read_text()) for folder in (done, tmp_path / "out"))
    assert one == two
    assert "ray" in sys.modules  # it was not carried out in this process alone


def test_a_cluster_that_is_not_there_is_said_in_one_sentence(
    trio: Trio, bank: Path, policy: Path, tmp_path: Path
) -> None:
    words = [*arguments(trio, bank, policy), "--ray", "127.0.0.1:1"]
    assert "no cluster answers" in invoke(words, tmp_path / "out", code=5)


def test_a_sweep_in_one_process_imports_no_ray() -> None:
    script = "import sys, resta.cli.sweep, resta.sweep.measure, resta.sweep.outcome; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stderr
