"""The committed counts of planted cases, in few draws."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gate_planted_cases import CASES, Planted, broken, count_case, draw
from resta.verify.decision import Verdict

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_no_planted_case_gets_a_verdict_that_it_must_not_get(number: int) -> None:
    assert broken(CASES[number], count_case(number, 4)) == []


def test_the_counts_would_tell_a_verdict_that_must_not_come() -> None:
    case = Planted(name="x", most={"PASS": 0.025}, least={"FAIL": 0.99})
    assert broken(case, Counter(FAIL=500)) == []
    assert broken(case, Counter(FAIL=495, PASS=5)) == []
    assert broken(case, Counter(PASS=40, FAIL=460)) == ["too many PASS", "too few FAIL"]
    assert broken(Planted(name="x"), Counter(PASS=1, INVALID=499)) == ["too many PASS"]


def test_a_draw_is_the_same_each_time() -> None:
    assert draw(CASES[0], 3) is draw(CASES[0], 3)


def test_the_committed_table_is_of_these_cases_and_of_a_hundred_draws_or_more_of_each() -> None:
    [result] = RESULTS.glob("gate_planted_cases_*.md")
    rows = re.findall(r"^\| (.+?) \| (\d* \| \d* \| \d* \| \d*) \|$", result.read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [case.name for case in CASES]
    names = [verdict.name for verdict in Verdict]
    for case, (_, cells) in zip(CASES, rows, strict=True):
        counts = Counter({name: int(cell or 0) for name, cell in zip(names, cells.split(" | "), strict=True)})
        assert sum(counts.values()) >= 100
        assert broken(case, counts) == []
