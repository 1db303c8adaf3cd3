"""Conversation -> token ids and a mask of the trained ones; it knows tokenizers and templates, not files or models.

Which characters are trained is found in the rendered text, and carried to tokens by their character offsets: no text is
split and tokenised in pieces, so the ids are exactly those that the model will see. Two ways lead to the characters:

- the template marks them itself with `{% generation %}`;
- or the same role sequence is rendered with a placeholder in every turn. The placeholders' places give the
  template's own text around each turn; putting the real turns in must reproduce the real rendering, or the
  template is refused.

Trained are the assistant's words and the token that ends its turn: all that the model must produce after the generation
prompt, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resta.chat_templates import NAMED, read_chat_template
from resta.errors import RequestError
from resta.sft.data import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample: token ids, which of them are trained, and how it was shortened, if it was."""

    ids: np.ndarray[Any, np.dtype[np.int32]]  # (tokens,)
    trained: np.ndarray[Any, np.dtype[np.bool_]]  # (tokens,)
    cut: str | None = None  # None, "at a turn" or "inside an answer"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One conversation as text, and the trained characters of it, one span an assistant turn."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Skeleton:
    """A template's own text around the turns of a role sequence: `pieces[i]` is before turn `order[i]`."""

    pieces: tuple[str, ...]  # one more than turns
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer with the template it will be trained, saved and used with."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    turn_end: str  # the text that closes an assistant turn, such as "</s>" or "<|im_end|>"
    system_turn: str  # "refuse", "into_user" or "drop"
    specials: frozenset[str]
    skeletons: dict[tuple[str, ...], Skeleton] = field(default_factory=dict)
    prompts: dict[tuple[str, ...], str | None] = field(default_factory=dict)


# -- opening -------------------------------------------------------------------------------------------------


def open_chat(
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    root: Path,
    pad_token: str | None,
    system_turn: str = "refuse",
) -> Chat:
    """Fit a tokenizer with its template and pad token, and check that the two can be trained with exactly.

    `template` is a name of `chat_templates.NAMED`, a path to a `.jinja` file (relative to `root`), or None for the
    tokenizer's own. Raises RequestError.
    """
    if not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, and masking needs them; save the "
            "tokenizer as "
            "tokenizer.json (a fast tokenizer)"
        )
    _set_pad(tokenizer, pad_token)
    text = _with_one_bos(tokenizer, _template_text(tokenizer, template, root))
    tokenizer.chat_template = text
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials = frozenset(t for t in {*tokenizer.all_special_tokens, *added} if t.strip())
    bare = Chat(tokenizer=tokenizer, template=text, turn_end="", system_turn=system_turn, specials=specials)
    return Chat(
        tokenizer=tokenizer,
        template=text,
        turn_end=_turn_end(bare),
        system_turn=system_turn,
        specials=specials,
    )


def _template_text(tokenizer: PreTrainedTokenizerBase, template: str | None, root: Path) -> str:
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise RequestError(
                "the tokenizer has no chat template; set `chat_template` to a .jinja file or one of: "
                + ", ".join(NAMED)
            )
        return str(own)
    return read_chat_template(template, tokenizer.get_vocab(), root=root)


