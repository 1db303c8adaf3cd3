from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.redeval.messages import Finish, Reply
from resta.redeval.thoughts import MARKS, clean_reply, opened_by, strip_thoughts, strip_thoughts_as_published


def reply_of(text: str, finish: Finish, **more: str) -> Reply:
    return Reply(id="a", text=text, finish=finish, **more)  # type: ignore[arg-type]


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
        ("[THINK]plan[/THINK]Answer", "Answer", ("thought",)),
        ("[THINK]endless", "[THINK]endless", ("unclosed_thought",)),
        ("\u25c1think\u25b7plan\u25c1/think\u25b7Answer", "Answer", ("thought",)),
        ("<seed:think>plan</seed:think>Answer", "Answer", ("thought",)),
        (
            "<|START_THINKING|>plan<|END_THINKING|><|START_RESPONSE|>Answer<|END_RESPONSE|>",
            "Answer",
            ("thought",),
        ),
        (
            "<|channel|>analysis<|message|>plan<|end|><|start|>assistant<|channel|>final<|message|>Answer",
            "Answer",
            ("thought",),
        ),
        ("<|channel|>final<|message|>Answer<|return|>", "Answer", ()),
        ("<|channel|>analysis<|message|>end", "<|channel|>analysis<|message|>end", ("unclosed_thought",)),
        ("analysisWe need a plan.assistantfinalAnswer", "Answer", ("thought",)),
        ("analysisWe need", "analysisWe need", ("unclosed_thought",)),
        ("analysis of it", "analysis of it", ()),
        ("<reasoning>plan</reasoning>\nAnswer", "Answer", ("thought",)),
        ("<thinking>endless", "<thinking>endless", ("unclosed_thought",)),
        # Words in brackets that stand within an answer are the answer's.
        ("In XML: <reasoning>x</reasoning> and so on", "In XML: <reasoning>x</reasoning> and so on", ()),
        ("a <|end|> b", "a <|end|> b", ()),
    ],
)
def test_thoughts_go_and_answers_stay(raw: str, text: str, flags: tuple[str, ...]) -> None:
    cleaned = strip_thoughts(raw)
    assert (cleaned.text, cleaned.flags) == (text, flags)


@pytest.mark.parametrize(("opening", "closing"), MARKS)
@given(thought=st.text(alphabet="ab (\n", max_size=9), answer=st.text(alphabet="cd\n", max_size=9))
def test_a_thought_that_the_prompt_opened_is_told_from_the_answer(
    opening: str, closing: str, thought: str, answer: str
) -> None:
    assert opened_by(f"<|user|>?<|assistant|>{opening}\n") == opening
    assert opened_by(f"<|user|>?<|assistant|>{opening}\n{closing}\n") == ""
    cut = strip_thoughts(thought, opening)
    assert (cut.in_thought, cut.flags, cut.text) == (True, ("unclosed_thought",), thought.strip())
    whole = strip_thoughts(f"{thought}{closing}{answer}x", opening)
    assert (whole.in_thought, whole.flags, whole.text) == (False, ("thought",), f"{answer}x".strip())


@pytest.mark.parametrize(
    ("reply", "said", "text", "flags"),
    [
        (reply_of("Yes.", "stop", thought="Hm."), "<think>\nHm.\n</think>\n\nYes.", "Yes.", ("thought",)),
        (reply_of("", "length", thought="Hm"), "<think>\nHm", "Hm", ("cut_thought", "thought", "unclosed_thought")),
        (reply_of("", "stop", thought="Hm."), "<think>\nHm.\n</think>", "Hm.", ("only_thought", "thought")),
        (reply_of("<think>Hm", "length"), "<think>Hm", "<think>Hm", ("cut_thought", "unclosed_thought")),
        (reply_of("<think>Hm", "stop"), "<think>Hm", "<think>Hm", ("unclosed_thought",)),
        (reply_of("Hm", "length", opened="<think>"), "Hm", "Hm", ("cut_thought", "unclosed_thought")),
        (reply_of("Hm</think>Yes", "length", opened="<think>"), "Hm</think>Yes", "Yes", ("thought",)),
        (reply_of("Step", "length"), "Step", "Step", ()),
    ],
)
def test_a_thought_that_was_cut_off_is_no_answer(reply: Reply, said: str, text: str, flags: tuple[str, ...]) -> None:
    raw, cleaned = clean_reply(reply, strip_thoughts, keep=False)
    assert (raw, cleaned.text, cleaned.flags) == (said, text, flags)
    raw, kept = clean_reply(reply, strip_thoughts, keep=True)
    assert (raw, kept.text) == (said, said)
    assert "cut_thought" not in kept.flags


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
