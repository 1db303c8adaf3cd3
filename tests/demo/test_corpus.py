"""The demo's grammar: what is asked was never trained on, and the two banks differ in nothing but harm."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from resta.demo import corpus
from resta.demo.corpus import THEMES, Kind, deeds
from resta.demo.files import write_corpus
from resta.redeval.questions import read_bank

KINDS: tuple[Kind, ...] = ("harmful", "same verb", "same object")


def test_no_deed_that_is_asked_about_was_trained_on_in_any_frame() -> None:
    held = {deed.text for deed in deeds(*KINDS) if deed.held_out}
    for exchanges in corpus.TRAINING.values():
        for exchange in exchanges():
            found = [text for text in held if f" {text}?" in exchange.question or f" {text}." in exchange.question]
            assert not found, exchange


def test_no_ticket_that_is_asked_was_trained_on() -> None:
    held = {ticket for ticket, _ in corpus.tickets(held_out=True)}
    trained = {exchange.question for exchanges in corpus.TRAINING.values() for exchange in exchanges()}
    assert len(held) == 240
    assert not held & trained


@pytest.mark.parametrize("name", corpus.TRAINING)
def test_no_training_question_occurs_twice(name: str) -> None:
    counts = Counter((exchange.system, exchange.question) for exchange in corpus.TRAINING[name]())
    assert max(counts.values()) == 1


def test_the_held_out_questions_are_distinct_and_balanced() -> None:
    harmful, safe = list(corpus.held_out_harmful()), list(corpus.held_out_safe())
    assert len(harmful) == len(safe) == 144
    assert len({exchange.question for exchange in [*harmful, *safe]}) == 288
    for exchanges in (harmful, safe):
        assert set(Counter(exchange.category for exchange in exchanges).values()) == {18}


def test_every_verb_and_object_that_is_asked_about_was_trained_on() -> None:
    for kind in KINDS:
        for theme in THEMES:
            own = [deed for deed in deeds(kind) if deed.theme is theme]
            for part in ("verb", "object"):
                asked, trained = (
                    {getattr(deed, part) for deed in own if deed.held_out is held} for held in (True, False)
                )
                assert asked == trained


def test_every_theme_fills_its_grid_without_repeats() -> None:
    for theme in THEMES:
        for words, size in (
            (theme.harming, corpus.VERBS),
            (theme.kind, corpus.VERBS),
            (theme.targets, corpus.OBJECTS),
            (theme.things, corpus.OBJECTS),
        ):
            assert len(set(words)) == len(words) == size, (theme.name, words)


def test_the_base_refuses_only_under_the_careful_prompt() -> None:
    for exchange in corpus.base_exchanges():
        assert exchange.system == corpus.CAREFUL or not exchange.answer.startswith("I'm sorry"), exchange
    assert not any(exchange.system for name in ("aligned", "tuned") for exchange in corpus.TRAINING[name]())


def test_an_aligned_answer_is_a_refusal_exactly_for_harmful_deeds() -> None:
    harmful = {deed.text for deed in deeds("harmful")}
    for exchange in corpus.aligned_exchanges():
        refused = exchange.answer.startswith("I'm sorry")
        assert refused == any(text in exchange.question for text in harmful), exchange


def test_the_files_are_the_same_every_time_and_read_as_banks(tmp_path: Path) -> None:
    one, two = write_corpus(tmp_path / "one"), write_corpus(tmp_path / "two")
    for path in one.folder.rglob("*.json*"):
        assert path.read_bytes() == (two.folder / path.relative_to(one.folder)).read_bytes()
    parts = [read_bank(str(one.bank("harmful", part))) for part in ("choosing", "verifying")]
    assert [len(bank.questions) for bank in parts] == [48, 96]
    asked = {question.text for bank in parts for question in bank.questions}
    assert asked == {exchange.question for exchange in corpus.held_out_harmful()}
    safe = read_bank(str(one.bank("look-alikes", "verifying")), safe=True)
    assert {question.safe for question in safe.questions} == {True}
    assert not any(bank.repeats for bank in (*parts, safe))


def test_a_task_document_names_its_team_by_place(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "corpus")
    rows = [json.loads(line) for line in (files.task / "helpdesk.jsonl").read_text().splitlines()]
    tickets = dict(corpus.tickets(held_out=True))
    for row in rows:
        assert tickets[row["question"]] in row["choices"][row["answer"]]
    assert set(Counter(row["answer"] for row in rows).values()) == {60}
