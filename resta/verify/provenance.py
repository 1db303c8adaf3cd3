"""Where a comparison's numbers come from, as tables: models, merge, judge, questions, settings, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from resta.page import Cell, Table, table
from resta.verify.comparison import Comparison, Model
from resta.verify.measurement import ROLES

JUDGE_FACTS = ("sha256", "about", "wording", "confirmed", "model", "measures")


def provenance(comparison: Comparison, versions: Mapping[str, str]) -> Iterable[Table]:
    """Yield everything that names what was measured, and by what, with every digest."""
    yield table("Identity of the models", ("fact", *ROLES), _targets(comparison.models))
    for model in comparison.models.values():
        yield from _merge(model)
    judge, settings = comparison.judge_facts, comparison.settings
    yield _facts("Judge", [("name", comparison.judge), *_flat({k: v for k, v in judge.items() if k in JUDGE_FACTS})])
    banks = (
        (bank["name"], str(bank["questions"]), "safe" if bank["safe"] else "harmful", *_origin(bank))
        for bank in settings["banks"]
    )
    yield table("Question banks", ("bank", "questions", "kind", "as published", "sha256"), banks)
    templates = ((template["name"], *_origin(template)) for template in settings["templates"])
    yield table("Prompt templates", ("template", "as published", "sha256"), templates)
    others = {key: value for key, value in settings.items() if key not in ("banks", "templates")}
    yield _facts("Settings of Red-Eval, the same for all models", _flat(others))
    if comparison.suite:
        yield _facts("Settings of utility, the same for all models", _flat(comparison.suite))
    yield _facts("Versions", versions.items())


def _facts(caption: str, facts: Iterable[tuple[str, str | Cell]]) -> Table:
    return table(caption, ("what", "value"), facts)


def _origin(of: Mapping[str, Any]) -> tuple[str, Cell]:
    return "yes" if of["published"] else "no", Cell(of["sha256"], tone="code")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested facts as (dotted name, text); absent ones are left out."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _targets(models: Mapping[str, Model]) -> Iterable[tuple[str, ...]]:
    found = {role: dict(_flat(model.target)) for role, model in models.items()}
    for key in dict.fromkeys(key for facts in found.values() for key in facts):
        yield key, *(found[role].get(key, "–") for role in ROLES)


def _merge(model: Model) -> Iterable[Table]:
    """Yield what a model's resta.json says, where it is that of a merge."""
    manifest = model.manifest
    if manifest.get("kind") != "merge":
        return
    change = manifest["change"]
    yield _facts(
        f"How {model.role} was merged",
        (
            ("equation", Cell(f"{model.role} = {manifest['equation']}", tone="code")),
            ("recipe, sha256", Cell(manifest["recipe_digest"], tone="code")),
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
            (name, source["source"], source["commit"] or "local files", file, Cell(_identity(facts), tone="code"))
            for name, source in manifest["inputs"].items()
            for file, facts in source["files"].items()
        ),
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _identity(facts: Mapping[str, Any]) -> str:
    if facts["sha256"]:
        return f"sha256 {facts['sha256']}"
    return f"{facts['bytes']} bytes, header's sha256 {facts['header_sha256']}"
