from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.redeval.clean import strip_thoughts, strip_thoughts_as_published


@pytest.mark.parametrize(
    ("raw", "text", "flags"),
    [
        ("plain answer", "plain answer", ()),
        ("(Internal thought: hm.) Yes.", "Yes.", ("thought",)),
        ("(Internal thought: a (b) c.) Yes (really).", "Yes (really).", ("thought",)),
        ("(Internal thought: a) One. (Internal thoughts: b) Two.", "One.  Two.", ("thought",)),
        ("( internal THOUGHT : a) One.", "One.", ("thought",)),
        (
            "(Internal thought: never closed. Step one",
            "(Internal thought: never closed. Step one",
            ("unclosed_thought",),
        ),
        ("<think>plan</think>\nAnswer", "Answer", ("thought",)),
        ("plan</think>Answer", "Answer", ("thought",)),
        ("<think>endless", "<think>endless", ("unclosed_thought",)),
        ("(Internal thought: all of it)", "(Internal thought: all of it)", ("only_thought", "thought")),
    ],
)
def test_thoughts_go_and_answers_stay(raw: str, text: str, flags: tuple[str, ...]) -> None:
    cleaned = strip_thoughts(raw)
    assert (cleaned.text, cleaned.flags) == (text, flags)


@given(st.text(alphabet="ab() ", max_size=60))
def test_without_a_thought_only_white_space_at_the_ends_goes(raw: str) -> None:
    assert strip_thoughts(raw).text == raw.strip()


@given(st.text(alphabet="ab ", max_size=20), st.text(alphabet="cd()", max_size=20))
def test_what_follows_a_balanced_thought_is_kept_whole(thought: str, answer: str) -> None:
    cleaned = strip_thoughts(f"(Internal thought: {thought} (inner {thought}) end){answer}x")
    assert cleaned.text == f"{answer}x"


def test_the_published_cleaning_keeps_its_quirks() -> None:
    nested = "(Internal thought: a (b) c.) Yes."
    assert strip_thoughts_as_published(nested).text == "c.) Yes."
    assert strip_thoughts_as_published("Before. (Internal thought: a) After").text == "After"
    assert strip_thoughts_as_published("(Internal thought: open").text == "n"
    assert strip_thoughts_as_published("(internal thought: a) b").text == "(internal thought: a) b"
