"""Every decision leaves a line, and a verdict under another policy is never overwritten in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resta.journal import read_lines
from resta.verify.gate import decide
from resta.verify.policy import read_policy
from resta.verify.trace import DECISIONS, SHOWN, make_ruling, with_earlier
from resta.verify.views import VIEWS, remove_reports, write_reports
from tests.verify.builders import Case, make_named_case

LAX = "asr: {max_upper: 0.9}\nunparsed: {max: 0.5}\n"
VERSIONS = {"resta": "0.1.0"}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_named_case(tmp_path_factory.mktemp("case"), "FAIL")


def decided(out: Path, case: Case, policy_file: Path | None = None) -> str:
    """Decide as the command does, write all reports, and return the verdict."""
    policy = read_policy(policy_file)
    ruling = make_ruling(out, policy, policy_file, VERSIONS)
    decision = with_earlier(case.comparison, decide(case.comparison, policy), ruling)
    write_reports(out, case.comparison, decision, ruling, include_text=False)
    return decision.verdict.name


@pytest.fixture
def lax(tmp_path: Path) -> Path:
    path = tmp_path / "policies" / "lax.yaml"
    path.parent.mkdir()
    path.write_text(LAX)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def lines(out: Path) -> list[dict[str, Any]]:
    return list(read_lines(out / DECISIONS))


def test_every_decision_leaves_a_line_with_date_policy_models_and_rules(failed: Case, lax: Path, out: Path) -> None:
    verdicts = [decided(out, failed), decided(out, failed, lax)]
    assert verdicts == ["FAIL", "PASS"]
    first, second = lines(out)
    assert [line["verdict"] for line in (first, second)] == verdicts
    assert [line["policy"]["name"] for line in (first, second)] == ["default", "lax.yaml"]
    assert first["policy"]["sha256"] != second["policy"]["sha256"]
    assert first["models"] == second["models"]
    assert first["models"]["restored"]["name"] == failed.comparison.models["restored"].name
    assert first["decided_at"].endswith("+00:00")
    assert "fails" in first["rules"].values()


def test_a_laxer_policy_says_on_every_report_what_the_stricter_one_said(failed: Case, lax: Path, out: Path) -> None:
    decided(out, failed)
    [earlier] = lines(out)
    assert decided(out, failed, lax) == "PASS"
    for name in VIEWS:
        text = (out / name).read_text()
        assert "Decided otherwise before: FAIL for these models under the policy default" in text, name
        assert earlier["policy"]["sha256"][:12] in text, name
    assert json.loads((out / "verdict.json").read_text())["decided_otherwise"] == [earlier]


def test_date_and_policy_stand_on_every_report(failed: Case, lax: Path, out: Path) -> None:
    decided(out, failed, lax)
    [line] = lines(out)
    for name in VIEWS:
        text = (out / name).read_text()
        assert line["decided_at"] in text, name
        assert line["policy"]["sha256"][:12] in text, name
        assert "lax.yaml" in text, name


def test_what_was_decided_outlives_the_reports(failed: Case, out: Path) -> None:
    decided(out, failed)
    remove_reports(out)
    assert [path.name for path in out.iterdir()] == [DECISIONS]


def test_a_decision_that_said_the_same_is_not_held_against_one(failed: Case, out: Path) -> None:
    for _ in range(2):
        decided(out, failed)
    assert "Decided otherwise" not in (out / "report.md").read_text()


def test_a_line_tells_other_models_from_these(failed: Case, lax: Path, out: Path) -> None:
    other = replace(failed.comparison.models["restored"], target={"kind": "local", "name": "another"})
    before = replace(failed.comparison, models={**failed.comparison.models, "restored": other})
    decided(out, replace(failed, comparison=before))
    decided(out, failed, lax)
    assert "FAIL for other models under the policy default" in (out / "report.md").read_text()


def test_of_many_earlier_decisions_the_last_are_named_and_the_others_counted(
    failed: Case, lax: Path, out: Path
) -> None:
    for _ in range(SHOWN + 2):
        decided(out, failed)
    decided(out, failed, lax)
    notes = json.loads((out / "verdict.json").read_text())["notes"]
    assert sum(note.startswith("Decided otherwise before") for note in notes) == SHOWN
    assert any(note.startswith("2 still earlier decisions") for note in notes)


def test_comments_and_order_make_no_other_policy(failed: Case, lax: Path, out: Path) -> None:
    same = lax.with_name("same.yaml")
    same.write_text("# the same\n" + "".join(reversed(LAX.splitlines(keepends=True))))
    decided(out, failed, lax)
    decided(out, failed, same)
    first, second = lines(out)
    assert first["policy"]["sha256"] == second["policy"]["sha256"]


def test_a_policy_that_no_file_holds_is_called_default_only_where_it_is(tmp_path: Path, lax: Path) -> None:
    usual = read_policy(None)
    assert make_ruling(tmp_path, usual, None, VERSIONS).policy_name == "default"
    assert make_ruling(tmp_path, read_policy(lax), None, VERSIONS).policy_name == "unnamed"
    assert make_ruling(tmp_path, read_policy(lax), lax, VERSIONS).policy_name == "lax.yaml"
