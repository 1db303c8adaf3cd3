"""The whole ladder, on models that say one thing whatever they are asked."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest

import resta
from resta.cli import main
from resta.errors import RequestError, ResumeError, UnansweredError
from resta.journal import read_rows
from resta.ladder import Restoration
from resta.ladder.conduct import Meter
from resta.ladder.questions import Spent
from resta.ladder.story import Cost
from resta.redeval.records import Answer
from resta.verify import Exam, Verdict
from tests.ladder.builders import COMPLIES, KEEPS_ANSWERING, POLICY, REFUSES, climb, exam, save_bank, save_trio, two
from tests.pages import assert_self_contained
from tests.processes import kill_once_kept
from tests.redeval.builders import save_refusing

Trio = dict[str, Path]


def asked(records: Path) -> dict[str, list[str]]:
    """Return the ids of all answers, by file."""
    return {
        str(path.relative_to(records)): [answer.id for answer in read_rows(path, Answer)]
        for path in sorted(records.rglob("answers.jsonl"))
    }


# -- what it comes to ----------------------------------------------------------------------------------------


def test_the_cheapest_remedy_that_works_is_proved_and_released(restored: Restoration, trio: Trio) -> None:
    assert (restored.verdict, restored.exit_code, restored.kept) == (Verdict.PASS, 0, None)
    assert restored.model is not None
    assert restored.chosen is not None
    assert restored.chosen.rung == "weights"
    assert restored.model.is_dir()
    assert not (restored.records / "candidate").exists()
    mask = os.umask(0)
    os.umask(mask)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (restored.model, restored.records)]
    assert modes == [0o777 & ~mask, 0o700], "others may read what is released, and nothing else"
    assert stat.S_IMODE((restored.model / "model.safetensors").stat().st_mode) == 0o666 & ~mask
    assert not (restored.records / "not-restored").exists()
    moved = {role: str(path) for role, path in two(trio).items()}
    resta.audit(restored.model, moved=moved).raise_if_any()
    [begun, closed] = read_rows(restored.records / "spent.jsonl", Spent)
    assert (begun.model, begun.verdict, closed.verdict) == (closed.model, None, "PASS")
    parts = json.loads((restored.records / "questions" / "parts.json").read_text())["parts"]
    digests = [set(part["questions"]) for part in parts.values()]
    assert sum(map(len, digests)) == len(set.union(*digests)) == 30


def test_what_is_verified_was_asked_nowhere_before(restored: Restoration) -> None:
    def texts(folder: Path) -> set[str]:
        return {json.loads(line)["text"] for line in (folder / "questions.jsonl").read_text().splitlines()}

    verified = texts(restored.records / "verify" / "restored" / "redeval")
    chosen_by = [texts(path.parent) for path in (restored.records / "rungs").rglob("questions.jsonl")]
    assert verified
    assert len(chosen_by) >= 2
    assert not verified & set.union(*chosen_by)


def test_the_story_says_what_was_broken_tried_and_spent_and_shows_no_text(restored: Restoration) -> None:
    page = restored.page.read_text()
    assert_self_contained(page)
    assert "tuned answers 100.0 % of the harmful questions" in page
    assert restored.chosen is not None
    assert restored.chosen.candidate in page
    assert "redacted" in page
    assert "question 1?" not in page
    told = json.loads((restored.records / "story.json").read_text())
    assert told["kind"] == "restoration"
    assert (told["exit_code"], told["verdict"], told["chosen"]) == (0, "PASS", "weights")
    kept = sum(len(each) for each in asked(restored.records).values())
    assert sum(cost["answers"] for cost in told["costs"]) == kept


def test_the_same_call_again_asks_nothing_and_says_the_same(
    restored: Restoration, trio: Trio, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resta.sweep.measure.load_local", lambda *given, **more: pytest.fail("a model was loaded"))
    monkeypatch.setattr("resta.verify.measure.load_local", lambda *given, **more: pytest.fail("a model was loaded"))
    before = asked(restored.records)
    again = climb(two(trio), exam(bank), restored.records.with_name("out"))
    assert asked(restored.records) == before
    assert (again.sentence, again.model, again.exit_code) == (restored.sentence, restored.model, 0)


def test_a_model_that_lost_nothing_is_said_to_pass_and_no_model_is_written(
    trio: Trio, bank: Path, tmp_path: Path
) -> None:
    models = {"tuned": trio["aligned"], "aligned": save_refuser(tmp_path / "other")}
    told = climb(models, exam(bank), tmp_path / "out")
    assert (told.verdict, told.exit_code, told.model, told.kept) == (Verdict.PASS, 0, None, None)
    assert "Nothing is to be restored: tuned passes as it is" in told.sentence
    assert [each.rung for each in told.attempts] == ["nothing"]
    assert not (tmp_path / "out").exists()


def save_refuser(path: Path) -> Path:
    save_refusing(path, seed=3, says=REFUSES)
    return path


def test_an_aligned_model_that_does_not_refuse_ends_the_run_before_anything_is_tried(
    trio: Trio, bank: Path, tmp_path: Path
) -> None:
    save_refusing(tmp_path / "aligned", seed=3, says=COMPLIES)
    with pytest.raises(RequestError, match="it does not refuse"):
        climb({"tuned": trio["tuned"], "aligned": tmp_path / "aligned"}, exam(bank), tmp_path / "out")
    assert not (tmp_path / "out.records" / "rungs").exists()


@pytest.fixture(scope="module")
def refused(trio: Trio, bank: Path, safe_bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Restoration:
    """Return what a ladder came to of which nothing was worth verifying: what stops harm refuses everything."""
    return climb(two(trio), exam(bank, safe_bank), tmp_path_factory.mktemp("refused") / "out", KEEPS_ANSWERING)


def test_where_nothing_would_pass_the_best_is_kept_and_no_model_is_released(refused: Restoration) -> None:
    assert (refused.verdict, refused.exit_code, refused.model, refused.chosen) == (None, 1, None, None)
    assert refused.kept == refused.records / "not-restored"
    assert refused.kept.is_dir()
    assert not refused.records.with_name("out").exists()
    assert not (refused.records / "verify").exists(), "the verifying questions are still unseen"
    assert refused.sentence.startswith(
        "Not restored: no candidate has a chance of 0.9 to pass. The nearest, interpolation-"
    )
    assert [each.rung for each in refused.attempts][:2] == ["nothing", "weights"]
    assert_self_contained(refused.page.read_text())


def test_a_folder_of_another_policy_bank_or_model_is_refused_by_its_differences(
    refused: Restoration, trio: Trio, bank: Path, safe_bank: Path, tmp_path: Path
) -> None:
    out = refused.records.with_name("out")
    with pytest.raises(ResumeError, match=r"it differs in policy.over_refusal.max_increase_over_tuned: 0.3 there"):
        climb(two(trio), exam(bank, safe_bank), out, KEEPS_ANSWERING.replace("0.3", "0.9"))
    with pytest.raises(ResumeError, match=r"of another request; it differs in redeval.banks"):
        climb(two(trio), exam(save_bank(tmp_path / "thirty.json", 31), safe_bank), out, KEEPS_ANSWERING)
    with pytest.raises(ResumeError, match=r"of another request; it differs in models.aligned"):
        climb(
            {"tuned": trio["tuned"], "aligned": save_refuser(tmp_path / "x")}, exam(bank, safe_bank), out,
            KEEPS_ANSWERING,
        )  # fmt: skip


# -- stopped, and gone on with -------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process, wherever it is."""


