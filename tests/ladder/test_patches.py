"""The rungs that learn a patch. What one learns is `resta.patch`'s affair: here one is planted."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import resta
from resta.errors import RequestError
from resta.verify import Verdict
from tests.ladder.builders import KEEPS_ANSWERING, climb, exam, save_bank, save_perfect_patch, save_prompts, two

REAL = inspect.signature(resta.patch.run)


@pytest.fixture
def learned(trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Plant a patch that makes tuned refuse all, in place of learning one; return what was asked for."""
    calls: list[dict[str, Any]] = []

    def run(**given: Any) -> None:
        REAL.bind(**given)
        calls.append(given)
        given["progress"](object())
        save_perfect_patch(Path(given["tuned"].model), trio["aligned"], given["out"])

    monkeypatch.setattr("resta.patch.learn.run", run)
    return calls


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Return a bank of which a quarter is enough to learn from."""
    return save_bank(tmp_path / "forty.json", 40)


def test_a_patch_is_learned_from_questions_of_its_own_verified_and_released_as_a_whole_model(
    learned: list[dict[str, Any]], trio: dict[str, Path], bank: Path, tmp_path: Path
) -> None:
    prompts, out = save_prompts(tmp_path / "task.txt"), tmp_path / "out"
    told = climb(two(trio), exam(bank), out, only=("patch",), task_prompts=prompts)
    assert (told.verdict, told.exit_code, told.model) == (Verdict.PASS, 0, out)
    assert told.chosen is not None
    assert told.chosen.rung == "patch"
    assert told.chosen.equation.endswith("* (patch - tuned)")
    assert (out / "model.safetensors").is_file()
    assert json.loads((out / "resta.json").read_text())["safety"]["restored"]
    [asked] = learned
    parts = json.loads((told.records / "questions" / "parts.json").read_text())["parts"]
    assert [Path(path).parent.name for path in asked["harmful"]] == ["calibrating"]
    assert {Path(path).parent.name for path in asked["apart"]} == {"choosing", "verifying"}
    assert len(parts["calibrating"]["questions"]) == 10
    again = climb(two(trio), exam(bank), out, only=("patch",), task_prompts=prompts)
    assert (again.sentence, len(learned)) == (told.sentence, 1)


def test_where_a_patch_does_not_help_it_is_put_on_the_best_weight_arithmetic(
    learned: list[dict[str, Any]], trio: dict[str, Path], bank: Path, safe_bank: Path, tmp_path: Path
) -> None:
    prompts = save_prompts(tmp_path / "task.txt")
    told = climb(two(trio), exam(bank, safe_bank), tmp_path / "out", KEEPS_ANSWERING, task_prompts=prompts)
    assert [each.rung for each in told.attempts] == [
        "nothing", "weights", "stochastic", "float32", "patch", "patched-weights",
    ]  # fmt: skip
    assert told.attempts[2].said.startswith("not tried: rounding keeps the change of interpolation-")
    assert told.attempts[5].equation == "weights + 1 * (patch - weights)"
    assert Path(learned[1]["tuned"].model) == told.records / "rungs" / "patched-weights" / "start"
    assert (told.exit_code, told.verdict, told.model) == (1, None, None)
    assert told.kept is not None
    assert told.kept.is_dir()


def test_prompts_that_no_patch_can_be_learned_from_are_refused_before_anything_is_written(
    trio: dict[str, Path], bank: Path, tmp_path: Path
) -> None:
    few = save_bank(tmp_path / "thirty.json", 30)
    prompts = save_prompts(tmp_path / "task.txt")
    with pytest.raises(RequestError, match="7 different harmful prompts; at least 8"):
        climb(two(trio), exam(few), tmp_path / "out", task_prompts=prompts)
    prompts.write_text(prompts.read_text() + "\n" + "\n".join(f"question {i}?" for i in range(40)))
    with pytest.raises(RequestError, match="a task prompt is a harmful question"):
        climb(two(trio), exam(bank), tmp_path / "out", task_prompts=prompts)
    with pytest.raises(RequestError, match="a patch needs --task-prompts"):
        climb(two(trio), exam(bank), tmp_path / "out", only=("patch",))
    with pytest.raises(RequestError, match="no such file of task prompts"):
        climb(two(trio), exam(bank), tmp_path / "out", task_prompts=tmp_path / "none.txt")
    assert not (tmp_path / "out.records").exists()


def test_a_bank_to_learn_from_that_holds_a_question_of_the_verdict_is_refused(
    trio: dict[str, Path], bank: Path, tmp_path: Path
) -> None:
    prompts, own = save_prompts(tmp_path / "task.txt"), save_bank(tmp_path / "own.json", 12)
    with pytest.raises(RequestError, match=r"of its 12 questions with the .* questions of this run"):
        climb(two(trio), exam(bank), tmp_path / "out", task_prompts=prompts, harmful=own)
