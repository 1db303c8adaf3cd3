"""The verdict on what was chosen: once, on unseen questions, and only if the records are what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from resta.errors import RequestError, ResumeError
from resta.journal import read_rows
from resta.ladder import Restoration
from resta.ladder.questions import Spent
from resta.ladder.rungs import Attempt, Ladder
from resta.verify import Verdict
from tests.ladder.builders import climb, exam, save_bank, two

Again = Callable[..., Restoration]


@pytest.fixture
def again(
    restored: Restoration, trio: dict[str, Path], bank: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Again:
    """Return what calls the ladder once more in a copy of its records, or before anything was verified there."""
    monkeypatch.setattr("resta.ladder.conduct.climb", lambda *given: list(restored.attempts))
    out = tmp_path / "out"
    shutil.copytree(restored.records, out.with_name("out.records"))

    def call(*, verified: bool = True, **more: object) -> Restoration:
        if not verified and (records := out.with_name("out.records")).joinpath("verify").is_dir():
            shutil.rmtree(records / "verify")
            (records / "spent.jsonl").unlink()
        return climb(two(trio), exam(bank), out, **more)

    return call


def do_nothing(ladder: Ladder, choice: Attempt) -> Path:
    """Write tuned in place of the choice: a remedy that does nothing."""
    folder = ladder.records / "candidate"
    shutil.copytree(ladder.target("tuned").name, folder, dirs_exist_ok=True)
    return folder


def test_a_remedy_that_does_nothing_is_not_released_whatever_was_expected_of_it(
    again: Again, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("resta.ladder.proof.write_candidate", do_nothing)
    told = again(verified=False)
    assert (told.verdict, told.exit_code, told.model) == (Verdict.FAIL, 1, None)
    assert told.sentence.startswith("Not restored: interpolation-")
    assert "its verdict on 12 harmful questions that nothing was learned or chosen by is FAIL" in told.sentence
    assert told.kept == told.records / "not-restored"
    assert not (tmp_path / "out").exists()
    answers = (told.records / "verify" / "restored" / "redeval" / "answers.jsonl").read_bytes()
    once_more = again()  # the same call says the same, and asks nothing
    assert (once_more.verdict, once_more.sentence) == (Verdict.FAIL, told.sentence)
    assert (told.records / "verify" / "restored" / "redeval" / "answers.jsonl").read_bytes() == answers
    monkeypatch.undo()


def test_a_second_candidate_is_not_verified_on_spent_questions_but_on_unseen_ones(
    again: Again, restored: Restoration, monkeypatch: pytest.MonkeyPatch, bank: Path, tmp_path: Path
) -> None:
    chosen = restored.chosen
    assert chosen is not None
    assert chosen.recipe is not None
    [term] = chosen.recipe.terms
    recipe = chosen.recipe.model_copy(update={"terms": (term.model_copy(update={"scale": 0.9}),)})
    other = replace(chosen, candidate="interpolation-0.9", recipe=recipe)
    monkeypatch.setattr("resta.ladder.conduct.climb", lambda *given: [restored.attempts[0], other])
    with pytest.raises(ResumeError, match=r"are spent on weights: interpolation-.*interpolation-0.9.*--unseen-bank"):
        again()
    with pytest.raises(RequestError, match=r"of its 30 questions with the .* questions of this run"):
        again(unseen=(bank,))
    told = again(unseen=(save_bank(tmp_path / "unseen.json", 14, "unheard-of"),))
    assert told.verdict is Verdict.PASS
    assert "verdict number 2 of this ladder" in told.sentence
    assert len({line.questions for line in read_rows(told.records / "spent.jsonl", Spent)}) == 2


def test_a_record_that_was_changed_after_the_verdict_says_nothing(again: Again, tmp_path: Path) -> None:
    path = tmp_path / "out.records" / "verify" / "restored" / "redeval" / "verdicts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace("refused", "safe"), *lines[1:]]) + "\n")
    with pytest.raises(ResumeError, match=r"the records are not those that the verdict of .* rests on"):
        again()
    assert not (tmp_path / "out").exists()


def test_a_record_without_the_line_that_says_of_which_model_it_is_says_nothing(again: Again, tmp_path: Path) -> None:
    (tmp_path / "out.records" / "spent.jsonl").unlink()
    with pytest.raises(ResumeError, match="does not say of which model"):
        again()


def test_questions_that_were_changed_in_the_records_are_refused(again: Again, tmp_path: Path) -> None:
    path = tmp_path / "out.records" / "questions" / "verifying" / "thirty.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows[1:], {**rows[0], "question": "an easy one"}]))
    with pytest.raises(ResumeError, match="changed after its questions were drawn"):
        again()


def test_a_released_model_that_was_changed_is_not_called_verified(again: Again, tmp_path: Path) -> None:
    assert again().verdict is Verdict.PASS
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ResumeError, match="is not the model that was verified"):
        again()
