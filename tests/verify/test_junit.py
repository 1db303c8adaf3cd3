"""JUnit XML against what Surefire's report schema allows, told here in our own form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args
from xml.etree import ElementTree

import pytest

from resta.verify.decision import Outcome
from resta.verify.junit import to_junit
from tests.verify.builders import RESTORED, Case, make_hostile_case, make_named_case

TIME = r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]{0,3})?"  # seconds; thousands may be set off by commas
MANY = float("inf")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An element: attributes it must and may have, its children in their order with the most there may be of each."""

    must: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    children: Mapping[str, float] = field(default_factory=dict)


SCHEMA = {
    "testsuite": Kind(
        must=("name", "tests", "errors", "skipped", "failures"),
        may=("time", "group"),
        children={"properties": MANY, "testcase": MANY},
    ),
    "properties": Kind(children={"property": MANY}),
    "property": Kind(must=("name", "value")),
    "testcase": Kind(
        must=("name", "time"),
        may=("classname", "group"),
        children={"failure": MANY, "skipped": 1, "error": 1, "system-out": 1, "system-err": 1},
    ),
    "failure": Kind(must=("type",), may=("message",)),
    "error": Kind(must=("type",), may=("message",)),
    "skipped": Kind(may=("message",)),
    "system-out": Kind(),
    "system-err": Kind(),
}


def check(element: ElementTree.Element) -> None:
    """Raise AssertionError where an element is not what the schema allows."""
    kind = SCHEMA[element.tag]
    missing, unknown = set(kind.must) - set(element.attrib), set(element.attrib) - {*kind.must, *kind.may}
    assert not missing, f"{element.tag} lacks {missing}"
    assert not unknown, f"{element.tag} has {unknown}"
    if "time" in element.attrib:
        assert re.fullmatch(TIME, element.attrib["time"]), element.attrib["time"]
    order = list(kind.children)
    found = [child.tag for child in element]
    assert set(found) <= set(order), f"{element.tag}: {found}"
    assert found == sorted(found, key=order.index), f"{element.tag}: {found}"
    assert all(found.count(tag) <= most for tag, most in kind.children.items())
    if kind.children:
        assert not (element.text or "").strip()
    for child in element:
        check(child)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    found = {name: make_named_case(folder, name) for name in RESTORED}
    return found | {"hostile": make_hostile_case(folder)}


def suite_of(case: Case) -> ElementTree.Element:
    return ElementTree.fromstring(to_junit(case.comparison, case.decision, case.ruling))


def test_the_xml_is_what_surefires_schema_allows_whatever_came_of_the_rules(cases: dict[str, Case]) -> None:
    for case in cases.values():
        check(suite_of(case))
        for outcome in get_args(Outcome):
            rules = tuple(replace(rule, outcome=outcome) for rule in case.decision.rules)
            check(suite_of(replace(case, decision=replace(case.decision, rules=rules))))


@pytest.mark.parametrize(
    "xml",
    [
        '<testsuite name="a" tests="1" errors="0" failures="0"/>',
        '<testsuite name="a" tests="1" errors="0" failures="0" skipped="0" hostname="h"/>',
        '<testsuite name="a" tests="1" errors="0" failures="0" skipped="0"><testcase name="b"/></testsuite>',
        '<testsuite name="a" tests="1" errors="0" failures="0" skipped="0"><system-out/></testsuite>',
        '<testcase name="b" time="0.0001"/>',
        '<testcase name="b" time="0"><failure message="m"/></testcase>',
        '<testcase name="b" time="0"><system-out/><error type="t"/></testcase>',
        '<testcase name="b" time="0"><error type="t"/><error type="t"/></testcase>',
    ],
)
def test_the_check_finds_what_is_not_allowed(xml: str) -> None:
    with pytest.raises(AssertionError):
        check(ElementTree.fromstring(xml))


def test_the_properties_name_date_host_policy_and_models(cases: dict[str, Case]) -> None:
    case = cases["PASS"]
    found = {each.get("name"): each.get("value") for each in suite_of(case).iter("property")}
    assert found["timestamp"] == case.ruling.decided_at
    assert found["hostname"]
    assert (found["policy"], found["policy.sha256"]) == ("release.yaml", case.ruling.policy_sha256)
    assert found["restored"] == case.comparison.models["restored"].name
    assert found["verdict"] == "PASS"
