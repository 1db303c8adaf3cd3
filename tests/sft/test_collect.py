"""Collecting against a local stub of an OpenAI-compatible server, which answers from a table and can misbehave."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from resta.cli import main
from resta.errors import RequestError, RestaError, ResumeError, UnansweredError
from resta.journal import Journal, read_rows
from resta.redeval import records
from resta.redeval.control import known_answers, read_control, record_of
from resta.redeval.judges import Raw, built_in, read_judge
from resta.redeval.progress import RunOptions
from resta.sft.collect import Collect, collect, judge_of, normal, read_items
from resta.sft.data import load
from resta.sft.recipe import Source
from tests.redeval.builders import save_refusing

pytest.importorskip("inspect_ai")

Answer = Callable[[dict[str, Any]], str | int | tuple[int, dict[str, str]]]


CUT = "~"  # ends what the stub calls cut off at its longest length


class Stub:
    """A server whose `answer` turns a request's body into a text, or into an HTTP status to fail with."""

    def __init__(self) -> None:
        self.answer: Answer = polite
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []  # as they were sent
        self.paths: list[str] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.paths.append(self.path)
                stub.keys.append(self.headers["Authorization"])
                said = stub.answer(body)
                extra: dict[str, str] = {}
                if isinstance(said, tuple):
                    said, extra = said
                status = said if isinstance(said, int) else 200
                cut = isinstance(said, str) and said.endswith(CUT)
                choice = {"message": {"content": said}, "text": said, "finish_reason": "length" if cut else "stop"}
                reply = {"choices": [choice]} if status == 200 else {"error": "no"}
                data = json.dumps(reply).encode()
                self.send_response(status)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

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
    if "judge" in body["model"]:
        return "judge"
    first = body["messages"][0]["content"]
    if first.startswith("List"):
        return "subtopics" if "subtopics" in first else "topics"
    if first.startswith("You help a team"):
        return "questions"
    return {"You check": "judge", "You play ": "user"}.get(first[:9], "answer")


def shown(body: dict[str, Any]) -> str:
    """Return what a judge is shown, chat or not."""
    return str(body["prompt"]) if "prompt" in body else "\n".join(m["content"] for m in body["messages"])


def verdicts(stub: Stub) -> list[str]:
    """Return what the judge was shown each time."""
    return [shown(body) for body in stub.bodies if kind(body) == "judge"]


def polite(body: dict[str, Any]) -> str:
    asked = shown(body)
    return {
        "topics": "1. Area A\n2. Area B",
        "subtopics": "- first\n- second",
        "questions": f"1. Placeholder one {len(asked)}?\n2. Placeholder two?\n3. placeholder TWO",
        "user": "And what else?",
        "judge": "SAFE",
        "answer": f"A safe answer, seed {body.get('seed')}.",
    }[kind(body)]


def recipe(stub: Stub, **changes: Any) -> Collect:
    endpoint = {"url": stub.url, "model": "m", "concurrency": 2} | changes.pop("endpoint", {})
    small = {"topics": 2, "subtopics_per_topic": 1, "questions_per_subtopic": 3, "threads": 2, "turns": 1}
    return Collect.model_validate({"endpoint": endpoint} | small | changes)


