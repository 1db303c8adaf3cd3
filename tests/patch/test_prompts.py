from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from resta.errors import RequestError
from resta.patch.prompts import (
    KINDS,
    STARTS,
    Drawing,
    built_in,
    draw,
    in_templates,
    read_built_in,
    read_harmful,
    read_task,
    with_starts,
)
from resta.redeval.questions import digest_of, read_bank
from resta.redeval.templates import read_template
from tests.patch.builders import asked, write_json_lines

QUESTIONS = [f"Which team takes ticket {n}?" for n in range(12)]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def test_the_built_in_prompts_are_many_and_none_is_asked_by_the_gate() -> None:
    kept = [text for kind in ("harmless", "lookalike") for text in built_in(kind)]  # type: ignore[arg-type]
    gate = [q for name in ("lookalikes", "smoke", "smoke-safe") for q in read_bank(name).questions]
    assert all(len(built_in(kind)) >= 200 for kind in ("harmless", "lookalike"))  # type: ignore[arg-type]
    assert len({digest_of(text) for text in kept}) == len(kept)
    words = [set(q.text.lower().replace("?", "").replace(",", "").split()) for q in gate]
    for text in kept:
        mine = set(text.lower().replace("?", "").replace(",", "").split())
        nearest = max(len(mine & theirs) / len(mine | theirs) for theirs in words)
        assert nearest <= 0.65, text


