"""The example in the docstring of each public call, run as it stands in a folder with the models that it names."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")
pytest.importorskip("lm_eval")

import resta
from resta.redeval.records import load_run
from tests.redeval.builders import save_refusing

POLICY = """
judge: refusal-strings
coherence: false
asr: {max_upper: 0.9}
over_refusal: {max_increase: 0.9}
degenerate: {max_increase: null}
one_answer: {max_increase: null}
"""


def example_of(call: Callable[..., Any]) -> str:
    """Return the first indented block of a docstring."""
    lines = inspect.getdoc(call).splitlines()  # type: ignore[union-attr]
    first = next(i for i, line in enumerate(lines) if line.startswith("    "))
    last = next(i for i, line in enumerate(lines[first:], first) if re.match(r"\S", line))
    return textwrap.dedent("\n".join(lines[first:last]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three models and the merge of them, a bank of questions and a policy."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(("base", "aligned", "tuned")):
        save_refusing(folder / name, seed=seed)
    tuned, aligned, base = (resta.load(str(folder / name)) for name in ("tuned", "aligned", "base"))
    (tuned + 0.5 * (aligned - base)).save(folder / "restored")
    (folder / "questions.json").write_text(json.dumps([f"question {i}?" for i in range(6)]))
    (folder / "policy.yaml").write_text(POLICY)
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(folder)


def run_example(call: Callable[..., Any]) -> dict[str, Any]:
    names: dict[str, Any] = {"resta": resta}
    exec(compile(example_of(call), call.__name__, "exec"), names)
    return names


def test_the_example_of_audit() -> None:
    assert "raise_if_any()" in example_of(resta.audit)
    run_example(resta.audit)


def test_the_example_of_diff(capsys: pytest.CaptureFixture[str]) -> None:
    run_example(resta.diff)
    assert "gate_proj 1." in capsys.readouterr().out


def test_the_example_of_redeval_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_example(resta.redeval.run)["run"]
    assert capsys.readouterr().out.splitlines() == [
        f"refusal-strings {bank} {template} 0.0 0.0 {run.scores.cells[0].asr.high}"
        for bank in ("questions", "smoke-safe")
        for template in ("cou", "standard")
    ]
    assert len(run.answers) == len(run.verdicts) == 16
    assert run.answers == load_run(folder / "asked").answers()


def test_the_example_of_verify_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run_example(resta.verify.run)["made"]
    assert capsys.readouterr().out.startswith(made.verdict.name)
    verdict = json.loads((folder / "verify" / "verdict.json").read_text())
    assert (made.verdict.name, made.exit_code) == (verdict["verdict"], verdict["exit_code"])
    assert [rule.name for rule in made.rules] == [rule["name"] for rule in verdict["rules"]]
    assert all(path.is_file() for path in made.files.values())


def test_the_example_of_sweep_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_example(resta.sweep.run)["outcome"]
    assert capsys.readouterr().out.startswith(f"{outcome.choice.name} the smallest change from tuned")
    assert outcome.recipe == folder / "sweep" / "chosen.yaml"
    assert resta.load_recipe(outcome.recipe).start == "tuned"
    assert (folder / "merged" / "model.safetensors").is_file()
    assert {each["name"] for each in json.loads((folder / "sweep" / "sweep.json").read_text())["candidates"]} == {
        each.candidate.name for each in outcome.tried
    }
