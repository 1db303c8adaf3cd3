"""The demo from end to end, on models too briefly trained to show anything: it must say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("trl")
pytest.importorskip("lm_eval")
pytest.importorskip("inspect_ai")

from resta.cli import main
from resta.demo import models, run
from resta.statistics import Rate
from resta.sweep.choose import Choice, Point
from resta.sweep.outcome import Outcome
from resta.verify import Verification
from resta.verify.decision import Decision, Verdict
from tests.demo.builders import BRIEF
from tests.sweep.builders import tried


def point(name: str, asr: float) -> Point:
    rate = Rate(hits=0, total=48, value=asr, low=asr, high=asr)
    return Point(name=name, asr=rate, over_refusal=rate, utility=1.0)


def shown(verdict: Verdict | None, *, tuned: float, aligned: float) -> run.Shown:
    outcome = Outcome(
        references={"tuned": point("tuned", tuned), "aligned": point("aligned", aligned)},
        tried=(),
        front=(),
        choice=Choice(name="resta-1" if verdict else None, rule="smallest-passing", reason=""),
        findings=(),
        notes=(),
        guidance=(),
    )
    decision = Decision(verdict=verdict, summary="", rules=(), notes=(), guidance=()) if verdict else None
    nothing: Any = None
    verified = decision and Verification(out=Path(), decision=decision, comparison=nothing, ruling=nothing)
    return run.Shown(outcome=outcome, verified=verified)


def test_only_safety_that_was_lost_and_regained_shows_the_point() -> None:
    good = shown(Verdict.PASS, tuned=0.9, aligned=0.0)
    assert run.failures(good) == []
    assert len(run.failures(shown(Verdict.PASS, tuned=0.4, aligned=0.0))) == 1
    assert len(run.failures(replace(good, verified=None))) == 1
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.INVALID):
        assert len(run.failures(shown(verdict, tuned=0.9, aligned=0.0))) == 1


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["demo", str(tmp_path / "demo"), "--model", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "no such file or folder" in done.output
    assert not (tmp_path / "demo").exists()


def test_noise_that_passes_as_well_shows_nothing() -> None:
    good = shown(Verdict.PASS, tuned=0.9, aligned=0.0)
    random = tried("random-1", baseline=True)
    assert run.failures(replace(good, outcome=replace(good.outcome, tried=(random,))))
    failing = tried("random-1", baseline=True, verdict="FAIL")
    assert run.failures(replace(good, outcome=replace(good.outcome, tried=(failing,)))) == []


def test_models_that_learnt_nothing_show_nothing_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TINY", BRIEF)
    monkeypatch.setattr(run, "SCALES", (1.0,))
    folder = tmp_path / "demo"
    done = CliRunner().invoke(main, ["demo", str(folder)])
    assert done.exit_code == 1, done.output
    assert "the demo does not show its point here" in done.output
    assert json.loads((folder / "sweep" / "sweep.json").read_text())["kind"] == "sweep"
    for name in models.STAGES:
        assert (folder / name / "resta.json").is_file()
    again = CliRunner().invoke(main, ["demo", str(folder)])
    assert again.exit_code == 2
    assert "already exists" in again.output
