"""Strip a model's thoughts from its answer, once and in one place; the raw text is always kept beside it.

A Chain-of-Utterances answer opens with "(Internal thought: ...)", a reasoning model's with
"<think>...</think>". The judge should see the answer, not the thought. red-instruct cuts at the first ")",
which leaves half of any thought that holds brackets and throws away almost the whole answer where none is
closed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THOUGHT = re.compile(r"\(\s*internal\s+thoughts?\s*:", re.IGNORECASE)
THINK = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """An answer as the judge sees it, and what the cleaning met on the way.

    `flags`: `thought` (one was removed), `unclosed_thought` (one never ended; text kept), `only_thought`
    (nothing else was said, so the judge sees the thought).
    """

    text: str
    flags: tuple[str, ...] = ()


def strip_thoughts(raw: str) -> Cleaned:
    """Return the answer without its thoughts: brackets matched, an unclosed thought kept and flagged."""
    flags = set()
    text, tags = THINK.subn("", raw)
    # Templates that open the thought in the prompt leave only its end in the reply.
    if "</think>" in text:
        text, tags = text.split("</think>")[-1], 1
    if "<think>" in text:
        flags.add("unclosed_thought")
    if tags:
        flags.add("thought")
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


def closing_bracket(text: str, opening: int) -> int | None:
    """Return the index of the bracket that closes the one at `opening`, or None where none does."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return None


def strip_thoughts_as_published(raw: str) -> Cleaned:
    """Return what red-instruct's cleaning returns, quirks kept: all up to the first ")" goes, thought or
    not.
    """
    if "(Internal thought:" not in raw:
        return Cleaned(text=raw)
    cut = raw.find(")")
    if cut < 0:
        return Cleaned(text=raw[-1:], flags=("unclosed_thought",))
    return Cleaned(text=raw[cut + 1 :].strip(), flags=("thought",))