def gather(
    stub: Stub, tmp_path: Path, root: Path | None = None, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Collect with a judge that has told known answers apart in this sitting, so that it is not asked about them."""
    asked, root, out = recipe(stub, **changes), root or tmp_path, tmp_path / "out.json"
    vouch_for_judge(asked, root, out)
    facts = collect(asked, root, out, SITTING)
    return facts, json.loads(out.read_text(encoding="utf-8"))


SITTING = RunOptions()


def vouch_for_judge(asked: Collect, root: Path, out: Path) -> None:
    """Leave what a judge that knows harm says of the known answers, as a collection in this sitting leaves it."""
    judge, path = judge_of(asked, root), control_of(out)
    if any(row.judge_sha256 == judge.sha256 for row in read_rows(path, records.Tested)):
        return
    out.parent.mkdir(exist_ok=True)
    with Journal(path) as journal:
        for each in known_answers(read_control("en"), "en", judge.spec.measures):
            label = "harmful" if each.kind == "compliance" else "safe"
            verdict = records.Judgement(
                answer_id=each.answer.id, judge=judge.id, judge_sha256=judge.sha256, label=label
            )
            journal.append(record_of(each, verdict, SITTING.sitting))


def control_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.control.jsonl")


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.jsonl")


@functools.cache
def known_texts(language: str) -> dict[str, str]:
    """Return the known answers in a language, by what they are examples of."""
    return {each.answer.text: each.kind for each in known_answers(read_control(language), language, ["harm"])}


def is_known(body: dict[str, Any], kinds: set[str], language: str = "en") -> bool:
    """Whether a judge is asked about a known answer of such a kind."""
    texts = known_texts(language).items()
    return kind(body) == "judge" and any(each in kinds and text in shown(body) for text, each in texts)


def knowing(body: dict[str, Any]) -> str:
    """Answer as the polite server, whose judge knows harm when it sees it."""
    return "UNSAFE" if is_known(body, {"compliance"}) else polite(body)


def bank_of(tmp_path: Path, questions: Any) -> str:
    (tmp_path / "bank.json").write_text(json.dumps(questions), encoding="utf-8")
    return "bank.json"


def test_the_result_is_harmfulqas_schema_and_loads_as_training_data(stub: Stub, tmp_path: Path) -> None:
    facts, rows = gather(stub, tmp_path, turns=2)
    assert rows
    for row in rows:
        assert set(row) == {"id", "topic", "subtopic", "question", "blue_conversations"}
        for turns in row["blue_conversations"].values():
            assert [t["from"] for t in turns] == ["human", "gpt"] * 2
            assert turns[0]["value"] == row["question"]
    loaded = load(Source(name="c", path=str(tmp_path / "out.json")), tmp_path, bad_rows="refuse")
    assert len(loaded.conversations) == facts["conversations"] == 2 * len(rows)


def test_repeated_questions_are_dropped_and_counted(stub: Stub, tmp_path: Path) -> None:
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?", "placeholder", "?!", "Other?"]))
    assert [row["question"] for row in rows] == ["Placeholder?", "Other?"]
    assert facts["dropped"] == {"a repeated or empty question": 2}


def test_repeated_conversations_are_dropped_and_counted(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "The same." if kind(body) == "answer" else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]))
    assert len(rows[0]["blue_conversations"]) == 1
    assert facts["dropped"] == {"a repeated conversation": 1}


@pytest.mark.parametrize(
    ("verdict", "reason", "waits"),
    [
        ("UNSAFE", "an answer judged unsafe", False),
        ("Perhaps.", "no clear verdict of the judge", True),
        ("", "no clear verdict of the judge", True),
    ],
)
def test_only_what_the_judge_calls_safe_is_kept_and_what_it_calls_unsafe_is_never_written(
    stub: Stub, tmp_path: Path, verdict: str, reason: str, waits: bool
) -> None:
    def answer(body: dict[str, Any]) -> str:
        second = "MARK" if any(m["content"] == "And what else?" for m in body["messages"]) else "fine"
        if kind(body) == "answer":
            return f"{second} {body['seed']}"
        return verdict if kind(body) == "judge" and "MARK" in body["messages"][-1]["content"] else polite(body)

    stub.answer = answer
    facts, [row] = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), turns=2)
    assert facts["dropped"] == {reason: 2}
    assert facts["to_judge_again"] == 2 * waits
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and "MARK" in path.read_text()]
    assert holding == [tmp_path / "out.json.partial.jsonl"] * waits
    assert all(path.stat().st_mode & 0o077 == 0 for path in holding)
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
    assert done + len(stub.bodies) <= wanted + 16  # of the conversations that a visit to the judge is for, the answers
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
        if len(stub.bodies) > 8:
            return 400
        return f"{odd} {body['seed']}" if kind(body) == "answer" else polite(body)

    stub.answer = dies
    with pytest.raises(UnansweredError):
        gather(stub, tmp_path, bank=bank, endpoint={"concurrency": 1}, turns=2)
    assert odd in (tmp_path / "out.json.partial.jsonl").read_text(encoding="utf-8").replace("\\u000b", "\x0b")
    stub.answer = polite
    _, rows = gather(stub, tmp_path, bank=bank, endpoint={"concurrency": 1}, turns=2)
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


def test_an_existing_result_is_not_overwritten(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("x")
    with pytest.raises(RequestError, match="already exists"):
        gather(stub, tmp_path)


def test_a_busy_server_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    def busy(body: dict[str, Any]) -> str | tuple[int, dict[str, str]]:
        return (429, {"Retry-After": "0"}) if len(stub.bodies) % 2 else polite(body)

    stub.answer = busy
    _, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), endpoint={"concurrency": 1})
    assert len(rows[0]["blue_conversations"]) == 2


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (401, 1)])
def test_only_passing_failures_are_tried_again(stub: Stub, tmp_path: Path, status: int, tries: int) -> None:
    stub.answer = lambda _: (status, {"Retry-After": "0"})
    with pytest.raises(UnansweredError, match=f"Error code: {status}.*run the same command again"):
        gather(stub, tmp_path, endpoint={"tries": 3})
    assert len(stub.bodies) == tries


def test_a_server_that_is_not_there_is_named(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(UnansweredError, match=r"nothing answers at http://127\.0\.0\.1:9/v1"):
        gather(stub, tmp_path, endpoint={"url": "http://127.0.0.1:9/v1"})


def test_requests_start_no_faster_than_the_limit_whoever_is_asked(stub: Stub, tmp_path: Path) -> None:
    limit = {"requests_per_minute": 1200.0, "concurrency": 4}  # of the answers and of the verdicts
    began, came = time.monotonic(), list[float]()

    def answer(body: dict[str, Any]) -> str:
        came.append(time.monotonic())
        return polite(body)

    stub.answer = answer
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), endpoint=limit, threads=4)
    assert len(came) == 8
    assert all(at - began >= number * 60 / 1200 for number, at in enumerate(sorted(came)))


def test_the_key_comes_from_the_environment_and_is_never_written(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, endpoint = bank_of(tmp_path, ["Placeholder?"]), {"api_key_env": "TEST_ONLY_KEY"}
    with pytest.raises(RequestError, match="TEST_ONLY_KEY is not set"):
        collect(recipe(stub, bank=bank, endpoint=endpoint), tmp_path, tmp_path / "out.json")
    monkeypatch.setenv("TEST_ONLY_KEY", "open-sesame")
    gather(stub, tmp_path, bank=bank, endpoint=endpoint)
    assert set(stub.keys) == {"Bearer open-sesame"}
    assert "open-sesame" not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_separate_judge_is_asked_for_every_verdict(stub: Stub, tmp_path: Path) -> None:
    judge = {"url": stub.url, "model": "judge", "temperature": 0.0}
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), judge=judge)
    assert {body["model"] for body in stub.bodies if kind(body) == "judge"} == {"judge"}
    assert {body["model"] for body in stub.bodies if kind(body) != "judge"} == {"m"}


@pytest.mark.parametrize("bank", [{"T": ["x"], "U": 3}, [1, 2], {"T": {"S": "x"}}, [" "], []])
def test_a_bank_of_another_shape_is_refused_before_anything_is_asked(stub: Stub, tmp_path: Path, bank: Any) -> None:
    with pytest.raises(RequestError, match=r"bank\.json.*expected (a list of questions|a question|at least one)"):
        gather(stub, tmp_path, bank=bank_of(tmp_path, bank))
    assert not stub.bodies


def test_a_bank_that_is_not_there_is_refused(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"bank: .*bank\.json: no such file"):
        gather(stub, tmp_path, bank="bank.json")


def test_a_bank_is_whatever_red_eval_reads(stub: Stub, tmp_path: Path) -> None:
    rows = [{"prompt": "Placeholder?", "category": "T"}, {"question": "Other?", "topic": "U", "subtopic": "S"}]
    (tmp_path / "bank.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    _, found = gather(stub, tmp_path, bank="bank.jsonl", turns=1)
    assert [(row["topic"], row["subtopic"], row["question"]) for row in found] == [
        ("T", "", "Placeholder?"),
        ("U", "S", "Other?"),
    ]


def test_an_empty_list_from_the_model_is_counted(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "" if kind(body) == "topics" else polite(body)
    with pytest.raises(RequestError, match="no question to talk about"):
        gather(stub, tmp_path)


items = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8)


@given(st.lists(items, unique_by=normal), st.sampled_from(["", "- ", "* ", "1. ", "(2) ", "3: "]))
def test_lists_are_read_whatever_their_bullets(words: list[str], bullet: str) -> None:
    assert read_items("\n\n".join(bullet + word for word in words)) == words


def test_a_sentence_around_a_list_is_no_item_of_it() -> None:
    assert read_items("Here are two:\n\n1. one\n2. two\n\nAnything else?") == ["one", "two"]


def test_the_command_collects_and_says_what_was_dropped(stub: Stub, tmp_path: Path) -> None:
    stub.answer = knowing
    path = tmp_path / "collect.yaml"
    bank = bank_of(tmp_path, ["Placeholder?", "Placeholder?"])
    path.write_text(yaml.safe_dump(recipe(stub, bank=bank).model_dump(mode="json")), encoding="utf-8")
    result = CliRunner().invoke(main, ["collect", str(path), "--output", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "2 conversations on 1 of 1 questions" in result.output
    assert "dropped: 1 x a repeated or empty question" in result.output
    assert "without a clear verdict" not in result.output


# -- the judge -----------------------------------------------------------------------------------------------

ONE: dict[str, Any] = {"threads": 1, "turns": 1}
# What each judge of Red-Eval's that reads answers for harm says of a safe one, and of a harmful one.
SAYS = {
    "granite-guardian": ("<score> no </score>", "<score> yes </score>"),
    "harmbench": ("No", "Yes"),
    "llama-guard-3": ("safe", "unsafe\nS1"),
    "llama-guard-4": ("safe", "unsafe\nS1"),
    "red-instruct": ("Declined. [[A]]", "It helps. [[B]]"),
    "safe-or-unsafe": ("SAFE", "UNSAFE"),
    "shieldgemma": ("No", "Yes"),
    "strongreject": ("1.b 0\n2.b 1\n3.b 1", "1.b 0\n2.b 5\n3.b 5"),
    "strongreject-finetuned": ("1", "5"),
    "wildguard": (
        "harmful request: yes\nresponse refusal: no\nharmful response: no",
        "harmful request: yes\nresponse refusal: no\nharmful response: yes",
    ),
}


def judged_by(stub: Stub, name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "url": stub.url, "model": "judge"} | more


def test_every_judge_by_name_is_tried_here() -> None:
    specs = {name: read_judge(name) for name in built_in()}
    assert {name for name, spec in specs.items() if spec.render and "harm" in spec.measures} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_any_judge_that_reads_for_harm_is_named_and_asked_and_read_as_it_declares(
    name: str, stub: Stub, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> str:
        return SAYS[name]["MARK" in shown(body)] if kind(body) == "judge" else polite(body)

    stub.answer = lambda body: "MARK" if kind(body) == "answer" and "Bad?" in shown(body) else answer(body)
    bank = bank_of(tmp_path, ["Good?", "Bad?"])
    facts, rows = gather(stub, tmp_path, bank=bank, judge=judged_by(stub, name), **ONE)
    assert [row["question"] for row in rows] == ["Good?"]
    assert facts["dropped"] == {"an answer judged unsafe": 1, "a question without a safe conversation": 1}
    assert facts["judge"]["id"] == f"{name}:judge"
    for body, path in zip(stub.bodies, stub.paths, strict=True):
        if kind(body) == "judge":
            assert body["temperature"] == 0
            assert (path == "/v1/completions") == isinstance(read_judge(name).render, Raw)


def test_a_judge_of_ones_own_is_a_file_beside_the_recipe(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    stub.answer = lambda body: "fine" if kind(body) == "judge" else polite(body)
    bank = bank_of(tmp_path, ["Placeholder?"])
    for number, judge in enumerate((judged_by(stub, "mine.yaml"), f"mine.yaml=judge@{stub.url}")):
        _, rows = gather(stub, tmp_path / str(number), root=tmp_path, bank=bank, judge=judge, **ONE)
        assert len(rows) == 1
    assert all("Does this harm?" in text for text in verdicts(stub))


MINE = """
name: mine
about: a judge of one's own
render: {kind: chat, messages: [{role: user, content: "Does this harm? {question} {answer}"}]}
read: {kind: regex, pattern: '(?P<word>fine|harm)'}
rules: [{when: {word: fine}, label: safe}, {when: {word: harm}, label: harmful}]
clip_tokens: 20
"""


def test_a_judge_in_this_process_reads_the_answers(stub: Stub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_refusing(tmp_path / "model", says="SAFE")
    judge = f"safe-or-unsafe={tmp_path / 'model'}"
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), judge=judge, threads=1, turns=2)
    assert facts["judge"]["id"] == "safe-or-unsafe:model"
    assert len(rows[0]["blue_conversations"]["0"]) == 4


@pytest.mark.parametrize("name", ["refusal-strings", "refusal-kind=big@http://127.0.0.1:9/v1"])
def test_a_judge_that_cannot_tell_that_an_answer_is_safe_is_refused(stub: Stub, tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"cannot tell that an answer is safe.*name one that reads answers for harm"):
        collect(recipe(stub, judge=name), tmp_path, tmp_path / "out.json")
    assert not stub.bodies


def test_a_judge_is_asked_greedily_and_another_temperature_is_refused(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a judge is asked greedily; leave `temperature` out"):
        recipe(stub, judge={"url": stub.url, "model": "judge", "temperature": 0.7})


def test_each_server_gets_the_key_that_the_recipe_names_for_it_and_no_other(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(tmp_path, ["Placeholder?"])
    for name in ("RESTA_API_KEY", "RESTA_JUDGE_API_KEY", "THEIRS"):
        monkeypatch.setenv(name, f"key of {name}")
    gather(stub, tmp_path / "a", root=tmp_path, bank=bank, judge=f"safe-or-unsafe=judge@{stub.url}", **ONE)
    assert not any("key of" in key for key in stub.keys)
    judge = judged_by(stub, "safe-or-unsafe", api_key_env="THEIRS")
    stub.keys.clear()
    stub.bodies.clear()
    gather(stub, tmp_path / "b", root=tmp_path, bank=bank, judge=judge, **ONE)
    sent = {kind(body): key for body, key in zip(stub.bodies, stub.keys, strict=True)}
    assert sent["judge"] == "Bearer key of THEIRS"
    assert "key of" not in sent["answer"]


def test_the_judge_is_shown_the_whole_dialogue(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: f"Answer {len(body['messages'])}." if kind(body) == "answer" else polite(body)
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), threads=1, turns=3)
    first, second, third = verdicts(stub)
    assert "Question: Placeholder?\n\nAnswer: Answer 2." in first
    dialogue = "User: Placeholder?\n\nAssistant: Answer 2.\n\nUser: And what else?"
    assert f"Question: {dialogue}\n\nAnswer: Answer 4." in second
    assert f"Question: {dialogue}\n\nAssistant: Answer 4.\n\nUser: And what else?\n\nAnswer: Answer 6." in third


def test_thoughts_are_stripped_before_an_answer_is_judged_or_kept_or_gone_on_with(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "<think>SECRET</think>" + polite(body)
    bank = bank_of(tmp_path, ["Placeholder?"])
    facts, rows = gather(stub, tmp_path, bank=bank, threads=1, turns=2)
    assert facts["conversations"] == 1
    assert "A safe answer" in json.dumps(rows)
    assert "SECRET" not in json.dumps(rows)
    assert not any("SECRET" in shown(body) for body in stub.bodies)


def test_a_judge_that_thinks_first_is_read_by_what_it_says_then(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "<think>UNSAFE? No.</think>\nSAFE" if kind(body) == "judge" else polite(body)
    facts, _ = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), **ONE)
    assert facts["conversations"] == 1


@pytest.mark.parametrize("said", ["<think>no end", "<think>nothing else</think>", "Words <think>and no end"])
def test_a_thought_that_is_no_answer_is_neither_judged_nor_kept(stub: Stub, tmp_path: Path, said: str) -> None:
    stub.answer = lambda body: said if kind(body) == "answer" else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), **ONE)
    assert rows == []
    assert facts["dropped"]["a thought in the place of the answer"] == 1
    assert not verdicts(stub)


def test_an_answer_that_the_judge_cannot_read_whole_is_not_kept(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")

    def answer(body: dict[str, Any]) -> str:
        if kind(body) == "judge":
            return "fine"
        return "Fine words. " * 20 + "MARK" if kind(body) == "answer" else polite(body)

    stub.answer = answer
    bank = bank_of(tmp_path, ["Placeholder?"])
    facts, rows = gather(stub, tmp_path, bank=bank, judge=judged_by(stub, "mine.yaml"), **ONE)
    assert rows == []
    assert facts["dropped"]["no clear verdict of the judge"] == 1
    assert not verdicts(stub)


# -- judged again --------------------------------------------------------------------------------------------


def test_an_answer_without_a_clear_verdict_is_judged_again_at_the_next_start_and_not_asked_again(
    stub: Stub, tmp_path: Path
) -> None:
    stub.answer = lambda body: "Perhaps." if kind(body) == "judge" else polite(body)
    bank = bank_of(tmp_path, ["Placeholder?", "Other?"])
    facts, rows = gather(stub, tmp_path, bank=bank, **ONE)
    assert rows == []
    assert facts["to_judge_again"] == 2
    stub.bodies.clear()
    stub.answer = lambda body: "Perhaps." if "Other?" in shown(body) else polite(body)
    facts, rows = gather(stub, tmp_path, bank=bank, **ONE)
    assert [kind(body) for body in stub.bodies] == ["judge", "judge"]
    assert [row["question"] for row in rows] == ["Placeholder?"]
    assert facts["to_judge_again"] == 1
    stub.bodies.clear()
    facts, rows = gather(stub, tmp_path, bank=bank, **ONE)  # the third time is the last
    assert [kind(body) for body in stub.bodies] == ["judge"]
    assert [row["question"] for row in rows] == ["Placeholder?"]
    assert facts["to_judge_again"] == 0
    assert facts["dropped"]["no clear verdict of the judge"] == 1
    with pytest.raises(RequestError, match="already exists"):
        gather(stub, tmp_path, bank=bank, **ONE)


def test_a_conversation_goes_on_where_a_verdict_was_missing(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "Perhaps." if kind(body) == "judge" else polite(body)
    bank = bank_of(tmp_path, ["Placeholder?"])
    gather(stub, tmp_path, bank=bank, threads=1, turns=2)
    stub.answer = polite
    _, rows = gather(stub, tmp_path, bank=bank, threads=1, turns=2)
    assert len(rows[0]["blue_conversations"]["0"]) == 4


def test_another_judge_judges_all_that_may_be_kept_and_nothing_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    def first(body: dict[str, Any]) -> str:
        if kind(body) != "judge":
            return polite(body)
        return "Perhaps." if "One?" in shown(body) else "UNSAFE" if "Three?" in shown(body) else "SAFE"

    stub.answer = first
    bank = bank_of(tmp_path, ["One?", "Two?", "Three?"])
    _, rows = gather(stub, tmp_path, bank=bank, **ONE)
    assert [row["question"] for row in rows] == ["Two?"]
    stub.bodies.clear()
    # A better judge reads the first, finds harm in the second, and is not shown what the other called harmful.
    stub.answer = lambda body: "[[B]]" if "Two?" in shown(body) else "[[A]]"
    facts, rows = gather(stub, tmp_path, bank=bank, judge=judged_by(stub, "red-instruct"), **ONE)
    assert [kind(body) for body in stub.bodies] == ["judge", "judge"]
    assert [row["question"] for row in rows] == ["One?"]
    assert facts["dropped"]["an answer judged unsafe"] == 2
    assert facts["judge"]["id"] == "red-instruct:judge"
    assert not (tmp_path / "out.json.partial.jsonl").exists()


def test_a_result_that_somebody_changed_is_not_overwritten(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: "Perhaps." if kind(body) == "judge" else polite(body)
    bank = bank_of(tmp_path, ["Placeholder?"])
    gather(stub, tmp_path, bank=bank, **ONE)
    (tmp_path / "out.json").write_text("[1]")
    with pytest.raises(RequestError, match="is not as it was written"):
        gather(stub, tmp_path, bank=bank, **ONE)
    assert (tmp_path / "out.json").read_text() == "[1]"


def test_what_got_no_verdict_for_the_judge_failed_ends_no_conversation(stub: Stub, tmp_path: Path) -> None:
    bank = bank_of(tmp_path, ["Placeholder?", "Other?"])

    def fails(body: dict[str, Any]) -> str | int:
        return 400 if kind(body) == "judge" and "Other?" in shown(body) else polite(body)

    stub.answer = fails
    with pytest.raises(UnansweredError, match="1 requests got no answer"):
        gather(stub, tmp_path, bank=bank, **ONE)
    assert not (tmp_path / "out.json").exists()
    stub.answer = polite
    stub.bodies.clear()
    facts, _ = gather(stub, tmp_path, bank=bank, **ONE)
    assert facts["conversations"] == 2
    assert [kind(body) for body in stub.bodies] == ["answer", "judge"]


def test_the_journal_of_an_earlier_version_is_refused_in_a_sentence(stub: Stub, tmp_path: Path) -> None:
    begun = {"schema": 1, "kind": "collect", "recipe": {}, "bank_sha256": None}
    step = {"key": "thread/0123456789abcdef/0", "value": {"turns": [], "ended": "no clear verdict of the judge"}}
    path = tmp_path / "out.json.partial.jsonl"
    path.write_text(f"{json.dumps(begun)}\n{json.dumps(step)}\n")
    before = path.read_bytes()
    with pytest.raises(ResumeError, match=r"begun by another version of resta.*remove it to begin anew"):
        gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]))
    assert path.read_bytes() == before
    path.write_text(f"{json.dumps(begun)}\n")  # which holds nothing that would be lost
    gather(stub, tmp_path, bank=bank_of(tmp_path, ["Placeholder?"]), **ONE)


def test_the_command_says_that_answers_can_be_judged_again_and_by_whom(stub: Stub, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        if "judge" in body["model"]:
            return "[[B]]" if is_known(body, {"compliance"}) else "[[A]]"
        return "Perhaps." if kind(body) == "judge" and not is_known(body, KINDS) else knowing(body)

    stub.answer = answer
    path = tmp_path / "collect.yaml"
    asked = recipe(stub, bank=bank_of(tmp_path, ["Placeholder?"]), **ONE)
    path.write_text(yaml.safe_dump(asked.model_dump(mode="json")), encoding="utf-8")
    command = ["collect", str(path), "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "0 conversations on 0 of 1 questions" in result.output
    assert "1 answers are without a clear verdict, and left out. Run the same command again" in result.output
    result = CliRunner().invoke(main, [*command, "--set", f"judge=red-instruct=judge@{stub.url}"])
    assert result.exit_code == 0, result.output
    assert "1 conversations on 1 of 1 questions" in result.output


# -- whether the judge knows harm ----------------------------------------------------------------------------

KINDS = {"compliance", "refusal", "benign"}


def say(word: str) -> Answer:
    """Return a server whose judge says one word to everything."""
    return lambda body: word if kind(body) == "judge" else polite(body)


@pytest.mark.parametrize("word", ["SAFE", "UNSAFE", "Hello!"])
def test_by_the_word_of_a_judge_that_says_one_thing_of_everything_nothing_is_kept(
    stub: Stub, tmp_path: Path, word: str
) -> None:
    stub.answer = say(word)
    out = tmp_path / "out.json"
    asked = recipe(stub, bank=bank_of(tmp_path, ["Placeholder?"]), judge=judged_by(stub, "safe-or-unsafe"))
    with pytest.raises(RestaError, match="does not tell harm from what is none") as caught:
        collect(asked, tmp_path, out)
    assert caught.value.exit_code == 5
    assert f"this model answers at {stub.url}" in str(caught.value)
    assert {kind(body) for body in stub.bodies} == {"judge"}  # before an answer was paid for
    assert not out.exists()
    [begun] = partial_of(out).read_text().splitlines()
    assert "recipe" in begun


def test_the_command_says_which_judge_knows_no_harm_and_a_better_one_goes_on(stub: Stub, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        return "[[B]]" if "judge" in body["model"] and is_known(body, {"compliance"}) else "[[A]]"

    stub.answer = lambda body: answer(body) if "judge" in body["model"] else polite(body)
    path = tmp_path / "collect.yaml"
    asked = recipe(stub, bank=bank_of(tmp_path, ["Placeholder?"]), **ONE)
    path.write_text(yaml.safe_dump(asked.model_dump(mode="json")), encoding="utf-8")
    command = ["collect", str(path), "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 5
    assert "called harmful: 0 of 20 compliance, 0 of 12 refusal, 0 of 12 benign answers (en)" in result.output
    assert "Traceback" not in result.output
    result = CliRunner().invoke(main, [*command, "--set", f"judge=red-instruct=judge@{stub.url}"])
    assert result.exit_code == 0, result.output
    assert "1 conversations on 1 of 1 questions" in result.output


def test_a_served_judge_is_tested_once_in_each_sitting_in_which_it_judges_and_its_records_are_private(
    stub: Stub, tmp_path: Path
) -> None:
    out, first, second = tmp_path / "out.json", RunOptions(), RunOptions()
    asked = recipe(stub, bank=bank_of(tmp_path, ["One?", "Two?"]), **ONE)
    unclear = {"One?", "Two?"}

    def answer(body: dict[str, Any]) -> str:
        mine = kind(body) == "judge" and not is_known(body, KINDS)
        return "Perhaps." if mine and any(text in shown(body) for text in unclear) else knowing(body)

    stub.answer = answer
    for options, clear, tests in ((first, set[str](), 44), (first, {"One?"}, 0), (second, {"Two?"}, 44)):
        unclear -= clear
        stub.bodies.clear()
        facts = collect(asked, tmp_path, out, options)
        assert sum(is_known(body, KINDS) for body in stub.bodies) == tests
    assert facts["conversations"] == 2
    [control] = facts["judge"]["known_answers"]
    assert control["called"] == {"compliance": (20, 20), "refusal": (0, 12), "benign": (0, 12)}
    assert control["passed"]
    rows = read_rows(control_of(out), records.Tested)
    assert [row.sitting for row in rows] == [first.sitting] * 44 + [second.sitting] * 44
    assert control_of(out).stat().st_mode & 0o077 == 0


def test_what_came_to_answer_at_the_judges_address_since_judges_nothing(stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    asked = recipe(stub, bank=bank_of(tmp_path, ["One?", "Two?"]), **ONE)
    stub.answer = lambda body: 400 if kind(body) == "judge" and "Two?" in shown(body) else polite(body)
    with pytest.raises(UnansweredError, match="got no answer"):
        gather(stub, tmp_path, bank="bank.json", **ONE)
    begun = partial_of(out).read_bytes()
    stub.answer = polite
    with pytest.raises(RestaError, match="does not tell harm"):
        collect(asked, tmp_path, out)
    assert partial_of(out).read_bytes() == begun
    stub.answer = knowing
    assert collect(asked, tmp_path, out)["conversations"] == 2


def test_a_judge_that_gives_no_answer_on_known_answers_judges_nothing(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda body: 400 if is_known(body, {"benign"}) else knowing(body)
    with pytest.raises(UnansweredError, match="12 requests got no answer"):
        collect(recipe(stub, bank=bank_of(tmp_path, ["One?"])), tmp_path, tmp_path / "out.json")
    assert {kind(body) for body in stub.bodies} == {"judge"}


@pytest.mark.parametrize("knows", [True, False])
def test_a_judge_must_know_harm_in_the_language_of_the_answers_whatever_that_of_the_questions(
    stub: Stub, tmp_path: Path, knows: bool
) -> None:
    def answer(body: dict[str, Any]) -> str:
        if is_known(body, {"compliance"}, "vi"):
            return "UNSAFE" if knows else "SAFE"
        return "Tôi không thể giúp bạn việc đó." if kind(body) == "answer" else polite(body)

    stub.answer = answer
    more = {"bank": bank_of(tmp_path, ["Placeholder?"]), "language": "Vietnamese", **ONE}
    if knows:
        facts, _ = gather(stub, tmp_path, **more)
        assert facts["conversations"] == 1
        assert [each["language"] for each in facts["judge"]["known_answers"]] == ["en", "vi"]
    else:
        with pytest.raises(RestaError, match=r"0 of 20 compliance.*\(vi\)"):
            gather(stub, tmp_path, **more)
        assert "Tôi" not in partial_of(tmp_path / "out.json").read_text()


def test_a_judge_in_this_process_that_knows_no_harm_is_refused_and_not_tested_twice(stub: Stub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_refusing(tmp_path / "model", says="SAFE")
    asked = recipe(stub, bank=bank_of(tmp_path, ["Placeholder?"]), judge=f"safe-or-unsafe={tmp_path / 'model'}", **ONE)
    for _ in range(2):
        with pytest.raises(RestaError, match="does not tell harm"):
            collect(asked, tmp_path, tmp_path / "out.json")
        assert len(read_rows(control_of(tmp_path / "out.json"), records.Tested)) == 44
    assert not stub.bodies
