"""Schemas that `resta schema` prints: valid, committed as printed, named by the files that they are of, and strict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

import resta
from resta.cli import main
from resta.cli.schema import KINDS
from resta.dialect import parse
from resta.schema import schema_of_data

ROOT = Path(resta.__file__).parent.parent
# committed file -> its kind
COMMITTED = {
    "recipes/schema.json": "recipe",
    "recipes/sft/schema.json": "sft",
    "recipes/sft/collect.schema.json": "collect",
    "resta/verify/policy.schema.json": "policy",
    "resta/redeval/judge.schema.json": "judge",
}
FILES = sorted(
    file
    for pattern in ("recipes/*.yaml", "recipes/sft/*.yaml", "resta/verify/policy.yaml", "resta/redeval/judge/*.yaml")
    for file in ROOT.glob(pattern)
)
NAMED = "# yaml-language-server: $schema="


def printed(*words: str) -> Any:
    done = CliRunner().invoke(main, ["schema", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_valid_schema(kind: str) -> None:
    found = printed(kind)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(found)
    assert list(jsonschema.Draft202012Validator(found).iter_errors({"zzz": 1}))


def test_without_a_kind_it_is_a_merge_recipes() -> None:
    assert printed() == printed("recipe")
    assert CliRunner().invoke(main, ["schema", "zzz"]).exit_code == 2


@pytest.mark.parametrize("file", COMMITTED)
def test_a_committed_schema_is_the_one_that_is_printed(file: str) -> None:
    assert json.loads((ROOT / file).read_text()) == printed(COMMITTED[file])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_names_its_schema_for_editors_and_keeps_it(file: Path) -> None:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(NAMED)
    named = (file.parent / first.removeprefix(NAMED)).resolve()
    assert named.relative_to(ROOT).as_posix() in COMMITTED
    jsonschema.Draft202012Validator(json.loads(named.read_text())).validate(parse(file.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Part:
    """A part of what is written."""

    word: Literal["a", "b"]
    number: float
    maybe: int | None


@dataclass(frozen=True)
class Whole:
    """All that is written."""

    parts: tuple[Part, ...]
    pair: tuple[str, int]
    by_name: Mapping[str, Part]
    numbers: np.ndarray[Any, np.dtype[np.float64]]
    any: Any


PLAIN: dict[str, Any] = {
    "parts": [{"word": "a", "number": None, "maybe": None}],
    "pair": ["x", 1],
    "by_name": {"y": {"word": "b", "number": 0.5, "maybe": 3}},
    "numbers": [[1.0, 2.0]],
    "any": {"z": []},
}


def test_the_schema_of_frozen_data_takes_what_is_dumped_and_nothing_else() -> None:
    schema = jsonschema.Draft202012Validator(schema_of_data(Whole))
    schema.validate(PLAIN)
    part = PLAIN["parts"][0]
    for broken in (
        {**PLAIN, "more": 1},
        {key: value for key, value in PLAIN.items() if key != "any"},
        {**PLAIN, "pair": ["x"]},
        {**PLAIN, "pair": ["x", "1"]},
        {**PLAIN, "parts": [{**part, "word": "c"}]},
        {**PLAIN, "parts": [{**part, "maybe": 0.5}]},
        {**PLAIN, "by_name": {"y": {}}},
        {**PLAIN, "numbers": 1},
    ):
        assert list(schema.iter_errors(broken)), broken


def test_a_type_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(TypeError, match="no schema is known of"):
        schema_of_data(complex)
