"""What servers do besides answering: nothing of it may block a run, count as safe, or pass for an answer."""

from __future__ import annotations

import contextlib
import json
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.journal import read_rows
from resta.redeval import engine
from resta.redeval.messages import Decoding, Message, Rendering, Request
from resta.redeval.records import Failure, load_run
from resta.redeval.targets import parse_target
from resta.redeval.wire import GarbledError, is_filter, read_body, request_body, seed_of
from tests.redeval.builders import TEMPLATE, Stub, answers, chat, chat_message, invoke, verdicts

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
    # Those that are missing are asked again, and nothing else but what shows that the judge can still judge.
    before = len(stub.bodies)
    stub.answer = lambda body: (200, chat("[[A]]" if body["model"] == "judge" else "Yes."))
    invoke(*served(stub, bank, out, *judge))
    assert [body["model"] for body in stub.bodies[before:]] == ["big", "big", *["judge"] * (44 + 2)]
    [cell] = json.loads((out / "report.json").read_text())["scores"]["cells"]
    assert cell["counts"] == {"harmful": 1, "safe": 4}


def test_a_dead_server_is_given_up_and_what_failed_is_asked_last(bank: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "run"
    stub.answer = lambda body: (400, {"error": {"message": "no"}}) if asked(body) != "one" else (200, chat("Yes."))
    shown = invoke(*served(stub, bank, out, "--max-failures", 2), code=5)
    assert "gave up after 2 failures in a row, as many as are allowed" in shown
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


# -- what is tried again -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        (200, b'{"choices": [{"message": {"content": "Ye'),
        (200, {"id": "1", "choices": []}),
        (200, b"<html>502 Bad Gateway</html>"),
        (200, {"error": {"message": "upstream failed", "code": 502}}),
        (502, b"<html>bad gateway</html>"),
        (429, {"error": {"message": "slow down"}}),
    ],
)
def test_what_came_in_pieces_is_asked_again(fault: tuple[int, Any], bank: Path, tmp_path: Path, stub: Stub) -> None:
    first = iter([fault])
    stub.answer = lambda body: next(first, None) or (200, chat("Yes."))
    invoke(*served(stub, bank, tmp_path / "run", "--retries", 1, "--limit", 1))
    assert len(stub.bodies) == 2
    assert [a.raw for a in answers(tmp_path / "run")] == ["Yes."]


def test_a_server_that_says_when_to_ask_again_is_asked_then() -> None:
    def pause(error: Exception, tries: int) -> float:
        outcome = SimpleNamespace(exception=lambda: error)
        return engine._pause(SimpleNamespace(outcome=outcome, attempt_number=tries))

    def status(header: str | None) -> Exception:
        return engine.StatusError(429, "slow down", engine._seconds(header))

    assert [pause(status(header), 3) for header in ("7", "0", "-1", "9000")] == [7, 0, 0, 60]
    for error in (status(None), status("Wed, 21 Oct 2026 07:28:00 GMT"), OSError()):
        assert 12 <= pause(error, 3) <= 15


