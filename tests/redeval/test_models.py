from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import resta
from resta.chat_templates import named_template
from resta.errors import RequestError, UnansweredError
from resta.redeval.messages import Decoding, Message, Rendering
from resta.redeval.models import (
    ROWS,
    LocalModel,
    LocalSpec,
    Prompt,
    check_contexts,
    classify,
    clip_text,
    cut_prompt,
    estimate_seconds,
    fingerprint,
    hidden_ids,
    load_classifier,
    load_local,
    read_tokenizer,
    why_not,
)
from resta.redeval.targets import Target
from tests.redeval.builders import save_llama, save_tokenizer

QUESTIONS = ["a", "how do I bake bread at home?", "why?", "tell me a very long story about a dog " * 3]
GREEDY = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def local(tiny: Path) -> LocalModel:
    return load_local(LocalSpec(model=str(tiny), device="cpu"))


def prompts(local: LocalModel, texts: list[str] = QUESTIONS, rendering: Rendering | None = None) -> list[Prompt]:
    turns = [[Message(role="user", content=text)] for text in texts]
    return [local.chat_prompt(str(i), turn, rendering or Rendering()) for i, turn in enumerate(turns)]


def naive_greedy(local: LocalModel, prompt: Prompt, new_tokens: int) -> list[int]:
    """Argmax one token at a time, without padding, batch or cache."""
    ids = list(prompt.ids)
    for _ in range(new_tokens):
        with torch.inference_mode():
            token = int(local.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token in (2, 6):
            break
    return ids[len(prompt.ids) :]


def test_a_batch_gives_the_answers_that_a_naive_loop_gives(local: LocalModel) -> None:
    asked = prompts(local)
    for prompt, found in zip(asked, local.answer(asked, GREEDY), strict=True):
        ids = naive_greedy(local, prompt, 12)
        stopped = ids[-1] in (2, 6)
        assert found.text == local.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        assert (found.new_tokens, found.finish) == (len(ids), "stop" if stopped else "length")
        assert found.prompt_tokens == len(prompt.ids)


def test_greedy_ignores_the_sampling_settings_of_the_checkpoint(local: LocalModel) -> None:
    assert local.own_config.do_sample
    asked = prompts(local)
    assert local.answer(asked, GREEDY) == local.answer(asked, GREEDY)


def test_every_prompt_has_exactly_one_bos(tiny: Path, tmp_path: Path) -> None:
    templates = ["{{ bos_token }}X", "X", "{{ bos_token }}{{ bos_token }}X"]
    for i, template in enumerate(templates):
        path = tmp_path / str(i)
        shutil.copytree(tiny, path)
        save_tokenizer(path, adds_bos=True, chat_template=template)
        model = load_local(LocalSpec(model=str(path), device="cpu"))
        for prompt in [*prompts(model), model.raw_prompt("r", "<s>raw"), model.raw_prompt("r", "raw")]:
            assert prompt.ids[0] == 1
            assert prompt.ids.count(1) == 1


def test_no_bos_is_added_for_a_tokenizer_that_adds_none(other: Path) -> None:
    model = load_local(LocalSpec(model=str(other), device="cpu"))
    assert model.raw_prompt("r", "raw").ids.count(1) == 0


def test_sampling_depends_on_seed_and_question_and_not_on_the_batch(local: LocalModel) -> None:
    asked = prompts(local)
    sample = Decoding(max_new_tokens=8, mode="sample", temperature=1.0, seed=1)
    together = local.answer(asked, sample)
    alone = [local.answer([prompt], sample)[0] for prompt in asked]
    assert together == alone
    assert together != local.answer(asked, Decoding(max_new_tokens=8, mode="sample", temperature=1.0, seed=2))


def test_keyed_sampling_draws_from_the_models_distribution(local: LocalModel) -> None:
    [prompt] = prompts(local, ["x"])
    keyed = [Prompt(f"k{i}", prompt.text, prompt.ids) for i in range(3000)]
    decoding = Decoding(max_new_tokens=1, mode="sample", temperature=0.7)
    with torch.inference_mode():
        expected = torch.softmax(local.model(torch.tensor([prompt.ids])).logits[0, -1] / 0.7, dim=-1)
    texts = [found.text for found in local.answer(keyed, decoding)]
    likely = int(expected[7:101].argmax()) + 7  # printable ASCII: whole characters
    share = texts.count(local.tokenizer.decode([likely])) / len(texts)
    spread = float((expected[likely] * (1 - expected[likely]) / 3000).sqrt())
    assert abs(share - float(expected[likely])) < 5 * spread


def test_out_of_memory_halves_the_batch_and_every_prompt_is_still_answered(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_local(LocalSpec(model=str(tiny), device="cpu", batch_rows=8))
    real, sizes = model.model.generate, []

    def generate(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        if len(given["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**given)

    monkeypatch.setattr(model.model, "generate", generate)
    asked = prompts(model, [f"question {i}" for i in range(8)])
    found = model.answer(asked, GREEDY)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert model.batch_rows == 2
    monkeypatch.undo()
    assert found == model.answer(asked, GREEDY)


def test_out_of_memory_with_a_single_prompt_is_an_error_that_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_local(LocalSpec(model=str(tiny), device="cpu"))

    def generate(**given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(model.model, "generate", generate)
    with pytest.raises(UnansweredError, match="out of memory on cpu with one prompt"):
        model.answer(prompts(model)[:1], GREEDY)


def test_the_next_batch_holds_the_longest_prompts(local: LocalModel) -> None:
    asked = prompts(local)
    local.batch_rows, before = 2, local.batch_rows
    assert local.take(asked, GREEDY) == [3, 1]
    local.batch_rows = before


def test_next_token_probabilities_are_those_of_an_unpadded_forward_pass(local: LocalModel) -> None:
    asked = prompts(local)
    found = local.next_token_logprobs(asked)
    for row, prompt in zip(found, asked, strict=True):
        with torch.inference_mode():
            expected = torch.log_softmax(local.model(torch.tensor([prompt.ids])).logits[0, -1], dim=-1)
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_the_whole_sequence_loses_its_prompt_as_in_the_published_script(local: LocalModel) -> None:
    asked = prompts(local, rendering=Rendering(generation_prompt=False, whole_sequence=True))
    assert not asked[0].text.endswith("<|assistant|>")
    for prompt, found in zip(asked, local.answer(asked, GREEDY, whole_sequence=True), strict=True):
        assert prompt.text not in found.text
    assert cut_prompt("<s> [INST] a b", "<s>[INST] a") == "b"
    assert cut_prompt("<s>a b", "<s> a") == "<s>a b"  # the published bug: the prompt stays


def test_a_model_without_chat_template_is_refused_and_one_can_be_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "bare" / file).unlink(missing_ok=True)
    save_tokenizer(tmp_path / "bare", adds_bos=True, chat_template=None)
    with pytest.raises(RequestError, match="--chat-template"):
        prompts(load_local(LocalSpec(model=str(tmp_path / "bare"), device="cpu")))
    (tmp_path / "t.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    named = LocalSpec(model=str(tmp_path / "bare"), device="cpu", chat_template=str(tmp_path / "t.jinja"))
    assert prompts(load_local(named))[0].text == "Q: a A:"


def test_the_size_of_batches_is_one_number_that_a_run_records(tiny: Path) -> None:
    facts = [Target(name=str(tiny), local=LocalSpec(model=str(tiny), batch_rows=rows)).facts for rows in (None, 8)]
    assert [each["batch_rows"] for each in facts] == [ROWS, 8]
    local = load_local(LocalSpec(model=str(tiny), device="cpu"))
    assert local.batch_rows == ROWS
    found = local.answer(prompts(local), GREEDY)
    assert {each.rows for each in found} == {ROWS}
    local.batch_rows = 2  # as after a batch that did not fit
    assert {each.rows for each in local.answer(prompts(local), GREEDY)} == {2}


def test_a_chat_template_is_known_by_the_names_that_sft_knows(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    save_tokenizer(tmp_path / "bare", adds_bos=True, chat_template=None)
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    spec = LocalSpec(model=str(tmp_path / "bare"), device="cpu", chat_template="vicuna_v1.1")
    prompt = load_local(spec).chat_prompt("k", [Message(role="user", content="Why?")], Rendering())
    assert prompt.text.endswith("USER: Why? ASSISTANT:")
    (tmp_path / "v.jinja").write_text(named_template("vicuna_v1.1"))
    assert fingerprint(spec) == fingerprint(replace(spec, chat_template=str(tmp_path / "v.jinja")))
    for wrong, why in (("vicuna", "no file and not one of: vicuna_v1.1, chatml"), ("chatml", "needs the token")):
        with pytest.raises(RequestError, match=why):
            load_local(replace(spec, chat_template=wrong))


def test_a_chat_template_that_never_shows_the_question_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ bos_token }}Hello!")
    local = load_local(LocalSpec(model=str(tiny), device="cpu", chat_template=str(tmp_path / "t.jinja")))
    with pytest.raises(RequestError, match="leaves the question out"):
        local.check_template(Rendering())
    load_local(LocalSpec(model=str(tiny), device="cpu")).check_template(Rendering())


def test_a_chat_template_that_raises_is_a_clear_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no system turns') }}")
    spec = LocalSpec(model=str(tiny), device="cpu", chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(RequestError, match="no system turns"):
        prompts(load_local(spec))


def test_a_context_is_refused_without_weights_exactly_where_the_loaded_model_refuses(tmp_path: Path) -> None:
    save_llama(tmp_path / "short", context=64)
    save_tokenizer(tmp_path / "short", adds_bos=True)
    spec = LocalSpec(model=str(tmp_path / "short"), device="cpu")
    local, decoding, refused = load_local(spec), Decoding(max_new_tokens=5), 0
    for size in range(20, 35):  # characters of two tokens each
        requests = [
            (key, [Message(role="user", content=text)]) for key, text in (("one", "?"), ("two", "\u00e9" * size))
        ]
        try:
            for key, messages in requests:
                local.check_length(local.chat_prompt(key, messages, Rendering()), decoding)
        except RequestError:
            refused += 1
            with pytest.raises(RequestError, match=r"1 of 2 prompts .* context of 64; the longest has .* \(two\)"):
                check_contexts(spec, requests, Rendering(), decoding)
        else:
            check_contexts(spec, requests, Rendering(), decoding)
    assert 0 < refused < 15


def test_a_prompt_beyond_the_context_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "short", context=64)
    save_tokenizer(tmp_path / "short", adds_bos=True)
    model = load_local(LocalSpec(model=str(tmp_path / "short"), device="cpu"))
    with pytest.raises(RequestError, match="exceed its context of 64"):
        model.check_length(prompts(model, ["long " * 20])[0], GREEDY)


def test_an_adapter_answers_on_its_base(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="--base"):
        load_local(LocalSpec(model=str(tmp_path / "adapter"), device="cpu"))
    model = load_local(LocalSpec(model=str(tmp_path / "adapter"), base=str(tiny), device="cpu"))
    asked = prompts(model)
    with torch.inference_mode():
        expected = adapted.eval()(torch.tensor([asked[0].ids])).logits[0, -1]
    torch.testing.assert_close(model.next_token_logprobs(asked[:1])[0], torch.log_softmax(expected, -1))


@pytest.mark.parametrize("device", ["cpu", "all"])
def test_an_unwritten_merge_answers_like_the_same_merge_on_disk(
    device: str, tiny: Path, other: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "half.yaml"
    recipe.write_text(
        f"models: {{tuned: '{tiny}', aligned: '{other}'}}\n"
        "start: tuned\nterms: [{delta: aligned - tuned, scale: 0.5}]\n"
    )
    with pytest.raises(RequestError, match="--files"):
        load_local(LocalSpec(model=str(recipe), device="cpu"))
    merged = load_local(LocalSpec(model=str(recipe), files=str(tiny), device=device))
    resta.merge(recipe, tmp_path / "half")
    on_disk = load_local(LocalSpec(model=str(tmp_path / "half"), device="cpu"))
    asked = prompts(merged)
    torch.testing.assert_close(merged.next_token_logprobs(asked), on_disk.next_token_logprobs(asked))
    assert merged.stop_ids == on_disk.stop_ids


def test_a_merge_that_lacks_a_tensor_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(tiny / "model.safetensors")
    state.pop("model.norm.weight")
    spec = LocalSpec(model=str(tmp_path / "r.yaml"), files=str(tiny), device="cpu")
    with pytest.raises(RequestError, match=r"model\.norm\.weight"):
        load_local(spec, tensors=state.items())


def test_what_cannot_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_local(LocalSpec(model=str(tmp_path / "empty"), device="cpu"))
    with pytest.raises(RequestError, match="unknown device"):
        load_local(LocalSpec(model=str(tmp_path), device="toaster"))
    with pytest.raises(RequestError, match="unknown dtype"):
        load_local(LocalSpec(model=str(tmp_path), device="cpu", dtype="int3"))


def test_weights_that_are_torn_and_code_of_a_models_own_are_clear_errors(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "torn")
    data = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match="torn: cannot be loaded"):
        load_local(LocalSpec(model=str(tmp_path / "torn"), device="cpu"))
    shutil.copytree(tiny, tmp_path / "own")
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(RequestError, match="code of its own, which is never run here"):
        load_local(LocalSpec(model=str(tmp_path / "own"), device="cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_model_too_large_and_a_package_that_is_missing_say_what_to_do() -> None:
    assert "--device all" in why_not(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "not installed: needs `bitsandbytes`" in why_not(ImportError("needs\n`bitsandbytes`"))


def test_layers_placed_by_accelerate_answer_like_one_device(local: LocalModel, tiny: Path) -> None:
    spread = load_local(LocalSpec(model=str(tiny), device="all"))  # here that is the CPU
    assert spread.answer(prompts(spread), GREEDY) == local.answer(prompts(local), GREEDY)


def test_a_device_that_is_not_there_and_a_broken_adapter_are_clear_errors(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no CUDA GPU"):
        load_local(LocalSpec(model=str(tiny), device="cuda:3"))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "./nowhere/at/all"}')
    with pytest.raises(RequestError, match=r"on its base ./nowhere/at/all \(--base names another place\)"):
        load_local(LocalSpec(model=str(tmp_path), device="cpu"))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(RequestError, match="not a readable adapter configuration"):
        load_local(LocalSpec(model=str(tmp_path), device="cpu"))


def test_the_fingerprint_of_an_unwritten_merge_follows_the_weights_of_its_models(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    recipe = tmp_path / "restored.yaml"
    recipe.write_text(
        f"models: {{one: {tiny}, other: {{source: {tmp_path / 'other'}}}, far: org/name@main}}\n"
        "start: one\nterms: [{delta: other - far, scale: 1}]\n"
    )
    spec = LocalSpec(model=str(recipe), files=str(tiny))
    before = fingerprint(spec)
    assert fingerprint(spec) == before
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(spec) != before
    recipe.write_text("nothing that names models\n")
    assert fingerprint(spec) != before


def test_a_fingerprint_follows_the_weights_and_not_the_place(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    same, moved = (
        fingerprint(LocalSpec(model=str(tiny))),
        fingerprint(LocalSpec(model=str(tmp_path / "copy"))),
    )
    assert same == moved
    data = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    assert fingerprint(LocalSpec(model=str(tmp_path / "copy"))) != same


def test_special_tokens_spelled_out_in_a_text_lose_their_meaning(local: LocalModel) -> None:
    ids = local.tokenizer(local.without_special("a<|end|><|user|>b</s>"), add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(range(7))


def test_clipping_keeps_the_start_of_a_text(local: LocalModel) -> None:
    assert local.clip("abcdef", 3) == "abc"
    assert local.clip("abc", 3) == "abc"


def test_the_time_estimate_asks_no_question(local: LocalModel) -> None:
    before = local.tokenised
    assert estimate_seconds(local, [40] * 5, GREEDY) > 0
    assert local.tokenised == before


def test_a_classifier_gives_the_shares_of_its_own_head(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(0)
    labels = {0: "fine", 1: "violent", 2: "illegal"}
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=3, id2label=labels)
    model.save_pretrained(tmp_path / "head")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "head")
    texts = ["short", "a much longer text than that"]
    classifier = load_classifier(LocalSpec(model=str(tmp_path / "head"), device="cpu"))
    found = dict(classify(classifier, texts, multi_label=True))
    for i, text in enumerate(texts):
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        assert list(found[i].values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert sum(dict(classify(classifier, texts, multi_label=False))[0].values()) == pytest.approx(1)


def test_a_classifiers_answer_is_clipped_by_its_own_tokens(tiny: Path) -> None:
    tokenizer = read_tokenizer(LocalSpec(model=str(tiny), device="cpu"))
    text = "0123456789 " * 20  # far fewer than four characters per token
    clipped = clip_text(tokenizer, text, 16)
    assert (
        tokenizer(clipped, add_special_tokens=False)["input_ids"]
        == tokenizer(text, add_special_tokens=False)["input_ids"][:16]
    )
    assert clip_text(tokenizer, "short", 16) == "short"


@pytest.mark.parametrize(
    ("special", "kept"),
    [
        (["[THINK]", "[/THINK]", "<|tool|>"], {"[THINK]", "[/THINK]"}),
        (["<|START_THINKING|>", "<|END_THINKING|>"], {"<|START_THINKING|>", "<|END_THINKING|>"}),
        (["<|channel|>", "<|message|>", "<|start|>"], {"<|channel|>", "<|message|>", "<|start|>", "<|end|>"}),
        (["<|message|>", "<|start|>"], set()),  # not gpt-oss: no part of what is said
    ],
)
def test_marks_of_a_thought_outlive_decoding_and_no_other_special_token_does(
    special: list[str], kept: set[str], tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path, adds_bos=True)
    tokenizer.add_tokens(special, special_tokens=True)
    hidden = {tokenizer.convert_ids_to_tokens(token) for token in hidden_ids(tokenizer)}
    assert hidden == set(tokenizer.get_added_vocab()) - kept
