"""What does `resta sft` cost over the trainer that it calls? Same base, rows and settings, in one process.

    python benchmarks/sft_overhead.py BASE_MODEL [--steps 8] [--rounds 3]

Start-up is the time from nothing loaded to the first training step (libraries imported before). A step is timed from
its beginning to its end, on the clock and in processor time, which other programs disturb less. The two take turns, so
that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from resta.sft import train as training
from resta.sft.recipe import Recipe
from resta.sft.save import versions

SETTINGS: dict[str, Any] = {"global_batch": 4, "per_device_batch": 4, "learning_rate": 1e-4}


class Timer(TrainerCallback):
    """When training began, and how long each step took."""

    def __init__(self) -> None:
        self.began = 0.0
        self.started = (0.0, 0.0)
        self.steps: list[tuple[float, float]] = []  # seconds on the clock, seconds of processor time

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        clock, processor = self.started
        self.steps.append((time.perf_counter() - clock, time.process_time() - processor))


def write_rows(path: Path, count: int) -> None:
    rows = (
        {
            "prompt": [{"role": "user", "content": f"What is {i + 100} and {i + 200}? Answer in one sentence."}],
            "completion": [{"role": "assistant", "content": f"The sum of the two numbers is {2 * i + 300}."}],
        }
        for i in range(count)
    )
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def wrapped(base: str, rows: Path, folder: Path, steps: int) -> tuple[float, list[tuple[float, float]], float]:
    recipe = Recipe.model_validate(
        {
            "base": base,
            "max_length": 256,
            "data": [{"name": "rows", "path": str(rows)}],
            "holdout": 0.0,
            "lora": {"rank": 8, "alpha": 16.0},
            "train": SETTINGS
            | {
                "max_steps": steps,
                "save_every": None,
                "gradient_checkpointing": False,
                "precision": "float32",
            },
        }
    )
    job = training.Job(recipe=recipe, root=folder, out=folder / "out", device="cpu")
    timer, begun = Timer(), time.perf_counter()
    chat = training.load_chat(job)
    _, prepared = training.load_data(job, chat)
    config = training.build_config(job, evaluates=False)
    trainer = training.build_trainer(job, config, training.load_model(job, chat), chat, prepared)
    trainer.add_callback(timer)
    loss = trainer.train().training_loss
    return timer.began - begun, timer.steps, loss


def bare(base: str, rows: Path, folder: Path, steps: int) -> tuple[float, list[tuple[float, float]], float]:
    timer, begun = Timer(), time.perf_counter()
    config = training.SFTConfig(
        output_dir=str(folder / "bare"),
        max_steps=steps,
        per_device_train_batch_size=SETTINGS["per_device_batch"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="cosine",
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        max_length=256,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = training.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[timer],
    )
    loss = trainer.train().training_loss
    return timer.began - begun, timer.steps, loss


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("base")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    sides: dict[str, Callable[..., tuple[float, list[tuple[float, float]], float]]] = {
        "bare": bare,
        "resta": wrapped,
    }
    starts: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "rows.jsonl", 400)
        for round_ in range(given.rounds):
            for name in sorted(sides, reverse=bool(round_ % 2)):
                start, each, losses[name] = sides[name](given.base, folder / "rows.jsonl", folder, given.steps)
                starts[name].append(start)
                steps[name] += each[1:]  # the first step of a process warms caches up
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    middle: dict[str, tuple[float, float]] = {}
    for name in sides:
        clock, processor = zip(*steps[name], strict=True)
        middle[name] = (statistics.median(clock), statistics.median(processor))
        print(
            f"{name:<6} step: clock median {middle[name][0]:.4f} s ({min(clock):.4f} to {max(clock):.4f}), "
            f"processor median {middle[name][1]:.4f} s ({min(processor):.4f} to {max(processor):.4f}), "
            f"of {len(clock)}; start-up {statistics.median(starts[name]):.2f} s, loss {losses[name]:.4f}"
        )
    clock_ratio, processor_ratio = (middle["resta"][i] / middle["bare"][i] for i in (0, 1))
    late = statistics.median(starts["resta"]) - statistics.median(starts["bare"])
    print(f"resta per step: {clock_ratio - 1:+.1%} clock, {processor_ratio - 1:+.1%} processor; start {late:+.2f} s")


if __name__ == "__main__":
    main()
