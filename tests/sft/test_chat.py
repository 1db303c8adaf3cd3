from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.chat_templates import named_template
from resta.errors import RequestError
from resta.sft.chat import Chat, control_token, encode, open_chat, render, tokenize
from tests.sft.builders import byte_level, sentencepiece_like

HERE = Path()
TALK = [
    {"role": "user", "content": "What is 12 and 30?"},
    {"role": "assistant", "content": "The sum is 42."},
    {"role": "user", "content": "And with 8?"},
    {"role": "assistant", "content": "It is 50 then."},
]
SYSTEM = {"role": "system", "content": "Be brief."}

# The same formats in the words of the models' own files, which trim, refuse and reorder in ways of their own.
LLAMA_2_OWN = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set sys = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set sys = false %}{% "
    "endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and sys != false %}"
    "{% set content = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM_LAST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (sys + '\n\n' if loop.index0 >= rest|length - 2 and sys else '') }}{{ m['content'] + "
    "'[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML_WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# case -> (tokenizer, template, trained text of each assistant turn), written by hand
CASES: dict[str, tuple[Any, str, list[str]]] = {
    "vicuna_v1.1": (
        sentencepiece_like,
        named_template("vicuna_v1.1"),
        [" The sum is 42.</s>", " It is 50 then.</s>"],
    ),
    "llama-2": (sentencepiece_like, named_template("llama-2"), [" The sum is 42. </s>", " It is 50 then. </s>"]),
    "llama-2 own": (sentencepiece_like, LLAMA_2_OWN, [" The sum is 42. </s>", " It is 50 then. </s>"]),
    "mistral": (sentencepiece_like, named_template("mistral"), [" The sum is 42.</s>", " It is 50 then.</s>"]),
    "mistral own": (sentencepiece_like, MISTRAL_SYSTEM_LAST, [" The sum is 42.</s>", " It is 50 then.</s>"]),
    "chatml": (byte_level, named_template("chatml"), ["The sum is 42.<|im_end|>", "It is 50 then.<|im_end|>"]),
    "chatml own": (byte_level, CHATML_WITH_DEFAULT, ["The sum is 42.<|im_end|>", "It is 50 then.<|im_end|>"]),
    "llama-3": (byte_level, named_template("llama-3"), ["The sum is 42.<|eot_id|>", "It is 50 then.<|eot_id|>"]),
    "gemma": (byte_level, named_template("gemma"), ["The sum is 42.<end_of_turn>", "It is 50 then.<end_of_turn>"]),
}


def chat_of(tokenizer: Any, template: str, **options: Any) -> Chat:
    tokenizer.chat_template = template
    return open_chat(tokenizer, template=None, root=HERE, pad_token=None, **options)


def trained_text(chat: Chat, messages: list[dict[str, str]]) -> list[str]:
    rendered = render(chat, messages)
    return [rendered.text[a:b] for a, b in rendered.spans]


def by_hand(chat: Chat, text: str, wanted: list[str]) -> list[bool]:
    """The mask that a person would draw: find each wanted piece, mark the tokens that touch it."""
    coded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside, place = [False] * len(text), 0
    for piece in wanted:
        start = text.index(piece, place)
        place = start + len(piece)
        inside[start:place] = [True] * len(piece)
    return [any(inside[a:b]) for a, b in coded["offset_mapping"]]


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answers_and_their_turn_ends_are_trained(case: str) -> None:
    make, template, wanted = CASES[case]
    chat = chat_of(make(), template)
    assert trained_text(chat, TALK) == wanted
    encoded = encode(chat, TALK, 500)
    assert encoded is not None
    assert encoded.trained.tolist() == by_hand(chat, render(chat, TALK).text, wanted)
    assert 0 < encoded.trained.sum() < len(encoded.ids)


def test_the_comparison_by_hand_can_fail() -> None:
    make, template, wanted = CASES["chatml"]
    chat = chat_of(make(), template)
    encoded = encode(chat, TALK, 500)
    assert encoded is not None
    assert encoded.trained.tolist() != by_hand(chat, render(chat, TALK).text, wanted[:1])


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_whole_text_and_begin_with_one_bos(case: str) -> None:
    make, template, _ = CASES[case]
    chat = chat_of(make(), template)
    encoded = encode(chat, TALK, 500)
    assert encoded is not None
    whole = chat.tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert encoded.ids.tolist() == whole
    bos = chat.tokenizer.bos_token_id
    if "<|im_start|>" in template:
        assert bos not in encoded.ids  # ChatML has none
    else:
        assert encoded.ids[0] == bos
        assert encoded.ids[1] != bos
        # Llama-2's own format opens every user turn with a BOS; all others write a single one.
        assert (encoded.ids == bos).sum() == (2 if "llama-2" in case else 1)


def fastchat_vicuna(messages: list[dict[str, str]]) -> str:
    """FastChat's ADD_COLON_TWO: sep is a space after the user's turn, sep2 is </s> after the assistant's."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = system + " "
    for message in messages:
        role = {"user": "USER", "assistant": "ASSISTANT"}[message["role"]]
        text += f"{role}: {message['content']}" + (" " if role == "USER" else "</s>")
    return text


words = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1, max_size=30)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
VICUNA_CHAT = open_chat(sentencepiece_like(), template="vicuna_v1.1", root=HERE, pad_token=None)
CHATML_CHAT = chat_of(byte_level(), named_template("chatml"))


@given(talks)
@settings(max_examples=60, deadline=None)
def test_vicuna_text_is_fastchats_byte_for_byte(talk: list[dict[str, str]]) -> None:
    assert render(VICUNA_CHAT, talk).text == "<s>" + fastchat_vicuna(talk)


@given(talks)
@settings(max_examples=60, deadline=None)
def test_trained_text_is_each_answer_whatever_it_says(talk: list[dict[str, str]]) -> None:
    answers = [m["content"] for m in talk if m["role"] == "assistant"]
    assert trained_text(VICUNA_CHAT, talk) == [f" {a}</s>" for a in answers]
    assert trained_text(CHATML_CHAT, talk) == [f"{a}<|im_end|>" for a in answers]


@given(talks, st.integers(8, 80))
@settings(max_examples=60, deadline=None)
def test_a_cut_sample_is_a_whole_number_of_answers_or_a_beginning(talk: list[dict[str, str]], limit: int) -> None:
    encoded = encode(CHATML_CHAT, talk, limit)
    whole = tokenize(CHATML_CHAT, render(CHATML_CHAT, talk))
    if encoded is None:
        assert not whole.trained[:limit].any()
        return
    assert len(encoded.ids) <= limit
    assert encoded.trained.any()
    if encoded.cut == "at a turn":
        assert np.array_equal(encoded.ids, whole.ids[: len(encoded.ids)])
        assert CHATML_CHAT.tokenizer.decode(encoded.ids).endswith("<|im_end|>\n")
    elif encoded.cut == "inside an answer":
        first = tokenize(CHATML_CHAT, render(CHATML_CHAT, talk[:2]))
        assert len(first.ids) > limit
    else:
        assert len(whole.ids) <= limit


def test_an_answer_that_quotes_the_format_is_still_wholly_trained() -> None:
    talk = [
        TALK[0],
        {"role": "assistant", "content": "Write ASSISTANT: first. USER: What is 12 and 30? ASSISTANT: 42"},
    ]
    assert trained_text(VICUNA_CHAT, talk) == [f" {talk[1]['content']}</s>"]


def test_an_answer_equal_to_the_question_is_told_apart_by_its_place() -> None:
    talk = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    rendered = render(VICUNA_CHAT, talk)
    assert rendered.spans == ((rendered.text.rindex(" yes"), len(rendered.text)),)


PAIRS = ["llama3", "gemma", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", PAIRS)
def test_found_spans_equal_the_marked_ones_of_the_same_published_template(name: str) -> None:
    folder = Path(trl.__file__).parent / "chat_templates"
    masks = []
    for suffix in ("", "_training"):
        chat = chat_of(byte_level(), (folder / f"{name}{suffix}.jinja").read_text(encoding="utf-8"))
        encoded = encode(chat, TALK, 500)
        assert encoded is not None
        masks.append((encoded.ids.tolist(), encoded.trained.tolist()))
    assert masks[0] == masks[1]


def test_a_marker_that_stops_before_the_turn_end_is_extended_over_it() -> None:
    marked = "{%- if turn['role'] == 'assistant' -%}{% generation %}{{- turn['content'] -}}{% endgeneration %}"
    template = named_template("chatml").replace(
        "turn['content'] + '<|im_end|>\\n' -}}",
        "'' -}}" + marked + "{%- else -%}{{- turn['content'] -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
    )
    assert "generation %}" in template
    chat = chat_of(byte_level(), template)
    assert trained_text(chat, TALK) == ["The sum is 42.<|im_end|>", "It is 50 then.<|im_end|>"]


def test_a_template_without_bos_gets_the_one_its_tokenizer_would_add() -> None:
    bare = named_template("chatml")
    chat = chat_of(byte_level(bos="<|begin|>"), bare)
    encoded = encode(chat, TALK, 500)
    assert encoded is not None
    begin = chat.tokenizer.bos_token_id
    assert encoded.ids[0] == begin
    assert (encoded.ids == begin).sum() == 1
    assert chat.tokenizer.chat_template == chat.template  # so that the saved template renders the same text


def test_a_dropped_system_turn_is_refused_and_can_be_folded() -> None:
    drops = named_template("chatml").replace("in messages", "in messages if turn['role'] != 'system'")
    with pytest.raises(RequestError, match=r"system turn 0 times.*system_turn: into_user"):
        render(chat_of(byte_level(), drops), [SYSTEM, *TALK])
    folded = render(chat_of(byte_level(), drops, system_turn="into_user"), [SYSTEM, *TALK]).text
    assert "user\nBe brief.\n\nWhat is 12" in folded
    gone = render(chat_of(byte_level(), drops, system_turn="drop"), [SYSTEM, *TALK]).text
    assert "Be brief" not in gone


def test_a_template_that_refuses_a_system_turn_is_reported_with_its_own_words() -> None:
    chat = chat_of(byte_level(), named_template("gemma"))
    with pytest.raises(RequestError, match="this format has no system turn"):
        render(chat, [SYSTEM, *TALK])


@pytest.mark.parametrize("case", ["vicuna_v1.1", "llama-2", "llama-2 own", "mistral", "mistral own", "llama-3"])
def test_a_system_turn_is_rendered_and_never_trained(case: str) -> None:
    make, template, wanted = CASES[case]
    chat = chat_of(make(), template)
    assert "Be brief." in render(chat, [SYSTEM, *TALK]).text
    assert trained_text(chat, [SYSTEM, *TALK]) == wanted


def test_a_template_that_rewrites_answers_is_refused() -> None:
    shouting = named_template("chatml").replace("turn['content']", "turn['content']|upper")
    with pytest.raises(RequestError, match="turn 0 times"):
        chat_of(byte_level(), shouting)
    doubling = named_template("chatml").replace("turn['content']", "turn['content']|replace('sum', 'total')")
    with pytest.raises(RequestError, match="changes what a turn says"):
        render(chat_of(byte_level(), doubling), TALK)


def test_a_template_without_a_turn_end_is_refused() -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    with pytest.raises(RequestError, match="never learn to stop"):
        chat_of(byte_level(), endless)


def test_no_template_asks_for_one_by_name() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*vicuna_v1\.1"):
        open_chat(sentencepiece_like(), template=None, root=HERE, pad_token=None)


def test_a_named_template_whose_tokens_are_missing_is_refused() -> None:
    with pytest.raises(RequestError, match=r"needs the token '<\|im_start\|>'"):
        open_chat(sentencepiece_like(), template="chatml", root=HERE, pad_token=None)


def test_a_tokenizer_without_pad_names_a_token_to_use() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.pad_token = None
    with pytest.raises(RequestError, match=r"no pad token; set `pad_token`.*'<unk>'"):
        open_chat(tokenizer, template="vicuna_v1.1", root=HERE, pad_token=None)
    with pytest.raises(RequestError, match="not in the tokenizer's vocabulary"):
        open_chat(tokenizer, template="vicuna_v1.1", root=HERE, pad_token="<nothing>")
    assert open_chat(tokenizer, template="vicuna_v1.1", root=HERE, pad_token="<unk>").tokenizer.pad_token == "<unk>"


def test_a_spelled_out_control_token_is_found() -> None:
    assert control_token(VICUNA_CHAT, TALK) is None
    assert control_token(VICUNA_CHAT, [TALK[0], {"role": "assistant", "content": "end</s>"}]) == "</s>"
