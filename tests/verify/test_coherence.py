from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("inspect_ai")

from resta.redeval.models import LocalModel, LocalSpec, Prompt, load_local
from resta.verify.coherence import FIRST_TOKENS, Losses, answer_losses, read_losses, write_losses
from tests.redeval.conftest import save_model, save_tokenizer


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
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


def test_an_answer_about_as_bad_as_a_uniform_guess_is_no_language_and_a_short_one_must_be_worse() -> None:
    bad = {"worse": math.log(100) + 0.01, "as bad": math.log(100), "better": 0.69 * math.log(100)}
    losses = Losses(aligned="", answers="", vocabulary=100, by_answer=bad)
    assert [losses.unlike_language(key, 40) for key in bad] == [True, True, False]
    assert [losses.unlike_language(key, 3) for key in bad] == [True, False, False]
    assert [losses.unlike_language(key, None) for key in bad] == [True, False, False]
    assert not losses.unlike_language("without tokens", 0)


def test_losses_of_other_answers_are_not_taken(tmp_path: Path) -> None:
    from resta.redeval.asks import digest

    path = tmp_path / "coherence" / "tuned.json"
    kept = Losses(aligned="x", answers=digest({"a": "text"}), vocabulary=9, by_answer={"a": 1.5})
    write_losses(path, kept)
    assert read_losses(path, {"a": "text"}) == kept
    assert read_losses(path, {"a": "another text"}) is None
