"""A whole sweep by one call."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import resta
from resta.redeval import Questions, RunOptions
from resta.verify import Exam
from tests.sweep.builders import Trio


def test_the_call_goes_on_where_the_command_was_and_comes_to_the_same(
    done: Path,
    trio: Trio,
    bank: Path,
    policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("resta.sweep.measure.load_local", lambda *given, **more: pytest.fail("a model was loaded"))
    kept = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    before = (done / "sweep.json").read_text()
    mask = os.umask(0o022)
    notes: list[str] = []
    outcome = resta.sweep.run(
        family=resta.sweep.make_family(**{role: str(path) for role, path in trio.items()}),
        grid=resta.sweep.Grid(scales=(0.0, 0.5, 1.0), interpolation_scales=(0.5,)),
        exam=Exam(questions=Questions(banks=[bank], templates=["standard"], max_new_tokens=9), utility=None),
        policy=policy,
        out=done,
        search=False,
        settings={"device": "cpu"},
        options=RunOptions(note=notes.append),
    )
    assert os.umask(mask) == 0o022  # what is written is private; what the script writes afterwards is its own affair
    assert outcome.choice.name == "resta-0.5"
    assert outcome.choice.reason.startswith("the smallest change from tuned")
    assert outcome.recipe == done / "chosen.yaml"
    assert (done / "sweep.json").read_text() == before
    assert {each.candidate.name for each in outcome.tried} == {
        folder.name for folder in (done / "candidates").iterdir()
    }
    for each in outcome.tried:
        assert each.point
        assert each.point.asr
        assert each.point.asr.low <= (each.point.asr.value or 0) <= each.point.asr.high
    assert notes
    assert capsys.readouterr().out == ""
    for path, content in kept.items():  # other tests go on with the command's own folder
        path.write_bytes(content)
