"""The library call: what the command does, without a word on the terminal, and with typed results."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from resta import sft
from resta.errors import RequestError, RestaError
from resta.sft import train as training
from resta.sft.recipe import Recipe, load


@pytest.fixture
def settings(tiny_base: Path, sums_file: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_base),
        "chat_template": "vicuna_v1.1",
        "max_length": 128,
        "data": [{"name": "sums", "path": sums_file.name}],
        "bad_rows": "drop",
        "holdout": 0.1,
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {
            "max_steps": 4,
            "global_batch": 4,
            "per_device_batch": 2,
            "learning_rate": 0.01,
            "log_every": 1,
            "save_every": 2,
            "gradient_checkpointing": False,
        },
    }


@pytest.fixture
def file(settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_a_call_trains_reports_and_prints_nothing(
    file: Path, sums_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sums_file.write_text(sums_file.read_text() + '{"text": "x"}\n')
    seen: list[sft.Progress] = []
    trained = sft.run(recipe=file, out=tmp_path / "out", device="cpu", progress=seen.append)
    assert capfd.readouterr() == ("", "")
    facts = json.loads((tmp_path / "out" / "resta.json").read_text())
    metrics = facts["metrics"]
    assert trained.out == tmp_path / "out"
    assert (trained.steps, trained.processes, trained.strategy, trained.precision) == (4, 1, None, "float32")
    assert (trained.first_loss, trained.last_loss) == (metrics["first_loss"], metrics["last_loss"])
    assert trained.heldout_losses == {"eval_loss": metrics["eval_loss"]}
    assert trained.resumed_from_step is None
    assert trained.changed_share is None  # of an adapter
    [left] = trained.left_out
    assert (left.what, left.count) == ("dropped from sums", 1)
    assert left.first.endswith("line 41")
    assert not list(tmp_path.glob("out.partial*"))
    losses = [each.logged["loss"] for each in seen if "loss" in each.logged]
    assert losses[0] == trained.first_loss
    assert losses[-1] == trained.last_loss
    assert {each.steps for each in seen} == {4}
    assert [each.step for each in seen] == sorted(each.step for each in seen)


def test_a_file_the_recipe_and_plain_data_are_the_same_request(
    file: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    sft.run(recipe=file, out=tmp_path / "one")
    sft.run(recipe=load(Recipe, file), root=tmp_path, out=tmp_path / "two")
    sft.run(recipe=settings, root=tmp_path, out=str(tmp_path / "three"))
    weights = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert len(weights) == 1
    with pytest.raises(RequestError, match='chat_templat: unknown key; did you mean "chat_template"'):
        sft.run(recipe=settings | {"chat_templat": "x"}, out=tmp_path / "four")


def test_a_call_that_was_stopped_goes_on(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RestaError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training.StopOnNaN, "on_step_end", stop)
        with pytest.raises(RestaError, match="stopped"):
            sft.run(recipe=file, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sft.run(recipe=file, out=tmp_path / "out").resumed_from_step == 2
    sft.run(recipe=file, out=tmp_path / "whole")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == two


def test_the_example_in_the_docstring_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = str(sft.run.__doc__).split("alike; the main one writes and reports.")[1].split("    Args:")[0]
    example = textwrap.dedent(lines)
    assert "resta.sft.run(" in example
    monkeypatch.chdir(file.parent)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    exec(compile(example, "example", "exec"), {})
    assert (tmp_path / "safety" / "adapter_model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "Progress(step=1, steps=4" in shown
    assert "eval_loss" in shown
