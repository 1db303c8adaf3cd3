from __future__ import annotations

from typing import Any

import pytest

from resta.recipe import named_models
from resta.sweep.candidates import Family
from resta.sweep.settings import models_of

FULL = {"tuned": "t", "aligned": "a", "base": "b", "origin": "o"}


@pytest.mark.parametrize(
    ("adapters", "base"),
    [
        ({}, None),  # the base of the vector is none of an adapter
        ({"tuned": "base"}, "b"),
        ({"tuned": "origin"}, "o"),
        ({"tuned": "base", "aligned": "base"}, "b"),
        ({"tuned": "origin", "aligned": "base"}, None),  # one option cannot name two
    ],
)
def test_a_choice_carries_the_base_that_its_adapters_are_on(adapters: dict[str, str], base: str | None) -> None:
    models: dict[str, Any] = {name: {"source": source, "on": adapters.get(name)} for name, source in FULL.items()}
    assert models_of(Family(models=named_models(models))).get("base") == base
