"""What a sweep's choice carries for `resta verify`: how it was asked, and what not to ask again.

The lines stand in comments of chosen.yaml, since nothing of the merge depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from resta.dialect import dump, parse_untyped
from resta.errors import RequestError
from resta.strict import did_you_mean, named
from resta.sweep.candidates import Family
from resta.sweep.measure import Sweep

MARK = "#: "  # begins such a line


def models_of(family: Family) -> dict[str, str]:
    """Return the options of `resta verify` that name the models: `base` where adapters are all on one."""
    models = family.models
    bases = {models[on].source for name in ("tuned", "aligned") if (on := models[name].on)}
    named = {name: models[name].source for name in ("tuned", "aligned")}
    return {**named, "base": bases.pop()} if len(bases) == 1 else named


def settings_of(sweep: Sweep, fresh: int) -> list[str]:
    """Return the lines: the options of `resta verify` by parameter, and how many fresh questions there are."""
    if not sweep.verify:
        return []
    banks = [bank for bank in sweep.budget.spec.banks if not all(question.safe for question in bank.questions)]
    asked = sweep.budget.plan(sweep.references["tuned"]).questions
    known = {question.text for question in asked if not question.safe}
    left = sum(len({question.text for question in bank.questions} - known) for bank in banks)
    options = {**sweep.verify, "without": [*sweep.verify.get("without", []), str(sweep.reference("tuned") / "redeval")]}
    if banks:
        options["limit"] = math.ceil(fresh / len(banks))
    lines = dump(dict(sorted(options.items()))).splitlines()
    head = [
        "#",
        f"# For `resta verify RESTORED --from` this file. The chance is that of {fresh} fresh harmful questions;",
        f"# the banks hold {left} that the sweep has not asked." + ("" if left >= fresh else " Name more with --bank."),
    ]
    return [*head, *(MARK + line for line in lines)]


def read_settings(path: Path, known: Collection[str | None]) -> dict[str, Any]:
    """Return the options that such a file carries. Raises RequestError where there are none, or unknown ones."""
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    with named(f"{path}: the lines that begin with {MARK!r}"):
        found = parse_untyped("\n".join(lines))
    if not isinstance(found, dict) or not found:
        raise RequestError(f"{path}: carries no settings of a sweep (lines that begin with {MARK!r}); give the options")
    for name in found:
        if name not in known:
            raise RequestError(f"{path}: {name!r} is no option of resta verify{did_you_mean(str(name), known)}")
    return found
