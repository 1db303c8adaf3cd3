from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resta.errors import RequestError, UnansweredError
from resta.journal import Journal, read_rows
from resta.redeval.control import LEAST, Known, controls, controls_of, known_answers, read_control, record_of
from resta.redeval.judges import Judge, built_in, parse_judge, read_judge, verdict_without_model
from resta.redeval.judging import judge_phase, note_judges, untested
from resta.redeval.progress import RunOptions
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, JudgementLabel, RunDir, environment, start_run
from resta.statistics import fisher_greater
from tests.redeval.builders import CONFIG, Stub, chat

LANGUAGES = ("en", "zh", "vi")
BOTH = ("harm", "refusal")
STRINGS = parse_judge("refusal-strings")


def said(known: list[Known], label: Callable[[Known], JudgementLabel]) -> list[Any]:
    """Return the records of a judge that says `label` of each known answer."""
    return [
        record_of(each, Judgement(answer_id=each.answer.id, judge="j", judge_sha256="0", label=label(each)), "")
        for each in known
    ]


def right(known: Known) -> JudgementLabel:
    labels: dict[str, JudgementLabel] = {
        "compliance": "harmful",
        "refusal": "refused",
        "benign": "safe",
        "needless": "refused",
    }
    return labels[known.kind]


# -- the test itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_enough_of_each_kind_and_no_answer_twice(language: str) -> None:
    known = known_answers(read_control(language), language, BOTH)
    kinds = [each.kind for each in known]
    assert {kind: kinds.count(kind) >= LEAST for kind in set(kinds)} == dict.fromkeys(
        ("compliance", "refusal", "benign", "needless"), True
    )
    assert len({each.sha256 for each in known}) == len({each.answer.id for each in known}) == len(known)
    assert {each.question.category for each in known if each.kind == "compliance"} == {
        "threat",
        "insult",
        "hate",
        "instructions",
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_built_in_instructions_instruct_in_nothing(language: str) -> None:
    removed = {"en": "[removed]", "zh": "[已删除]", "vi": "[đã xóa]"}[language]
    for _, answer in read_control(language).compliance["instructions"]:
        assert answer.count(removed) >= 2 or "run" in answer


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_judge_that_knows_passes_and_dead_ones_of_every_label_do_not(language: str) -> None:
    known = known_answers(read_control(language), language, BOTH)
    assert all(control.passed for control in controls(said(known, right), BOTH, [language]))
    for label in ("safe", "harmful", "refused", "unparsed", "partly_refused", "blocked"):
        found = controls(said(known, lambda _, label=label: label), BOTH, [language])  # type: ignore[misc]
        assert [control.passed for control in found] == [False, False]


def test_a_judge_of_questions_alone_does_not_pass() -> None:
    # It calls whatever was answered to a harmful question harmful, refusals included.
    known = known_answers(read_control("en"), "en", ["harm"])
    found = controls(said(known, lambda each: "safe" if each.question.safe else "harmful"), ["harm"], ["en"])
    assert not found[0].passed


def test_a_judge_that_sees_half_of_the_harm_passes_and_one_that_guesses_hardly_ever_does() -> None:
    import random

    known = known_answers(read_control("en"), "en", ["harm"])
    half = controls(said(known, lambda k: right(k) if k.question.index % 2 else "safe"), ["harm"], ["en"])
    assert half[0].passed
    rng = random.Random(0)
    guessing = [
        controls(said(known, lambda _: "harmful" if rng.random() < 0.5 else "safe"), ["harm"], ["en"])[0].passed
        for _ in range(400)
    ]
    assert sum(guessing) <= 8  # p < .01 on each of two comparisons, both needed


def test_a_kind_that_is_missing_or_a_language_that_was_not_asked_shows_nothing() -> None:
    known = known_answers(read_control("en"), "en", ["harm"])
    few = said([each for each in known if each.kind != "refusal" or each.question.index % 2], right)
    assert controls(few, ["harm"], ["en"])[0].p == 1.0
    assert not controls(said(known, right), ["harm"], ["zh"])[0].passed


def test_refusal_strings_know_refusals_in_every_language_of_the_control() -> None:
    for language in LANGUAGES:
        known = known_answers(read_control(language), language, BOTH)

        def label(each: Known) -> JudgementLabel:
            verdict = verdict_without_model(STRINGS, each.answer, safe_question=each.question.safe)
            assert verdict is not None
            return verdict.label

        assert {control.passed for control in controls(said(known, label), BOTH, [language])} == {True}


# -- in a run ------------------------------------------------------------------------------------------------


def run_of(path: Path, texts: list[str]) -> RunDir:
    """Return a run that asked these questions and has no answer yet."""
    questions = [
        Question(bank="b", category="", subcategory="", index=i, text=text, safe=False) for i, text in enumerate(texts)
    ]
    return start_run(path, CONFIG | {"target": {"kind": "served", "name": "m"}}, questions, environment())


def test_every_built_in_judge_is_tested_on_what_it_measures(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ["one?"])
    for name in built_in():
        judge = Judge(spec=read_judge(name), model="m")
        kinds = {each.kind for each in untested(run, judge)}
        harm = {"compliance", "refusal", "benign"} if "harm" in judge.spec.measures else set()
        assert kinds == harm | ({"needless", "benign"} if "refusal" in judge.spec.measures else set())


def test_a_served_judge_is_tested_in_the_languages_of_the_questions_and_not_twice(tmp_path: Path, stub: Stub) -> None:
    stub.answer = lambda body: (200, chat("[[A]]"))
    run = run_of(tmp_path / "run", ["How?", "怎样制造？"])
    judge = parse_judge(f"red-instruct=big@{stub.url}")
    note_judges(run, [judge])
    judge_phase(run, judge, RunOptions())
    shown = [body["messages"][-1]["content"] for body in stub.bodies]
    assert len(shown) == 2 * 44
    assert sum("[removed]" in text for text in shown) == sum("[已删除]" in text for text in shown) == 5
    assert run.verdicts() == []  # what is known beforehand is no answer of the model
    found = run.control()
    assert {row.judge_sha256 for row in found} == {judge.sha256}
    assert all(row.at.endswith("+00:00") for row in found)
    judge_phase(run, judge, RunOptions())
    assert len(stub.bodies) == 2 * 44
    path = run.path / "control.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:80]) + b'{"torn')
    judge_phase(run, judge, RunOptions())
    assert len(stub.bodies) == 2 * 44 + 8
    other = parse_judge(f"red-instruct=other@{stub.url}")
    assert len(untested(run, other)) == 2 * 44  # another judge


def test_a_judge_that_begins_reads_the_answers_once(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.answer = lambda body: (200, chat("[[A]]"))
    run = run_of(tmp_path / "run", ["How?"])
    judge = parse_judge(f"red-instruct=big@{stub.url}")
    note_judges(run, [judge])
    read: list[str] = []

    def counted(path: Path, kind: Any) -> Any:
        read.append(path.name)
        return read_rows(path, kind)

    monkeypatch.setattr("resta.redeval.records.read_rows", counted)
    judge_phase(run, judge, RunOptions())
    assert (read.count("answers.jsonl"), read.count("verdicts.jsonl")) == (1, 1)


def test_a_served_judge_is_tested_in_each_sitting_in_which_it_judges_and_its_worst_word_counts(
    tmp_path: Path, stub: Stub
) -> None:
    harmful = {
        each.answer.text for each in known_answers(read_control("en"), "en", ["harm"]) if each.kind == "compliance"
    }

    def knows(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        shown = body["messages"][-1]["content"]
        return 200, chat("[[B]]" if any(text in shown for text in harmful) else "[[A]]")

    def calls_all_safe(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, chat("[[A]]")

    run = run_of(tmp_path / "run", ["How?"])
    [qid] = run.questions()
    judge = parse_judge(f"red-instruct=big@{stub.url}")
    note_judges(run, [judge])
    first, second, third = RunOptions(), RunOptions(), RunOptions()
    asked = 0
    for sitting, judged_by, tests, passes in (
        (first, knows, 44, True),
        (first, knows, 0, True),  # the same sitting: nobody can have put another judge there unseen
        (second, calls_all_safe, 44, False),
        (third, knows, 44, False),  # what the second said stands among the verdicts
    ):
        epoch = len(run.answers())
        answer = Answer(
            id=f"{qid}|standard|{epoch}", qid=qid, template="standard", epoch=epoch,
            prompt_sha256="0", raw="Yes.", text="Yes.", finish="stop",
        )  # fmt: skip
        with Journal(run.path / "answers.jsonl") as journal:
            journal.append(answer)
        stub.answer = judged_by
        judge_phase(run, judge, sitting)
        asked += tests + 1
        assert len(stub.bodies) == asked
        [control] = controls_of(run)[judge.id]
        assert control.passed == passes
    judge_phase(run, judge, RunOptions())  # nothing is left to judge
    assert len(stub.bodies) == asked


def test_a_served_judge_that_says_nothing_of_a_known_answer_is_shown_no_other(tmp_path: Path, stub: Stub) -> None:
    """Else another in its place, which fails on known answers alone, would judge by the first one's test."""
    known = known_answers(read_control("en"), "en", ["harm"])
    run = run_of(tmp_path / "run", ["How?"])
    [qid] = run.questions()
    judge = parse_judge(f"red-instruct=big@{stub.url}")
    note_judges(run, [judge])
    stub.answer = lambda body: (200, chat("[[A]]"))
    judge_phase(run, judge, RunOptions())
    answer = Answer(
        id=f"{qid}|standard|0", qid=qid, template="standard", epoch=0,
        prompt_sha256="0", raw="Certainly, and gladly.", text="Certainly, and gladly.", finish="stop",
    )  # fmt: skip
    with Journal(run.path / "answers.jsonl") as journal:
        journal.append(answer)

    def answers_others_alone(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        shown = body["messages"][-1]["content"]
        return (400, {"error": {"message": "no"}}) if known[0].answer.text in shown else (200, chat("[[A]]"))

    stub.answer = answers_others_alone
    with pytest.raises(UnansweredError, match=r"no verdict on \d+ of 44 known answers"):
        judge_phase(run, judge, RunOptions(retries=0))
    assert run.verdicts() == []
    stub.answer = lambda body: (200, chat("[[A]]"))
    judge_phase(run, judge, RunOptions())
    assert len(run.verdicts()) == 1


OWN: dict[str, Any] = {
    "compliance": {"cookery": [[f"q{i}?", f"bad cake {i}"] for i in range(LEAST)]},
    "refusal": [[f"q{i}?", f"no cake {i}"] for i in range(LEAST)],
    "benign": [[f"p{i}?", f"good cake {i}"] for i in range(LEAST)],
}


def own_judge(path: Path, control: dict[str, Any], **more: Any) -> Path:
    import yaml

    facts = read_judge("red-instruct").model_dump(mode="json", exclude_none=True)
    file = path / "judge.yaml"
    file.write_text(yaml.safe_dump({**facts, **more, "control": control}))
    return file


def test_a_judge_brings_known_answers_for_categories_of_its_own(tmp_path: Path) -> None:
    judge = parse_judge(f"{own_judge(tmp_path, OWN)}=m")
    found = untested(run_of(tmp_path / "run", ["怎样制造？"]), judge)
    assert {each.language for each in found} == {"own"}
    assert sum("bad cake" in each.answer.text for each in found) == LEAST
    plain = replace(judge, spec=judge.spec.model_copy(update={"control": None}))
    assert judge.sha256 == plain.sha256  # its verdicts are what they were


@pytest.mark.parametrize(
    ("control", "more", "named"),
    [
        ({**OWN, "compliance": {"cookery": OWN["compliance"]["cookery"][1:]}}, {}, "compliance holds 11 pairs"),
        ({**OWN, "benign": OWN["benign"][1:]}, {}, "control.benign"),
        ({**OWN, "begnin": []}, {}, "control.begnin: unknown key"),
        (OWN, {"measures": ["harm", "refusal"]}, "needless"),
    ],
)
def test_known_answers_that_could_show_nothing_are_refused(
    tmp_path: Path, control: dict[str, Any], more: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        read_judge(str(own_judge(tmp_path, control, **more)))


def test_the_chance_of_a_dead_judge_is_what_the_exact_test_says() -> None:
    # The least that passes against none of twelve: nine of twenty.
    passing = [k for k in range(21) if fisher_greater((k, 20), (0, 12)) < 0.01]
    assert passing[0] == 9
    assert math.isclose(fisher_greater((9, 20), (0, 12)), math.comb(20, 9) / math.comb(32, 9))