def test_a_ladder_that_is_stopped_again_and_again_comes_to_the_same_and_asks_nothing_twice(
    restored: Restoration, trio: Trio, bank: Path, tmp_path: Path
) -> None:
    stops = 0
    while (told := stopped(two(trio), exam(bank), tmp_path / "out")) is None:
        assert not (tmp_path / "out").exists()
        stops += 1
    assert stops >= 2
    found = asked(told.records)
    assert found.keys() == asked(restored.records).keys()
    for file, answers in asked(restored.records).items():
        assert sorted(found[file]) == sorted(answers), file
    assert told.chosen is not None
    assert restored.chosen is not None
    assert told.chosen.candidate == restored.chosen.candidate
    assert (told.verdict, told.model) == (Verdict.PASS, tmp_path / "out")
    weights = [path / "model.safetensors" for path in (tmp_path / "out", restored.records.with_name("out"))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def stopped(models: Trio, asks: Exam, out: Path) -> Restoration | None:
    """Return what a call with few answers left comes to; None where they did not do."""
    try:
        return climb(models, asks, out, budget_answers=30)
    except UnansweredError as error:
        if "--budget-answers 30 are spent" not in str(error):
            raise
        return None


WHERE = ("proof.spend", "proof.add", "conduct.release", "conduct.write")


def test_a_ladder_that_is_killed_anywhere_between_verifying_and_the_story_goes_on(
    restored: Restoration, trio: Trio, bank: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(restored.records, tmp_path / "out.records")
    (tmp_path / "out.records" / "spent.jsonl").unlink()
    shutil.rmtree(tmp_path / "out.records" / "verify")
    monkeypatch.setattr("resta.ladder.conduct.climb", lambda *given: list(restored.attempts))  # it was answered before
    for where in WHERE:
        module = importlib.import_module(f"resta.ladder.{where.partition('.')[0]}")
        for after in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(f"resta.ladder.{where}", killing(getattr(module, where.partition(".")[2]), after=after))
                with pytest.raises(Killed):
                    climb(two(trio), exam(bank), tmp_path / "out")
            assert (tmp_path / "out").exists() == (
                where == "conduct.write" or (where, after) == ("conduct.release", True)
            )
    told = climb(two(trio), exam(bank), tmp_path / "out")
    assert (told.verdict, told.model) == (Verdict.PASS, tmp_path / "out")
    assert [line.verdict for line in read_rows(told.records / "spent.jsonl", Spent)] == [None, "PASS"]


def killing(real: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """Return a function that ends the process in place of another one, or after it."""

    def kill(*given: Any, **more: Any) -> None:
        if after:
            real(*given, **more)
        raise Killed

    return kill


def words(trio: Trio, bank: Path, policy: Path, out: Path, *more: object) -> list[str]:
    """Return a command line without a base."""
    given = ["restore", trio["tuned"], "--aligned", trio["aligned"], "--policy", policy, "--bank", bank]
    given += ["--template", "standard", "--max-new-tokens", 9, "--no-utility", "--device", "cpu", "-o", out, *more]
    return [str(word) for word in given]


def test_a_command_that_is_killed_while_it_verifies_goes_on_and_exits_as_the_gate_does(
    trio: Trio, bank: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    line = words(trio, bank, policy, tmp_path / "out")
    answers = tmp_path / "out.records" / "verify" / "restored" / "redeval" / "answers.jsonl"
    kill_once_kept(line, answers, lines=1)
    assert not (tmp_path / "out").exists()
    done = click.testing.CliRunner().invoke(main, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Restored by interpolation-" in done.output.replace("\n", " ")
    assert (tmp_path / "out" / "resta.json").is_file()
    assert len({a.id for a in read_rows(answers, Answer)}) == len(read_rows(answers, Answer)) == 12


def test_the_time_is_kept_and_a_call_ends_when_it_is_over(trio: Trio, bank: Path, tmp_path: Path) -> None:
    with pytest.raises(UnansweredError, match=r"--max-minutes 1e-06 are over on the rung nothing: nothing is decided"):
        climb(two(trio), exam(bank), tmp_path / "out", max_minutes=1e-6)
    [cost] = read_rows(tmp_path / "out.records" / "costs.jsonl", Cost)
    assert (cost.rung, cost.answers) == ("nothing", 0)
    assert Meter


# -- refused before anything is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"aligned": None}, "no aligned model .*Use the instruct model that TUNED or its base belongs to"),
        ({"aligned": "inspect:openai/x"}, "aligned: inspect:openai/x is served, and its weights are needed"),
        ({"tuned": "http://localhost:8000/v1"}, "is served, and its weights are needed"),
        ({"aligned": "TUNED"}, "are the same model"),
        ({"only": ("wieghts",)}, "no rung 'wieghts'.*weights"),
        ({"unseen": ("smoke",), "safe": True}, "name safe ones as well"),
        ({"policy": "judge: refusal-strings\nasr: {max_upper: 0.01}\n"}, "cannot show what the policy asks for"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_anything_is_written(
    change: dict[str, Any], says: str, trio: Trio, bank: Path, safe_bank: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {role: str(path) for role, path in two(trio).items()}
    given |= {key: change[key] for key in ("tuned", "aligned") if key in change}
    if given["aligned"] == "TUNED":
        given["aligned"] = given["tuned"]
    more = {key: value for key, value in change.items() if key in ("only", "unseen")}
    models = {role: name for role, name in given.items() if name is not None}
    with pytest.raises(RequestError, match=says):
        climb(
            models, exam(bank, safe_bank if change.get("safe") else None), tmp_path / "out",
            change.get("policy", POLICY), **more,
        )  # fmt: skip
    assert not (tmp_path / "out.records").exists()


def test_a_model_without_a_chat_template_is_refused_in_words(trio: Trio, bank: Path, tmp_path: Path) -> None:
    models = save_trio(tmp_path / "models")
    for path in (models["tuned"] / "chat_template.jinja",):
        path.unlink()
    with pytest.raises(RequestError, match="no chat template, so nobody knows how it is asked"):
        climb(two(models), exam(bank), tmp_path / "out")


def test_a_folder_that_is_there_is_not_written_over(trio: Trio, bank: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ResumeError, match="already exists"):
        climb(two(trio), exam(bank), tmp_path / "out")
    (tmp_path / "new.records").mkdir()
    (tmp_path / "new.records" / "mine.txt").write_text("x")
    with pytest.raises(ResumeError, match="holds no records of a ladder"):
        climb(two(trio), exam(bank), tmp_path / "new")
