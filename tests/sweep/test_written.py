"""sweep.json keeps the schema that is printed of it; one that was altered does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema

from resta.sweep.written import sweep_schema


def test_a_sweep_keeps_the_schema_and_an_altered_one_does_not(done: Path) -> None:
    schema = jsonschema.Draft202012Validator(sweep_schema())
    whole = json.loads((done / "sweep.json").read_text())
    schema.validate(whole)
    alterations: list[tuple[tuple[str | int, ...], Any]] = [
        (("schema",), "1"),
        (("kind",), "verdict"),
        (("candidates", 0, "scale"), "half"),
        (("candidates", 0, "verdict"), "GOOD"),
        (("candidates", 0, "change", "more"), 1),
        (("references", "aligned", "asr"), 0.5),
        (("search",), [{"candidate": {}}]),
        (("chosen", "zzz"), 1),
        (("policy", "level"), 2),
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
