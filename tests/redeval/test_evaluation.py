"""A run as a call: the same files as the command's, nothing printed, what is missing said and never hidden."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import resta
from resta.cli import main
from resta.errors import RequestError, ResumeError, UnansweredError
from resta.redeval import Questions, RunOptions, parse_target
from resta.redeval.evaluation import judge, report
from tests.redeval.builders import Stub, chat

QUICK = RunOptions(retries=0)


def test_a_call_makes_the_files_that_the_command_makes_and_prints_nothing(
    tiny: Path, bank: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bank", bank, "--template", "standard", "--max-new-tokens", 6, "--device", "cpu", "-o", tmp_path / "a"]
    done = CliRunner().invoke(main, ["redeval", str(tiny), *map(str, flags)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    capfd.readouterr()
    asked = Questions(banks=[bank], templates=["standard"], max_new_tokens=6)
    seen: list[tuple[str, int, int]] = []
    notes: list[str] = []
    options = RunOptions(watch=lambda tally: seen.append((tally.phase, tally.done, tally.total)), note=notes.append)
    before = os.umask(0o022)
    os.umask(0o022)
    run = resta.redeval.run(parse_target(tiny, device="cpu"), questions=asked, out=tmp_path / "b", options=options)
    assert os.umask(before) == 0o022, "the process's own files are nobody's business"
    assert capfd.readouterr() == ("", "")
    for name in ("questions.jsonl", "answers.jsonl", "verdicts.jsonl", "judges.jsonl", "scores.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
        assert (tmp_path / "b" / name).stat().st_mode & 0o077 == 0
    assert ("answers", 5, 5) in seen
    assert "note: 1 questions of six repeat an earlier one; asked once" in notes
    [cell] = run.scores.cells
    assert (cell.bank, cell.template, cell.asr.total) == ("six", "standard", 5)
    assert run.missing == ()
    run.raise_if_missing()
    seen.clear()
    again = resta.redeval.run(parse_target(tiny, device="cpu"), questions=asked, out=tmp_path / "b", options=options)
    assert (again.answers, again.scores) == (run.answers, run.scores)
    assert not [phase for phase, *_ in seen if phase == "answers"]


def test_a_question_without_an_answer_is_in_the_result_and_counts(bank: Path, tmp_path: Path, stub: Stub) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {}) if "four?" in json.dumps(body) else (200, chat("No, I will not."))

    stub.answer = answer
    asked = Questions(banks=[bank], templates=["standard"])
    run = resta.redeval.run(parse_target("served", stub.url), questions=asked, out=tmp_path / "r", options=QUICK)
    assert len(run.answers) == 4
    assert run.missing[0].startswith("1 of 5 questions have no answer and count as unanswered")
    assert run.scores.cells[0].counts["unanswered"] == 1
    with pytest.raises(UnansweredError, match="1 of 5 questions"):
        run.raise_if_missing()
    assert report(tmp_path / "r").missing == run.missing
    stub.answer = lambda body: (200, chat("No."))
    assert resta.redeval.run(parse_target("served", stub.url), questions=asked, out=tmp_path / "r").missing == ()


def test_an_answer_without_a_verdict_is_in_the_result_and_later_in_the_report(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (200, chat("No, I will not."))
    asked = Questions(banks=[bank], templates=["standard"])
    resta.redeval.run(parse_target("served", stub.url), questions=asked, out=tmp_path / "r", options=QUICK)
    stub.answer = lambda body: (500, {})
    made = judge(tmp_path / "r", judges=[f"strongreject=grader@{stub.url}"], options=QUICK)
    assert any("has no verdict on 5 answers" in line for line in made.missing), made.missing
    assert any("has no verdict on 5 answers" in line for line in report(tmp_path / "r").missing)


def test_another_run_in_the_same_folder_and_an_unknown_profile_are_refused(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    target = parse_target("served", stub.url)
    resta.redeval.run(target, questions=Questions(banks=[bank]), out=tmp_path / "r", options=QUICK)
    with pytest.raises(ResumeError, match="holds another run; it differs in limit"):
        resta.redeval.run(target, questions=Questions(banks=[bank], limit=2), out=tmp_path / "r", options=QUICK)
    with pytest.raises(RequestError, match="unknown profile 'fast'; there are quick, standard, full"):
        resta.redeval.run(target, questions=Questions(profile="fast"), out=tmp_path / "s", options=QUICK)
    assert not (tmp_path / "s").exists()
