from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.errors import RequestError
from resta.sft.data import Conversation, format_of, load, mix, tidy
from resta.sft.recipe import Recipe, Source
from tests.sft.builders import exchange

Write = Callable[..., Path]
ASKED, SAID = "What is 2 and 2?", "It is 4."
SHAREGPT = {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]}
THREAD = SHAREGPT["conversations"]
HARMFULQA = {
    "topic": "t",
    "subtopic": "s",
    "question": ASKED,
    "blue_conversations": {"0": THREAD, "1": THREAD, "3": None},
    "red_conversations": {"0": THREAD},
}
ROWS: dict[str, Any] = {
    "messages": exchange(ASKED, SAID),
    "sharegpt": SHAREGPT,
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "prompt/completion": {"prompt": ASKED, "completion": SAID},
    "question/answer": {"question": ASKED, "answer": SAID},
    "harmfulqa": HARMFULQA,
}


def read(path: Path, *, bad_rows: str = "refuse", side: str = "blue") -> Any:
    return load(Source(name="s", path=path.name, side=side), path.parent, bad_rows=bad_rows)  # type: ignore[arg-type]


def said(conversations: list[Conversation]) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in c.messages] for c in conversations]


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_told_by_content_and_read_alike(write_rows: Write, name: str) -> None:
    assert format_of(ROWS[name]) == name
    conversations = read(write_rows([ROWS[name]])).conversations
    assert said(conversations) == [[("user", ASKED), ("assistant", SAID)]] * (2 if name == "harmfulqa" else 1)


