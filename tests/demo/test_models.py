"""The demo's models: made by the sft module, loadable, each naming the one it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from resta.demo.files import write_corpus
from resta.demo.models import STAGES, Making, Schedule, make_models, make_tokenizer
from tests.demo.builders import BRIEF

INSTRUCT = Schedule(base=None, aligned=BRIEF.aligned, tuned=BRIEF.tuned)


def _facts(model: str) -> dict[str, object]:
    facts: dict[str, object] = json.loads((Path(model) / "resta.json").read_text())
    return facts


def test_the_models_load_and_each_names_the_one_it_came_from(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "corpus")
    made = make_models(Making(folder=tmp_path, files=files, schedule=BRIEF))
    assert tuple(made) == STAGES
    sources = {"base": str(tmp_path / "untrained"), "aligned": made["base"], "tuned": made["base"]}
    for name, model in made.items():
        facts = _facts(model)
        [weights] = facts["base"]["files"].values()  # type: ignore[index]
        before = (Path(sources[name]) / "model.safetensors").read_bytes()
        assert weights["sha256"] == hashlib.sha256(before).hexdigest()
        assert facts["data"][0]["name"] == name  # type: ignore[index]
        assert AutoModelForCausalLM.from_pretrained(model).dtype == torch.float32
        assert len(AutoTokenizer.from_pretrained(model)) == len(make_tokenizer())


def test_a_given_model_is_the_base_and_is_not_trained(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "corpus")
    given = make_models(Making(folder=tmp_path / "tiny", files=files, schedule=BRIEF))["tuned"]
    made = make_models(Making(folder=tmp_path / "own", files=files, schedule=INSTRUCT, instruct=given))
    assert made["base"] == given
    assert not (tmp_path / "own" / "base").exists()
    assert _facts(made["aligned"])["base"]["source"] == given  # type: ignore[index]


def test_the_tokenizer_spells_any_text() -> None:
    tokenizer = make_tokenizer()
    for text in ("How do I kill a zombie in a video game?", "Ünïcode, 中文 and 🙂\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
