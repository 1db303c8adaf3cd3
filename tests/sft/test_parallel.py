"""Several processes on one CPU, through torchrun and gloo: their number must not change what a step sees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from resta.sft import recipe as recipes
from resta.sft.finetune import carry_out as run
from resta.sft.recipe import Recipe
from resta.sft.train import Job
from tests.sft.builders import exchange


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
    red = tmp_path / "red.jsonl"
    rows = [exchange(f"Placeholder {i}?", f"Placeholder answer {i}.") for i in range(12)]
    red.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings_of(case, tiny_base, sums_file, red)), encoding="utf-8")
    ran = launch(2, "sft", path, "--output", tmp_path / "two", "--device", "cpu")
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


def launch(processes: int, *words: object, module: str = "resta") -> subprocess.CompletedProcess[str]:
    """Start a command under torchrun, its module being `resta` or a file of this folder."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    target = ["-m", module] if module == "resta" else [str(Path(__file__).with_name(module))]
    return subprocess.run(
        [*start, *target, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def write_recipe(folder: Path, settings: dict[str, Any], name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def outcome(out: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Any]]:
    """The logged losses, the saved weights, and what resta.json says of the run."""
    log = json.loads((out / "loss.json").read_text())
    losses = [line["loss"] for line in log if "loss" in line]
    return losses, load_file(next(out.glob("*.safetensors"))), json.loads((out / "resta.json").read_text())["metrics"]


ZERO_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
SPLITS: dict[str, dict[str, Any]] = {
    "fsdp": {"processes": 2, "strategy": "fsdp"},
    "deepspeed": {"processes": 2, "strategy": "deepspeed", "deepspeed": {"zero_optimization": ZERO_3}},
}
METHODS: dict[str, dict[str, Any]] = {
    "full, blue_red": {"method": "full"},
    "lora in bf16": {"method": "lora", "lora": {"rank": 4, "alpha": 8.0}},
}


def split_settings(case: str, base: Path, sums: Path, folder: Path) -> dict[str, Any]:
    red = folder / "red.jsonl"
    rows = [exchange(f"Placeholder {i}?", f"Placeholder answer {i}.") for i in range(12)]
    red.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = settings_of("blue_red" if "blue_red" in case else "full", base, sums, red) | METHODS[case]
    precision = "bf16" if "bf16" in case else "float32"
    settings["train"] |= {"save_every": 2, "gradient_checkpointing": True, "precision": precision}
    return settings


@pytest.mark.parametrize("strategy", SPLITS)
@pytest.mark.parametrize("case", METHODS)
def test_a_split_model_trains_to_the_same_weights_and_resumes(
    tiny_base: Path, sums_file: Path, tmp_path: Path, case: str, strategy: str
) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    settings = split_settings(case, tiny_base, sums_file, tmp_path)
    one = write_recipe(tmp_path, settings, "one")
    run(Job(recipe=recipes.load(Recipe, one), root=tmp_path, out=tmp_path / "one", device="cpu"))
    settings |= {"parallel": SPLITS[strategy]}
    if strategy == "deepspeed":
        settings |= {"trainer": {"ddp_backend": "gloo", "dataloader_pin_memory": False}}
        settings["train"]["optimizer"] = "adamw_torch"
    two = write_recipe(tmp_path, settings, "two")
    ran = launch(2, two, tmp_path / "two", module="split_on_cpu.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    alone, split, resumed = (outcome(tmp_path / name) for name in ("one", "whole", "two"))
    assert (split[2]["processes"], split[2]["strategy"]) == (2, strategy)
    assert split[0] == pytest.approx(alone[0], rel=2e-2 if "bf16" in case else 1e-4)
    assert split[1].keys() == alone[1].keys()
    for name, tensor in alone[1].items():
        assert torch.allclose(tensor, split[1][name].float(), atol=5e-3 if "bf16" in case else 1e-3), name
    assert resumed[2]["resumed_from_step"] == 2
    assert all(torch.equal(resumed[1][name], tensor) for name, tensor in split[1].items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", SPLITS)
@pytest.mark.parametrize("case", METHODS)
def test_a_model_split_over_two_gpus_trains_what_one_trains_and_resumes(
    tiny_base: Path, sums_file: Path, tmp_path: Path, case: str, strategy: str
) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    settings = split_settings(case, tiny_base, sums_file, tmp_path)
    ends = []
    for name, processes in (("one", 1), ("two", 2), ("two", 2)):
        path = write_recipe(tmp_path, settings | ({"parallel": SPLITS[strategy]} if processes == 2 else {}), name)
        out = tmp_path / name
        ran = launch(processes, "sft", path, "--output", out, "--device", "cuda", "--keep-checkpoints")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        ends.append(outcome(out))
        if processes == 2:
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "two.partial" / "checkpoint-4")
    assert [end[2]["strategy"] for end in ends] == [None, strategy, strategy]
    assert ends[1][0] == pytest.approx(ends[0][0], rel=3e-2)
    assert ends[1][1].keys() == ends[0][1].keys()
    assert ends[2][2]["resumed_from_step"] == 2
    assert ends[2][0] == pytest.approx(ends[1][0], rel=1e-2)
