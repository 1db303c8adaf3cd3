"""The regression check's documents: the same everywhere, and each with one right answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from resta.fingerprint import digest
from resta.verify.regression.made import CAPITALS, DAYS, KINDS, MONTHS, OPPOSITES, PAST, PLURALS, documents

SHA256 = "7d83a7b23f0f761af48b6722a6850cc1a03e662ca3343245cfac5e07f9fe9a2a"


def test_the_documents_are_the_same_on_every_machine_and_in_every_process() -> None:
    assert digest(documents()) == SHA256
    code = (
        "from resta.fingerprint import digest; from resta.verify.regression.made import documents;"
        "print(digest(documents()))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        )
        assert done.stdout.decode().strip() == SHA256


def test_there_are_enough_documents_of_many_kinds_and_no_start_stands_twice() -> None:
    found = documents()
    assert len(found) >= 1200
    assert len({document["start"] for document in found}) == len(found)
    assert Counter(document["kind"] for document in found) == {kind: count for kind, (_, count) in KINDS.items()}
    for document in found:
        assert len(set(document["choices"])) == 4, document
    places = Counter(document["answer"] for document in found)
    assert min(places.values()) > 0.2 * len(found), "a model that always takes the same place would do well"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _solve(kind: str, start: str) -> list[str]:
    """Return what is right, worked out from the words of the start alone."""
    words = start.replace(".", "").replace(",", "").split()
    numbers = _numbers(start)
    if kind == "sum":
        return [str(numbers[-2] + numbers[-1] if "+" in start else numbers[-2] - numbers[-1])]
    if kind == "product":
        return [str(numbers[-2] * numbers[-1])]
    if kind == "sequence":
        return [str(2 * numbers[-1] - numbers[-2])]
    if kind == "story":
        return [str(numbers[0] - numbers[1])]
    if kind == "lookup":
        return re.findall(rf"of {words[-2]} is (\w+)\.", start)
    if kind == "moved":
        return re.findall(r"took it to the (\w+)\.", start)
    if kind == "order":  # A is older than B. B is older than C. Of the three, the oldest is
        people = re.findall(r"[A-Z]\w+", start)
        return [people[0] if words[2].removesuffix("er") == words[-2].removesuffix("est") else people[3]]
    if kind == "letter":
        return [words[2][0 if "begins" in words else -1]]
    if kind == "after":
        row = {"day": DAYS, "month": MONTHS, "letter": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}.get(words[1])
        step = 1 if "after" in words else -1
        return [str(int(words[-2]) + step) if row is None else row[list(row).index(words[-2]) + step]]
    if kind == "pattern":
        items = start.rstrip(",").split(", ")
        return [items[len(items) % 3]]
    table, place = {"capital": (CAPITALS, -2), "opposite": (OPPOSITES, -2), "past": (PAST, 2), "plural": (PLURALS, 1)}[
        kind
    ]
    return [right for left, right in (pair.split() for pair in table.split(", ")) if left == words[place]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "member"])
def test_the_right_answer_is_the_one_and_only_that_follows_from_the_start(kind: str) -> None:
    for document in (document for document in documents() if document["kind"] == kind):
        right = document["choices"][document["answer"]]
        found = set(_solve(kind, document["start"])) & set(document["choices"])
        assert found == {right}, document


def test_no_word_is_of_two_sorts() -> None:
    from resta.verify.regression.made import GROUPS

    words = [word for group in GROUPS.values() for word in group.split()]
    assert len(set(words)) == len(words)
    assert {"orange", "cricket", "gold", "silver"}.isdisjoint(words), "a fruit and a colour, an animal and a sport"


def test_the_task_file_lies_beside_what_makes_its_documents() -> None:
    folder = Path(sys.modules["resta.verify.regression.made"].__file__ or "").parent
    assert "!function made.dataset" in (folder / "regression.yaml").read_text()
