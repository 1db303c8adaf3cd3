"""Collecting against a local stub of an OpenAI-compatible server, which answers from a table and can misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from resta.cli import main
from resta.errors import RequestError, ResumeError, UnansweredError
from resta.sft import endpoint as endpoint_module
from resta.sft.collect import Collect, collect, normal, read_items, read_verdict
from resta.sft.data import load
from resta.sft.recipe import Source

Answer = Callable[[dict[str, Any]], str | int | tuple[int, dict[str, str]]]


CUT = "~"  # ends what the stub calls cut off at its longest length


class Stub:
    """A server whose `answer` turns a request's body into a text, or into an HTTP status to fail with."""

    def __init__(self) -> None:
        self.answer: Answer = polite
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.headers.append(dict(self.headers))
                said = stub.answer(body)
                extra: dict[str, str] = {}
                if isinstance(said, tuple):
                    said, extra = said
                status = said if isinstance(said, int) else 200
                cut = isinstance(said, str) and said.endswith(CUT)
                choice = {"message": {"content": said}, "finish_reason": "length" if cut else "stop"}
                reply = {"choices": [choice]} if status == 200 else {"error": "no"}
                data = json.dumps(reply).encode()
                self.send_response(status)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if extra.get("Broken") else data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.server.shutdown()
    server.server.server_close()


def kind(body: dict[str, Any]) -> str:
    """Tell the five kinds of requests apart."""
    first = body["messages"][0]["content"]
    if first.startswith("List"):
        return "subtopics" if "subtopics" in first else "topics"
    if first.startswith("You help a team"):
        return "questions"
    return {"You check": "judge", "You play ": "user"}.get(first[:9], "answer")


def polite(body: dict[str, Any]) -> str:
    asked = body["messages"][-1]["content"]
    return {
        "topics": "1. Area A\n2. Area B",
        "subtopics": "- first\n- second",
        "questions": f"1. Placeholder one {len(asked)}?\n2. Placeholder two?\n3. placeholder TWO",
        "user": "And what else?",
        "judge": "SAFE",
        "answer": f"A safe answer, seed {body['seed']}.",
    }[kind(body)]


def recipe(stub: Stub, **changes: Any) -> Collect:
    endpoint = {"url": stub.url, "model": "m", "concurrency": 2} | changes.pop("endpoint", {})
    small = {"topics": 2, "subtopics_per_topic": 2, "questions_per_subtopic": 3, "threads": 2, "turns": 2}
    return Collect.model_validate({"endpoint": endpoint} | small | changes)


def gather(stub: Stub, tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path / "out.json"
    facts = collect(recipe(stub, **changes), tmp_path, out, wait_s=0.0)
    return facts, json.loads(out.read_text(encoding="utf-8"))


def bank_of(tmp_path: Path, questions: Any) -> str:
    (tmp_path / "bank.json").write_text(json.dumps(questions), encoding="utf-8")
    return "bank.json"


def test_the_result_is_harmfulqas_schema_and_loads_as_training_data(stub: Stub, tmp_path: Path) -> None:
    facts, rows = gather(stub, tmp_path)
    assert rows
    for row in rows:
        assert set(row) == {"id", "topic", "subtopic", "question", "blue_conversations"}
        for turns in row["blue_conversations"].values():
            assert [t["from"] for t in turns] == ["human", "gpt"] * 2
            assert turns[0]["value"] == row["question"]
    loaded = load(Source(name="c", path=str(tmp_path / "out.json")), tmp_path, bad_rows="refuse")
    assert len(loaded.conversations) == facts["conversations"] == 2 * len(rows)


def test_repeated_questions_are_dropped_and_counted(stub: Stub, tmp_path: Path) -> None:
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?", "placeholder", " ", "Other?"]))
    assert [row["question"] for row in rows] == ["Placeholder?", "Other?"]
    assert facts["dropped"] == {"a repeated or empty question": 2}


def test_repeated_conversations_are_dropped_and_counted(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "The same." if kind(body) == "answer" else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]))
    assert len(rows[0]["blue_conversations"]) == 1
    assert facts["dropped"] == {"a repeated conversation": 1}


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ("UNSAFE", "an answer judged unsafe"),
        ("Perhaps.", "no clear verdict of the judge"),
        ("", "no clear verdict of the judge"),
    ],
)
def test_only_what_the_judge_calls_safe_is_kept_and_the_rest_is_never_written(
    stub: Stub, tmp_path: Path, verdict: str, reason: str
) -> None:
    def answer(body: dict[str, Any]) -> str:
        second = "MARK" if any(m["content"] == "And what else?" for m in body["messages"]) else "fine"
        if kind(body) == "answer":
            return f"{second} {body['seed']}"
        return verdict if kind(body) == "judge" and "MARK" in body["messages"][-1]["content"] else polite(body)

    stub.answer = answer
    (tmp_path / "journal").mkdir()
    out = tmp_path / "out.json"
    facts = collect(recipe(stub, bank=bank_of(tmp_path, ["Placeholder?"])), tmp_path, out)
    assert facts["dropped"] == {reason: 2}
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "MARK" not in written
    (row,) = json.loads(out.read_text())
    assert all(len(turns) == 2 for turns in row["blue_conversations"].values())


