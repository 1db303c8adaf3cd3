"""Where a comparison's numbers come from, as tables: models, merge, judge, questions, settings, policy, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from resta.fingerprint import sha256_text
from resta.verify.comparison import Comparison, Model
from resta.verify.markup import Markup, element, table
from resta.verify.measurement import ROLES
from resta.verify.policy import Policy

Facts = Iterable[tuple[str, ...]]


def provenance(comparison: Comparison, policy: Policy, versions: Mapping[str, str]) -> Iterable[Markup]:
    """Yield everything that names what was measured, and by what."""
    yield table("Identity of the models", ("fact", *ROLES), _targets(comparison.models), wide=(1, 2, 3))
    for model in comparison.models.values():
        yield from _manifest(model)
    judge = comparison.judge_facts
    yield _facts("Judge", [("name", comparison.judge), *_flat({k: v for k, v in judge.items() if k in JUDGE_FACTS})])
    yield table(
        "Question banks",
        ("bank", "questions", "kind", "as published", "sha256"),
        (
            (
                str(bank["name"]),
                str(bank["questions"]),
                "safe" if bank["safe"] else "harmful",
                _yes(bank["published"]),
                code(bank["sha256"]),
            )
            for bank in comparison.settings["banks"]
        ),
        right=(1,),
        wide=(4,),
    )
    yield table(
        "Prompt templates",
        ("template", "as published", "sha256"),
        ((str(t["name"]), _yes(t["published"]), code(t["sha256"])) for t in comparison.settings["templates"]),
        wide=(2,),
    )
    settings = {key: value for key, value in comparison.settings.items() if key not in ("banks", "templates")}
    yield _facts("Settings of Red-Eval, the same for all models", _flat(settings))
    if comparison.suite:
        yield _facts("Settings of utility, the same for all models", _flat(comparison.suite))
    yield from _policy(policy)
    yield _facts("Versions", versions.items())


JUDGE_FACTS = ("sha256", "about", "wording", "confirmed", "model", "measures")


def code(text: str) -> Markup:
    """Return a digest or an equation."""
    return element("code", text)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _facts(caption: str, facts: Facts) -> Markup:
    return table(caption, ("what", "value"), facts, wide=(1,))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested facts as (dotted name, text); absent ones are left out."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _targets(models: Mapping[str, Model]) -> Facts:
    found = {role: dict(_flat(model.target)) for role, model in models.items()}
    for key in dict.fromkeys(key for facts in found.values() for key in facts):
        yield key, *(found[role].get(key, "–") for role in ROLES)


def _manifest(model: Model) -> Iterable[Markup]:
    """Yield what a model's resta.json says, where it is that of a merge."""
    manifest = model.manifest
    if manifest.get("kind") != "merge":
        return
    change = manifest["change"]
    yield _facts(
        f"How {model.role} was merged",
        (
            ("equation", code(f"{model.role} = {manifest['equation']}")),
            ("recipe, sha256", code(manifest["recipe_digest"])),
            ("merged with", ", ".join(f"{name} {found}" for name, found in manifest["versions"].items())),
            ("entries changed", f"{100 * change['changed']:.1f} %"),
            ("cosine to the intended change", _figure(change["cosine"])),
            ("size of the change, relative to the weights", _figure(change["relative_size"])),
        ),
    )
    yield table(
        f"Inputs of the merge of {model.role}",
        ("input", "source", "commit", "file", "identity of the file"),
        (
            (name, source["source"], source["commit"] or "local files", file, code(_identity(facts)))
            for name, source in manifest["inputs"].items()
            for file, facts in source["files"].items()
        ),
        wide=(4,),
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _identity(facts: Mapping[str, Any]) -> str:
    if facts["sha256"]:
        return f"sha256 {facts['sha256']}"
    return f"{facts['bytes']} bytes, header's sha256 {facts['header_sha256']}"


def _policy(policy: Policy) -> Iterable[Markup]:
    text = yaml.safe_dump(policy.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    yield element("h3", "Policy")
    yield element("p", "Every rule as it was applied, defaults included; sha256 ", code(sha256_text(text)), ".")
    yield element("pre", text, tabindex="0", role="region", aria_label="Policy")
