from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.errors import RequestError
from resta.plan import make_plan
from resta.recipe import load_recipe, named_models
from resta.sweep.candidates import (
    Candidate,
    Family,
    Grid,
    candidates_of,
    check_density,
    check_methods,
    coarse_first,
    family_of,
    parse_numbers,
    recipe_of,
    tuned_recipe,
)

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = {"tuned": "./tuned", "aligned": "./aligned", "base": "./base"}


def family(**more: object) -> Family:
    return Family(models=named_models({**MODELS, **more}), seed=5)


@given(
    first=st.decimals(-5, 5, places=3),
    step=st.decimals("0.001", 2, places=3),
    count=st.integers(min_value=0, max_value=50),
)
def test_a_range_is_inclusive_and_does_not_drift(first: Decimal, step: Decimal, count: int) -> None:
    last = first + count * step
    found = parse_numbers(f"{first}:{last}:{step}", "--scale")
    assert len(found) == count + 1
    assert found == tuple(float(str(first + i * step)) for i in range(count + 1))


def test_the_fourth_tenth_is_three_tenths() -> None:
    assert parse_numbers("0:1:0.1", "--scale") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_numbers(" 0.5, 0.2 ", "--scale") == (0.5, 0.2)


@pytest.mark.parametrize(
    "text",
    ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:0.3", "0:1:-1", "0.1,0.10", "nan", "0:1e9:0.001", "0:1:0.1:2", "1e-9"],
)
def test_a_range_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--scale"):
        parse_numbers(text, "--scale")