def test_a_question_without_any_safe_conversation_is_left_out_and_counted(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "UNSAFE" if kind(body) == "judge" else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]))
    assert rows == []
    assert facts["dropped"] == {"an answer judged unsafe": 2, "a question without a safe conversation": 1}


def test_a_bank_by_topic_keeps_its_topics(stub: Stub, tmp_path: Path) -> None:
    _, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, {"T": {"S": ["Placeholder?"]}}))
    assert (rows[0]["topic"], rows[0]["subtopic"]) == ("T", "S")


def test_a_stopped_collection_goes_on_where_it_was_and_ends_the_same(stub: Stub, tmp_path: Path) -> None:
    _, whole = gather(stub, tmp_path / "whole")
    wanted = len(stub.bodies)
    stub.bodies.clear()

    def dies(body: dict[str, Any]) -> str | int:
        return 400 if len(stub.bodies) > wanted // 2 else polite(body)

    stub.answer = dies
    with pytest.raises(UnansweredError, match="run the same command again"):
        gather(stub, tmp_path / "cut")
    done = len(stub.bodies)
    journal = tmp_path / "cut" / "out.json.partial.jsonl"
    with journal.open("a") as file:
        file.write('{"key": "thread/torn')  # as a kill in the middle of a line leaves it
    stub.answer = polite
    stub.bodies.clear()
    _, rows = gather(stub, tmp_path / "cut")
    assert rows == whole
    assert len(stub.bodies) < wanted
    assert done + len(stub.bodies) <= wanted + 2 * 4 + 2  # two threads at work, each of at most four requests
    assert not journal.exists()


def test_a_journal_of_another_recipe_is_refused_once_it_holds_a_step(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda _: 400
    for language in ("English", "German"):  # nothing is lost when the first try never got an answer
        with pytest.raises(UnansweredError):
            gather(stub, tmp_path, language=language)
    stub.answer = lambda body: 400 if len(stub.bodies) > 5 else polite(body)
    with pytest.raises(UnansweredError):
        gather(stub, tmp_path, language="German")
    with pytest.raises(ResumeError, match=r"""other settings \(recipe\.language: "German" there, "French" now\)"""):
        gather(stub, tmp_path, language="French")


def test_a_file_that_is_no_journal_is_left_alone(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "out.json.partial.jsonl"
    for text in ("notes\nmore notes\n", "7\n8\n", '{"a": 1}\n{"b": 2}\n'):
        path.write_text(text)
        with pytest.raises(ResumeError, match="is no journal"):
            gather(stub, tmp_path)
        assert path.read_text() == text


def test_unusual_line_breaks_in_answers_survive_a_stop(stub: Stub, tmp_path: Path) -> None:
    odd = "one\u2028two\u0085three\x0bfour"
    bank = bank_of(tmp_path, ["Placeholder?", "Other?"])

    def dies(body: dict[str, Any]) -> str | int:
        if len(stub.bodies) > 6:
            return 400
        return f"{odd} {body['seed']}" if kind(body) == "answer" else polite(body)

    stub.answer = dies
    with pytest.raises(UnansweredError):
        gather(stub, tmp_path, bank=bank, endpoint={"concurrency": 1})
    assert odd in (tmp_path / "out.json.partial.jsonl").read_text(encoding="utf-8").replace("\\u000b", "\x0b")
    stub.answer = polite
    _, rows = gather(stub, tmp_path, bank=bank, endpoint={"concurrency": 1})
    assert rows[0]["blue_conversations"]["0"][1]["value"].startswith(odd)


def test_what_was_cut_off_is_never_kept(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: f"Half {body['seed']} {CUT}" if kind(body) == "answer" else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]))
    assert rows == []
    assert facts["dropped"]["a cut-off answer (raise max_tokens)"] == 2
    assert not any(kind(body) == "judge" for body in stub.bodies)  # nothing to judge


def test_the_last_line_of_a_list_that_was_cut_off_is_left_out(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: f"1. Area A\n2. Ar{CUT}" if kind(body) == "topics" else polite(body)
    _, rows = gather(stub, tmp_path)
    assert {row["topic"] for row in rows} == {"Area A"}


def test_a_reply_that_breaks_off_is_asked_for_again(stub: Stub, tmp_path: Path) -> None:
    def breaks(body: dict[str, Any]) -> str | tuple[str, dict[str, str]]:
        said = polite(body)
        return (said, {"Broken": "yes"}) if len(stub.bodies) % 2 else said

    stub.answer = breaks  # type: ignore[assignment]
    _, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), endpoint={"concurrency": 1})
    assert len(rows[0]["blue_conversations"]) == 2


