"""Chat templates by name, for a base model that has none: chat_template/*.jinja, which hold nothing but their format.

They are without generation markers so that every engine that reads `chat_template.jinja` can render them.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path

from resta.errors import RequestError

# name -> special tokens that the tokenizer must already have as one token each. The system sentence of vicuna_v1.1 is
# FastChat's, byte for byte: the model was trained on exactly this text.
NAMED: dict[str, tuple[str, ...]] = {
    "vicuna_v1.1": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-2": (),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}


def named_template(name: str) -> str:
    """Return the text of a template of NAMED."""
    return (resources.files("resta") / "chat_template" / f"{name}.jinja").read_text("utf-8")


def read_chat_template(template: str, vocabulary: Collection[str], *, root: Path = Path()) -> str:
    """Return a chat template by its name in NAMED, or a file's text.

    Args:
        template: the name, or a path relative to `root`.
        vocabulary: the tokens of the tokenizer that it is for.
        root: folder that paths start from.

    Raises:
        RequestError: neither a name nor a readable file, or the tokenizer lacks a token that the format needs.
    """
    if template in NAMED:
        missing = [token for token in NAMED[template] if token not in vocabulary]
        if missing:
            raise RequestError(
                f"chat_template {template!r} needs the token {missing[0]!r}, which this tokenizer does not have; "
                "use `vicuna_v1.1`, which needs none, or a tokenizer that has it"
            )
        return named_template(template)
    path = (root / template).expanduser()
    if not path.is_file():
        raise RequestError(f"chat_template {template!r} is no file and not one of: {', '.join(NAMED)}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as a chat template in UTF-8: {error}") from error
