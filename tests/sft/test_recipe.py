from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from resta.errors import RequestError
from resta.journal import differences
from resta.sft import recipe as recipes
from resta.sft.recipe import Recipe

RED = {"name": "red", "path": "red.jsonl", "side": "red"}
MINIMAL: dict[str, Any] = {"base": "org/model", "data": [{"name": "blue", "path": "blue.jsonl"}]}

BLUE_RED = MINIMAL | {"data": [*MINIMAL["data"], RED], "objective": {"kind": "blue_red"}}


def deepspeed(**config: Any) -> dict[str, Any]:
    return MINIMAL | {"parallel": {"strategy": "deepspeed", "deepspeed": config}}


def load(tmp_path: Path, settings: dict[str, Any] | str, *assignments: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
    return recipes.load(Recipe, path, assignments)


def test_a_minimal_recipe_is_lora_on_the_blue_objective(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.method, recipe.objective.kind, recipe.lora.target_modules) == (
        "lora",
        "blue",
        "all-linear",
    )


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL | {"lora": {"rank": 4, "target_modules": ["q_proj"]}})
    assert load(tmp_path, recipes.dump(recipe)) == recipe


def test_numbers_like_1e_5_are_numbers(tmp_path: Path) -> None:
    text = "base: m\ndata: [{name: a, path: a.jsonl}]\ntrain: {learning_rate: 1e-5}\n"
    assert load(tmp_path, text).train.learning_rate == 1e-5


def test_what_deepspeed_leaves_to_the_trainer_may_be_said(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    settings = deepspeed(zero_optimization=zero, train_batch_size="auto", bf16={"enabled": "auto"})
    assert load(tmp_path, settings).parallel.zero_stage == 3


# (settings, what the message must say)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (MINIMAL | {"chat_templat": "x"}, 'chat_templat: unknown key; did you mean "chat_template"'),
    (MINIMAL | {"train": {"learning_rat": 1.0}}, r'train\.learning_rat: unknown key; did you mean "learning_rate"'),
    (MINIMAL | {"train": {"epochs": "3"}}, r"train\.epochs: expected a number, found '3'"),
    (MINIMAL | {"data": []}, "data: expected at least 1"),
    (MINIMAL | {"data": [{"name": "a"}]}, "exactly one of `path`"),
    (MINIMAL | {"data": [{"name": "a", "path": "x", "hub": "y"}]}, "exactly one of `path`"),
    (MINIMAL | {"data": [{"name": "a", "path": "x", "revision": "y"}]}, "belong to a `hub` dataset"),
    (MINIMAL | {"data": MINIMAL["data"] * 2}, "two data sources are called 'blue'"),
    (MINIMAL | {"data": [{"name": "a", "path": "x", "equal_to": ["b"]}]}, "'b', which is not a source"),
    (MINIMAL | {"data": [*MINIMAL["data"], RED]}, "blue would imitate it"),
    (MINIMAL | {"objective": {"kind": "blue_red"}}, "at least one blue and one `side: red`"),
    (MINIMAL | {"objective": {"lambda2": 0.5}}, "need `kind: blue_red`"),
    (MINIMAL | {"objective": {"kind": "blue_red", "red_cutoff": 0.0}}, "red_cutoff"),
    (MINIMAL | {"trainer": {"learning_rate": 1.0}}, r"is set by `train\.learning_rate`"),
    (MINIMAL | {"train": {"early_stop_patience": 2}}, "needs `train.eval_every`"),
    (MINIMAL | {"train": {"eval_every": 5}, "holdout": 0.0}, "needs a `holdout`"),
    (MINIMAL | {"train": {"save_every": 7, "log_every": 5}}, "multiple of `log_every`"),
    (MINIMAL | {"parallel": {"strategy": "deepspeed"}}, "go together"),
    (MINIMAL | {"parallel": {"fsdp": {"version": 2}}}, "need `strategy: fsdp`"),
    (MINIMAL | {"parallel": {"strategy": "fsdp", "fsdp": {"verison": 2}}}, r"`fsdp\.verison` is no option"),
    (deepspeed(train_batch_size=8), r"`deepspeed\.train_batch_size` is set by `train\.global_batch`"),
    (deepspeed(bf16={"enabled": True}), r"set by `train\.precision`; leave it out, or leave it to `auto`"),
    (deepspeed(optimizer={"type": "AdamW"}), r"`deepspeed\.optimizer` is set by `train\.optimizer`"),
    (deepspeed(zero_optimization={"stage": 4}), "`stage: 1`, `2` or `3`"),
    (deepspeed(zero_optimization=3), "is a mapping with"),
    (deepspeed(zero_optimization={"stage": 3}), "stage3_gather_16bit_weights_on_model_save: true"),
    (deepspeed() | {"save_dtype": "float32"}, "gathers the weights in the 16 bits"),
    (MINIMAL | {"trainer": {"logging_strategy": "no"}}, r"is set by `train\.log_every`"),
    (BLUE_RED | {"trainer": {"loss_type": "dft"}}, r"`trainer\.loss_type` would have no effect"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_does_not_say_one_clear_thing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(tmp_path, settings)


def test_packing_with_blue_red_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path, BLUE_RED).objective.lambda2 == 0.1
    with pytest.raises(RequestError, match="each sample's own side"):
        load(tmp_path, BLUE_RED | {"train": {"packing": True}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping"),
        ("base: [\n", "not valid YAML"),
        ("base: a\nbase: b\n", "'base' occurs twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        recipes.load(Recipe, tmp_path / "none.yaml")


def test_assignments_change_single_settings(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL, "train.epochs=1", "base=/models/x", "data.0.limit=5", "lora.rank=4")
    assert (recipe.train.epochs, recipe.base, recipe.data[0].limit, recipe.lora.rank) == (
        1,
        "/models/x",
        5,
        4,
    )


@pytest.mark.parametrize("assignment", ["train.epochs", "=3", "data.7.limit=1", "base.x=1", "nothing=1"])
def test_a_bad_assignment_is_refused(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(RequestError):
        load(tmp_path, MINIMAL, assignment)


def test_the_digest_names_what_changes_the_result_and_nothing_else(tmp_path: Path) -> None:
    first = recipes.digest(load(tmp_path, MINIMAL))
    assert recipes.digest(load(tmp_path, MINIMAL, "parallel.processes=8")) == first
    assert recipes.digest(load(tmp_path, MINIMAL, "seed=1")) != first
    assert recipes.digest(load(tmp_path, MINIMAL, "train.learning_rate=2e-5")) != first


def test_changes_are_listed_by_key(tmp_path: Path) -> None:
    before = recipes.dump(load(tmp_path, MINIMAL))
    after = recipes.dump(load(tmp_path, MINIMAL, "seed=3", "lora.rank=4"))
    assert differences(before, after) == ["lora.rank: 16 there, 4 now", "seed: 0 there, 3 now"]