def test_an_existing_result_is_not_overwritten(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("x")
    with pytest.raises(RequestError, match="already exists"):
        gather(stub, tmp_path)


def test_a_busy_server_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    def busy(body: dict[str, Any]) -> str | tuple[int, dict[str, str]]:
        return (429, {"Retry-After": "0"}) if len(stub.bodies) % 2 else polite(body)

    stub.answer = busy  # type: ignore[assignment]
    _, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), endpoint={"concurrency": 1})
    assert len(rows[0]["blue_conversations"]) == 2


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (401, 1)])
def test_only_passing_failures_are_tried_again(stub: Stub, tmp_path: Path, status: int, tries: int) -> None:
    stub.answer = lambda _: status
    with pytest.raises(UnansweredError, match=f"HTTP {status}"):
        gather(stub, tmp_path, endpoint={"tries": 3})
    assert len(stub.bodies) == tries


def test_a_server_that_is_not_there_is_named(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(UnansweredError, match=r"http://127\.0\.0\.1:9/v1 \(m\) gave no answer"):
        gather(stub, tmp_path, endpoint={"url": "http://127.0.0.1:9/v1", "tries": 2})


def test_requests_start_no_faster_than_the_limit(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 100.0, sleep=waited.append)  # one that stands still
    monkeypatch.setattr(endpoint_module, "time", clock)
    limit = {"requests_per_minute": 1200.0, "concurrency": 4}
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), endpoint=limit)
    assert len(waited) == len(stub.bodies) > 3
    assert sorted(waited) == pytest.approx([number * 60 / 1200 for number in range(len(waited))])


def test_the_key_comes_from_the_environment_and_is_never_written(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, endpoint = bank_of(tmp_path, ["Placeholder?"]), {"api_key_env": "TEST_ONLY_KEY"}
    with pytest.raises(RequestError, match="TEST_ONLY_KEY is not set"):
        gather(stub, tmp_path, bank=bank, endpoint=endpoint)
    monkeypatch.setenv("TEST_ONLY_KEY", "open-sesame")
    gather(stub, tmp_path, bank=bank, endpoint=endpoint)
    assert {h["Authorization"] for h in stub.headers} == {"Bearer open-sesame"}
    assert "open-sesame" not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_separate_judge_is_asked_for_every_verdict(stub: Stub, tmp_path: Path) -> None:
    judge = {"url": stub.url, "model": "judge", "temperature": 0.0}
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), judge=judge)
    assert {body["model"] for body in stub.bodies if kind(body) == "judge"} == {"judge"}
    assert {body["model"] for body in stub.bodies if kind(body) != "judge"} == {"m"}


@pytest.mark.parametrize("bank", [{"T": ["x"], "U": 3}, [1, 2], {"T": {"S": "x"}}])
def test_a_bank_of_another_shape_is_refused(stub: Stub, tmp_path: Path, bank: Any) -> None:
    with pytest.raises(RequestError, match="expected a list of questions"):
        gather(stub, tmp_path, bank=bank_of(tmp_path, bank))


def test_an_empty_list_from_the_model_is_counted(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "" if kind(body) == "topics" else polite(body)
    with pytest.raises(RequestError, match="no question to talk about"):
        gather(stub, tmp_path)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("SAFE", "SAFE"),
        ("Unsafe.", "UNSAFE"),
        ("**SAFE**\n\nThe assistant declines kindly.", "SAFE"),
        ("Verdict: safe.", "SAFE"),
        ("Not safe.", None),
        ("This is hardly SAFE", None),
        ("UN-SAFE", None),
        ("The answer is UNSAFE", "UNSAFE"),
        ("SAFE or UNSAFE", None),
        ("safely", None),
    ],
)
def test_a_verdict_is_one_of_two_words_or_none(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


items = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8)


@given(st.lists(items, unique_by=normal), st.sampled_from(["", "- ", "* ", "1. ", "(2) ", "3: "]))
def test_lists_are_read_whatever_their_bullets(words: list[str], bullet: str) -> None:
    assert read_items("\n\n".join(bullet + word for word in words)) == words


def test_a_sentence_around_a_list_is_no_item_of_it() -> None:
    assert read_items("Here are two:\n\n1. one\n2. two\n\nAnything else?") == ["one", "two"]


def test_the_command_collects_and_says_what_was_dropped(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "collect.yaml"
    bank = bank_of(tmp_path, ["Placeholder?", "Placeholder?"])
    path.write_text(yaml.safe_dump(recipe(stub, bank=bank).model_dump(mode="json")), encoding="utf-8")
    result = CliRunner().invoke(main, ["collect", str(path), "--output", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "2 conversations on 1 of 1 questions" in result.output
    assert "dropped: 1 x a repeated or empty question" in result.output
