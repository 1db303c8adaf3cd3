"""verdict.json keeps the schema that is printed of it, whatever the verdict; one that was altered does not."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from resta.verify.report import to_json
from resta.verify.written import verdict_schema
from tests.verify.builders import RESTORED, Case, make_named_case


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    return {name: make_named_case(folder, name) for name in RESTORED}


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(verdict_schema())


def written(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(case.comparison, case.decision, case.ruling))
    return found


def test_every_verdict_keeps_the_schema(cases: dict[str, Case], schema: jsonschema.Draft202012Validator) -> None:
    found = {name: written(case) for name, case in cases.items()}
    assert {each["verdict"] for each in found.values()} == {"PASS", "FAIL", "INVALID"}
    for each in found.values():
        schema.validate(each)


def test_a_verdict_that_was_altered_does_not_keep_it(
    cases: dict[str, Case], schema: jsonschema.Draft202012Validator
) -> None:
    whole = written(cases["PASS"])
    alterations: list[tuple[tuple[str | int, ...], Any]] = [
        (("schema",), 1),
        (("verdict",), "PASSED"),
        (("exit_code",), 2),
        (("rules", 0, "outcome"), "held"),
        (("rules", 0, "value"), "0.1"),
        (("rules", 0, "limit"), 3),
        (("policy", "level"), 1.5),
        (("policy", "asr", "max_uper"), 0.1),
        (("policy_sha256",), "abc"),
        (("comparison", "pairs"), "many"),
        (("comparison", "examples"), []),
        (("comparison", "models", "restored", "manifest"), {}),
        (("comparison", "cells", 0, "rates", "restored", "hits"), "3"),
        (("zzz",), 1),
    ]
    for place, value in alterations:
        altered = copy.deepcopy(whole)
        inner: Any = altered
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
        assert list(schema.iter_errors(altered)), place
    for key in whole:
        assert list(schema.iter_errors({name: each for name, each in whole.items() if name != key})), key