@given(st.lists(st.integers(), unique=True, max_size=40))
def test_coarse_first_loses_and_repeats_nothing(items: list[int]) -> None:
    assert sorted(coarse_first(items)) == sorted(items)
    if len(items) > 2:
        assert coarse_first(items)[:3] == [items[0], items[-1], items[(len(items) - 1) // 2]]


def test_both_baselines_are_always_there() -> None:
    found = candidates_of(Grid(methods=("resta",), scales=(0.0, 0.5, 1.0), interpolation_scales=(0.3, 0.6)))
    assert {each.name for each in found if each.baseline} == {
        "interpolation-0.3",
        "interpolation-0.6",
        "random-0.5",
        "random-1",
    }
    assert {each.name for each in found if not each.baseline} == {"resta-0.5", "resta-1"}  # at 0 it is tuned


def test_interpolation_that_is_asked_for_is_no_baseline() -> None:
    grid = Grid(
        methods=("resta_d", "interpolation"),
        scales=(0.5,),
        densities=(0.7, 0.9),
        interpolation_scales=(0.4,),
        random_scales=(1.0,),
    )
    found = candidates_of(grid)
    assert {each.name for each in found if each.baseline} == {"random-1"}
    assert {each.name for each in found if not each.baseline} == {
        "resta_d-0.5-density-0.7", "resta_d-0.5-density-0.9", "interpolation-0.4",
    }  # fmt: skip


def test_both_takes_the_scales_up_to_the_aligned_model() -> None:
    found = candidates_of(Grid(methods=("both",), scales=(0.0, 0.5, 1.0, 1.5)))
    assert {each.name for each in found if not each.baseline} == {"both-0.5", "both-1"}


@pytest.mark.parametrize(
    ("candidate", "equation"),
    [
        (Candidate(method="resta", scale=0.3), "tuned + 0.3 * (aligned - base)"),
        (Candidate(method="interpolation", scale=0.3), "tuned + 0.3 * (aligned - tuned)"),
        (Candidate(method="both", scale=0.3), "tuned + 0.3 * (aligned - base) + 0.3 * (aligned - tuned)"),
        (Candidate(method="random", scale=0.3), "tuned + 0.3 * (aligned - base)"),
        (
            Candidate(method="resta_d", scale=0.3, density=0.7),
            "base + 1 * dare(tuned - base, density=0.7) + 0.3 * (aligned - base)",
        ),
    ],
)
def test_each_method_is_its_equation(candidate: Candidate, equation: str) -> None:
    recipe = recipe_of(candidate, family())
    assert recipe.equation == equation
    assert recipe.files_from == "tuned"
    assert recipe.seed == 5


def test_an_unaligned_twin_stands_for_the_base() -> None:
    candidate = Candidate(method="resta", scale=0.5)
    assert recipe_of(candidate, family(unaligned="./unaligned")).equation == "tuned + 0.5 * (aligned - unaligned)"


@pytest.mark.parametrize("name", ["resta", "resta_d", "wise_ft"])
def test_a_recipe_is_swept_by_its_own_scale(name: str) -> None:
    own = family_of(load_recipe(RECIPES / f"{name}.yaml"))
    swept = recipe_of(Candidate(method="recipe", scale=0.25), own)
    assert swept.terms[-1].scale == 0.25
    assert swept.terms[:-1] == own.terms[:-1]
    assert tuned_recipe(own).start == "tuned"


def test_density_goes_into_every_thinned_term_of_a_recipe() -> None:
    own = family_of(load_recipe(RECIPES / "resta_d.yaml"))
    swept = recipe_of(Candidate(method="recipe", scale=0.25, density=0.9), own)
    assert swept.terms[0].sparsify is not None
    assert swept.terms[0].sparsify.density == 0.9


def test_methods_that_need_what_is_not_given_are_refused() -> None:
    without = family_of(load_recipe(RECIPES / "wise_ft.yaml"))
    with pytest.raises(RequestError, match="--base"):
        check_methods(Grid(methods=("resta",), scales=(1.0,)), without)
    with pytest.raises(RequestError, match="both need --base"):
        check_methods(Grid(methods=("both",), scales=(1.0,)), without)
    with pytest.raises(RequestError, match="at most 1"):
        check_methods(Grid(methods=("both",), scales=(1.5,)), family())
    with pytest.raises(RequestError, match="--density"):
        check_methods(Grid(methods=("resta_d",), scales=(1.0,)), family())
    with pytest.raises(RequestError, match="resta_d alone"):
        check_methods(Grid(methods=("resta",), scales=(1.0,), densities=(0.5,)), family())
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        check_density([0.0])
    check_methods(Grid(methods=("interpolation",), scales=(1.0,)), without)


def test_every_candidate_can_be_planned(trio: dict[str, Path]) -> None:
    found = family(**{name: str(path) for name, path in trio.items()})
    grid = Grid(
        methods=("resta", "resta_d", "interpolation"), scales=(0.5,), densities=(0.7,), interpolation_scales=(0.5,)
    )
    for candidate in candidates_of(grid):
        assert make_plan(recipe_of(candidate, found)).steps


def test_interpolation_may_be_asked_for_by_its_earlier_name() -> None:
    from resta.cli.sweep import _grid, command

    context = command.make_context(
        "sweep", ["t", "--scale", "0.5", "--method", "wise", "--wise-scale", "0.2", "-o", "x"]
    )
    grid = _grid(context.params, is_recipe=False)
    assert (grid.methods, grid.interpolation_scales) == (("interpolation",), (0.2,))


def test_flags_of_coverage_and_configs_go_into_every_candidates_recipe(trio: dict[str, Path]) -> None:
    from resta.cli.sweep import _family, command

    words = [str(trio["tuned"]), "--aligned", str(trio["aligned"]), "--base", str(trio["base"]), "--scale", "0.5"]
    words += ["--min-coverage", "0.5", "--allow-config", "rope_theta", "-o", "x"]
    context = command.make_context("sweep", words)
    found = _family(str(trio["tuned"]), context.params)
    for candidate in candidates_of(Grid(scales=(0.5,))):
        recipe = recipe_of(candidate, found)
        assert (recipe.min_coverage, recipe.allow_config) == (0.5, ("rope_theta",))
