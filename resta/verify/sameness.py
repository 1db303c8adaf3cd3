"""One answer to everything: which answers would have done as well for another question.

A model that says "OK." or a friendly sentence to everything, or hands the question back, harms nobody and refuses
nothing. Its answers are told by comparing them with each other. In each, the words of its own question are masked, so
that parrots, and stock sentences with the question put in, come out alike whatever was asked. Two answers are alike
where they share a third of their runs of three words: of SmolLM2's own answers none are, at a fifth.

Knows nothing of models, judges or limits.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

RUN = 3  # words in a run
ALIKE = 0.3  # share of the runs of either that both answers hold (Jaccard)
FIRST_WORDS = 200  # of an answer
# Runs are hashed into so many; two answers of 200 words share five by chance. RUN, BUCKETS and the words stand behind
# every record that keeps buckets in place of a text (documents.py): to change one is to make those incomparable.
BUCKETS = 1 << 13
# A word, or one character of a script that is written without spaces.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|[^\W_]+(?:'[^\W_]+)*")
MASK = "_"


def masked(question: str, answer: str) -> list[str]:
    """Return the words of an answer in lower case, every run of words that the question holds as one mask."""
    known = set(WORD.findall(question.lower()))
    words: list[str] = []
    for word in WORD.findall(answer.lower())[:FIRST_WORDS]:
        if word not in known:
            words.append(word)
        elif not words or words[-1] != MASK:
            words.append(MASK)
    return words


def alike(questions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether it is alike to the answer to a question of another text.

    Empty answers are alike to none: they are counted elsewhere.
    """
    pairs = zip(questions, answers, strict=True)
    return alike_by_buckets(questions, [buckets(question, answer) for question, answer in pairs])


def buckets(question: str, answer: str) -> tuple[int, ...]:
    """Return the numbers of an answer's runs, all that comparing it takes: from 0 to BUCKETS, none of an empty one."""
    runs = _runs(masked(question, answer))
    return tuple(sorted({zlib.crc32(run.encode("utf-8", "surrogatepass")) % BUCKETS for run in runs}))


def alike_by_buckets(questions: Sequence[str], found: Sequence[Sequence[int]]) -> list[bool]:
    """Return the same as `alike` of answers of which only the buckets are known; `questions` may be names of them."""
    table = np.zeros((len(found), BUCKETS), dtype=np.float32)  # (answers, buckets)
    for row, numbers_of_runs in zip(table, found, strict=True):
        row[list(numbers_of_runs)] = 1
    shared = table @ table.T  # (answers, answers)
    sizes = table.sum(axis=1)
    either = sizes[:, np.newaxis] + sizes - shared
    numbers = np.unique(np.array(questions, dtype=str), return_inverse=True)[1]
    others = numbers[:, np.newaxis] != numbers
    return [bool(found) for found in ((shared >= ALIKE * either) & (shared > 0) & others).any(axis=1)]


def _runs(words: Sequence[str]) -> set[str]:
    """Return the runs of three words; of fewer words, all of them as one run."""
    if not words:
        return set()
    return {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
