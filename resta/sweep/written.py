"""The JSON Schema of sweep.json."""

from __future__ import annotations

from typing import Any

from resta.schema import COUNT, DIALECT, TEXT, TEXTS, closed, schema_of_data
from resta.sweep.apply import Change
from resta.sweep.candidates import Candidate
from resta.sweep.choose import Choice, Point
from resta.sweep.measure import SCHEMA
from resta.sweep.search import Step
from resta.verify.decision import Rule, Verdict
from resta.verify.written import policy_schema

MAYBE_TEXT = schema_of_data(str | None)
MAYBE_NUMBER = schema_of_data(float | None)


def candidate_schema() -> dict[str, Any]:
    """Return the schema of one candidate: what it is, what was measured of it, what the gate would say."""
    return closed(
        {
            "name": TEXT,
            **schema_of_data(Candidate)["properties"],
            "equation": TEXT,
            "recipe": MAYBE_TEXT,
            "change": closed({**schema_of_data(Change)["properties"], "relative": MAYBE_NUMBER}),
            "answered": COUNT,
            "planned": COUNT,
            "stopped": MAYBE_TEXT,
            "point": schema_of_data(Point | None),
            "chance": MAYBE_NUMBER,
            "verdict": {"enum": [*(verdict.name for verdict in Verdict), None]},
            "summary": MAYBE_TEXT,
            "rules": schema_of_data(tuple[Rule, ...]),
        }
    )


def sweep_schema() -> dict[str, Any]:
    """Return the schema of sweep.json."""
    step = schema_of_data(Step)["properties"]
    content = {
        "schema": {"const": SCHEMA},
        "kind": {"const": "sweep"},
        "chosen": schema_of_data(Choice),
        "references": {"type": "object", "additionalProperties": schema_of_data(Point)},
        "candidates": {"type": "array", "items": candidate_schema()},
        "front": TEXTS,
        "fresh": COUNT,
        "search": {"type": "array", "items": closed({**step, "candidate": TEXT})},
        **dict.fromkeys(("findings", "notes", "guidance"), TEXTS),
        "policy": policy_schema("properties/policy"),
        "versions": {"type": "object", "additionalProperties": TEXT},
    }
    return {"$schema": DIALECT, "title": "sweep.json, as resta sweep writes it", **closed(content)}
