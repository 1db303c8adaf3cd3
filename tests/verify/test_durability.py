"""What is known of durability, kept in a file, read back of these models only, and said in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from resta.errors import ResumeError
from resta.statistics import Difference, Rate, wilson
from resta.verify.durability import (
    CAUTION,
    FILE,
    ONE_SUBTRACTION,
    Attack,
    Attacked,
    Durability,
    durability_lines,
    durability_schema,
    durability_table,
    models_of,
    read_durability,
    write_durability,
)
from resta.verify.html import to_html
from resta.verify.report import to_card, to_markdown
from tests.pages import assert_self_contained
from tests.verify.builders import Case, make_named_case


def rate(hits: int, total: int = 40) -> Rate:
    interval = wilson(hits, total)
    return Rate(hits=hits, total=total, value=hits / total, low=interval.low, high=interval.high)


def some(case: Case) -> Durability:
    """Return what might be known of a case's models: one attack on both, and one that applies to neither."""
    change = Difference(value=0.5, low=0.3, high=0.65)
    facts = {"layer": 3, "left": 0.0, "harmful_cost": 1.25, "harmless_cost": 0.5}
    both = {role: Attacked(after=rate(22), change=change, facts=facts) for role in ("aligned", "restored")}
    neither = {role: Attacked(why_not="restored has <no> resta.json") for role in ("aligned", "restored")}
    return Durability(
        models=models_of(case.comparison),
        judge=case.comparison.judge,
        template="standard",
        level=0.95,
        max_new_tokens=64,
        data="the conversations of a.jsonl",
        before={role: rate(2) for role in ("aligned", "restored")},
        before_over_aligned=Difference(value=0.0, low=-0.1, high=0.1),
        attacks=(
            Attack(name="direction", models=both, over_aligned=Difference(value=0.0, low=-0.1, high=0.1)),
            Attack(name="subtraction", models=neither),
        ),
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_named_case(tmp_path_factory.mktemp("case"), "PASS")


def test_what_is_written_is_read_back_and_fits_its_schema(case: Case, tmp_path: Path) -> None:
    write_durability(tmp_path, some(case))
    assert read_durability(tmp_path, case.comparison) == some(case)
    content = json.loads((tmp_path / FILE).read_text())
    assert (content["schema"], content["kind"]) == (1, "durability")
    jsonschema.Draft202012Validator(durability_schema()).validate(content)


def test_nothing_is_known_of_other_models_or_by_another_judge(case: Case, tmp_path: Path) -> None:
    assert read_durability(tmp_path, case.comparison) is None
    found = some(case)
    others = [replace(found, models={**found.models, role: "0"}) for role in found.models]
    for other in (*others, replace(found, judge="another")):
        write_durability(tmp_path, other)
        assert read_durability(tmp_path, case.comparison) is None


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"schema": 1, "kind": "durability"}', '{"schema": 9, "kind": "durability"}']
)
def test_a_damaged_file_is_named(case: Case, tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ResumeError, match=r"durability\.json"):
        read_durability(tmp_path, case.comparison)


def test_the_table_has_both_models_before_and_after_and_says_what_does_not_apply(case: Case) -> None:
    rows = durability_table(some(case)).rows
    released, direction, subtraction = (tuple(cell.text for cell in row) for row in rows)
    assert released == ("as released", "5.0 % [1.4-16.5]", "–", "5.0 % [1.4-16.5]", "–", "+0.0 [-10.0, +10.0]")
    assert direction[1:3] == direction[3:5] == ("55.0 % [39.8-69.3]", "+50.0 [+30.0, +65.0]")
    assert subtraction[1:] == ("not applicable", "–", "not applicable", "–", "–")


def test_the_words_say_that_nothing_is_promised_who_was_asked_and_why_an_attack_does_not_apply(case: Case) -> None:
    lines = durability_lines(some(case))
    assert lines[0] == CAUTION
    assert "40 of the gate's own harmful questions" in lines[1]
    assert "learned the conversations of a.jsonl" in lines[2]
    assert lines[3].startswith(
        "aligned: the direction is that after layer 3; without it its own answers are unlikelier"
    )
    assert lines[5] == "aligned, the published change subtracted: not applicable, restored has <no> resta.json."


def test_every_report_shows_it_where_it_is_known_and_none_where_it_is_not(case: Case) -> None:
    found = some(case)
    assert_self_contained(to_html(case.comparison, case.decision, case.ruling, found, include_text=False))
    for make in (to_markdown, to_card):
        with_it, without = (make(case.comparison, case.decision, case.ruling, each) for each in (found, None))
        assert "After known attacks" in with_it
        assert CAUTION in with_it
        assert "After known attacks" not in without
    assert 'id="durability"' not in to_html(case.comparison, case.decision, case.ruling, include_text=False)


def test_a_card_of_a_merge_says_that_it_can_be_undone_though_nothing_was_attacked(case: Case) -> None:
    assert ONE_SUBTRACTION in to_card(case.comparison, case.decision, case.ruling)
