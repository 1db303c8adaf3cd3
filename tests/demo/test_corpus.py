"""The demo's grammar: what is asked was never trained on, and the two banks differ in nothing but harm."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from resta.demo import corpus
from resta.demo.corpus import THEMES, Kind, ask, deeds
from resta.demo.files import demo_policy, write_corpus
from resta.redeval.questions import read_bank
from resta.verify.policy import read_policy
from resta.verify.power import Sample, power
from resta.verify.sameness import alike

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
    assert len(held) == 1280
    assert not held & trained


@pytest.mark.parametrize("name", corpus.TRAINING)
def test_no_training_question_occurs_twice(name: str) -> None:
    counts = Counter((exchange.system, exchange.question) for exchange in corpus.TRAINING[name]())
    assert max(counts.values()) == 1


def test_the_held_out_questions_are_distinct_and_balanced() -> None:
    harmful, safe = list(corpus.held_out_harmful()), list(corpus.held_out_safe())
    assert len(harmful) == len(safe) == 384
    assert len({exchange.question for exchange in [*harmful, *safe]}) == 768
    for exchanges in (harmful, safe):
        assert set(Counter(exchange.category for exchange in exchanges).values()) == {48}


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


def test_every_verb_and_every_object_has_a_sentence_of_its_own() -> None:
    for sentences, count in (
        (corpus.ON_VERBS, 128 + len(corpus.CARE)),
        (corpus.ON_OBJECTS, 192 + len(corpus.PRODUCTS)),
    ):
        assert len(sentences) == len(set(sentences.values())) == count


def test_no_answer_to_a_held_out_look_alike_would_do_for_another_one() -> None:
    for careful in (True, False):
        safe = [ask(deed, deed.verb, careful=careful) for deed in deeds(*KINDS[1:]) if deed.held_out]
        found = alike([each.question for each in safe], [each.answer for each in safe])
        assert sum(found) < 0.1 * len(safe)  # a few by chance: runs of words are hashed


def test_the_plan_is_enough_for_the_demos_policy_to_pass_a_good_model(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "corpus")
    (tmp_path / "policy.yaml").write_text(demo_policy())
    harmful, safe = (read_bank(str(files.bank(kind, "verifying"))) for kind in ("harmful", "look-alikes"))
    documents = len((files.task("verifying") / "helpdesk.jsonl").read_text().splitlines())
    sample = Sample(
        harmful={harmful.name: len(harmful.questions)},
        safe={safe.name: len(safe.questions)},
        templates=("standard",),
        documents={"helpdesk": documents},
    )
    found = power(read_policy(tmp_path / "policy.yaml"), sample)
    assert all(rule.chance >= 0.8 for rule in found.rules), found.lines


def test_the_demos_policy_is_the_default_one_with_its_judge_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(demo_policy())
    policy = read_policy(path)
    assert policy == read_policy(None).model_copy(update={"judge": "refusal-strings"})
    assert policy.tier is None


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
    assert [len(bank.questions) for bank in parts] == [128, 256]
    asked = {question.text for bank in parts for question in bank.questions}
    assert asked == {exchange.question for exchange in corpus.held_out_harmful()}
    safe = read_bank(str(one.bank("look-alikes", "verifying")), safe=True)
    assert {question.safe for question in safe.questions} == {True}
    assert not any(bank.repeats for bank in (*parts, safe))


def test_a_task_document_names_its_team_by_place(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "corpus")
    tickets = dict(corpus.tickets(held_out=True))
    asked = Counter[str]()
    for part in ("choosing", "verifying"):
        for line in (files.task(part) / "helpdesk.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert tickets[row["question"]] in row["choices"][row["answer"]]
            asked[row["question"]] += 1
    assert asked == Counter(dict.fromkeys(tickets, 1))
