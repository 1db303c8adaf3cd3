"""Chat templates by name, for a base model that has none; each is plain Jinja and holds nothing but its format.

They are written without generation markers so that every engine that reads `chat_template.jinja` can render them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from resta.errors import TemplateError

# FastChat's system sentence of vicuna_v1.1, kept byte for byte: the model was trained on exactly this text.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set turns = messages[1:] %}"
    "{% else %}{{ '" + VICUNA_SYSTEM.replace("'", "\\'") + " ' }}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (prefix if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

LLAMA_3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (prefix if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('this format has no system turn') }}{% "
    "endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# name -> (template, special tokens that the tokenizer must already have as one token each)
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "vicuna_v1.1": (VICUNA, ()),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama-2": (LLAMA_2, ()),
    "llama-3": (LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (MISTRAL, ()),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}


def read_chat_template(template: str, vocabulary: Collection[str], *, root: Path = Path()) -> str:
    """Return a chat template by its name in NAMED, or a file's text.

    Args:
        template: the name, or a path relative to `root`.
        vocabulary: the tokens of the tokenizer that it is for.
        root: folder that paths start from.

    Raises:
        TemplateError: neither a name nor a readable file, or the tokenizer lacks a token that the format needs.
    """
    if template in NAMED:
        text, needed = NAMED[template]
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise TemplateError(
                f"chat_template {template!r} needs the token {missing[0]!r}, which this tokenizer does not have; "
                "use `vicuna_v1.1`, which needs none, or a tokenizer that has it"
            )
        return text
    path = (root / template).expanduser()
    if not path.is_file():
        raise TemplateError(f"chat_template {template!r} is no file and not one of: {', '.join(NAMED)}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: cannot be read as a chat template in UTF-8: {error}") from error
