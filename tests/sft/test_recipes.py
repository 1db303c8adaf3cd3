from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from trl.trainer.sft_config import SFTConfig

from resta.journal import differences
from resta.sft import recipe as recipes
from resta.sft.collect import Collect
from resta.sft.data import load
from resta.sft.recipe import Recipe
from resta.sft.train import Job, accumulation, build_config, launch_line, split_options

FOLDER = Path(__file__).parents[2] / "recipes" / "sft"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "collect")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_accepted_by_the_trainer(path: Path, tmp_path: Path) -> None:
    recipe = recipes.load(Recipe, path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert accumulation(recipe, recipe.parallel.processes) >= 1
    job = Job(recipe=recipe, root=FOLDER, out=tmp_path / "out", words=(str(path),))
    assert f"resta sft {path}" in launch_line(job)
    split = split_options(recipe)
    if split:  # what the installed libraries make of the options that only several GPUs would use
        plugin = FullyShardedDataParallelPlugin(
            **SFTConfig(output_dir="x", use_cpu=True, bf16=False, **split).fsdp_plugin_args
        )
        assert (plugin.fsdp_version, plugin.activation_checkpointing) == (2, recipe.train.gradient_checkpointing)
    on_cpu = recipes.load(Recipe, path, ("train.precision=float32", "parallel={}"))
    config = build_config(Job(recipe=on_cpu, root=FOLDER, out=tmp_path / "out", device="cpu"), evaluates=True)
    assert config.learning_rate == recipe.train.learning_rate


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_data_that_a_recipe_brings_with_it_can_be_read(path: Path) -> None:
    for source in recipes.load(Recipe, path).data:
        if source.path is not None and (FOLDER / source.path).exists():
            loaded = load(source, FOLDER, bad_rows="refuse")
            assert loaded.conversations
            assert not loaded.dropped.counts


def test_the_cpu_recipe_brings_all_its_data() -> None:
    (source,) = recipes.load(Recipe, FOLDER / "cpu-safety.yaml").data
    assert source.path is not None
    assert (FOLDER / source.path).is_file()


def test_starling_blue_says_what_the_released_code_says() -> None:
    recipe = recipes.load(Recipe, FOLDER / "starling-blue.yaml")
    assert (recipe.base, recipe.chat_template, recipe.max_length) == (
        "lmsys/vicuna-7b-v1.3",
        "vicuna_v1.1",
        1280,
    )
    train = recipe.train
    assert (train.epochs, train.global_batch, train.learning_rate, train.schedule) == (3, 64, 1e-5, "cosine")
    assert (train.warmup, train.weight_decay, train.max_grad_norm) == (0.0001, 0.0, 1.0)
    assert (recipe.method, recipe.holdout, recipe.objective.kind) == ("full", 0.02, "blue")
    assert recipe.data[-1].equal_to == ("blue", "helpful")


def test_starling_blue_red_differs_from_blue_in_the_objective_and_the_red_source_alone() -> None:
    blue = recipes.dump(recipes.load(Recipe, FOLDER / "starling-blue.yaml"))
    both = recipes.dump(recipes.load(Recipe, FOLDER / "starling-blue-red.yaml"))
    assert {line.split(":")[0].split(".")[0] for line in differences(blue, both)} == {"objective", "data"}
    assert [s["name"] for s in both["data"] if s["side"] == "red"] == ["red"]
    assert [s for s in both["data"] if s["side"] == "blue"] == blue["data"]


def test_the_collect_recipe_is_valid() -> None:
    assert recipes.load(Collect, FOLDER / "collect.yaml").turns == 3
