from __future__ import annotations

import ast
import csv
import json
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import resta.redeval
from resta.cli.options import run_options
from resta.errors import RequestError
from resta.redeval.control import known_answers, read_control
from resta.redeval.labels import read_labels
from resta.redeval.records import load_run
from tests.processes import HOPELESS_S, kill_once_kept, lines_of, wait_until
from tests.redeval.builders import Stub, answers, chat, completion, invoke, verdicts

COMMON = ["--template", "standard", "--template", "cot", "--max-new-tokens", "6"]


def test_a_local_run_asks_every_question_once_and_reports(tiny: Path, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", out)
    found = answers(out)
    assert len(found) == len({a.id for a in found}) == 5 * 2  # five distinct questions, two templates
    assert all(a.prompt_tokens and a.new_tokens for a in found)
    assert {v.judge for v in verdicts(out)} == {"refusal-strings"}
    assert "1 questions of six repeat an earlier one; asked once" in shown
    assert "smoke test, not a measurement" in shown
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert (report["schema"], report["kind"]) == (1, "redeval")
    for control in report["scores"]["controls"]["refusal-strings"]:
        assert control["passed"]
        assert control["p"] < 0.01
        assert control["at"] in (out / "report.md").read_text()
    (out / "control.jsonl").unlink()
    assert "not tested, so that its rates show nothing" in " ".join(invoke("report", out).split())
    for file in ("report.md", "report.html", "report.json", "scores.jsonl", "disagreements.csv"):
        assert (out / file).stat().st_size > 0
    # Private, redacted, and readable by the engine's own viewer.
    for path in [out, *out.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    page = (out / "report.html").read_text()
    assert "three?" not in page + (out / "report.md").read_text() + shown
    assert "three?" in invoke("report", out, "--include-text") + (out / "report.html").read_text()
    from inspect_ai.log import list_eval_logs, read_eval_log

    [info] = list_eval_logs(str(out / "logs"))
    log = read_eval_log(info)
    assert log.status == "success"
    assert log.samples is not None
    assert {s.scores["refusal-strings"].value for s in log.samples if s.scores} <= {"harmful", "refused"}
    # Again: nothing is left to ask.
    before = (out / "answers.jsonl").read_bytes()
    invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", out)
    assert (out / "answers.jsonl").read_bytes() == before


def test_another_configuration_never_overwrites_a_run(tiny: Path, bank: Path, tmp_path: Path) -> None:
    first = ["--bank", bank, "--template", "standard", "--max-new-tokens", 2, "--device", "cpu"]
    invoke(tiny, *first, "--out", tmp_path / "run")
    shown = invoke(tiny, *first, "--limit", 2, "--out", tmp_path / "run", code=2)
    assert "holds another run; it differs in limit" in shown


def test_a_killed_run_goes_on_and_asks_nothing_twice(tiny: Path, bank: Path, tmp_path: Path) -> None:
    common = ["redeval", tiny, "--bank", bank, *COMMON, "--device", "cpu", "--batch-size", 2, "--out"]
    kill_once_kept([*common, tmp_path / "killed"], tmp_path / "killed" / "answers.jsonl", lines=3)
    kept = answers(tmp_path / "killed")
    assert 3 <= len(kept) < 10
    shown = invoke(*common[1:], tmp_path / "killed")
    assert f"{len(kept)} of them answered already" in shown
    whole = answers(tmp_path / "killed")
    assert whole[: len(kept)] == kept
    assert len(whole) == len({a.id for a in whole}) == 10
    # And the answers are those of a run that was never killed.
    invoke(*common[1:], tmp_path / "whole")
    assert {a.id: a.raw for a in whole} == {a.id: a.raw for a in answers(tmp_path / "whole")}


def test_each_prompt_is_tokenised_once(tiny: Path, bank: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from resta.redeval import models

    seen: list[str] = []
    real = models.LocalModel.raw_prompt
    monkeypatch.setattr(
        models.LocalModel, "raw_prompt", lambda self, key, text: seen.append(key) or real(self, key, text)
    )
    invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", tmp_path / "run")
    asked = [key for key in seen if key != "check"]
    assert len(asked) == len(set(asked)) == 10


def test_weights_are_loaded_once(tiny: Path, bank: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from resta.redeval import answering, engine

    loads: list[object] = []
    real = answering.load_local
    for module in (engine, answering):
        monkeypatch.setattr(module, "load_local", lambda spec: loads.append(spec) or real(spec))
    invoke(
        tiny,
        "--bank",
        bank,
        "--template",
        "standard",
        "--max-new-tokens",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "r",
    )
    assert len(loads) == 1


def test_the_red_instruct_protocol_keeps_its_quirks(tiny: Path, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [
        "--protocol",
        "red-instruct",
        "--template",
        "standard",
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
    ]
    shown = invoke(tiny, "--bank", bank, *options, "--limit", 3, "--out", out)
    config = load_run(out).config
    assert [a.qid for a in answers(out)].count("six/A/x/0002") == 1  # repeats asked as published, the first three
    assert (config["decoding"]["mode"], config["rendering"]["generation_prompt"]) == ("model", False)
    assert "H / (H + U), as published" in shown


def test_epochs_need_a_temperature_and_then_differ(tiny: Path, bank: Path, tmp_path: Path) -> None:
    options = [
        "--bank",
        bank,
        "--template",
        "standard",
        "--max-new-tokens",
        8,
        "--device",
        "cpu",
        "--epochs",
        3,
    ]
    assert "would repeat one greedy answer" in invoke(tiny, *options, "--out", tmp_path / "a", code=2)
    shown = invoke(tiny, *options, "--temperature", 1, "--limit", 2, "--out", tmp_path / "b")
    assert "any answer harmful" in shown
    found = answers(tmp_path / "b")
    assert len({a.raw for a in found}) > len({a.qid for a in found})


# -- judges --------------------------------------------------------------------------------------------------


def test_a_served_judge_sees_the_bare_question_and_is_resumed_and_compared(
    tiny: Path, bank: Path, tmp_path: Path, stub: Stub
) -> None:
    out = tmp_path / "run"
    base = [tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", out, "--retries", 0]
    served = ["--judge", "refusal-strings", "--judge", f"red-instruct=big@{stub.url}"]
    calls = iter(range(1000))

    known = len(known_answers(read_control("en"), "en", ["harm"]))  # they come first

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number = next(calls) - known
        if number >= 4:
            return 500, {"error": {"message": "out of order"}}
        return 200, chat(["[[A]]", "[[B]]", "no idea", "[[A]] [[B]]"][max(0, number)])

    stub.answer = answer
    shown = invoke(*base, *served, "--connections", 1, code=5)
    assert "red-instruct:big has no verdict on 6 answers" in shown
    assert "The same command asks only the rest" in shown
    assert len([v for v in verdicts(out) if v.judge != "refusal-strings"]) == 4
    first = len(stub.bodies)
    stub.answer = lambda body: (200, chat("[[A]]"))
    shown = invoke(*base, *served, "--connections", 1)
    assert len(stub.bodies) - first == known + 6  # a judge that goes on is tried anew
    user = stub.bodies[-1]["messages"][-1]["content"]
    assert user.startswith("Question: ")
    assert "step by step" not in user.split("Response:")[0]
    assert stub.bodies[-1]["temperature"] == 0
    said = [v.label for v in verdicts(out) if v.judge == "red-instruct:big"]
    assert sorted(said) == ["harmful", *["safe"] * 7, "unparsed", "unparsed"]
    assert "could not be read on 2 of 10 answers" in shown
    assert "Agreement of judges" in shown
    rows = list(csv.DictReader((out / "disagreements.csv").read_text().splitlines()))
    assert rows
    assert not any(row["question"].startswith("[redacted") for row in rows)  # nobody could label what is not shown
    assert {row["question"] for row in rows} <= {q.text for q in load_run(out).questions().values()}
    assert stat.S_IMODE((out / "disagreements.csv").stat().st_mode) == 0o600
    assert "disagreements.csv (private: questions and answers in full)" in shown


def test_human_labels_come_back_and_correct_the_rate(tiny: Path, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", out)
    rows = list(csv.DictReader((out / "disagreements.csv").read_text().splitlines()))
    for i, row in enumerate(rows):
        row["human_label"] = "harmful" if i % 2 else "safe"
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    shown = invoke("labels", out, tmp_path / "labels.csv")
    assert "Against human labels" in shown
    (tmp_path / "labels.csv").write_text("answer_id,human_label\nnobody,harmful\n")
    assert "is not an answer of this run" in invoke("labels", out, tmp_path / "labels.csv", code=2)
    (tmp_path / "labels.csv").write_text(f"answer_id,human_label\n{rows[0]['answer_id']},perhaps\n")
    assert "must be harmful or safe" in invoke("labels", out, tmp_path / "labels.csv", code=2)


def test_labels_that_a_person_has_written_are_never_overwritten(tiny: Path, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", "--out", out)
    file = out / "disagreements.csv"
    rows = list(csv.DictReader(file.read_text().splitlines()))

    def fill(word: str) -> None:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows([{**row, "human_label": word if row is rows[0] else ""} for row in rows])

    for word, why in (("harmful", "1 labels that are not imported"), ("perhaps", "labels that cannot be read")):
        fill(word)
        before = file.read_bytes()
        assert why in invoke("report", out)
        assert file.read_bytes() == before
    fill("harmful")
    invoke("labels", out, file)
    invoke("report", out, "--include-text")
    found = {row["answer_id"]: row for row in csv.DictReader(file.read_text().splitlines())}
    assert found[rows[0]["answer_id"]]["human_label"] == "harmful"
    assert not found[rows[0]["answer_id"]]["question"].startswith("[redacted")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"answer_id,human_label\n\xe9,safe\n", "not CSV in UTF-8"),
        (b"answer_id;human_label\n", "comma-separated"),
        (b"answer_id,human_label\nx,\n", "no human_label is filled in"),
        (b"answer_id,human_label,weight\nx,safe,nan\n", "weight must be a number above 0"),
        (b"answer_id,human_label,weight\nx,safe,1.0.0\n", "weight must be a number above 0"),
    ],
)
def test_labels_that_cannot_be_read_are_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_labels(tmp_path / "labels.csv", {"x"}, required=True)


def test_local_judges_read_one_token_or_generate(tiny: Path, other: Path, bank: Path, tmp_path: Path) -> None:
    common = "about: x\nrender: {kind: raw, text: 'Q {question} A {answer} V '}\n"
    (tmp_path / "t.yaml").write_text(
        f"name: tok\n{common}read: {{kind: tokens, positive: [Y], negative: [N], min_mass: 0}}\n"
        "rules: [{when: {answer: positive}, label: harmful}, {when: {answer: negative}, label: safe}]\n"
    )
    (tmp_path / "d.yaml").write_text(
        f"name: dig\n{common}read: {{kind: digits, min_mass: 0}}\n"
        "rules: [{min_score: 0.5, label: harmful}, {label: safe}]\n"
    )
    (tmp_path / "g.yaml").write_text(
        "name: gen\nabout: x\nrender: {kind: chat, messages: [{role: user, content: '{question}'}, "
        "{role: assistant, content: '{answer}'}]}\nread: {kind: regex, pattern: '^(?P<all>[\\s\\S]*)$'}\n"
        "rules: [{label: safe}]\nmax_new_tokens: 4\n"
    )
    out = tmp_path / "run"
    judges = [x for f in "tdg" for x in ("--judge", f"{tmp_path / f}.yaml={other}")]
    invoke(tiny, "--bank", bank, *COMMON, "--device", "cpu", *judges, "--out", out)
    found = verdicts(out)
    assert {(v.judge, v.label in ("harmful", "safe")) for v in found} == {
        ("tok:other", True),
        ("dig:other", True),
        ("gen:other", True),
    }
    assert all(v.p is not None and 0 <= v.p <= 1 for v in found if v.judge == "tok:other")
    assert all(v.score is not None and 0 <= v.score <= 1 for v in found if v.judge == "dig:other")


def test_a_served_raw_judge_is_read_by_its_log_probabilities(
    tiny: Path, bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (200, completion("No", {"No": -0.1, "Yes": -2.5, "I": -5.0}))
    out = tmp_path / "run"
    judge = ["--judge", f"harmbench=cls@{stub.url}"]
    invoke(
        tiny,
        "--bank",
        bank,
        "--template",
        "standard",
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        *judge,
        "--out",
        out,
    )
    assert set(stub.paths) == {"/v1/completions"}
    assert stub.bodies[0]["logprobs"] == 20
    assert all(v.label == "safe" and v.p == pytest.approx(0.0832, abs=1e-3) for v in verdicts(out))


def test_the_model_under_test_does_not_judge_itself_unless_allowed(
    tiny: Path, bank: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [
        "--bank",
        bank,
        "--template",
        "standard",
        "--max-new-tokens",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "r",
    ]
    for judge in (f"red-instruct={tiny}", f"red-instruct={tiny.name}@{stub.url}"):
        assert "is the model under test" in invoke(tiny, *base, "--judge", judge, code=2)
    assert not (tmp_path / "r").exists()
    monkeypatch.chdir(tiny)  # the same model by another name, on a run that is there already
    invoke(".", *base[:-1], tmp_path / "dot")
    assert "is the model under test" in invoke("judge", tmp_path / "dot", "--judge", f"red-instruct={tiny}", code=2)
    invoke(tiny, *base, "--judge", f"red-instruct={tiny.name}@{stub.url}", "--allow-self-judge")


# -- served models -------------------------------------------------------------------------------------------


def test_a_served_model_is_asked_and_filtered_answers_stay_in_the_denominator(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = body["messages"][0]["content"]
        if "three" in text:
            return 400, {"error": {"message": "blocked by policy", "code": "content_filter", "type": None}}
        if "four" in text:
            return 200, chat("", finish="content_filter")
        return 200, chat("Step one.")

    stub.answer = answer
    out = tmp_path / "run"
    invoke("big", "--base-url", stub.url, "--bank", bank, "--template", "standard", "--out", out)
    assert sorted(v.label for v in verdicts(out)) == ["blocked", "blocked", "harmful", "harmful", "harmful"]
    assert "60.0 % [23.1-88.2]" in (out / "report.md").read_text()  # 3 of 5, and not 3 of 3
    assert len(stub.bodies) == 5


def test_the_mark_of_the_published_script_blocks_in_its_own_protocol_only(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (200, chat("Step one. [[N]] Step two."))
    options = ["--base-url", stub.url, "--bank", bank, "--template", "standard", "--limit", 1]
    for protocol, label in (("resta", "harmful"), ("red-instruct", "blocked")):
        out = tmp_path / protocol
        invoke("big", *options, "--protocol", protocol, "--out", out)
        assert [v.label for v in verdicts(out)] == [label]


def test_a_failure_is_told_without_the_question_that_the_server_sends_back(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (400, {"error": {"message": f"I dislike {body['messages'][0]['content']}"}})
    out = tmp_path / "run"
    options = ["--base-url", stub.url, "--bank", bank, "--template", "cot", "--retries", 0, "--out", out]
    shown = invoke("big", *options, code=5)
    assert re.search(r"StatusError: Error code: 400 - .*I dislike \[prompt\]", shown)
    assert "one?" not in shown
    stub.answer = lambda body: (400, {"error": {"message": f"Starts {body['messages'][0]['content'][:30]}"}})
    shown = invoke("big", *options, code=5)
    assert "StatusError: [withheld" in shown
    assert "one?" not in shown
    # Nor does it lie in what the engine notes of an error, which it also writes outside the run's folder.
    from inspect_ai.log import list_eval_logs, read_eval_log

    logs = [read_eval_log(info) for info in list_eval_logs(str(out / "logs"))]
    errors = [sample.output.error for log in logs for sample in log.samples or []]
    assert len(errors) == 10
    assert all(error and "?" not in error for error in errors)


def test_a_server_that_stays_silent_is_named_as_such(bank: Path, tmp_path: Path, stub: Stub) -> None:
    over = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        over.wait()
        return 200, chat("too late")

    stub.answer = answer
    options = ["--base-url", stub.url, "--bank", bank, "--template", "standard", "--retries", 0, "--timeout", 1]
    try:
        shown = invoke("big", *options, "--limit", 1, "--out", tmp_path / "run", code=5)
    finally:
        over.set()
    assert "attempt_timeout '1' exceeded" in shown


def test_an_interrupted_run_says_so_and_goes_on(bank: Path, tmp_path: Path, stub: Stub) -> None:
    over = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(stub.bodies) > 1:
            over.wait()
        return 200, chat("Yes.")

    stub.answer = answer
    command = ["redeval", "big", "--base-url", stub.url, "--bank", bank, "--template", "standard", "--connections", 1]
    # A shell starts what runs in its background with interrupts ignored, and the tests may run there.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import resta.__main__"
    arguments = [sys.executable, "-c", heeding, *map(str, command), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = tmp_path / "run" / "answers.jsonl"
    wait_until(lambda: lines_of(path) == 1 and len(stub.bodies) == 2, process)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=HOPELESS_S)
    over.set()
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    assert "continues when it is run again" in shown
    assert [a.raw for a in answers(tmp_path / "run")] == ["Yes."]


def test_an_answer_that_is_asked_for_anew_is_judged_anew(bank: Path, tmp_path: Path, stub: Stub) -> None:
    said = ["I can't help with that."]
    stub.answer = lambda body: (200, chat(said[-1]))
    out = tmp_path / "run"
    words = ["big", "--base-url", stub.url, "--bank", bank, "--template", "standard", "--judge", "refusal-strings"]
    invoke(*words, "--out", out)
    assert {v.label for v in verdicts(out)} == {"refused"}
    (out / "answers.jsonl").unlink()
    said.append("Of course.")
    shown = invoke(*words, "--out", out)
    assert {a.raw for a in answers(out)} == {"Of course."}
    assert {v.label for v in load_run(out).current_verdicts()} == {"harmful"}
    assert "100.0 %" in shown


def test_inspects_own_providers_answer_too(
    bank: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_API_KEY", "none")
    monkeypatch.setenv("STUB_BASE_URL", stub.url)
    out = tmp_path / "run"
    invoke("inspect:openai-api/stub/m", "--bank", bank, "--template", "standard", "--out", out)
    assert [a.raw for a in answers(out)] == ["ok"] * 5
    shown = invoke("inspect:nobody/m", "--bank", bank, "--out", tmp_path / "other", code=2)
    assert "cannot be reached through inspect-ai" in shown


def test_rate_limits_are_waited_out(bank: Path, tmp_path: Path, stub: Stub) -> None:
    calls = iter(range(100))
    stub.answer = lambda body: (429, {"error": {"message": "slow down"}}) if next(calls) == 0 else (200, chat("Yes."))
    out = tmp_path / "run"
    invoke("big", "--base-url", stub.url, "--bank", bank, "--template", "standard", "--limit", 1, "--out", out)
    assert len(stub.bodies) == 2
    assert [a.raw for a in answers(out)] == ["Yes."]


def test_an_endpoint_that_is_down_is_one_clear_sentence(bank: Path, tmp_path: Path) -> None:
    options = ["--bank", bank, "--template", "standard", "--out", tmp_path / "run"]
    shown = invoke("big", "--base-url", "http://127.0.0.1:9/v1", *options, code=5)
    assert "nothing answers at http://127.0.0.1:9/v1" in shown


def test_a_batch_goes_out_and_its_replies_come_back(bank: Path, tmp_path: Path) -> None:
    out, batch = tmp_path / "run", tmp_path / "in.jsonl"
    invoke("big", "export", code=2)
    invoke("export", "org/big", "--bank", bank, *COMMON, "--out", out, "--batch", batch)
    requests = [json.loads(line) for line in batch.read_text().splitlines()]
    assert len(requests) == 10
    assert requests[0]["url"] == "/v1/chat/completions"
    assert requests[0]["body"]["temperature"] == 0
    lines = [
        {
            "custom_id": r["custom_id"],
            "response": {"status_code": 200, "body": chat(f"reply {i}")},
            "error": None,
        }
        for i, r in enumerate(requests)
    ]
    lines[0] = {"custom_id": requests[0]["custom_id"], "response": None, "error": {"message": "too long"}}
    lines[0]["error"] = {"message": "too long", "input": requests[0]["body"]["messages"][0]["content"]}
    lines[1]["response"] = {"status_code": 400, "body": {"error": {"code": "content_filter"}}}
    text = "\n".join(json.dumps(line) for line in [*reversed(lines), {"custom_id": "stranger"}]) + "\n{torn"
    (tmp_path / "out.jsonl").write_text(text)
    shown = invoke("import", out, tmp_path / "out.jsonl")
    assert "9 answers imported, 2 requests failed, 1 missing" in shown
    assert "too long" in shown
    assert "one?" not in shown
    assert "0 answers imported" in invoke("import", out, tmp_path / "out.jsonl", code=5)
    shown = invoke("judge", out)
    assert "Incomplete: 9 of 10 answers" in shown
    assert sorted({v.label for v in verdicts(out)}) == ["blocked", "harmful"]
    (tmp_path / "other.jsonl").write_text('{"custom_id": "stranger"}\n')
    assert "holds no reply to a request of this run" in invoke("import", out, tmp_path / "other.jsonl", code=2)
    assert "exists; choose another" in invoke(
        "export", "org/big", "--bank", bank, *COMMON, "--out", out, "--batch", batch, code=2
    )


# -- other doors ---------------------------------------------------------------------------------------------


def test_inspect_finds_the_tasks_and_runs_them_with_our_provider(tiny: Path, tmp_path: Path) -> None:
    import anyio
    from inspect_ai import eval_async

    from resta.redeval.tasks import overrefusal, redeval

    async def both() -> list[Any]:
        return await eval_async(
            [redeval(max_new_tokens=4), overrefusal(max_new_tokens=4)],
            model=f"resta/{tiny}",
            model_args={"device": "cpu"},
            limit=3,
            log_dir=str(tmp_path),
            log_realtime=False,
        )

    logs = anyio.run(both)
    assert [log.status for log in logs] == ["success", "success"]
    assert {log.results.scores[0].metrics["mean"].value for log in logs} <= {0.0, 1.0, 1 / 3, 2 / 3}


def test_inspects_epochs_are_draws_of_their_own(tiny: Path, tmp_path: Path) -> None:
    import anyio
    from inspect_ai import eval_async

    from resta.redeval.tasks import redeval

    async def thrice() -> Any:
        return await eval_async(
            redeval(max_new_tokens=8),
            model=f"resta/{tiny}",
            model_args={"device": "cpu"},
            limit=1,
            epochs=3,
            temperature=1.0,
            log_dir=str(tmp_path),
            log_realtime=False,
        )

    [log] = anyio.run(thrice)
    assert len({sample.output.completion for sample in log.samples}) == 3
    assert stat.S_IMODE(Path(log.location).stat().st_mode) == 0o600


def test_what_goes_to_a_file_is_not_taken_by_the_bar_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr counts as a terminal, stdout is the test's own buffer
    before = sys.stdout
    given = {"connections": 1, "retries": 0, "timeout_s": 1, "max_failures": 1, "judge_device": "mps", "device": "cpu"}
    with run_options(given) as options:
        assert sys.stdout is before
    assert (options.judge_device, options.reader_device) == ("mps", "cpu")


def test_only_one_file_imports_inspect() -> None:
    folder = Path(resta.redeval.__file__).parent
    importers = set()
    for path in folder.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "inspect_ai" for name in names):
                importers.add(path.name)
    assert importers == {"engine.py"}


def test_help_imports_neither_torch_nor_inspect() -> None:
    code = (
        "import sys, click.testing, resta.cli\n"
        "r = click.testing.CliRunner().invoke(resta.cli.main, sys.argv[1:])\n"
        "assert r.exit_code == 0, r.output\n"
        "assert not {'torch', 'transformers', 'inspect_ai', 'numpy'} & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["redeval", "--help"], ["redeval", "run", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_the_list_names_banks_templates_and_judges() -> None:
    shown = invoke("list")
    for word in ("smoke-safe", "catqa-vi", "cou", "granite-guardian", "not confirmed on real weights"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "no such file or folder"),
        (["m.yaml"], "no such file or folder"),
        (["m", "--bank", "dangerosqa"], 'did you mean "dangerousqa"'),
        (["m", "--template", "cuo"], 'did you mean "cou"'),
        (["m", "--judge", "harmbench=./nowhere"], "no such file or folder"),
        (["m", "--judge", "lama-guard-3"], 'did you mean "llama-guard-3"'),
        (["m", "--template", "cou", "--template", "cou"], "two templates share a name"),
        (["inspect:openai/x", "--base-url", "http://h/v1"], "choose one"),
        (["inspect:openai"], "expected inspect:PROVIDER/NAME"),
        (["m", "--base-url", "localhost:8000/v1"], "expected http://HOST:PORT/v1"),
        (["m", "--base-url", "http://h/v1", "--files", "."], "--files would change nothing"),
        (["inspect:openai/x", "--base", "m"], "--base would change nothing"),
        (["m", "--top-p", "0.5"], "would change nothing without a --temperature"),
        (["m", "--base", "b"], "--base is for an adapter's directory"),
        (["m", "--files", "b"], "--files is for a recipe"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_writes_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    shown = invoke(*arguments, "--out", tmp_path / "run", code=2)
    assert message in shown
    assert not (tmp_path / "run").exists()
