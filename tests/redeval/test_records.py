from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resta.errors import ResumeError
from resta.journal import FolderLock, Journal
from resta.redeval.plan import plan_of
from resta.redeval.questions import read_bank
from resta.redeval.records import Answer, Label, load_run, start_run
from tests.redeval.builders import CONFIG


def row(i: int, text: str = "a") -> Answer:
    return Answer(
        id=f"q{i}|standard|0",
        qid=f"q{i}",
        template="standard",
        epoch=0,
        prompt_sha256="0",
        raw=text,
        text=text,
        finish="stop",
        flags=("thought",),
    )


def test_the_same_configuration_goes_on_and_another_is_refused(tmp_path: Path, bank: Path) -> None:
    questions = read_bank(str(bank)).questions
    run = start_run(tmp_path / "run", CONFIG, questions, {})
    assert start_run(tmp_path / "run", CONFIG, questions, {"torch": "9"}).run_id == run.run_id
    (run.path / "answers.jsonl").write_text('{"torn')
    with pytest.raises(ResumeError, match=r"differs in limit: null there, 3 now"):
        start_run(tmp_path / "run", CONFIG | {"limit": 3}, questions, {})
    assert run.questions() == {question.qid: question for question in questions}


def test_a_run_in_which_nothing_was_answered_gives_way_to_the_corrected_request(tmp_path: Path, bank: Path) -> None:
    questions = read_bank(str(bank)).questions
    run = start_run(tmp_path / "run", CONFIG, questions, {})
    run.add_judge("j", "s", {})
    (run.log_dir("answers") / "x.eval").write_text("x")
    found = start_run(tmp_path / "run", CONFIG | {"limit": 3}, questions[:3], {})
    assert found.config["limit"] == 3
    assert list(found.questions().values()) == list(questions[:3])
    assert (found.judges(), (found.path / "logs").exists()) == ({}, False)


@pytest.mark.parametrize("left", [[], ["questions.jsonl"], ["questions.jsonl", "run.json.part"]])
def test_a_kill_while_a_run_is_being_made_leaves_what_the_same_command_makes_whole(
    left: list[str], tmp_path: Path, bank: Path
) -> None:
    questions = read_bank(str(bank)).questions
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text('{"torn')
    run = start_run(tmp_path / "run", CONFIG, questions, {})
    assert list(run.questions().values()) == list(questions)
    assert not (tmp_path / "run" / "run.json.part").exists()


def test_a_run_that_another_process_is_making_is_left_to_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(ResumeError, match="another process"):
        start_run(tmp_path, CONFIG, (), {})


@pytest.mark.parametrize("change", ["cut", "made safe", "gone"])
def test_a_run_whose_questions_are_no_longer_those_asked_is_not_read(change: str, tmp_path: Path, bank: Path) -> None:
    run = start_run(tmp_path / "run", CONFIG, read_bank(str(bank)).questions, {})
    path = run.path / "questions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if change == "gone":
        path.unlink()
    else:
        path.write_text("".join(lines[:-1] if change == "cut" else [*lines[:-1], lines[-1].replace("false", "true")]))
    with pytest.raises(ResumeError, match=r"questions.jsonl: not the questions that the run was made with"):
        load_run(run.path)


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ResumeError, match="cannot be a run's folder"):
        start_run(tmp_path / "run", CONFIG, (), {})


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match=r"not empty and holds no run \(thesis.tex\)"):
        start_run(tmp_path, CONFIG, (), {})
    with pytest.raises(ResumeError, match="holds no run"):
        load_run(tmp_path)


def test_the_folder_is_private(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", CONFIG, (), {})
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.log_dir("answers").stat().st_mode) == 0o700


def test_verdicts_of_an_earlier_wording_of_a_judge_are_left_out(tmp_path: Path) -> None:
    from resta.redeval.records import Judgement

    run = start_run(tmp_path / "run", CONFIG, (), {})
    for sha in ("old", "new"):
        run.add_judge("j", sha, {})
        run.add_judge("j", sha, {})
        with Journal(run.path / "verdicts.jsonl") as journal:
            journal.append(Judgement(answer_id="q", judge="j", judge_sha256=sha, label="safe"))
    assert [v.judge_sha256 for v in run.current_verdicts()] == ["new"]
    assert len(run.verdicts()) == 2


DAMAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "flags that are a number": ("answers.jsonl", {"flags": 7}, "no whole Answer.*flags"),
    "text that is a number": ("answers.jsonl", {"text": 12}, "no whole Answer.*text"),
    "an answer of another run": ("answers.jsonl", {"qid": "zzz"}, "'zzz', which is not a question of this run"),
    "a finish that nobody knows": ("answers.jsonl", {"finish": "exploded"}, "no whole Answer.*finish"),
    "a question without text": ("questions.jsonl", {"text": None}, "no whole Question.*text"),
    "a label that is a word": ("labels.jsonl", {"weight": "heavy"}, "no whole Label.*weight"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_one_sentence_that_names_its_file(case: str, tmp_path: Path, bank: Path) -> None:
    name, change, expected = DAMAGE[case]
    questions = read_bank(str(bank)).questions
    run = start_run(tmp_path / "run", CONFIG, questions, {})
    qid = questions[0].qid
    with Journal(run.path / "answers.jsonl") as journal:
        journal.append(replace(row(0), qid=qid))
    with Journal(run.path / "labels.jsonl") as journal:
        journal.append(Label(answer_id=row(0).id, harmful=True))
    assert len(run.answers()) == len(run.labels()) == 1
    lines = [json.loads(line) for line in (run.path / name).read_text().splitlines()]
    (run.path / name).write_text("".join(json.dumps(line | change) + "\n" for line in lines))
    with pytest.raises(ResumeError, match=expected) as caught:
        run.answers(), run.labels()
    assert str(run.path / name) in str(caught.value)
    assert "remove that line" in str(caught.value)


@pytest.mark.parametrize("key", [key for key in CONFIG if key != "limit"])
@pytest.mark.parametrize("value", [None, [7], "word"])
def test_a_damaged_configuration_is_one_sentence(key: str, value: Any, tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", CONFIG, (), {})
    facts = json.loads((run.path / "run.json").read_text())
    facts["config"][key] = value
    (run.path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ResumeError, match=f"is damaged: config: {key}"):
        load_run(run.path)


def test_a_template_or_decoding_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    for number, change in enumerate(({"templates": [{"name": "t"}]}, {"decoding": {"mode": "greedy"}})):
        run = start_run(tmp_path / str(number), CONFIG | change, (), {})
        with pytest.raises(ResumeError, match="is damaged"):
            plan_of(run)
