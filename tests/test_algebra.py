from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import resta
from resta.errors import RecipeError
from resta.recipe import parse_recipe
from tests.test_engine import RESTA_D, assert_same_tensors, read, recipe_of

TUNED, ALIGNED, BASE = (resta.load(f"org/{name}") for name in ("tuned", "aligned", "base"))


def test_an_expression_merges_like_its_recipe(trio: dict[str, str], tmp_path: Path) -> None:
    tuned, aligned, base = (resta.load(trio[name]) for name in ("tuned", "aligned", "base"))
    expression = base + resta.dare(tuned - base, density=0.7, seed=7) + 0.5 * (aligned - base)
    out = expression.save(tmp_path / "out", workers=2).out
    recipe = recipe_of(trio, "base", RESTA_D, seed=7)
    assert expression.to_recipe().model_dump(exclude={"models"}) == recipe.model_dump(exclude={"models"})
    assert_same_tensors(read(out), read(resta.merge(recipe, tmp_path / "recipe").out))
    assert_same_tensors(dict(expression.tensors()), read(out))


def test_the_recipe_of_an_expression_is_yaml_that_reads_back() -> None:
    expression = (TUNED + 0.5 * (ALIGNED - BASE)).options(dtype="float32", files_from=TUNED)
    assert parse_recipe(expression.recipe()) == expression.to_recipe()


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_deltas_are_linear(a: float, b: float) -> None:
    vector = ALIGNED - BASE

    def scales(delta: resta.Delta) -> list[float]:
        return [term.scale for term in (TUNED + delta).to_recipe().terms]

    assert scales(a * vector) == scales(vector * a) == [a]
    assert scales(a * vector + b * vector) == [a, b]
    assert scales(a * vector - b * vector) == [a, -b]
    assert scales(-(a * vector)) == [-a]
    assert scales(b * (a * vector)) == [a * b]


def test_a_delta_may_stand_on_either_side_and_merges_go_on() -> None:
    vector = ALIGNED - BASE
    want = (TUNED + vector).to_recipe()
    assert (vector + TUNED).to_recipe() == want
    assert len((TUNED + vector + vector - vector).to_recipe().terms) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TUNED + ALIGNED,
        lambda: 0.5 * TUNED,
        lambda: TUNED * 0.5,
        lambda: (TUNED + (ALIGNED - BASE)) + BASE,
        lambda: (TUNED + (ALIGNED - BASE)) - BASE,
        lambda: (ALIGNED - BASE) * (ALIGNED - BASE),
        lambda: (ALIGNED - BASE) * True,
        lambda: TUNED - 1,
        lambda: (ALIGNED - BASE) - BASE,
        lambda: TUNED + 1,
    ],
)
def test_what_is_not_a_model_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError):
        wrong()  # type: ignore[operator]


def test_adding_two_checkpoints_says_why() -> None:
    with pytest.raises(TypeError, match=r"their sum is not a model.*tuned \+ 0.5 \* \(aligned - base\)"):
        TUNED + ALIGNED


def test_checkpoints_of_the_same_name_stay_apart() -> None:
    other = resta.load("elsewhere/base")
    models = (TUNED + (BASE - other)).to_recipe().models
    assert {name: model.source for name, model in models.items()} == {
        "tuned": "org/tuned",
        "base": "org/base",
        "base_2": "elsewhere/base",
    }


def test_an_adapter_brings_its_base(trio: dict[str, str]) -> None:
    adapter = resta.load("org/7b-lora@main", on=resta.load(trio["base"], name="origin"), recorded_base="x")
    models = (adapter + 0.5 * (ALIGNED - BASE)).to_recipe().models
    assert models["model_7b_lora"].on == "origin"
    assert models["origin"].source == trio["base"]
    assert models["model_7b_lora"].source == "org/7b-lora@main"


def test_dare_refuses_sums_second_helpings_and_two_seeds() -> None:
    vector = ALIGNED - BASE
    with pytest.raises(RecipeError, match="one difference"):
        resta.dare(vector + vector, density=0.5)
    with pytest.raises(RecipeError, match="one difference"):
        resta.dare(resta.dare(vector, density=0.5), density=0.5)
    with pytest.raises(RecipeError, match="seeds"):
        (TUNED + resta.dare(vector, density=0.5, seed=1) + resta.dare(vector, density=0.5, seed=2)).to_recipe()
