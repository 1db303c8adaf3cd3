"""What servers do besides answering: nothing of it may block a run, count as safe, or pass for an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resta.redeval.records import Failure, read_rows

from .conftest import Stub, chat
from .test_run import answers, invoke, verdicts

NUMBERS = ("one", "two", "three", "four", "five")  # the words of the questions in the bank of six


def asked(body: dict[str, Any]) -> str:
    """Return which of the five questions a request holds; none, where a judge is tested on known answers."""
    text = body["messages"][-1]["content"]
    return next((word for word in NUMBERS if f"{word}?" in text), "")


def served(stub: Stub, bank: Path, out: Path, *more: object) -> list[object]:
    common = ["--bank", bank, "--template", "standard", "--retries", 0, "--connections", 1]
    return ["big", "--base-url", stub.url, *common, *more, "--out", out]


def test_a_question_that_always_fails_blocks_neither_judges_nor_report(bank: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "run"

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] == "judge":
            return 200, chat("[[B]]" if asked(body) == "one" else "[[A]]")
        if asked(body) in ("three", "five"):
            return 400, {"error": {"message": "maximum context length exceeded", "code": "context_length_exceeded"}}
        return 200, chat("Yes.")

    stub.answer = answer
    judge = ["--judge", f"red-instruct=judge@{stub.url}"]
    shown = invoke(*served(stub, bank, out, *judge), code=5)
    assert "2 of 5 questions have no answer and count as unanswered" in shown
    assert f"resta redeval judge {out}" in shown
    assert f"resta redeval report {out}" in shown
    [cell] = json.loads((out / "report.json").read_text())["scores"]["cells"]
    assert cell["counts"] == {"harmful": 1, "safe": 2, "unanswered": 2}
    assert cell["answers"] == sum(cell["counts"].values()) == 5
    assert (cell["asr"]["value"], cell["asr_worst"]["value"]) == (1 / 5, 3 / 5)
    assert "Incomplete: 3 of 5 answers" in shown
    assert "worst case" in shown
    assert {f.ask_id.split("/")[-1] for f in read_rows(out / "failures.jsonl", Failure)} == {
        "0000|standard|0",
        "0002|standard|0",
    }
    # Those that are missing are asked again, and nothing else.
    before = len(stub.bodies)
    stub.answer = lambda body: (200, chat("[[A]]" if body["model"] == "judge" else "Yes."))
    invoke(*served(stub, bank, out, *judge))
    assert [body["model"] for body in stub.bodies[before:]] == ["big", "big", "judge", "judge"]
    [cell] = json.loads((out / "report.json").read_text())["scores"]["cells"]
    assert cell["counts"] == {"harmful": 1, "safe": 4}


def test_a_dead_server_is_given_up_and_what_failed_is_asked_last(bank: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "run"
    stub.answer = lambda body: (400, {"error": {"message": "no"}}) if asked(body) != "one" else (200, chat("Yes."))
    shown = invoke(*served(stub, bank, out, "--max-failures", 2), code=5)
    assert "gave up after 2 failures in a row (--max-failures)" in shown
    assert "4 of 5 questions have no answer" in shown
    assert [asked(body) for body in stub.bodies] == ["one", "two", "three"]
    assert [v.label for v in verdicts(out)] == ["harmful"]
    stub.answer = lambda body: (200, chat("Yes."))
    invoke(*served(stub, bank, out, "--max-failures", 2))
    assert [asked(body) for body in stub.bodies[3:]] == ["four", "five", "two", "three"]
    assert len(answers(out)) == 5


def test_a_judge_that_fails_on_one_answer_leaves_it_unanswered(bank: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "run"

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] == "big":
            return 200, chat("Yes.")
        return (400, {"error": {"message": "no"}}) if asked(body) == "four" else (200, chat("[[A]]"))

    stub.answer = answer
    judges = ["--judge", f"red-instruct=judge@{stub.url}", "--judge", "refusal-strings"]
    shown = invoke(*served(stub, bank, out, *judges), code=5)
    assert "red-instruct:judge has no verdict on 1 answers" in shown
    cells = {c["judge"]: c["counts"] for c in json.loads((out / "report.json").read_text())["scores"]["cells"]}
    assert cells == {"red-instruct:judge": {"safe": 4, "unanswered": 1}, "refusal-strings": {"harmful": 5}}
