"""What the tests of this folder share: a tiny base model and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.sft.builders import exchange, sentencepiece_like, tiny_config


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a sentencepiece-like tokenizer and no chat template, as Vicuna."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = sentencepiece_like()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def sums_file(write_rows: Callable[..., Path]) -> Path:
    """Forty small questions with answers."""
    return write_rows(
        [exchange(f"What is {a} and {a + 3}?", f"The sum is {2 * a + 3}.") for a in range(40)], "sums.jsonl"
    )
