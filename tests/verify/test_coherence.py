from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

from hypothesis import given
from hypothesis import strategies as st

from resta.redeval.models import LocalModel, LocalSpec, Prompt, load_local
from resta.verify.coherence import (
    FIRST_TOKENS,
    Losses,
    answer_losses,
    implausible,
    read_losses,
    shuffled,
    write_losses,
)
from tests.redeval.builders import save_llama, save_tokenizer


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_llama(path)
    save_tokenizer(path, adds_bos=True)
    return load_local(LocalSpec(model=str(path), device="cpu"))


def naive_loss(local: LocalModel, prompt: Prompt, text: str) -> float:
    """One sequence, one token at a time, no padding."""
    import torch

    ids = list(prompt.ids)
    losses = []
    for token in local.tokenizer(text, add_special_tokens=False)["input_ids"][:FIRST_TOKENS]:
        with torch.inference_mode():
            logits = local.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        losses.append(-float(torch.log_softmax(logits, dim=-1)[token]))
        ids.append(token)
    return sum(losses) / len(losses)


def test_losses_in_padded_batches_are_those_of_each_answer_alone(local: LocalModel) -> None:
    texts = ["yes", "a longer answer, with more to it", "", "no, that is not something to do" * 8]
    prompts = [local.raw_prompt(str(i), "ask " * (i + 1)) for i in range(len(texts))]
    found = answer_losses(local, prompts, texts)
    assert found[2] is None
    for i in (0, 1, 3):
        assert found[i] == pytest.approx(naive_loss(local, prompts[i], texts[i]), abs=1e-4)


def test_a_batch_holds_no_more_rows_than_allowed_and_no_more_logits_than_there_is_room_for(
    local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    real = local.model.forward

    def forward(*args: Any, input_ids: Any, **given: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return real(*args, input_ids=input_ids, **given)

    monkeypatch.setattr(local.model, "forward", forward)
    prompts, texts = [local.raw_prompt(str(i), "ask") for i in range(5)], ["yes, of course"] * 5
    monkeypatch.setattr(local, "batch_rows", 2)
    whole = answer_losses(local, prompts, texts)
    assert [rows for rows, _ in sizes] == [2, 2, 1]
    one_row = 4 * local.model.config.vocab_size * sizes[0][1]  # bytes of its logits in float32
    for room, expected in ((one_row * 2 - 1, [1] * 5), (one_row * 2, [2, 2, 1]), (1, [1] * 5)):
        sizes.clear()
        monkeypatch.setattr("resta.verify.coherence.LOGITS_BYTES", room)
        assert answer_losses(local, prompts, texts) == pytest.approx(whole, abs=1e-5)
        assert [rows for rows, _ in sizes] == expected


def losses(by_answer: dict[str, float], mixed: dict[str, float], vocabulary: int = 49152) -> Losses:
    return Losses(aligned="", answers="", vocabulary=vocabulary, by_answer=by_answer, shuffled=mixed)


OWN = losses({str(i): 0.8 for i in range(20)} | {"own": 9.0}, {str(i): 6.2 for i in range(20)})


@pytest.mark.parametrize(
    ("loss", "mixed", "strange"),
    [
        (0.8, 6.2, False),  # as the model's own
        (4.3, 5.5, False),  # a language that it hardly knows: little gain, but not as costly as words in no order
        (2.8, 3.0, False),  # a list, digits: their order tells nothing
        (5.5, 5.4, True),  # common words in no order
        (9.0, 9.2, True),
        (6.0, 8.0, False),  # unlikely, but its order tells much
        (4.9, None, False),
        (10.80, None, False),
        (10.81, None, True),  # too short to shuffle: worse than a uniform draw over 49152 tokens
        # The aligned model's own gain is 5.4: a quarter of it is 1.35, three quarters of the way 4.85.
        (4.86, 6.20, True),
        (4.86, 6.22, False),
        (4.84, 6.10, False),
    ],
)
def test_an_answer_is_no_language_where_its_order_gains_nothing_and_it_costs_as_much_as_words_in_none(
    loss: float, mixed: float | None, strange: bool
) -> None:
    found = implausible({"aligned": OWN, "restored": losses({"x": loss}, {} if mixed is None else {"x": mixed})})
    assert found["restored"] == (frozenset("x") if strange else frozenset())
    assert found["aligned"] == frozenset()


@given(st.floats(0.3, 2.0), st.integers(0, 9), st.floats(-0.5, 0.5))
def test_a_part_of_gibberish_in_the_aligned_models_answers_does_not_hide_the_rest(
    own: float, bad: int, noise: float
) -> None:
    by = {str(i): 9.0 if i < bad else own for i in range(20)}
    mixed = {str(i): 9.0 + noise if i < bad else 6.0 for i in range(20)}
    found = implausible({"aligned": losses(by, mixed), "restored": losses({"x": 8.0, "y": own}, {"x": 8.0, "y": 6.0})})
    assert found["restored"] == frozenset("x")
    assert found["aligned"] == frozenset(str(i) for i in range(bad))


def test_a_handful_of_answers_says_nothing_of_what_language_is() -> None:
    few, enough = (losses({str(i): 0.8 for i in range(n)}, {str(i): 6.2 for i in range(n)}) for n in (7, 8))
    assert implausible({"aligned": few, "restored": OWN}) == {"aligned": None, "restored": None}
    assert implausible({"aligned": enough, "restored": OWN}) == {"aligned": frozenset(), "restored": frozenset()}


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_shuffling_keeps_every_character_and_what_is_between_the_words(text: str) -> None:
    found = shuffled(text)
    if found is None:
        return
    assert sorted(found) == sorted(text.strip())
    assert shuffled(text) == found


def test_shuffling_is_of_words_or_of_characters_where_there_are_no_spaces_and_of_nothing_that_is_too_short() -> None:
    text = "one two\nthree  four five six seven eight"
    found = shuffled(text)
    assert found is not None
    assert found != text
    assert sorted(found.split()) == sorted(text.split())
    assert [c for c in found if c.isspace()] == [c for c in text if c.isspace()]
    chinese = "把鸡蛋放进开水里煮八分钟左右，再用冷水冲一冲，就可以剥壳了。"
    assert sorted(shuffled(chinese) or "") == sorted(chinese)
    assert shuffled(chinese) != chinese
    assert [shuffled(text) for text in ("", "OK.", "two words")] == [None, None, None]
    assert sorted((shuffled("three small words") or "").split()) == ["small", "three", "words"]


def test_words_are_shuffled_whole_unless_they_and_what_is_between_them_are_longer_than_fifteen() -> None:
    whole = ["a" * 24, "b" * 24, "c" * 25]  # with two spaces 75 characters in five parts
    assert sorted((shuffled(" ".join(whole)) or "").split()) == whole
    longer = ["a" * 24, "b" * 24, "c" * 26]
    assert sorted((shuffled(" ".join(longer)) or "").split()) != longer


def test_losses_of_other_answers_or_of_an_earlier_version_are_not_taken(tmp_path: Path) -> None:
    from resta.fingerprint import digest

    path = tmp_path / "coherence" / "tuned.json"
    kept = replace(losses({"a": 1.5}, {"a": 5.0}), answers=digest({"a": "text"}))
    write_losses(path, kept)
    assert read_losses(path, {"a": "text"}) == kept
    assert read_losses(path, {"a": "another text"}) is None
    path.write_text(json.dumps({"aligned": "", "answers": kept.answers, "vocabulary": 9, "by_answer": {"a": 1.5}}))
    assert read_losses(path, {"a": "text"}) is None
