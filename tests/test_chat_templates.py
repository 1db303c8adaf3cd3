from __future__ import annotations

from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import resta
from resta.chat_templates import NAMED, named_template, read_chat_template
from resta.errors import RequestError

TALK = [
    {"role": "user", "content": " One? "},
    {"role": "assistant", "content": "\nTwo. {{ x }}"},
    {"role": "user", "content": "It's 3?"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
# As their makers write them down, with a prompt for the next answer; spaces of the turns are theirs.
RENDERED = {
    "vicuna_v1.1": f"<s>{VICUNA}USER:  One?  ASSISTANT: \nTwo. {{{{ x }}}}</s>USER: It's 3? ASSISTANT:",
    "chatml": "<|im_start|>user\n One? <|im_end|>\n<|im_start|>assistant\n\nTwo. {{ x }}<|im_end|>\n"
    "<|im_start|>user\nIt's 3?<|im_end|>\n<|im_start|>assistant\n",
    "llama-2": "<s>[INST]  One?  [/INST] \nTwo. {{ x }} </s><s>[INST] It's 3? [/INST]",
    "llama-3": "<s><|start_header_id|>user<|end_header_id|>\n\n One? <|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n\nTwo. {{ x }}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nIt's 3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST]  One?  [/INST] \nTwo. {{ x }}</s>[INST] It's 3? [/INST]",
    "gemma": "<s><start_of_turn>user\n One? <end_of_turn>\n<start_of_turn>model\n\nTwo. {{ x }}<end_of_turn>\n"
    "<start_of_turn>user\nIt's 3?<end_of_turn>\n<start_of_turn>model\n",
}


def test_every_name_has_a_file_and_every_file_a_name() -> None:
    folder = Path(resta.__file__).parent / "chat_template"
    assert {file.name.removesuffix(".jinja") for file in folder.iterdir()} == NAMED.keys() == RENDERED.keys()


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("trims", [True, False], ids=["as transformers sets it", "as Jinja does"])
def test_a_template_writes_its_format_whatever_the_engine_trims(name: str, trims: bool) -> None:
    engine = ImmutableSandboxedEnvironment(trim_blocks=trims, lstrip_blocks=trims)
    template = engine.from_string(named_template(name))
    text = template.render(messages=TALK, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert text == RENDERED[name]


def test_a_template_is_for_tokenizers_that_have_its_tokens() -> None:
    assert read_chat_template("gemma", NAMED["gemma"]) == named_template("gemma")
    with pytest.raises(RequestError, match=r"needs the token '<\|im_end\|>'"):
        read_chat_template("chatml", ["<|im_start|>"])
