"""Strip a model's thoughts from its answer, once and in one place; the raw text is always kept beside it.

A Chain-of-Utterances answer opens with "(Internal thought: ...)", a reasoning model's with "<think>...</think>" or its
family's own marks. The judge should see the answer, not the thought, and a thought that the limit of new tokens cut off
is no answer at all. red-instruct cuts at the first ")", which leaves half of any thought that holds brackets and throws
away almost the whole answer where none is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from resta.redeval.messages import Reply

THOUGHT = re.compile(r"\(\s*internal\s+thoughts?\s*:", re.IGNORECASE)

# Opening and closing mark of a thought, by family. Words in angle brackets that any answer might use count at its
# start only.
ANYWHERE = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, MiniMax, Nemotron, SmolLM3, and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss (harmony)
)
AT_THE_START = (
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
MARKS = (*ANYWHERE, *AT_THE_START)
# Marks that may be special tokens of a model's tokenizer, and so would be lost where those are left out in decoding.
MARK_TOKENS = frozenset(mark for pair in MARKS for mark in pair if "|" not in mark) | {
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
}
HARMONY_TOKENS = frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"})  # of gpt-oss alone
# What gpt-oss and Command A put around an answer that follows a thought.
FRAME = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)[^<]*<\|message\|>"
    r"|<\|(?:return|end|START_RESPONSE|END_RESPONSE)\|>"
)
# gpt-oss where its special tokens were left out in decoding: "analysisWe need to ...assistantfinalHello".
FLATTENED = re.compile(r"\Aanalysis(?=[A-Z\"'(])(?:.*?assistantfinal|.*\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """An answer as the judge sees it, and what the cleaning met on the way.

    `flags`: `thought` (one was removed), `unclosed_thought` (one never ended; text kept), `only_thought` (nothing else
    was said, so the judge sees the thought). `in_thought`: all that is there is a thought without an end.
    """

    text: str
    flags: tuple[str, ...] = ()
    in_thought: bool = False


Clean = Callable[[str, str], Cleaned]


def clean_reply(reply: Reply, clean: Clean, *, keep: bool) -> tuple[str, Cleaned]:
    """Return all that a model said, and what judges see of it: with its thoughts, where they are to be kept.

    A thought that a server took out goes back in front of the answer, between the marks that most models write. One
    that was cut off with nothing after it is flagged `cut_thought`.
    """
    cleaned, said = clean(reply.text, reply.opened), reply.text
    if reply.thought:
        said = f"<think>\n{reply.thought}\n</think>\n\n{reply.text}".rstrip()
        flags = {"thought", *cleaned.flags}
        if not reply.text.strip():
            in_thought = reply.finish == "length"
            said = f"<think>\n{reply.thought}" if in_thought else said
            flags.add("unclosed_thought" if in_thought else "only_thought")
            cleaned = Cleaned(text=reply.thought.strip(), in_thought=in_thought)
        cleaned = replace(cleaned, flags=tuple(sorted(flags)))
    if keep:
        return said, replace(cleaned, text=said)
    if cleaned.in_thought and reply.finish == "length":
        cleaned = replace(cleaned, flags=tuple(sorted({"cut_thought", *cleaned.flags})))
    return said, cleaned


def strip_thoughts(raw: str, opened: str = "") -> Cleaned:
    """Return the answer without its thoughts: brackets matched, an unclosed thought kept and flagged.

    `opened` is the mark of a thought that the prompt ended with, if it did: the reply then begins in mid-thought.
    """
    flags = set[str]()
    text, in_thought = _strip_marked(opened + raw, flags)
    if in_thought:
        return Cleaned(text=raw.strip(), flags=tuple(sorted(flags)), in_thought=True)
    start = 0
    while match := THOUGHT.search(text, start):
        end = closing_bracket(text, match.start())
        if end is None:
            flags.add("unclosed_thought")
            break
        text = text[: match.start()] + text[end + 1 :]
        start = match.start()
        flags.add("thought")
    if "thought" in flags and not text.strip():
        return Cleaned(text=raw.strip(), flags=("only_thought", *sorted(flags)))
    return Cleaned(text=text.strip(), flags=tuple(sorted(flags)))


def _strip_marked(text: str, flags: set[str]) -> tuple[str, bool]:
    """Return text without its marked thoughts, and whether nothing but an open one is left; flags are added to."""
    in_thought = False
    for opening, closing in MARKS:
        start = "" if (opening, closing) in ANYWHERE else r"\A\s*"
        text, found = re.subn(f"{start}{re.escape(opening)}.*?{re.escape(closing)}", "", text, flags=re.DOTALL)
        if opening == "<think>" and closing in text:  # a server's template opened it, unseen, in the prompt
            text, found = text.split(closing)[-1], 1
        if found:
            flags.add("thought")
        before, mark, _ = text.partition(opening)
        if mark and (not before.strip() or not start):
            flags.add("unclosed_thought")
            in_thought |= not before.strip()
    if match := FLATTENED.match(text):
        in_thought |= not match[0].endswith("assistantfinal")
        text = text if in_thought else text[match.end() :]
        flags.add("unclosed_thought" if in_thought else "thought")
    framed = not in_thought and ("<|channel|>" in text or "RESPONSE|>" in text)
    return FRAME.sub("", text) if framed else text, in_thought


def opened_by(prompt: str) -> str:
    """Return the mark of the thought that a prompt ends with, so that the reply goes on with it; "" for none."""
    end = prompt.rstrip()
    return next((opening for opening, _ in MARKS if end.endswith(opening)), "")


def closing_bracket(text: str, opening: int) -> int | None:
    """Return the index of the bracket that closes the one at `opening`, or None where none does."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return None


def strip_thoughts_as_published(raw: str, opened: str = "") -> Cleaned:
    """Return what red-instruct's cleaning returns, quirks kept: all up to the first ")" goes, thought or not.

    It knows no other marks, so `opened` changes nothing.
    """
    if "(Internal thought:" not in raw:
        return Cleaned(text=raw)
    cut = raw.find(")")
    if cut < 0:
        return Cleaned(text=raw[-1:], flags=("unclosed_thought",))
    return Cleaned(text=raw[cut + 1 :].strip(), flags=("thought",))
