"""Rules on how the restored model was made, by the resta.json that was checked against its weights.

What a model does is measured; this says whether the safety vector that it is named after is in it at all. Without a
manifest that is true to the weights the provenance is unknown, which is said and no rule decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from resta.verify.comparison import Comparison, Model
from resta.verify.decision import Limit, Outcome, Rule
from resta.verify.policy import Policy


def origin_rules(comparison: Comparison, policy: Policy) -> Iterable[Rule]:
    """Yield whether a safety vector was added, how much of the model it covers, and how much of it is left."""
    limits = policy.provenance
    reason = why_unknown(comparison.models["restored"])
    if reason is not None:
        if limits.required:
            yield _plain("provenance.required", "inconclusive", f"provenance unknown: {reason}")
        return
    manifest = comparison.models["restored"].manifest
    safety = manifest["safety"]
    terms = [manifest["terms"][place] for place in safety["terms"]]
    if limits.required:
        yield _plain("provenance.required", "holds", "resta.json is true to the weights")
    if not terms:
        return  # a merge without a known safety term has nothing that could be covered or lost
    if limits.min_coverage is not None or limits.min_kept is not None:
        outcome: Outcome = "holds" if safety["restored"] else "fails"
        yield _plain("provenance.restored", outcome, str(safety["statement"]), test="a safety term was added")
    for term in terms:
        yield from _term(term, policy)


def _term(term: Mapping[str, Any], policy: Policy) -> Iterable[Rule]:
    limits, name = policy.provenance, term["name"] or term["delta"]
    counts = term["coverage"]
    covered = 1 - counts["not_covered"] / counts["parameters"] if counts["parameters"] else 0.0
    if limits.min_coverage is not None:
        why = f"{name}: {100 * covered:.3g} % of the model's parameters"
        yield _at_least("provenance.min_coverage", covered, limits.min_coverage, why)
    kept = term["change"]["kept"]
    if limits.min_kept is not None and kept is not None:
        why = f"{name}: {100 * kept:.3g} % of the change that was meant is in the weights"
        yield _at_least("provenance.min_kept", kept, limits.min_kept, why)


def why_unknown(model: Model) -> str | None:
    """Return why nothing is known of how a model was made; None where its manifest is true to its weights."""
    if model.manifest.get("kind") != "merge":
        return "restored has no resta.json of a merge"
    if model.manifest_problem:
        return f"restored's resta.json is not true to its weights ({model.manifest_problem})"
    return None if "terms" in model.manifest else "restored's resta.json is of an older version, without its terms"


def _at_least(name: str, value: float, limit: float, why: str) -> Rule:
    outcome: Outcome = "holds" if value >= limit else "fails"
    least = Limit(bound="value", op=">=", value=limit)
    return Rule(name=name, outcome=outcome, limit=least, value=value, low=None, high=None, why=why)


def _plain(name: str, outcome: Outcome, why: str, *, test: str = "") -> Rule:
    return Rule(name=name, outcome=outcome, test=test, value=None, low=None, high=None, why=why)