@pytest.mark.parametrize("name", ROWS)
def test_json_lines_json_and_parquet_hold_the_same_rows(write_rows: Write, tmp_path: Path, name: str) -> None:
    rows = [ROWS[name]] * 3
    lines = read(write_rows(rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for other in ("rows.json", "rows.parquet"):
        again = read(tmp_path / other)
        assert (said(again.conversations), again.rows) == (said(lines.conversations), 3)


def test_alpaca_puts_the_input_under_the_instruction(write_rows: Write) -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert said(read(write_rows([row])).conversations)[0][0] == ("user", "Add.\n\n2 and 2")


def test_a_sharegpt_system_field_becomes_a_system_turn(write_rows: Write) -> None:
    assert said(read(write_rows([SHAREGPT | {"system": "Be brief."}])).conversations)[0][0] == (
        "system",
        "Be brief.",
    )


def test_harmfulqa_threads_are_read_by_side_and_missing_ones_are_counted(write_rows: Write) -> None:
    path = write_rows([HARMFULQA, {"question": ASKED, "blue_conversations": {"0": THREAD}}])
    blue, red = read(path), read(path, side="red")
    assert (len(blue.conversations), blue.dropped.counts) == (3, {"empty thread": 1})
    assert (len(red.conversations), red.dropped.counts) == (1, {"the row has no red conversation": 1})
    assert blue.conversations[1].where.endswith("line 1, blue thread 1")


def test_a_folder_is_read_whole_and_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(exchange(name, "x")), encoding="utf-8")
    loaded = load(Source(name="s", path=str(tmp_path)), Path(), bad_rows="refuse")
    assert [c.question for c in loaded.conversations] == ["a", "b"]


def test_a_hub_dataset_is_read_through_the_datasets_library(write_rows: Write) -> None:
    path = write_rows([exchange("a", "b"), exchange("c", "d")])
    loaded = load(Source(name="s", hub=str(path.parent)), Path(), bad_rows="refuse")
    assert [c.question for c in loaded.conversations] == ["a", "c"]
    assert loaded.conversations[1].where.endswith("(train), row 2")
    with pytest.raises(RequestError, match="cannot load"):
        load(Source(name="s", hub=str(path.parent), split="nothing"), Path(), bad_rows="refuse")


BAD: list[tuple[str, str]] = [
    ("", "no rows; the file is empty"),
    ('{"messages": [}\n', "line 1: not valid JSON"),
    (json.dumps(exchange("a", "b")) + "\n{broken\n", "line 2: not valid JSON"),
    ("[" + json.dumps(exchange("a", "b")), "cut off"),
    ("[\n" + json.dumps(exchange("a", "b")) + ",\n\n {]\n", "line 4: not valid JSON"),
    ('{"text": "x"}\n', "line 1: no known format has the keys text"),
    ("[" + json.dumps(exchange("a", "b")) + "]\n[" + json.dumps(exchange("c", "d")) + "]", "more text follows the end"),
    ("[" * 100_000, "line 1: nested too deeply"),
    ('{"messages": ' + "[" * 100_000, "line 1: nested too deeply"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}\n', r"has the role \['user'\]"),
    (json.dumps(exchange("half \ud83d", "b")), "turn 1 holds half of a character"),
    ("7\n", "line 1: expected an object, found int"),
    ('{"messages": "x"}\n', "line 1: expected a list of turns, found str"),
    ('{"messages": [{"role": "user"}]}\n', "turn 1 is not an object with 'role' and 'content'"),
    ('{"messages": [{"role": "judge", "content": "x"}]}\n', "turn 1 has the role 'judge'"),
    ('{"prompt": 7, "completion": "x"}\n', "`prompt` is int, not text"),
    ('{"messages": []}\n', "no user turn followed by an answer"),
    (
        json.dumps({"messages": exchange("a", "b")["messages"] + exchange("a", "b")["messages"][1:]}),
        "roles do not alternate: turn 3 is assistant, expected user",
    ),
    (json.dumps(exchange("a", "  ")), r"turn 2 \(assistant\) is empty"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_file_is_refused_by_file_line_and_cause(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message) as caught:
        read(path)
    assert "bad.jsonl" in str(caught.value)


def test_files_that_cannot_be_data_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("x.pkl", "never read"),
        ("x.csv", "unknown file type"),
        ("none.jsonl", "no such file"),
    ):
        if not name.startswith("none"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(RequestError, match=message):
            read(tmp_path / name)
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(RequestError, match="not a readable Parquet"):
        read(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not UTF-8"):
        read(tmp_path / "x.jsonl")


def test_dropped_rows_are_counted_by_reason_with_the_first_place(write_rows: Write) -> None:
    rows = [exchange("a", "b"), {"text": "x"}, {"other": 1}, exchange("c", " ")]
    loaded = read(write_rows(rows), bad_rows="drop")
    assert len(loaded.conversations) == 1
    assert loaded.dropped.counts == {"no known format": 2, "an empty turn": 1}
    assert loaded.dropped.first["no known format"].endswith("line 2")


def test_ends_without_partner_are_cut_and_noted() -> None:
    turns = [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant", "user")]
    kept, notes = tidy(turns)
    assert [m["role"] for m in kept] == ["user", "assistant"]
    assert notes == ["leading assistant turn removed", "trailing user turn removed"]


def recipe(*sources: dict[str, Any], **settings_: Any) -> Recipe:
    return Recipe.model_validate({"base": "m", "data": list(sources), "holdout": 0.0} | settings_)


def numbered(write: Write, name: str, count: int) -> dict[str, Any]:
    write([exchange(f"{name} {i}", "x") for i in range(count)], f"{name}.jsonl")
    return {"name": name, "path": f"{name}.jsonl"}


def test_starlings_mixture_is_blue_and_helpful_and_as_much_sharegpt(write_rows: Write, tmp_path: Path) -> None:
    blue, helpful, chat = (numbered(write_rows, n, c) for n, c in (("blue", 20), ("helpful", 10), ("chat", 50)))
    mixture = mix(recipe(blue, helpful, chat | {"equal_to": ["blue", "helpful"]}), tmp_path)
    assert mixture.drawn == {"blue": 20, "helpful": 10, "chat": 30}
    assert len({c.question for c in mixture.train}) == 60


def test_an_equal_amount_is_of_what_the_others_give_whatever_the_order(write_rows: Write, tmp_path: Path) -> None:
    blue, chat = numbered(write_rows, "blue", 20), numbered(write_rows, "chat", 50)
    sources = [chat | {"equal_to": ["blue"]}, blue | {"weight": 2.0}]
    assert mix(recipe(*sources), tmp_path).drawn == {"chat": 40, "blue": 40}


def test_too_few_rows_for_an_equal_amount_are_refused(write_rows: Write, tmp_path: Path) -> None:
    blue, chat = numbered(write_rows, "blue", 20), numbered(write_rows, "chat", 5)
    with pytest.raises(RequestError, match=r"asks for 20 conversations, it has 5; lower its `weight` to 0\.250"):
        mix(recipe(blue, chat | {"equal_to": ["blue"]}), tmp_path)


@given(weight=st.floats(0.1, 3.5), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_weight_is_a_number_of_passes(tmp_path_factory: pytest.TempPathFactory, weight: float, seed: int) -> None:
    folder = tmp_path_factory.mktemp("weight")
    text = "\n".join(json.dumps(exchange(f"q {i}", "x")) for i in range(20))
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    mixture = mix(recipe({"name": "a", "path": "a.jsonl", "weight": weight}, seed=seed), folder)
    times = [sum(c.question == f"q {i}" for c in mixture.train) for i in range(20)]
    assert sum(times) == round(weight * 20)
    assert max(times) - min(times) <= 1


def test_the_same_seed_gives_the_same_order_and_another_seed_another(write_rows: Write, tmp_path: Path) -> None:
    source = numbered(write_rows, "a", 40)

    def order(seed: int) -> list[str]:
        return [c.question for c in mix(recipe(source, seed=seed, holdout=0.2), tmp_path).train]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_one_source_never_shifts_what_another_draws(write_rows: Write, tmp_path: Path) -> None:
    a, b = numbered(write_rows, "a", 40), numbered(write_rows, "b", 40)
    alone = mix(recipe(a | {"limit": 7}), tmp_path)
    both = mix(recipe(a | {"limit": 7}, b), tmp_path)
    chosen = {c.question for c in alone.train}
    assert {c.question for c in both.train if c.source == "a"} == chosen


@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.5])
def test_a_repeated_question_is_never_on_both_sides_of_the_split(
    write_rows: Write, tmp_path: Path, holdout: float
) -> None:
    write_rows(
        [exchange(f"What is {i % 15} ?".upper() if i % 2 else f"what is  {i % 15} ?", f"{i}") for i in range(60)]
    )
    mixture = mix(recipe({"name": "a", "path": "rows.jsonl"}, holdout=holdout), tmp_path)

    def questions(side: tuple[Conversation, ...]) -> set[str]:
        return {" ".join(c.question.lower().split()) for c in side}

    assert not questions(mixture.train) & questions(mixture.heldout)
    assert len(mixture.train) + len(mixture.heldout) == 60
    assert abs(len(mixture.heldout) - holdout * 60) <= 4


def test_too_many_dropped_rows_are_refused_with_the_commonest_reason(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([exchange("a", "b")] * 3 + [{"text": "x"}] * 2)
    settings_ = {"bad_rows": "drop", "max_dropped": 0.3}
    with pytest.raises(RequestError, match=r"2 of 5 .* most often: no known format \(first at .*line 4\)"):
        mix(recipe({"name": "a", "path": path.name}, **settings_), tmp_path)
    settings_["max_dropped"] = 0.5
    assert len(mix(recipe({"name": "a", "path": path.name}, **settings_), tmp_path).train) == 3
