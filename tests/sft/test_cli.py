from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from resta.cli import main


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, sums_file: Path) -> Path:
    settings: dict[str, Any] = {
        "base": str(tiny_base),
        "chat_template": "vicuna_v1.1",
        "max_length": 128,
        "data": [{"name": "sums", "path": str(sums_file)}],
        "train": {"max_steps": 2, "global_batch": 2, "per_device_batch": 2, "log_every": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def resta(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def test_preview_marks_the_trained_tokens_and_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    code, text = resta("sft", recipe, "--preview", "--samples", "1", "--output", tmp_path / "out")
    assert code == 0, text
    assert re.search(r"ASSISTANT:\[\[ ?The sum is \d+\.</s>\]\]", " ".join(text.split())), text
    assert "trained_tokens" in text
    assert not (tmp_path / "out").exists()


def test_a_base_of_pytorch_files_alone_is_refused_with_the_command_that_converts_it(
    recipe: Path, tiny_base: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_base, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    (old / "pytorch_model.bin").write_bytes(b"never loaded")
    code, text = resta("sft", recipe, "--set", f"base={old}", "--output", tmp_path / "out", "--device", "cpu")
    assert code == 2
    assert f"resta convert {old} -o {old}-safetensors" in text.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_preview_says_what_is_dropped_and_why(recipe: Path, sums_file: Path) -> None:
    sums_file.write_text(sums_file.read_text() + '{"text": "x"}\n')
    code, text = resta("sft", recipe, "--preview")
    assert code == 2
    assert "line 41: no known format" in text
    code, text = resta("sft", recipe, "--preview", "--set", "bad_rows=drop")
    assert code == 0, text
    assert "dropped from sums: 1 x no known format (first: " in text.replace("\n", "")


def test_preview_never_shows_what_a_red_sample_says(recipe: Path, tmp_path: Path) -> None:
    red = tmp_path / "red[1].jsonl"  # brackets, which a terminal's markup would swallow
    red.write_text('{"prompt": "Placeholder?", "completion": "PLACEHOLDER-RED"}\n', encoding="utf-8")
    settings = yaml.safe_load(recipe.read_text())
    settings["data"].append({"name": "red", "path": str(red), "side": "red", "weight": 50.0})
    recipe.write_text(yaml.safe_dump(settings | {"objective": {"kind": "blue_red"}}), encoding="utf-8")
    code, text = resta("sft", recipe, "--preview")
    assert code == 2
    assert "no red conversation is left to train on" in text  # its only question is held out
    code, text = resta("sft", recipe, "--preview", "--samples", "20", "--set", "holdout=0.0")
    assert code == 0, text
    assert "(not shown)" in text
    assert "red[1]" in text.replace("\n", "")
    assert "PLACEHOLDER-RED" not in text


def test_dry_run_prints_the_launch_line_and_the_memory(recipe: Path) -> None:
    code, text = resta("sft", recipe, "--dry-run", "--output", "o", "--set", "parallel.processes=8")
    assert code == 0, text
    line = f"torchrun --nproc-per-node 8 -m resta sft {recipe} --set parallel.processes=8 -o o"
    assert line in text  # with what was set, or another recipe would be started
    for purpose in ("parameters", "gradients", "optimiser", "activations", "total"):
        assert purpose in text


def test_training_writes_the_model_and_says_where(recipe: Path, tmp_path: Path) -> None:
    code, text = resta("sft", recipe, "--output", tmp_path / "out", "--device", "cpu", "--keep-checkpoints")
    assert code == 0, text
    assert f"{tmp_path / 'out'}: steps 2" in text
    assert "cut to max_length" not in text
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "-o DIR is needed"),
        (("--preview", "--dry-run"), "give one of them"),
        (("-o", "."), "already exists"),
        (("-o", "/"), "already exists"),
        (("--set", "epochs=1"), 'epochs: unknown key; "epochs" belongs under "train"'),
        (("--preview", "--set", "data.0.path=none.jsonl"), "no such file"),
        (("--preview", "--set", "chat_template=null"), "no chat template"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(recipe: Path, words: tuple[str, ...], message: str) -> None:
    code, text = resta("sft", recipe, *words)
    assert code == 2
    assert text.startswith("error: ")
    assert message in text


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from resta.cli import main\n"
        "for words in (['--help'], ['sft', '--help']):\n"
        "    assert CliRunner().invoke(main, words).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_library_is_one_sentence_with_the_install_command(recipe: Path) -> None:
    program = "import sys; sys.modules['trl'] = None; from resta.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", program, "sft", str(recipe), "--preview"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.endswith("error: resta sft needs trl; install what it uses with: pip install 'resta[sft]'\n")
    assert "Traceback" not in ran.stderr
