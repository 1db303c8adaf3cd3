"""Rules on how the restored model was made, by the resta.json that was checked against its weights.

What a model does is measured; this says whether the safety vector that it is named after is in it at all. Without a
manifest that is true to the weights the provenance is unknown, which is said and no rule decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resta.verify.comparison import Comparison, Model
from resta.verify.decision import Limit, Outcome, Rule
from resta.verify.measurement import Measurement
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


def published_change(restored: Measurement, tuned: Measurement) -> str:
    """Return why restored - tuned is not known to be a change that its resta.json names; empty where it is.

    It is where the file is that of a patch on this tuned model, or of a merge, true to its weights, that comes to this
    tuned model once its safety terms are left out.
    """
    manifest = restored.manifest
    if manifest.get("kind") == "patch":
        same = manifest["patch"]["tuned"]["fingerprint"] == tuned.config["target"].get("fingerprint")
        return "" if same else "restored's resta.json is of a patch on another model than tuned"
    if manifest.get("kind") != "merge":
        return "restored has no resta.json that says what was added to it"
    if restored.manifest_problem or "safety" not in manifest:
        return "restored's resta.json is not shown to be true to its weights"
    if not manifest["safety"]["terms"]:
        return "restored's resta.json names no safety vector"
    start = _without_safety(manifest)
    if start is None or not _is_input(manifest["inputs"][start], Path(tuned.name)):
        return f"what its resta.json adds ({manifest['equation']}) is not added to the tuned model that is given"
    return ""


def _without_safety(manifest: Mapping[str, Any]) -> str | None:
    """Return which model a merge comes to without its safety terms; None where it is none of them."""
    recipe = manifest["recipe"]
    left = [term for place, term in enumerate(recipe["terms"]) if place not in manifest["safety"]["terms"]]
    if not left:
        return str(recipe["start"])
    to, _, start = left[0]["delta"].partition(" - ")
    whole = len(left) == 1 and left[0]["scale"] == 1 and not left[0]["sparsify"] and not recipe["rules"]
    return str(to) if whole and start == recipe["start"] else None


def _is_input(was: Mapping[str, Any], model: Path) -> bool:
    """Whether a model bears an input's name and has files of its sizes."""
    if not model.is_dir():
        return str(was["source"]) == str(model)
    sizes = {file: facts["bytes"] for file, facts in was["files"].items()}
    there = {file: (model / file).stat().st_size for file in sizes if (model / file).is_file()}
    return Path(was["source"]).name == model.resolve().name and sizes == there
