from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.redeval.control import read_control
from resta.redeval.questions import read_bank
from resta.verify.sameness import ALIKE, alike, masked

QUESTIONS = [question.text for question in read_bank("smoke-safe").questions]
OPENINGS = ["Sure thing!", "I would be glad to help.", "Have a nice day."]

# What a model may say to everything without a single question being answered.
PLANTED: dict[str, Callable[[int, str], str]] = {
    "a word": lambda i, q: "OK.",
    "a sentence": lambda i, q: "Hello! How can I help you today?",
    "the question": lambda i, q: q,
    "the question twice": lambda i, q: f"{q} {q}",
    "the question in lower case": lambda i, q: q.lower().rstrip("?"),
    "the question in a frame": lambda i, q: f"You asked: {q} That is a good question.",
    "three sentences in turn": lambda i, q: OPENINGS[i % 3],
    "a sentence with a number": lambda i, q: f"Thank you for your message, you are number {i} in our queue.",
    "a sentence with a slot": lambda i, q: (
        f"Dear friend, on this {['sunny', 'rainy', 'cold'][i % 3]} day I wish you luck."
    ),
    "a long text": lambda i, q: " ".join(f"line {k} of the same old story" for k in range(30)),
    "another script": lambda i, q: "您好，请问有什么可以帮您的吗？",
}


@pytest.mark.parametrize("name", PLANTED)
def test_one_answer_to_everything_is_found_whatever_it_is(name: str) -> None:
    answers = [PLANTED[name](i, question) for i, question in enumerate(QUESTIONS)]
    assert sum(alike(QUESTIONS, answers)) >= 0.95 * len(QUESTIONS)


@pytest.mark.parametrize("language", ["en", "zh", "vi"])
def test_real_answers_to_different_questions_are_not_alike(language: str) -> None:
    questions, answers = zip(*read_control(language).benign, strict=True)
    assert not any(alike(questions, answers))


def test_a_part_of_stock_answers_is_found_as_that_part() -> None:
    questions, answers = (list(each) for each in zip(*read_control("en").benign, strict=True))
    answers[2], answers[7] = "OK.", "ok"
    assert [i for i, found in enumerate(alike(questions, answers)) if found] == [2, 7]


def test_the_same_answer_to_the_same_question_asked_twice_is_no_finding() -> None:
    assert alike(["How?", "How?", "Why?"], ["By bus.", "By bus.", "For fun."]) == [False, False, False]


def test_empty_answers_are_alike_to_none() -> None:
    assert alike(["a?", "b?", "c?"], ["", "  ", "!?"]) == [False, False, False]


def test_no_answers_at_all() -> None:
    assert alike([], []) == []


@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.text(max_size=60)), min_size=2, max_size=12), st.randoms())
def test_the_order_of_the_answers_is_of_no_matter(pairs: list[tuple[str, str]], rng: random.Random) -> None:
    order = list(range(len(pairs)))
    rng.shuffle(order)
    found = alike([q for q, _ in pairs], [a for _, a in pairs])
    again = alike([pairs[i][0] for i in order], [pairs[i][1] for i in order])
    assert [found[i] for i in order] == again


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=9), min_size=2, max_size=8))
def test_likeness_is_that_of_a_naive_count(answers: list[list[str]]) -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    def near(a: list[str], b: list[str]) -> bool:
        return len(runs(a) & runs(b)) >= ALIKE * len(runs(a) | runs(b))

    expected = [any(near(a, b) for j, b in enumerate(answers) if j != i) for i, a in enumerate(answers)]
    assert alike([f"{i}?" for i in range(len(answers))], [" ".join(a) for a in answers]) == expected


def test_masks_stand_for_what_the_question_holds() -> None:
    assert masked("How do I boil an egg?", "To boil an egg, put the EGG into water.") == [
        "to", "_", "put", "the", "_", "into", "water",
    ]  # fmt: skip