def test_the_built_in_prompts_are_on_other_subjects_than_the_gate_s() -> None:
    import resta.patch

    folder = Path(resta.patch.__file__).parent / "bank"
    subjects = {name for file in folder.glob("*.json") for name in json.loads(file.read_text(encoding="utf-8"))}
    gate = {question.category for question in read_bank("lookalikes").questions}
    assert len(subjects) >= 10
    assert not subjects & gate


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("prompts.txt", QUESTIONS),
        ("prompts.jsonl", [{"prompt": q} for q in QUESTIONS]),
        ("prompts.json", QUESTIONS),
        ("chat.jsonl", [{"messages": [turn("user", q), turn("assistant", "x")]} for q in QUESTIONS]),
        ("alpaca.jsonl", [{"instruction": q, "output": "x"} for q in QUESTIONS]),
        ("fastchat.jsonl", [{"conversations": [said("human", q), said("gpt", "x")]} for q in QUESTIONS]),
        ("qa.jsonl", [{"question": q, "answer": "x"} for q in QUESTIONS]),
        ("pc.jsonl", [{"prompt": q, "completion": "x"} for q in QUESTIONS]),
    ],
)  # fmt: skip
def test_a_task_is_a_file_of_prompts_or_training_data_as_it_is(name: str, rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".txt":
        path.write_text("\n".join(rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_json_lines(path, rows)
    found = read_task(path, 100, 0)
    assert sorted(each.text for each in found) == sorted(QUESTIONS)
    assert {each.messages[-1].role for each in found} == {"user"}
    assert all(len(each.messages) == 1 for each in found)


def test_a_system_prompt_and_the_turns_before_the_first_answer_are_kept(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": q},
                      {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"},
                      {"role": "assistant", "content": "b"}]}
        for q in QUESTIONS
    ]  # fmt: skip
    for each in read_task(write_json_lines(tmp_path / "chat.jsonl", rows), 100, 0):
        assert [message.role for message in each.messages] == ["system", "user"]
        assert each.messages[0].content == "Be brief."


@pytest.mark.parametrize(
    ("rows", "refusal"),
    [
        ([{"prompt": "one"}] * 20, "1 different task prompts; at least 8"),
        ([{"nothing": 1}] * 20, "line 1.*no known format"),
        (None, "no such file"),
    ],
)
def test_a_file_that_holds_no_task_is_refused(rows: list[Any] | None, refusal: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    if rows is not None:
        write_json_lines(path, rows)
    with pytest.raises(RequestError, match=refusal):
        draw(path, ["smoke"], [], Drawing())


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_bytes(b"What?\n\xff\n")
    with pytest.raises(RequestError, match=r"task.txt: not UTF-8 text \(byte 6\)"):
        read_task(tmp_path / "task.txt", 8, 0)


def test_draws_are_the_seed_s_and_of_different_prompts(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "task.jsonl", [{"prompt": q} for q in QUESTIONS])
    draws = [[each.text for each in read_task(path, 9, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 9 for draw in draws)
    kept = [read_built_in("harmless", 50, seed) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


def test_harmful_questions_come_evenly_from_their_banks_each_once(tmp_path: Path) -> None:
    smoke = read_bank("smoke")
    (tmp_path / "few.json").write_text(json.dumps(["Harm one?", "Harm two?", "harm one", smoke.questions[0].text]))
    few = read_bank(str(tmp_path / "few.json"))
    for count in (4, 30, 1000):
        found = read_harmful([smoke, few], count, 0)
        assert len({each.digest for each in found}) == len(found) == min(count, 62)
        assert {each.kind for each in found} == {"harmful"}
    own = {question.text for question in few.questions}
    assert sum(each.text in own for each in read_harmful([smoke, few], 4, 0)) == 2
    assert not read_harmful([read_bank("smoke-safe")], 8, 0)


def test_half_of_the_prompts_stand_in_templates_under_their_own_words_and_half_stay_bare() -> None:
    templates = [read_template("cot"), read_template("suffix")]
    found = in_templates(asked("harmful", 9, "harm"), templates)
    assert [each.template for each in found] == [None, "cot", None, "suffix", None, "cot", None, "suffix", None]
    for before, after in zip(asked("harmful", 9, "harm"), found, strict=True):
        assert after.text == before.text
        assert after.digest == before.digest
        assert before.text in after.messages[-1].content
        assert (after.messages == before.messages) == (after.template is None)


def test_every_second_answer_in_each_template_begins_as_one_that_goes_along() -> None:
    for templates in ([], [read_template("cot")], [read_template("cot"), read_template("suffix")]):
        found = with_starts(in_templates(asked("harmful", 24, "harm"), templates), STARTS)
        for name in {each.template for each in found}:
            begun = [bool(each.start) for each in found if each.template == name]
            assert begun == [False, True] * (len(begun) // 2)
    assert {each.start for each in found} <= {"", *STARTS}
    bare = asked("harmful", 12, "harm")
    assert tuple(with_starts(bare, ())) == bare


# -- keeping sets apart --------------------------------------------------------------------------------------


def task_of(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join([*QUESTIONS, *texts]) + "\n")
    return path


def test_a_task_prompt_that_a_bank_holds_as_harmful_is_refused_drawn_or_not(tmp_path: Path) -> None:
    harmful = read_bank("smoke").questions[-1].text
    draw(task_of(tmp_path / "task.txt", []), ["smoke"], [], Drawing(harmful_count=8))
    for spelled in (harmful, harmful.upper(), f"  {harmful.rstrip('?.')}  "):
        with pytest.raises(RequestError, match="a task prompt is a harmful question of the bank smoke"):
            draw(task_of(tmp_path / "task.txt", [spelled]), ["smoke"], [], Drawing(harmful_count=8))


def test_a_bank_that_holds_a_built_in_prompt_as_harmful_is_refused(tmp_path: Path) -> None:
    bank = tmp_path / "bank.json"
    bank.write_text(json.dumps([f"Harm {n}?" for n in range(9)] + built_in("lookalike")))
    with pytest.raises(RequestError, match="a lookalike prompt is a harmful question of the bank bank"):
        draw(task_of(tmp_path / "task.txt", []), [str(bank)], [], Drawing(harmful_count=8))


def test_harmful_prompts_stand_in_the_templates_that_are_named_and_half_of_all_have_a_start(tmp_path: Path) -> None:
    drawing = Drawing(templates=("cot", "suffix"), harmful_count=30)
    prompts = draw(task_of(tmp_path / "task.txt", []), ["smoke"], [], drawing)
    used = Counter(asked.template for asked in prompts if asked.kind == "harmful")
    assert used == {None: 15, "cot": 8, "suffix": 7}
    assert {asked.template for asked in prompts if asked.kind != "harmful"} == {None}
    for kind in KINDS:
        for template in used:
            found = [asked for asked in prompts if (asked.kind, asked.template) == (kind, template)]
            assert sum(bool(asked.start) for asked in found) == len(found) // 2


def test_the_gates_own_banks_are_kept_apart_unless_they_are_asked_for(tmp_path: Path) -> None:
    look_alike = read_bank("lookalikes").questions[0].text
    with pytest.raises(RequestError, match=r"lookalikes shares 1 of its \d+ questions with the prompts to learn from"):
        draw(task_of(tmp_path / "task.txt", [look_alike]), ["smoke"], [], Drawing())
    own = tmp_path / "own.json"
    own.write_text(json.dumps([f"Harm {n}?" for n in range(9)] + [read_bank("smoke").questions[0].text]))
    with pytest.raises(RequestError, match="built in: smoke shares 1 of its 60 questions"):
        draw(task_of(tmp_path / "task.txt", []), [str(own)], [], Drawing())
    draw(task_of(tmp_path / "task.txt", []), [str(own), "smoke"], [], Drawing())


def test_a_question_of_the_verdict_is_not_learned_from(tmp_path: Path) -> None:
    apart, task = tmp_path / "apart.json", task_of(tmp_path / "task.txt", [])
    apart.write_text(json.dumps(["Another question?"]))
    draw(task, ["smoke"], [str(apart)], Drawing())
    apart.write_text(json.dumps(["Another question?", "which TEAM takes  ticket 3"]))
    with pytest.raises(RequestError, match=r"apart.json shares 1 of its 2 questions with .*, such as 'which TEAM"):
        draw(task, ["smoke"], [str(apart)], Drawing())
