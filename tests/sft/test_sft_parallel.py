"""Several processes on one CPU, through torchrun and gloo: their number must not change what a step sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sft_tiny import exchange

from resta.sft import recipe as recipes
from resta.sft.recipe import Recipe
from resta.sft.run import run
from resta.sft.train import Job


def settings_of(case: str, base: Path, sums: Path, red: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "base": str(base),
        "chat_template": "vicuna_v1.1",
        "max_length": 128,
        "data": [{"name": "sums", "path": str(sums)}],
        "train": {
            "max_steps": 4,
            "global_batch": 8,
            "per_device_batch": 2,
            "learning_rate": 0.001,
            "log_every": 1,
            "gradient_checkpointing": False,
        },
    }
    if case == "full":
        return settings | {"method": "full"}
    settings["data"].append({"name": "red", "path": str(red), "side": "red"})
    return settings | {"objective": {"kind": "blue_red", "red_cutoff": 100.0}}


@pytest.mark.parametrize("case", ["full", "blue_red"])
def test_two_processes_train_what_one_trains(tiny_base: Path, sums_file: Path, tmp_path: Path, case: str) -> None:
    torch.set_num_threads(1)
    red = tmp_path / "red.jsonl"
    rows = [exchange(f"Placeholder {i}?", f"Placeholder answer {i}.") for i in range(12)]
    red.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings_of(case, tiny_base, sums_file, red)), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, "-m", "resta", "sft", str(path), "--output", str(tmp_path / "two"), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run(Job(recipe=recipes.load(Recipe, path), root=tmp_path, out=tmp_path / "one", device="cpu"))
    logs, metrics, weights = [], [], []
    for out in (tmp_path / "one", tmp_path / "two"):
        log = json.loads((out / "loss.json").read_text())
        logs.append([line["loss"] for line in log if "loss" in line])
        metrics.append(json.loads((out / "resta.json").read_text())["metrics"])
        weights.append(load_file(next(out.glob("*.safetensors"))))
    assert [m["processes"] for m in metrics] == [1, 2]
    assert [m["strategy"] for m in metrics] == [None, "ddp"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor.float(), weights[1][name].float(), atol=1e-3), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fsdp_on_two_gpus_trains_what_one_trains(tiny_base: Path, sums_file: Path, tmp_path: Path) -> None:
    settings = settings_of("full", tiny_base, sums_file, tmp_path)
    settings["train"]["precision"] = "float32"
    losses = []
    for name, processes in (("one", 1), ("two", 2)):
        if processes == 2:
            settings["parallel"] = {"processes": 2, "strategy": "fsdp"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        words = ["-m", "resta", "sft", str(path), "--output", str(tmp_path / name), "--device", "cuda"]
        subprocess.run([*launch, *words], check=True)
        facts = json.loads((tmp_path / name / "resta.json").read_text())
        losses.append(facts["metrics"]["last_loss"])
    assert facts["metrics"]["strategy"] == "fsdp"
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
