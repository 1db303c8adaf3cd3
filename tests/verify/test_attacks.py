"""What an attack does to a model in memory, and that nothing of it is left afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
import torch

from resta.errors import RequestError
from resta.redeval.messages import Message, Rendering
from resta.redeval.models import LocalModel, LocalSpec, Prompt, load_local
from resta.verify.attacks import (
    STEPS,
    Contrast,
    Conversation,
    ablated,
    find_directions,
    fine_tuned,
    left_along,
    own_answers,
    residual_writers,
    without,
    without_refusal,
)
from tests.redeval import builders as redeval
from tests.verify.builders import save_planted

HARMFUL = [f"xxxxxxxxxx {i}?" for i in range(24)]
HARMLESS = [f"cakes and tea {i}?" for i in range(24)]
REFUSAL = torch.eye(32)[31]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    path = tmp_path_factory.mktemp("planted") / "model"
    save_planted(path)
    return load_local(LocalSpec(model=str(path), device="cpu"))


def prompts(local: LocalModel, texts: list[str]) -> list[Prompt]:
    return [local.chat_prompt(text, [Message(role="user", content=text)], Rendering()) for text in texts]


def said(local: LocalModel, texts: list[str]) -> set[str]:
    return {answer.text for answer in own_answers(local, prompts(local, texts), 9)}


def contrast(local: LocalModel) -> Contrast:
    return Contrast(
        harmful=prompts(local, HARMFUL[:16]),
        harmless=prompts(local, HARMLESS[:16]),
        choosing_harmful=prompts(local, HARMFUL[16:]),
        choosing_harmless=prompts(local, HARMLESS[16:]),
    )


def conversations(answer: str = "Sure") -> list[Conversation]:
    return [Conversation(messages=(Message(role="user", content=text),), answer=answer) for text in HARMFUL[:8]]


def state(local: LocalModel) -> dict[str, Any]:
    """Return everything that an attack could leave behind: weights, which of them learn, modules."""
    modules = {name: (id(m), type(m), m.training) for name, m in local.model.named_modules()}
    weights = {name: (id(p), p.requires_grad, p.grad) for name, p in local.model.named_parameters()}
    bits = {name: value.detach().clone().view(torch.uint8) for name, value in local.model.state_dict().items()}
    return {"modules": modules, "weights": weights, "bits": bits}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["weights"] == after["weights"]
    assert before["bits"].keys() == after["bits"].keys()
    for name, bits in before["bits"].items():
        assert torch.equal(bits, after["bits"][name]), name


def test_the_planted_model_refuses_what_is_marked_and_answers_all_else(planted: LocalModel) -> None:
    assert said(planted, HARMFUL) == {"I can't"}
    assert said(planted, HARMLESS) == {"Sure"}


def test_a_refusal_in_one_direction_is_undone_by_projecting_it_out_and_not_by_a_random_direction(
    planted: LocalModel,
) -> None:
    with without_refusal(planted, contrast(planted)) as facts:
        assert said(planted, HARMFUL + HARMLESS) == {"Sure"}
    assert facts["layer"] == 1
    assert facts["left"] < 1e-5
    for seed in range(3):
        random = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        with ablated(planted, random / random.norm()):
            assert all("I can't" in answer for answer in said(planted, HARMFUL))


def test_the_direction_is_the_planted_one(planted: LocalModel) -> None:
    found = find_directions(planted, prompts(planted, HARMFUL), prompts(planted, HARMLESS))
    assert list(found) == [1]
    torch.testing.assert_close(found[1], REFUSAL)


def test_models_that_no_layer_tells_apart_have_no_direction(planted: LocalModel) -> None:
    with pytest.raises(RequestError, match="no layer tells harmful prompts from harmless ones"):
        find_directions(planted, prompts(planted, HARMLESS[:4]), prompts(planted, HARMLESS[:4]))


ATTACKS: dict[str, Callable[[LocalModel], AbstractContextManager[Any]]] = {
    "fine-tuned": lambda local: fine_tuned(local, conversations(), Rendering()),
    "ablated": lambda local: ablated(local, REFUSAL),
    "without refusal": lambda local: without_refusal(local, contrast(local)),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks off"])
def test_after_an_attack_every_bit_and_module_is_what_it_was(
    planted: LocalModel, attack: Callable[[LocalModel], AbstractContextManager[Any]], breaks: bool
) -> None:
    before, answers = state(planted), said(planted, HARMFUL)
    try:
        with attack(planted):
            assert said(planted, HARMFUL) != answers
            if breaks:
                raise InterruptedError
    except InterruptedError:
        assert breaks
    assert_same(before, state(planted))
    assert said(planted, HARMFUL) == answers


def test_a_changed_bit_is_seen(planted: LocalModel) -> None:
    before = state(planted)
    weight = planted.model.model.layers[0].self_attn.o_proj.weight
    own = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1e-7
    with pytest.raises(AssertionError):
        assert_same(before, state(planted))
    with torch.no_grad():
        weight[0, 0] = own
    assert_same(before, state(planted))


def test_fine_tuning_takes_ten_steps_that_learn_and_are_the_same_every_time(planted: LocalModel) -> None:
    losses = []
    for _ in range(2):
        with fine_tuned(planted, conversations(), Rendering()) as facts:
            losses.append(facts["losses"])
    assert len(losses[0]) == facts["steps"] == STEPS == 10
    assert losses[0] == losses[1]
    assert losses[0] == sorted(losses[0], reverse=True)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_an_answer_is_learned_with_the_token_that_ends_a_turn_unless_it_was_cut_off(planted: LocalModel) -> None:
    from resta.verify.attacks import encoded

    for ended in (True, False):
        one = Conversation(messages=(Message(role="user", content="Tea?"),), answer="Sure", ended=ended)
        ids, start = encoded(planted, "key", one, Rendering())
        assert planted.tokenizer.decode(ids[start:]) == ("Sure<|end|>" if ended else "Sure")
        assert planted.tokenizer.decode(ids[:start]).endswith("Tea?<|end|><|assistant|>")


# -- architectures -------------------------------------------------------------------------------------------


def architectures() -> Iterator[tuple[str, Any, set[str]]]:
    """Yield small configurations, each with the names of what writes into its residual stream."""
    import transformers as tf

    small = {"vocab_size": 263, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = {**small, "intermediate_size": 64, "num_key_value_heads": 4}
    yield "llama", tf.LlamaConfig(**gated), {"embed_tokens", "self_attn.o_proj", "mlp.down_proj"}
    yield (
        "qwen2, tied",
        tf.Qwen2Config(**gated, tie_word_embeddings=True),
        {
            *("embed_tokens", "self_attn.o_proj", "mlp.down_proj"),
        },
    )
    yield (
        "gpt2",
        tf.GPT2Config(vocab_size=263, n_embd=32, n_layer=2, n_head=4),
        {
            *("wte", "wpe", "attn.c_proj", "mlp.c_proj"),
        },
    )
    yield (
        "gpt-neox",
        tf.GPTNeoXConfig(**small, intermediate_size=64),
        {
            *("embed_in", "attention.dense", "mlp.dense_4h_to_h"),
        },
    )
    yield (
        "opt",
        tf.OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32),
        {
            *("embed_tokens", "embed_positions", "self_attn.out_proj", "fc2"),
        },
    )


@pytest.mark.parametrize(("config", "writers"), [pytest.param(c, w, id=name) for name, c, w in architectures()])
def test_what_writes_into_the_residual_stream_is_found_and_a_direction_leaves_it_whole(
    config: Any, writers: set[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    names = {id(module): name for name, module in model.named_modules()}
    found = {".".join(part for part in names[id(m)].split(".")[-2:]) for m, _ in residual_writers(model)}
    assert all(any(name.endswith(writer) for writer in writers) for name in found), found
    assert len(residual_writers(model)) == sum(2 if "." in w or w == "fc2" else 1 for w in writers)
    with torch.no_grad():  # biases begin at zero, where nothing could be seen of them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    local = LocalModel(model, redeval.save_tokenizer(tmp_path, adds_bos=True), name="it")
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    before = state(local)
    assert left_along(local, direction, prompts(local, HARMFUL[:3]), prompts(local, HARMLESS[:3])) < 1e-3
    assert_same(before, state(local))


def test_an_architecture_that_norms_what_its_blocks_write_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(3 * torch.randn_like(parameter))
    local = LocalModel(model, redeval.save_tokenizer(tmp_path, adds_bos=True), name="it")
    before = state(local)
    with pytest.raises(RequestError, match="were not all found"), without_refusal(local, contrast(local)):
        pass
    assert_same(before, state(local))


def test_experts_whose_weights_are_no_linear_layers_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=263, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.copy_(torch.randn_like(parameter))
    local = LocalModel(model, redeval.save_tokenizer(tmp_path, adds_bos=True), name="it")
    with pytest.raises(RequestError, match="were not all found"), without_refusal(local, contrast(local)):
        pass


def test_layers_that_are_no_layers_are_refused(planted: LocalModel) -> None:
    planted.model.config.num_hidden_layers = 3
    try:
        with pytest.raises(RequestError, match="expected 3 layers, in each of them linear layers with 32 outputs"):
            residual_writers(planted.model)
    finally:
        planted.model.config.num_hidden_layers = 2


@pytest.mark.parametrize("axis", [0, 1])
def test_a_projected_weight_is_the_textbooks(axis: int) -> None:
    weight, direction = torch.randn(8, 8, dtype=torch.float64), torch.nn.functional.normalize(torch.randn(8), dim=0)
    projector = torch.eye(8) - torch.outer(direction, direction)
    wanted = projector @ weight.float() if axis == 0 else weight.float() @ projector
    torch.testing.assert_close(without(weight.float(), direction, axis), wanted)
