from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resta
from resta.errors import RequestError
from resta.recipe import parse_recipe
from tests.builders import RESTA_D, assert_same_tensors, read, recipe_of

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
        lambda: TUNED - (BASE + (ALIGNED - BASE)),
        lambda: 1 + (ALIGNED - BASE),
        lambda: (ALIGNED - BASE) / "2",
        lambda: (ALIGNED - BASE) / (ALIGNED - BASE),
        lambda: 2 / (ALIGNED - BASE),
        lambda: np.ones(2) * (ALIGNED - BASE),
        lambda: (ALIGNED - BASE) * torch.ones(2),
        lambda: (ALIGNED - BASE) * np.True_,
        lambda: (ALIGNED - BASE) * 1j,
        lambda: np.float64(0.5) * TUNED,
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
    with pytest.raises(RequestError, match="one difference"):
        resta.dare(vector + vector, density=0.5)
    with pytest.raises(RequestError, match="one difference"):
        resta.dare(resta.dare(vector, density=0.5), density=0.5)
    with pytest.raises(RequestError, match="seeds"):
        (TUNED + resta.dare(vector, density=0.5, seed=1) + resta.dare(vector, density=0.5, seed=2)).to_recipe()


def test_a_checkpoint_minus_a_delta_moves_the_other_way() -> None:
    vector = ALIGNED - BASE
    assert (TUNED - 0.5 * vector).to_recipe() == (TUNED + -0.5 * vector).to_recipe()
    assert (TUNED - vector - vector).to_recipe() == (TUNED + -vector + -vector).to_recipe()


HALVES = [
    *(0.5, Fraction(1, 2), np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)),
    torch.tensor(0.5).half(),
]


@pytest.mark.parametrize("half", HALVES, ids=lambda half: f"{type(half).__module__}.{type(half).__name__}")
def test_a_delta_takes_every_kind_of_number(half: object) -> None:
    vector = ALIGNED - BASE
    for delta in (half * vector, vector * half):  # type: ignore[operator]
        assert isinstance(delta, resta.Delta)
        (term,) = (TUNED + delta).to_recipe().terms
        assert (type(term.scale), term.scale) == (float, 0.5)
    assert [term.scale for term in (TUNED + (vector + vector) / half).to_recipe().terms] == [2, 2]
    assert [term.scale for term in (TUNED + vector * np.int32(3)).to_recipe().terms] == [3]


def test_deltas_can_be_summed() -> None:
    other = TUNED - BASE
    want = (BASE + ((ALIGNED - BASE) + other)).to_recipe()
    assert (BASE + sum([ALIGNED - BASE, other])).to_recipe() == want
    assert sum([ALIGNED - BASE, other], BASE).to_recipe() == want  # type: ignore[call-overload]


def test_a_folder_may_be_named_in_any_script(trio: dict[str, str], tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("模型", "modèle", "7б-модель")}
    for folder, source in zip(folders.values(), trio.values(), strict=True):
        folder.symlink_to(source)
    tuned, aligned, base = (resta.Checkpoint(str(folder)) for folder in folders.values())
    merge = tuned + 0.5 * (aligned - base)
    assert merge.to_recipe().equation == "模型 + 0.5 * (modèle - model_7б_модель)"
    assert parse_recipe(merge.recipe()) == merge.to_recipe()
    out = merge.save(tmp_path / "out").out
    assert_same_tensors(read(out), dict(merge.tensors()))


def test_one_seed_serves_masks_and_rounding_wherever_it_is_said() -> None:
    vector = ALIGNED - BASE
    assert (TUNED + vector).options(seed=5).to_recipe().seed == 5
    assert (TUNED + resta.dare(vector, density=0.5)).options(seed=5).to_recipe().seed == 5
    assert (TUNED + resta.dare(vector, density=0.5, seed=5) + resta.dare(vector, density=0.5)).to_recipe().seed == 5
    assert (TUNED + resta.dare(vector, density=0.5)).to_recipe().seed == 0
    with pytest.raises(RequestError, match="the seeds 5, 7 are set"):
        (TUNED + resta.dare(vector, density=0.5, seed=7)).options(seed=5).to_recipe()


def test_a_named_term_can_be_scaled_by_rule() -> None:
    merge = TUNED + 0.5 * (ALIGNED - BASE).named("safety") + (TUNED - BASE)
    recipe = merge.options(rules=[{"match": "*.mlp.*", "scale_by": {"safety": 2.0}}]).to_recipe()
    assert [term.name for term in recipe.terms] == ["safety", None]
    with pytest.raises(RequestError, match="one difference"):
        ((ALIGNED - BASE) + (TUNED - BASE)).named("both")


def test_an_option_that_no_recipe_has_is_refused_when_it_is_said() -> None:
    with pytest.raises(RequestError, match='roundign is no choice of a recipe; did you mean "rounding"'):
        (TUNED + (ALIGNED - BASE)).options(roundign="stochastic")
    with pytest.raises(RequestError, match="start is no choice"):
        (TUNED + (ALIGNED - BASE)).options(start="base")


def test_a_path_that_is_not_there_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source in (tmp_path / "absent", tmp_path / "file", "./absent", "models"):
        with pytest.raises(RequestError, match="expected a model directory or a Hub id"):
            resta.load(source)


def test_dare_of_what_is_no_delta_is_a_type_error() -> None:
    for wrong in (TUNED, TUNED + (ALIGNED - BASE), 0.5):
        with pytest.raises(TypeError, match=r"dare takes a delta, dare\(a - b, density=...\); found a"):
            resta.dare(wrong, density=0.5)  # type: ignore[arg-type]


def test_merge_says_what_it_takes(tmp_path: Path) -> None:
    expression = TUNED + 0.5 * (ALIGNED - BASE)
    for wrong in (expression, {"start": "tuned"}, 5):
        with pytest.raises(
            TypeError, match=r"takes a Recipe or a recipe's path.*an expression is saved by its own \.save"
        ):
            resta.merge(wrong, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Recipe"):
        next(resta.tensors(expression))  # type: ignore[arg-type]


def test_expressions_show_their_equations() -> None:
    vector = ALIGNED - BASE
    merge = BASE + resta.dare(TUNED - BASE, density=0.7) - 0.5 * vector
    assert repr(merge) == "Merge(base + 1 * dare(tuned - base, density=0.7) - 0.5 * (aligned - base))"
    assert repr(0.5 * vector - vector) == "Delta(0.5 * (aligned - base) - 1 * (aligned - base))"
    assert repr(-vector) == "Delta(- 1 * (aligned - base))"
    assert repr(resta.load("org/tuned")) == "Checkpoint('org/tuned')"


def test_a_result_shows_its_change_and_not_every_tensor(trio: dict[str, str], tmp_path: Path) -> None:
    tuned, aligned, base = (resta.load(trio[name]) for name in ("tuned", "aligned", "base"))
    seen: list[str] = []
    result = (tuned + 0.5 * (aligned - base)).save(tmp_path / "out", progress=lambda name, nbytes: seen.append(name))
    assert set(seen) == set(read(result.out))
    assert len(repr(result)) < 600
    assert "tuned + 0.5 * (aligned - base)" in repr(result)
    assert f"cosine={result.change.cosine:.3f}" in repr(result)
    assert result.warnings == ()
