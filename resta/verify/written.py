"""The JSON Schema of verdict.json."""

from __future__ import annotations

from typing import Any

from resta.schema import DIALECT, TEXT, TEXTS, closed, schema_of_data
from resta.verify.comparison import Comparison
from resta.verify.decision import SCHEMA, Rule, Verdict
from resta.verify.policy import Policy


def rule_schema() -> dict[str, Any]:
    """Return the schema of a rule; `limit_words` say its limit, and what is asked where there is none."""
    properties = dict(schema_of_data(Rule)["properties"])
    del properties["test"]  # part of the words
    return closed({**properties, "limit_words": TEXT})


def policy_schema(place: str) -> dict[str, Any]:
    """Return the schema of a policy, for a place of its own in another schema."""
    return Policy.model_json_schema(ref_template=f"#/{place}/$defs/{{model}}")


def verdict_schema() -> dict[str, Any]:
    """Return the schema of verdict.json."""
    comparison = schema_of_data(Comparison)
    properties = {name: each for name, each in comparison["properties"].items() if name != "examples"}
    model = properties["models"]["additionalProperties"]["properties"]
    merge = {"type": "object", "properties": {"equation": TEXT, "recipe_digest": TEXT, "inputs": {"type": "object"}}}
    merged = {**{name: each for name, each in model.items() if name != "manifest"}, "merge": merge}
    content = {
        "schema": {"const": SCHEMA},
        "kind": {"const": "verdict"},
        "verdict": {"enum": [verdict.name for verdict in Verdict]},
        "limits": {**TEXT, "description": "default, or what a policy with wider limits calls itself"},
        "exit_code": {"enum": [verdict.value for verdict in Verdict]},
        "summary": TEXT,
        "rules": {"type": "array", "items": rule_schema()},
        **dict.fromkeys(("notes", "guidance", "power"), TEXTS),
        "decided_at": TEXT,
        "policy_name": TEXT,
        "policy_sha256": {**TEXT, "pattern": "^[0-9a-f]{64}$"},
        "policy": policy_schema("properties/policy"),
        "decided_otherwise": TEXTS,
        "comparison": closed({**properties, "models": {"type": "object", "additionalProperties": closed(merged)}}),
        "versions": {"type": "object", "additionalProperties": TEXT},
    }
    return {"$schema": DIALECT, "title": "verdict.json, as resta verify writes it", **closed(content)}
