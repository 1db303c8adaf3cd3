"""Parts of the questions share none; what a verdict rested on is spent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.errors import RequestError, ResumeError
from resta.ladder.questions import (
    CALIBRATING,
    CHOOSING,
    MOST_CALIBRATING,
    VERIFYING,
    Part,
    Spent,
    add,
    draw,
    exam_on,
    keep,
    seen_before,
    spend,
)
from resta.redeval import Questions
from resta.redeval.plan import RunSpec
from resta.redeval.questions import Bank, Question, read_bank
from resta.verify import Exam, Utility

NAMES = (CALIBRATING, CHOOSING, VERIFYING)


def bank(name: str, texts: list[str], *, safe: bool = False, categories: int = 1) -> Bank:
    questions = tuple(
        Question(bank=name, category=f"c{i % categories}", subcategory="", index=i, text=text, safe=safe)
        for i, text in enumerate(texts)
    )
    return Bank(name=name, source=name, sha256=name, published=False, questions=questions)


def drawn(*banks: Bank, seed: int = 0, calibrating: Bank | None = None, folder: Path = Path("x")) -> dict[str, Part]:
    return draw(RunSpec(banks=banks, templates=(), asked=Questions()), folder, seed=seed, calibrating=calibrating)


def texts(count: int, word: str = "thing") -> list[str]:
    return [f"What about {word} {i}?" for i in range(count)]


SPELLINGS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["", "?", " ?", "!"]), st.booleans()), min_size=60, max_size=120
)


@given(SPELLINGS, SPELLINGS, st.integers(0, 5))
def test_parts_share_no_question_however_it_is_spelled_and_in_whatever_bank(
    one: list[tuple[int, str, bool]], two: list[tuple[int, str, bool]], seed: int
) -> None:
    def spelled(rows: list[tuple[int, str, bool]], start: str) -> list[str]:
        return [*texts(4, start), *(f"{'HOW' if loud else 'how'}  {start}{i}{mark}" for i, mark, loud in rows)]

    banks = [bank("one", spelled(one, "1")), bank("two", spelled(two, "")), bank("fine", texts(8, "pie"), safe=True)]
    parts = drawn(*banks, seed=seed)
    whole = [question for each in banks for question in each.questions]
    assert sum((Counter(part.digests) for part in parts.values()), Counter()) == Counter({q.digest for q in whole})


def test_every_category_is_in_both_halves_and_a_quarter_at_most_is_for_learning() -> None:
    parts = drawn(bank("bad", texts(120), categories=6), bank("fine", texts(40, "cake"), safe=True, categories=4))
    for name in (CHOOSING, VERIFYING):
        counts = Counter((q.safe, q.category) for q in parts[name].questions)
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 8
    assert parts[CALIBRATING].harmful_count == 30
    assert not any(question.safe for question in parts[CALIBRATING].questions)
    assert abs(parts[CHOOSING].harmful_count - parts[VERIFYING].harmful_count) <= 1
    assert drawn(bank("bad", texts(1000)))[CALIBRATING].harmful_count == MOST_CALIBRATING


def test_the_seed_alone_decides_which_question_is_for_what() -> None:
    one, two = bank("bad", texts(50)), bank("bad", texts(50)[::-1])
    assert drawn(one)[VERIFYING].sha256 == drawn(two)[VERIFYING].sha256
    assert drawn(one)[VERIFYING].sha256 != drawn(one, seed=1)[VERIFYING].sha256


def test_a_bank_to_learn_from_leaves_the_others_whole_and_must_share_nothing_with_them() -> None:
    parts = drawn(bank("bad", texts(20)), calibrating=bank("own", texts(20, "other")))
    assert parts[CALIBRATING].digests == {q.digest for q in bank("own", texts(20, "other")).questions}
    assert len(parts[CHOOSING].digests) + len(parts[VERIFYING].digests) == 20
    with pytest.raises(RequestError, match=r"own shares 1 of its 2 questions with the .* of this run, such as 'WHAT"):
        drawn(bank("bad", texts(20)), calibrating=bank("own", ["WHAT about thing 3", "something else"]))


def test_a_bank_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(RequestError, match="too few to choose on some and verify on others"):
        drawn(bank("bad", texts(20)), bank("fine", texts(1, "cake"), safe=True))


def test_each_part_is_asked_by_files_of_its_own_that_read_as_they_were_drawn(tmp_path: Path) -> None:
    parts = drawn(bank("bad", texts(40), categories=3), bank("fine", texts(10, "cake"), safe=True), folder=tmp_path)
    keep(tmp_path, parts)
    for number, name in enumerate((CHOOSING, VERIFYING)):
        asked = exam_on(parts[name], Exam(questions=Questions(limit=7, profile="quick"), utility=Utility()), number)
        read = [*(read_bank(str(p)) for p in asked.questions.banks)]
        read += [read_bank(str(p), safe=True) for p in asked.questions.safe_banks]
        assert [(q.text, q.safe, q.category) for each in read for q in each.questions] == [
            (q.text, q.safe, q.category) for q in parts[name].questions
        ]
        assert asked.questions.limit is None
        assert asked.utility is not None
        assert asked.utility.part == (number, 2)


def test_questions_that_were_changed_after_they_were_drawn_are_refused(tmp_path: Path) -> None:
    parts = drawn(bank("bad", texts(40)), folder=tmp_path)
    keep(tmp_path, parts)
    keep(tmp_path, parts)
    with pytest.raises(ResumeError, match="were others when they were drawn"):
        keep(tmp_path, drawn(bank("bad", texts(41)), folder=tmp_path))
    path = tmp_path / VERIFYING / "bad.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(ResumeError, match="changed after its questions were drawn"):
        keep(tmp_path, parts)
    assert seen_before(tmp_path, {VERIFYING}).keys() == parts[CALIBRATING].digests | parts[CHOOSING].digests


# -- spending ------------------------------------------------------------------------------------------------


def spent(model: str = "m", questions: str = "q", **more: str) -> Spent:
    return Spent(questions=questions, model=model, candidate=f"weights: {model}", at="2026-01-01", **more)


def test_questions_are_spent_on_one_model_and_on_no_other(tmp_path: Path) -> None:
    path = tmp_path / "spent.jsonl"
    assert spend(path, spent(), tmp_path / "verify") is None
    assert spend(path, spent(), tmp_path / "verify") is None  # killed, and gone on with
    with pytest.raises(ResumeError, match=r"are spent on weights: m, .* --unseen-bank"):
        spend(path, spent("other"), tmp_path / "verify")
    add(path, spent(verdict="FAIL", records="r"))
    closed = spend(path, spent(), tmp_path / "verify")
    assert closed is not None
    assert closed.verdict == "FAIL"
    assert spend(path, spent("other", questions="unseen"), tmp_path / "other") is None


def test_answers_of_nobody_knows_which_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ResumeError, match="does not say of which model"):
        spend(tmp_path / "spent.jsonl", spent(), tmp_path / "verify")
