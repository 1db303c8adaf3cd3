"""Prompts and files of them, and two tiny models of one family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resta.patch.prompts import Asked
from resta.patch.request import Learning, Request
from resta.patch.teachers import Teaching
from resta.redeval.messages import Message
from resta.redeval.models import LocalSpec

WORDS = [f"{a}{b}" for a in ("red", "blue", "old", "new") for b in ("hat", "cat", "map", "cup", "key", "pen")]


def asked(kind: Any, count: int, start: str) -> tuple[Asked, ...]:
    """Return prompts of a kind, all different."""
    texts = [f"{start} {word}" for word in WORDS[:count]]
    return tuple(Asked(kind=kind, messages=(Message(role="user", content=text),), text=text) for text in texts)


def write_json_lines(path: Path, rows: list[Any]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def nudge(model: Path, *, size: float = 0.15) -> None:
    """Add noise to a model's attention, so that an adapter on the model before can get near to it."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(7)
    path = model / "model.safetensors"
    tensors = {
        name: value + size * torch.randn(value.shape, generator=generator) if "o_proj" in name else value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def request_for(pair: dict[str, Path], folder: Path, *, steps: int) -> Request:
    """Return a request of twelve prompts a kind, for a patch in a folder."""
    return Request(
        tuned=LocalSpec(model=str(pair["tuned"])),
        aligned=LocalSpec(model=str(pair["aligned"])),
        prompts=(
            *asked("harmful", 12, "harm"),
            *asked("task", 12, "task"),
            *asked("harmless", 12, "tell"),
            *asked("lookalike", 12, "kill"),
        ),
        out=folder / "patch",
        lessons=folder / "patch.lessons",
        teaching=Teaching(tokens=6, top=16),
        learning=Learning(steps=steps, learning_rate=1e-2, rank=8),
        base=str(pair["base"]),
        device="cpu",
    )