def test_what_is_asked_without_a_folder_for_logs_is_in_no_log(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(log_dir: Path | None) -> tuple[list[str], list[str]]:
        logs: list[Path] = []
        held: list[str] = []

        def look(folder: Path) -> None:
            logs.extend(folder.rglob("*.eval"))
            for log in logs:
                with zipfile.ZipFile(log) as whole:
                    held.extend(whole.read(name).decode() for name in whole.namelist())

        monkeypatch.setattr(engine, "_make_private", look)
        decoding = Decoding(max_new_tokens=8)
        handle = engine.open_model(parse_target("big", stub.url), decoding, Rendering())
        request = Request(id="a", messages=(Message(role="user", content="WHAT IS ASKED"),))
        said: list[str] = []
        engine.ask_all(handle, [request], lambda o: said.append(o.text), log_dir=log_dir, title="t")  # type: ignore
        assert said == ["WHAT IS SAID"]
        assert logs
        return [text for text in held if "WHAT IS" in text], [str(log) for log in logs if log.exists()]

    stub.answer = lambda body: (200, chat("WHAT IS SAID"))
    with tempfile.TemporaryDirectory() as folder:
        assert all(asked(Path(folder)))
    assert asked(None) == ([], [])


def test_what_never_comes_whole_is_unanswered(bank: Path, tmp_path: Path, stub: Stub) -> None:
    stub.answer = lambda body: (200, {"id": "1", "choices": []})
    shown = invoke(*served(stub, bank, tmp_path / "run", "--limit", 1), code=5)
    assert "1 of 1 questions have no answer and count as unanswered" in shown
    assert "not a completion but {choices, id} (ValueError: no choices)" in shown


def test_a_model_that_counts_its_limit_otherwise_is_asked_in_its_own_words(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    wrong = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    stub.answer = lambda body: (
        (400, {"error": {"message": wrong, "code": "unsupported_parameter"}})
        if "max_tokens" in body
        else (200, chat("Yes."))
    )
    invoke(*served(stub, bank, tmp_path / "run", "--max-new-tokens", 9))
    assert Counter(body.get("max_completion_tokens") for body in stub.bodies) == {None: 1, 9: 5}


# -- filters -------------------------------------------------------------------------------------------------

FILTERED: list[dict[str, Any]] = [
    {"message": "Content Exists Risk", "type": "invalid_request_error", "code": "invalid_request_error"},
    {"message": "<400> InternalError.Algo.DataInspectionFailed: Input text data may contain inappropriate content."},
    {"message": "no", "code": "data_inspection_failed"},
    {"message": "The request was rejected because it was considered high risk", "type": "content_filter"},
    {"message": "no", "code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
    {"message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "code": "x"},
    {"message": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO", "code": "denied"},
]
NOT_FILTERED: list[dict[str, Any]] = [
    {"message": "maximum context length is 4096 tokens", "code": "context_length_exceeded"},
    {"message": "your IP address is blocked", "type": "invalid_request_error"},
    {"message": "rate limit policy: 3 requests a minute"},
    {"message": "model not found"},
]


@pytest.mark.parametrize("error", FILTERED)
def test_every_providers_filter_is_blocked_served_and_in_a_file(
    error: dict[str, Any], bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (400, {"error": error})
    out = tmp_path / "run"
    invoke(*served(stub, bank, out, "--limit", 1))
    [answer] = answers(out)
    assert (answer.finish, answer.raw, answer.text) == ("content_filter", "", "")
    assert [v.label for v in verdicts(out)] == ["blocked"]
    batch, options = tmp_path / "batch", ["--bank", bank, "--template", "standard", "--limit", 1]
    invoke("export", "big", *options, "--out", batch, "--batch", out / "b")
    [request] = [json.loads(line) for line in (out / "b").read_text().splitlines()]
    line = {"custom_id": request["custom_id"], "response": {"status_code": 400, "body": {"error": error}}}
    (out / "c").write_text(json.dumps(line))
    invoke("import", batch, out / "c")
    assert [(a.finish, a.raw) for a in answers(batch)] == [("content_filter", "")]


@pytest.mark.parametrize("error", NOT_FILTERED)
def test_other_refusals_are_no_filter_not_even_where_they_repeat_a_question_about_one(error: dict[str, Any]) -> None:
    assert not is_filter(error, ())
    question = "How does a content filter decide that our usage policy is violated?"
    assert not is_filter({**error, "input": question}, [question])
    assert is_filter({**error, "input": question}, ["another question"])


def test_a_filters_words_are_nobodys_answer_and_what_was_said_before_it_is_kept(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    stub.answer = lambda body: (200, chat("Step one", finish="content_filter"))
    invoke(*served(stub, bank, tmp_path / "run", "--limit", 1))
    assert [(a.raw, a.finish) for a in answers(tmp_path / "run")] == [("Step one", "content_filter")]
    assert [v.label for v in verdicts(tmp_path / "run")] == ["blocked"]


# -- what a body says ----------------------------------------------------------------------------------------

ASK = Request(id="six/A/x/0000|standard|0", messages=(Message(role="user", content="one?"),))
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "text", "error"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_whatever_a_server_sends_is_a_reply_or_garbled(body: Any) -> None:
    with contextlib.suppress(GarbledError):
        assert isinstance(read_body(ASK, body).text, str)


def test_a_refusal_in_its_own_field_is_the_answer() -> None:
    reply = read_body(ASK, chat_message({"content": None, "refusal": "I can't help with that."}))
    assert (reply.text, reply.finish) == ("I can't help with that.", "stop")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Yes.", "reasoning_content": "Hm."},
        {"content": "Yes.", "reasoning": "Hm."},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "Yes."},
            ]
        },
    ],
)
def test_a_thought_apart_from_the_answer_is_read(message: dict[str, Any]) -> None:
    reply = read_body(ASK, chat_message(message))
    assert (reply.thought, reply.text) == ("Hm.", "Yes.")


# -- seeds ---------------------------------------------------------------------------------------------------


def test_each_epoch_of_a_served_model_and_of_a_batch_has_a_seed_of_its_own(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    out, batch = tmp_path / "run", tmp_path / "in.jsonl"
    options = ["--bank", bank, "--template", "standard", "--temperature", 0.7, "--epochs", 3]
    invoke("big", "--base-url", stub.url, *options, "--out", out)
    seeds = [body["seed"] for body in stub.bodies]
    assert len(set(seeds)) == len(seeds) == 15
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sorted(seeds) == sorted(a.seed for a in answers(out) if a.seed is not None)
    invoke("export", "big", *options, "--out", tmp_path / "batch", "--batch", batch)
    in_file = [json.loads(line)["body"] for line in batch.read_text().splitlines()]
    assert sorted(body["seed"] for body in in_file) == sorted(seeds)
    # And what is asked is the same, now or in a file.
    by_seed = {body["seed"]: body for body in stub.bodies}
    assert all(body == by_seed[body["seed"]] for body in in_file)


@given(st.integers(), st.text())
def test_a_seed_is_kept_in_range_and_keyed_by_run_and_ask(seed: int, ask_id: str) -> None:
    assert 0 <= seed_of(seed, ask_id) < 2**31
    assert seed_of(seed, ask_id) == seed_of(seed, ask_id)
    assert seed_of(seed, ask_id) != seed_of(seed + 1, ask_id)
    assert seed_of(seed, ask_id) != seed_of(seed, f"{ask_id}0")


def test_greedy_requests_have_no_seed() -> None:
    assert "seed" not in request_body(ASK, "big", Decoding(max_new_tokens=1), {})


# -- models that think ---------------------------------------------------------------------------------------


def test_thoughts_that_a_server_takes_out_are_counted_kept_and_never_judged_where_cut_off(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if asked(body) == "one":
            return 200, chat_message({"content": None, "reasoning_content": "Step one would be"}, finish="length")
        return 200, chat_message({"content": "I'm sorry, no.", "reasoning_content": "They want harm."})

    stub.answer = answer
    out = tmp_path / "run"
    shown = invoke(*served(stub, bank, out))
    found = {a.qid: a for a in answers(out)}
    cut = found.pop("six/A/x/0000")
    assert cut.raw == "<think>\nStep one would be"
    assert "cut_thought" in cut.flags
    assert {a.text for a in found.values()} == {"I'm sorry, no."}
    assert Counter(v.label for v in verdicts(out)) == {"refused": 4, "unanswered": 1}
    report = json.loads((out / "report.json").read_text())["scores"]
    assert report["cells"][0]["counts"] == {"refused": 4, "unanswered": 1}
    assert (report["conduct"][0]["thoughts"], report["conduct"][0]["cut_thoughts"]) == (5, 1)
    assert "1 of 5 answers to six x standard ended in mid-thought" in " ".join(shown.split())
    kept = tmp_path / "kept"
    invoke(*served(stub, bank, kept, "--keep-thoughts"))
    assert all(a.text == a.raw and a.text.startswith("<think>") for a in answers(kept))


def test_a_thought_that_the_template_opens_and_the_limit_cuts_is_unanswered(
    tiny: Path, bank: Path, tmp_path: Path
) -> None:
    (tmp_path / "thinks.jinja").write_text(TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>\n{%"))
    assert "<think>" in (tmp_path / "thinks.jinja").read_text()
    options = ["--bank", bank, "--template", "standard", "--max-new-tokens", 4, "--device", "cpu"]
    out = tmp_path / "run"
    invoke(tiny, *options, "--chat-template", tmp_path / "thinks.jinja", "--out", out)
    found = {a.id: a for a in answers(out)}
    assert any(a.finish == "length" for a in found.values())
    for verdict in verdicts(out):
        answer = found[verdict.answer_id]
        assert ("cut_thought" in answer.flags) == (answer.finish == "length")
        assert (verdict.label == "unanswered") == (answer.finish == "length")


def test_a_thought_that_a_servers_template_opens_unseen_and_the_limit_cuts_is_unanswered(
    bank: Path, tmp_path: Path, stub: Stub
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if asked(body) in ("one", "five"):  # among them the first, which is judged before the others are there
            return 200, chat("First I would", finish="length")
        return 200, chat("They want harm.</think>I'm sorry, no.")

    stub.answer = answer
    out = tmp_path / "run"
    shown = invoke(*served(stub, bank, out))
    assert json.loads((out / "report.json").read_text())["scores"]["cells"][0]["counts"] == {
        "refused": 3,
        "unanswered": 2,
    }
    assert "2 of 5 answers to six x standard ended in mid-thought" in " ".join(shown.split())
    before = (out / "verdicts.jsonl").read_bytes()
    invoke(*served(stub, bank, out))
    assert (out / "verdicts.jsonl").read_bytes() == before


def test_a_long_answer_of_a_model_that_does_not_think_is_judged(bank: Path, tmp_path: Path, stub: Stub) -> None:
    stub.answer = lambda body: (200, chat("Step one", finish="length" if asked(body) == "one" else "stop"))
    invoke(*served(stub, bank, tmp_path / "run"))
    assert {v.label for v in verdicts(tmp_path / "run")} == {"harmful"}


def test_local_prompts_that_are_too_long_are_unanswered_and_block_nothing_however_many(
    tiny: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank.json"
    bank.write_text(
        json.dumps(["What is one?", *(f"What is the number {i}? " * 100 for i in range(25)), "What is three?"])
    )
    options = ["--bank", bank, "--template", "standard", "--max-new-tokens", 4, "--device", "cpu"]
    shown = invoke(tiny, *options, "--out", tmp_path / "run", code=5)
    assert "25 of 27 questions have no answer" in shown
    assert "exceed its context of 2048" in shown
    assert len(answers(tmp_path / "run")) == 2
    bank.write_text(json.dumps(["What is the number? " * 200]))
    assert "1 of 1 prompts" in invoke(tiny, *options, "--out", tmp_path / "none", code=2)
    assert not (tmp_path / "none").exists()


def test_arguments_of_the_chat_template_reach_a_local_model_a_server_and_a_file(
    tiny: Path, bank: Path, tmp_path: Path, stub: Stub
) -> None:
    args = ["--template-arg", "enable_thinking=false", "--template-arg", "reasoning_effort=low"]
    common = ["--bank", bank, "--template", "standard", "--limit", 1, "--max-new-tokens", 4, *args]
    wanted = {"enable_thinking": False, "reasoning_effort": "low"}
    invoke("big", "--base-url", stub.url, *common, "--out", tmp_path / "served")
    assert stub.bodies[0]["chat_template_kwargs"] == wanted
    invoke("export", "big", *common, "--out", tmp_path / "batch", "--batch", tmp_path / "in")
    assert json.loads((tmp_path / "in").read_text())["body"]["chat_template_kwargs"] == wanted
    thinks = TEMPLATE.replace("<|assistant|>{%", "<|assistant|>{% if enable_thinking %}<think>{% endif %}{%")
    (tmp_path / "thinks.jinja").write_text(thinks)
    local = [tiny, "--device", "cpu", "--chat-template", tmp_path / "thinks.jinja"]
    for value, cut in (("true", 1), ("false", 0)):
        invoke(*local, *common, "--template-arg", f"enable_thinking={value}", "--out", tmp_path / value)
        assert sum("unclosed_thought" in a.flags for a in answers(tmp_path / value)) == cut
    assert load_run(tmp_path / "true").run_id != load_run(tmp_path / "false").run_id
    assert "expected NAME=VALUE" in invoke("big", "--template-arg", "thinking", code=2)


# -- before anything is paid for -----------------------------------------------------------------------------


def test_a_request_that_cannot_be_carried_out_leaves_nothing_behind(
    tiny: Path, bank: Path, tmp_path: Path, stub: Stub
) -> None:
    from tests.redeval.builders import save_llama, save_tokenizer

    save_llama(tmp_path / "base")
    save_tokenizer(tmp_path / "base", adds_bos=True, chat_template=None)
    (tmp_path / "bad.yaml").write_text("models: {}\n")
    common = ["--bank", bank, "--template", "standard", "--max-new-tokens", 2, "--out", tmp_path / "run"]
    for words, code in (
        ([tiny, "--device", "cuda"], 2),
        ([tmp_path / "base", "--device", "cpu"], 2),
        ([tmp_path / "bad.yaml", "--files", tiny, "--device", "cpu"], 2),
        (["big", "--base-url", "http://127.0.0.1:9/v1"], 5),
        (["inspect:nobody/m"], 2),
        (["export", "big", "--batch", tmp_path / "nowhere" / "in.jsonl"], 2),
        (["export", "big", "--batch", bank], 2),
    ):
        invoke(*words, *common, code=code)
        assert not (tmp_path / "run").exists(), words


@pytest.mark.parametrize(
    ("judge", "code", "message"),
    [
        ("red-instruct=judge@http://127.0.0.1:9/v1", 5, "Start it, or leave it out for now"),
        ("granite-guardian=nobody/has-this", 2, "its tokenizer cannot be loaded"),
        ("harmbench=inspect:openai-api/stub/m", 2, "its prompt is sent as plain text"),
    ],
)
def test_a_judge_that_is_not_there_is_found_before_the_first_answer_is_paid_for(
    judge: str, code: int, message: str, bank: Path, tmp_path: Path, stub: Stub
) -> None:
    out = tmp_path / "run"
    assert message in invoke(*served(stub, bank, out, "--judge", judge), code=code)
    assert stub.bodies == []
    assert not out.exists()
    invoke(*served(stub, bank, out))
    assert message in invoke("judge", out, "--judge", judge, code=code)
    assert len(load_run(out).judges()) == 1


def test_a_judge_whose_work_is_done_need_not_be_there(bank: Path, tmp_path: Path, stub: Stub) -> None:
    stub.answer = lambda body: (200, chat("[[A]]"))
    judge = ["--judge", f"red-instruct=judge@{stub.url}"]
    invoke(*served(stub, bank, tmp_path / "run", *judge))
    gone = ["--judge", "red-instruct=judge@http://127.0.0.1:9/v1"]
    invoke(*served(stub, bank, tmp_path / "run", *gone))


# -- imports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish", [b"\x00\xff\n\x93\n", b"", b"[1, 2]\n", b"[" * 100_000, b'{"custom_id": "stranger"}\n', b"null\n"]
)
def test_a_file_that_is_no_batch_output_is_refused(rubbish: bytes, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke("export", "big", "--bank", bank, "--template", "standard", "--out", out, "--batch", tmp_path / "in")
    (tmp_path / "out").write_bytes(rubbish)
    assert "holds no reply to a request of this run" in invoke("import", out, tmp_path / "out", code=2)


def test_an_import_keeps_refusals_and_thoughts_and_its_exit_code_says_whether_it_brought_anything(
    bank: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    invoke("export", "big", "--bank", bank, "--template", "standard", "--out", out, "--batch", tmp_path / "in")
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "in").read_text().splitlines()]

    def write(*bodies: Any) -> Path:
        lines = [
            {"custom_id": key, "response": {"status_code": 200 if body else 500, "body": body}}
            for key, body in zip(ids, bodies, strict=False)
        ]
        (tmp_path / "out").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / "out"

    assert "0 answers imported, 5 requests failed, 5 missing" in invoke("import", out, write(*[None] * 5), code=5)
    refusal = chat_message({"content": None, "refusal": "I can't help with that."})
    invoke("import", out, write(refusal, chat_message({"content": "Yes.", "reasoning_content": "Hm."})))
    first, second = answers(out)
    assert (first.text, second.text, second.flags) == ("I can't help with that.", "Yes.", ("thought",))
    assert "unanswered" in invoke("report", out)
