"""The parts of the study of SmolLM2, on a random model small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


script = load_script("realign_smollm2")
patching = load_script("patch_smollm2")
SIZES = script.Sizes(
    seeds=(0,),
    harmful=2,
    safe=2,
    items=2,
    texts=2,
    aligned_steps=2,
    tuned_steps=2,
    refused=2,
    answered=1,
    batch=2,
    new_tokens=3,
    text_tokens=4,
)
CELLS = tuple(cell for cell in script.CELLS if cell.task == "arithmetic")  # in full from aligned, LoRA from base
POINTS = len(CELLS) * len(list(script.points())) + 2  # base and aligned


def save_tiny(path: Path) -> None:
    """Write a random two-layer Llama with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, banks under their published names, and a study of one seed over two cells, done."""
    folder = tmp_path_factory.mktemp("study")
    save_tiny(folder / "base")
    for name in ("dangerousqa", "harmfulqa", "catqa_english"):
        (folder / f"{name}.json").write_text(json.dumps([f"How is the {name} lock {i} picked?" for i in range(9)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "CELLS", CELLS)
        study(folder).run()
    return {"folder": folder, "out": folder / "out", "base": folder / "base"}


def study(folder: Path, minutes: float = 10.0) -> Any:
    return script.prepare(folder / "base", folder, folder / "out", SIZES, minutes)


def seed_models(places: dict[str, Path], *, lora: bool) -> Any:
    home = places["out"] / "seed0"
    tuned = "arithmetic-lora-from-base" if lora else "arithmetic-full-from-aligned"
    return script.Models(
        base=places["base"],
        aligned=home / "aligned",
        noise=home / "noise",
        tuned=home / tuned,
        start="base" if lora else "aligned",
        seed=0,
    )


def test_a_stopped_study_goes_on_where_it_was_and_does_nothing_twice(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CELLS", CELLS)
    results = places["out"] / "results.jsonl"
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len({json.dumps(script.key_of(json.loads(line))) for line in lines}) == POINTS
    results.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote
    study(places["folder"], minutes=0.0).run()
    assert results.read_bytes().startswith(b"".join(lines[:-2]))
    assert results.read_bytes().count(b"\n") == len(lines) - 2
    study(places["folder"]).run()

    def facts(data: bytes) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in data.splitlines()]

    assert facts(results.read_bytes()) == facts(whole)


@pytest.mark.parametrize("lora", [False, True])
def test_all_the_way_towards_aligned_is_aligned(places: dict[str, Path], lora: bool) -> None:
    merge = seed_models(places, lora=lora).merge(script.Point(method="interpolation", scale=1.0))
    aligned = load_file(places["out"] / "seed0" / "aligned" / "model.safetensors")
    merged = dict(merge.tensors())
    assert merged.keys() == aligned.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, aligned[name])


def test_the_noise_is_as_long_as_the_safety_vector_in_every_tensor(places: dict[str, Path]) -> None:
    home = places["out"] / "seed0"
    base, aligned, noise = (
        load_file(path / "model.safetensors") for path in (places["base"], home / "aligned", home / "noise")
    )
    for name, value in base.items():
        vector, random = aligned[name] - value.float(), noise[name] - value.float()
        torch.testing.assert_close(random.norm(), vector.norm(), rtol=1e-3, atol=1e-6)
        assert vector.norm() > 0


def test_rounding_both_ends_to_the_same_float32_realises_the_whole_step(places: dict[str, Path]) -> None:
    models = seed_models(places, lora=False)
    exact = script.realised(models, script.Point(method="resta", scale=0.5))
    rounded = script.realised(models, script.Point(method="resta", scale=0.5, dtype="bfloat16"))
    assert exact["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert rounded["cosine"] < exact["cosine"]
    assert rounded["changed"] < exact["changed"]


def test_only_the_answers_tokens_count_and_padding_does_not(places: dict[str, Path]) -> None:
    local = study(places["folder"]).local
    lessons = [
        script.Lesson(prompt=[1, 40, 41], answer=[50, 51, 2]),
        script.Lesson(prompt=[1, 60], answer=[61]),
    ]
    with torch.no_grad():
        losses = script.answer_loss(local.model, lessons)
        alone = []
        for each in lessons:  # the library's own loss, one unpadded row at a time
            ids = torch.tensor([each.prompt + each.answer])
            labels = torch.tensor([[-100] * len(each.prompt) + each.answer])
            alone.append(local.model(input_ids=ids, labels=labels).loss)
    torch.testing.assert_close(losses[:3].mean(), alone[0])
    torch.testing.assert_close(losses[3], alone[1])


def test_the_report_has_every_point_and_no_question(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CELLS", CELLS)
    done = study(places["folder"])
    records = script.complete(done.journal.records)
    assert len(records) == POINTS
    script.write_report(records, done.exam.questions, ["# Head"], tmp_path)
    [table], [facts], plots = (list(tmp_path.glob(f"*{suffix}")) for suffix in (".md", ".json", ".png"))
    text = table.read_text()
    for cell in CELLS:
        assert text.count(f"| {cell.name} |") >= 2  # among the best, and in bfloat16
    assert text.count("| interpolation 0.75 |") == 2 * len(CELLS) + 1  # each cell, in bfloat16, and all together
    assert [plot.read_bytes()[:4] for plot in plots] == [b"\x89PNG"] * 2  # against accuracy and against loss
    written = text + facts.read_text() + (places["out"] / "results.jsonl").read_text()
    assert not [question.text for question in done.exam.questions if question.text in written]


def test_a_seed_that_lacks_a_point_is_left_out_of_the_tables(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CELLS", CELLS)
    records = script.read_records(places["out"] / "results.jsonl")
    second = [record | {"seed": 1} for record in records if record["cell"]]
    assert script.complete([*records, *second]) == [*records, *second]
    assert script.complete([*records, *second[:-1]]) == records


def test_nothing_examined_was_trained_on(places: dict[str, Path]) -> None:
    done = study(places["folder"])
    assert not {question.text for question in done.exam.questions} & set(done.refused)
    for name, task in script.TASKS.items():
        held_out = done.exam.items[name]
        taught = script.draw_items(task, 50, seed="any", without=held_out)
        assert not {item.prompt for item in held_out} & {item.prompt for item in taught}


@pytest.mark.parametrize(
    ("key", "reply", "right"),
    [
        ("19", "Sure! The answer is 19.", True),
        ("19", "12 + 7 = 19", True),
        ("19", "The answer is 190.", False),
        ("19", "19 pens, no, 18", False),
        ("7000", "That is 7,000.", True),
        ("19", "I'm sorry.", False),
        ("river, lamp, horse", "River, lamp, horse.", True),
        ("river, lamp, horse", "river lamp horse", False),
    ],
)
def test_a_right_answer_ends_with_the_number_or_holds_the_list(key: str, reply: str, right: bool) -> None:
    assert script.is_right(script.Item(prompt="", answer="", key=key), reply) is right


def test_the_best_merge_has_the_lowest_asr_of_those_that_cost_little_and_is_tuned_where_all_cost_much() -> None:
    def found(asr: float, refused: float, task: float) -> dict[str, float]:
        return {"ASR": asr, "over-refusal": refused, "task": task}

    tried = {
        (0.0, 0.0): found(0.9, 0.0, 0.7),
        (0.5, 0.0): found(0.5, 0.1, 0.7),
        (1.0, 0.0): found(0.1, 0.2, 0.7),  # refuses what is safe
        (0.0, 0.5): found(0.0, 0.0, 0.6),  # loses the task
    }
    assert patching.best_merge(tried) == (0.5, 0.0)
    assert patching.best_merge({place: each for place, each in tried.items() if place != (0.5, 0.0)}) == (0.0, 0.0)
