"""Which language a text is in, as far as it matters here: whose refusals, known answers and token counts apply.

Told by script and by everyday words, for whole banks rather than single questions; no library's worth of languages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from resta.redeval.questions import Question

OTHER = "other"  # a language that nothing here is made for
# Words that one English question in three holds, and that no other large language in Latin script has.
ENGLISH = {
    "the", "how", "what", "and", "with", "can", "you", "your", "without", "someone", "from", "that", "which", "why",
    "does", "should", "this", "write", "make", "explain", "describe", "create", "give", "to",
}  # fmt: skip
ENGLISH_SHARE = 0.2
FEWEST_WORDS = 4  # of a question that can tell its language
FEWEST_QUESTIONS = 5


def language_of(text: str) -> str:
    """Return "zh", "vi", "other" for a text in another script than these two and Latin, else "en"."""
    letters = [c for c in text.lower() if c.isalpha()]
    kana = sum("\u3040" <= c <= "\u30ff" for c in letters)
    han = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    latin = sum(c < "\u0250" or "\u1e00" <= c <= "\u1eff" for c in letters)
    if letters and han >= 0.3 * len(letters) and kana <= 0.05 * len(letters):
        return "zh"
    if latin < 0.5 * len(letters):
        return OTHER
    # Letters that no other large language in Latin script has: o and u with a horn, and what carries two marks.
    return "vi" if sum(c in "ơư" or "\u1ea0" <= c <= "\u1ef9" for c in letters) >= 2 else "en"


def languages_of(questions: Iterable[Question]) -> dict[str, str]:
    """Return {language: a bank that is in it}, sorted; a bank in Latin script without English words is "other"."""
    banks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        banks[language_of(question.text), question.bank].append(question.text)
    found: dict[str, str] = {}
    for (language, bank), texts in banks.items():
        found.setdefault(OTHER if language == "en" and not is_english(texts) else language, bank)
    return dict(sorted(found.items()))


def is_english(texts: Iterable[str]) -> bool:
    """Whether texts in Latin script are in English, or too few and short to tell."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts if len(text.split()) >= FEWEST_WORDS]
    return len(words) < FEWEST_QUESTIONS or sum(bool(each & ENGLISH) for each in words) >= ENGLISH_SHARE * len(words)


def token_count(text: str) -> float:
    """Return about how many tokens a text makes, at most, where no tokenizer is at hand.

    Taken from a tokenizer that was made for English (SmolLM2's): 512 by this count are 360 to 480 of its tokens in
    English, about 460 in Chinese and 500 in Vietnamese. One that was made for a language needs fewer.
    """
    letter = _letter(text)
    return sum(_weight(character, letter) for character in text)


def cut_to_tokens(text: str, tokens: int) -> str:
    """Return the longest beginning of a text that `token_count` counts as no more than `tokens`."""
    used, letter = 0.0, _letter(text)
    for index, character in enumerate(text):
        used += _weight(character, letter)
        if used > tokens:
            return text[:index]
    return text


def _letter(text: str) -> float:
    others = sum(character > "\x7f" for character in text)
    return 0.25 if others < 0.05 * len(text) else 0.6


def _weight(character: str, letter: float) -> float:
    if character > "\x7f":
        return 1 if character < "\u0800" else 2
    return letter if character.isalpha() or character == " " else 1.0