def _set_pad(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> None:
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise RequestError(f"pad_token {pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        choices = [t for t in (tokenizer.unk_token, tokenizer.eos_token) if t]
        raise RequestError(
            "the tokenizer has no pad token; set `pad_token` to a token that it has"
            + (f", for example {choices[0]!r}" if choices else "")
            + " (any will do: padding is masked by length, never by its id)"
        )


def _with_one_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the template so that it writes the BOS that the tokenizer itself would add to plain text.

    The saved template then renders, in every engine, the text that was trained on.
    """
    bos = tokenizer.bos_token
    plain = tokenizer("x")["input_ids"]
    if not bos or not plain or plain[0] != tokenizer.bos_token_id:
        return template
    rendered = _render(tokenizer, template, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
    return template if rendered.startswith(bos) else "{{- bos_token -}}" + template


def _turn_end(chat: Chat) -> str:
    """Return what closes an assistant turn: the text after the last one, to its first special token."""
    skeleton = _skeleton(chat, ("user", "assistant"))
    tail = skeleton.pieces[-1]
    ends = [tail.index(token) + len(token) for token in chat.specials if token in tail]
    end = tail[: min(ends)] if ends else tail.rstrip()
    if not end.strip():
        raise RequestError(
            "the chat template writes nothing after an assistant turn, so the model could never learn to "
            "stop; add the end-of-turn token to it, or set `chat_template` to one of: " + ", ".join(NAMED)
        )
    return end


# -- rendering -----------------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, prompt: bool = False
) -> str:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(f"the chat template cannot render this conversation: {error}") from None
    return text


def _placeholder(number: int) -> str:
    return f"resta{number:05d}turn"


def _skeleton(chat: Chat, roles: tuple[str, ...]) -> Skeleton:
    if roles in chat.skeletons:
        return chat.skeletons[roles]
    marks = [_placeholder(i) for i in range(len(roles))]
    text = _render(
        chat.tokenizer,
        chat.template,
        [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)],
    )
    for role, mark in zip(roles, marks, strict=True):
        if text.count(mark) != 1:
            fix = "; set `system_turn: into_user`" if role == "system" else ""
            raise RequestError(f"the chat template writes the {role} turn {text.count(mark)} times, not once{fix}")
    order = tuple(sorted(range(len(roles)), key=lambda i: text.index(marks[i])))
    pieces, place = [], 0
    for turn in order:
        start = text.index(marks[turn])
        pieces.append(text[place:start])
        place = start + len(marks[turn])
    skeleton = Skeleton(pieces=(*pieces, text[place:]), order=order)
    chat.skeletons[roles] = skeleton
    return skeleton


def _prompt_skeleton(chat: Chat, roles: tuple[str, ...]) -> str | None:
    """Return the rendering of placeholders up to the generation prompt, or None where the template cannot."""
    if roles not in chat.prompts:
        turns = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
        try:
            chat.prompts[roles] = _render(chat.tokenizer, chat.template, turns, prompt=True)
        except RequestError:
            chat.prompts[roles] = None
    return chat.prompts[roles]


def _keep(text: str) -> str:
    return text


# What templates do to a turn's text before they write it.
TRIMS: tuple[Callable[[str], str], ...] = (_keep, str.strip, str.rstrip, str.lstrip)


def fold_system(messages: Sequence[Message], system_turn: str) -> tuple[Message, ...]:
    """Return the conversation with its system turn kept, dropped, or put before the first user turn."""
    if messages[0]["role"] != "system" or system_turn == "refuse":
        return tuple(messages)
    system, first, *rest = messages
    if system_turn == "into_user":
        first = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
    return (first, *rest)


def render(chat: Chat, messages: Sequence[Message]) -> Rendered:
    """Render a conversation and find its trained characters. Raises RequestError.

    Each span runs from the end of the generation prompt to the end of the turn-end token.
    """
    messages = fold_system(messages, chat.system_turn)
    if GENERATION.search(chat.template):
        return _render_marked(chat, messages)
    roles = tuple(m["role"] for m in messages)
    skeleton = _skeleton(chat, roles)
    text = _render(chat.tokenizer, chat.template, messages)
    contents = _fill(skeleton, messages, text)
    if contents is None:
        raise RequestError(
            "the chat template changes what a turn says, so its tokens cannot be told apart; mark the "
            "assistant turn with {% generation %} ... {% endgeneration %} in a `chat_template` file"
        )
    spans, place = [], 0
    for piece, turn in zip(skeleton.pieces, skeleton.order, strict=False):
        start = place + len(piece)
        place = start + len(contents[turn])
        if roles[turn] == "assistant":
            lead = len(piece) - _prompt_length(chat, skeleton, roles, turn)
            end = place + (len(chat.turn_end) if text.startswith(chat.turn_end, place) else 0)
            spans.append((start - lead, end))
    return Rendered(text=text, spans=tuple(spans))


def control_token(chat: Chat, messages: Sequence[Message]) -> str | None:
    """Return a control token that a turn spells out, which would be read as one, or None."""
    return next((token for m in messages for token in chat.specials if token in m["content"]), None)


def _fill(skeleton: Skeleton, messages: Sequence[Message], text: str) -> list[str] | None:
    for trim_answer in TRIMS:
        for trim_other in TRIMS:
            contents = [(trim_answer if m["role"] == "assistant" else trim_other)(m["content"]) for m in messages]
            parts = [piece + contents[turn] for piece, turn in zip(skeleton.pieces, skeleton.order, strict=False)]
            if "".join([*parts, skeleton.pieces[-1]]) == text:
                return contents
    return None


def _prompt_length(chat: Chat, skeleton: Skeleton, roles: tuple[str, ...], turn: int) -> int:
    """Return how much of the text before an answer the generation prompt writes; the rest is trained."""
    position = skeleton.order.index(turn)
    piece = skeleton.pieces[position]
    prompt = _prompt_skeleton(chat, roles[:turn])
    if prompt is None or position == 0:
        return len(piece)
    mark = _placeholder(skeleton.order[position - 1])
    written = prompt.partition(mark)[2]
    return len(written) if mark in prompt and piece.startswith(written) else len(piece)


def _render_marked(chat: Chat, messages: Sequence[Message]) -> Rendered:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marks = render_jinja_template(
            conversations=[[dict(m) for m in messages]],
            chat_template=chat.template,
            return_assistant_tokens_mask=True,
            **chat.tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(f"the chat template cannot render this conversation: {error}") from None
    text, spans = texts[0], []
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise RequestError("the chat template drops the system turn; set `system_turn: into_user`")
    for start, end in marks[0]:
        # Markers stop before the token that ends the turn, after it, or after the line break that follows it.
        tail = text[start:end].rstrip()
        stop = start + len(tail) if tail.endswith(chat.turn_end) else end
        if stop == end and text.startswith(chat.turn_end, end):
            stop += len(chat.turn_end)
        spans.append((start, stop))
    return Rendered(text=text, spans=tuple(spans))


# -- tokens --------------------------------------------------------------------------------------------------


def tokenize(chat: Chat, rendered: Rendered) -> Encoded:
    """Tokenise rendered text once; a token is trained if it shares a character with a trained span."""
    coded = chat.tokenizer(
        rendered.text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids = np.asarray(coded["input_ids"], dtype=np.int32)
    offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, end in rendered.spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return Encoded(ids=ids, trained=trained)


def encode(chat: Chat, messages: Sequence[Message], max_length: int) -> Encoded | None:
    """Return a conversation as at most `max_length` tokens, or None if no trained token would be left.

    A longer one ends after the last whole answer that fits; only if not even the first answer fits is it cut inside.
    """
    whole = tokenize(chat, render(chat, messages))
    if len(whole.ids) <= max_length:
        return whole if whole.trained.any() else None
    answers = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    for end in reversed(answers[:-1]):
        shorter = tokenize(chat, render(chat, messages[:end]))
        if len(shorter.ids) <= max_length:
            return Encoded(ids=shorter.ids, trained=shorter.trained, cut="at a turn")
    ids, trained = whole.ids[:max_length], whole.trained[:max_length]
    return Encoded(ids=ids, trained=trained, cut="inside an answer") if trained.any() else None
