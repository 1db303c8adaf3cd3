from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from .conftest import arguments
from .test_sweep import Trio, invoke, records


def test_a_cluster_writes_what_one_process_writes(trio: Trio, bank: Path, policy: Path, tmp_path: Path) -> None:
    words = arguments(trio, bank, policy, scale="0.5,1", random_scale="1")
    invoke(words, tmp_path / "serial")
    invoke([*words, "--ray", "local", "--ray-workers", "2"], tmp_path / "cluster")
    assert records(tmp_path / "serial") == records(tmp_path / "cluster")
    one, two = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("serial", "cluster"))
    assert one == two
    assert "ray" in sys.modules  # it was not carried out in this process alone
