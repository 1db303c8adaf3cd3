"""A decision as JUnit XML, for a CI's own report: one test case per rule.

Valid against the schema of Maven's Surefire, the strictest in use: every case has a time, every failure and error a
type, and what the schema has no attribute for (date, host, policy, models) is a property.
"""

from __future__ import annotations

import platform
from xml.etree import ElementTree

from resta.page import printable
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision, Rule, Verdict
from resta.verify.trace import Ruling
from resta.verify.words import measured

BAD = ("fails", "inconclusive", "invalid")  # outcomes that keep a verdict from being PASS
NO_TIME = "0.000"  # a rule is decided in no time; what took long was the measurement


def to_junit(comparison: Comparison, decision: Decision, ruling: Ruling) -> str:
    """Return the XML.

    Where no rule is to blame for a verdict other than PASS, the verdict itself is a case, so that no CI shows green.
    """
    rules = list(decision.rules)
    if decision.verdict is not Verdict.PASS and not any(rule.outcome in BAD for rule in rules):
        rules.append(
            Rule(
                name="verdict", outcome="inconclusive", test=Verdict.PASS.name, value=None, low=None, high=None,
                why=decision.summary,
            )
        )  # fmt: skip
    outcomes = [rule.outcome for rule in rules]
    suite = ElementTree.Element(
        "testsuite",
        name="resta verify",
        time=NO_TIME,
        tests=str(len(rules)),
        failures=str(outcomes.count("fails")),
        errors=str(sum(outcome in BAD and outcome != "fails" for outcome in outcomes)),
        skipped=str(outcomes.count("left out")),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(comparison, decision, ruling).items():
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    for rule in rules:
        suite.append(_case(rule))
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _properties(comparison: Comparison, decision: Decision, ruling: Ruling) -> dict[str, str]:
    return {
        "timestamp": ruling.decided_at,
        "hostname": platform.node(),
        "verdict": decision.title,
        "summary": decision.summary,
        "policy": ruling.policy_name,
        "policy.sha256": ruling.policy_sha256,
        "judge": comparison.judge,
        **{role: model.name for role, model in comparison.models.items()},
        **{f"{role}.measured_at": str(model.measured_at) for role, model in comparison.models.items()},
        **{f"power.{number}": line for number, line in enumerate(decision.power, 1)},
        **{f"note.{number}": note for number, note in enumerate(decision.notes, 1)},
        "resta": ruling.versions.get("resta", ""),
    }


def _case(rule: Rule) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="resta.verify", name=printable(rule.name), time=NO_TIME)
    text = printable(f"{rule.limit_words}; measured {measured(rule)}; {rule.why}")
    if rule.outcome == "holds":
        ElementTree.SubElement(case, "system-out").text = text
    elif rule.outcome == "left out":
        ElementTree.SubElement(case, "skipped", message=f"{rule.outcome}: {text}")
    else:
        kind = "failure" if rule.outcome == "fails" else "error"
        ElementTree.SubElement(case, kind, type=rule.outcome, message=f"{rule.outcome}: {text}")
    return case
