"""A mergekit configuration as a recipe: the same sum, or a refusal that names what cannot be said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from resta.cli import main
from resta.engine import tensors
from resta.errors import RequestError
from resta.recipe import load_recipe, parse_recipe
from tests.builders import Tensors, nudged, save_model

BASE = {"w": torch.linspace(-1, 1, 24).reshape(4, 6)}
NAMES = ("base", "aligned", "tuned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        save_model(folder / name, BASE if name == "base" else nudged(BASE, seed, 0.1))
    return folder


def by_definition(config: dict[str, Any], folder: Path) -> torch.Tensor:
    """What mergekit's documentation says that it computes, in float64."""
    from safetensors.torch import load_file

    shared = config.get("parameters", {})
    weights = {entry["model"]: entry["parameters"]["weight"] for entry in config["models"] if "parameters" in entry}
    loaded: dict[str, Tensors] = {name: load_file(folder / name / "model.safetensors") for name in NAMES}
    models = {name: found["w"].double() for name, found in loaded.items()}
    if config["merge_method"] == "linear":
        total = sum(weights.values()) if shared.get("normalize", True) else 1.0
        return sum((weight * models[source] for source, weight in weights.items()), torch.zeros(4, 6).double()) / total
    base = models[config["base_model"]]
    deltas = {source: weight for source, weight in weights.items() if source != config["base_model"]}
    total = sum(deltas.values()) if shared.get("normalize", False) else 1.0
    change = sum((weight * (models[source] - base) for source, weight in deltas.items()), torch.zeros(4, 6).double())
    return base + shared.get("lambda", 1.0) * change / total


def merged(config: dict[str, Any], folder: Path) -> torch.Tensor:
    path = folder / "their.yaml"
    path.write_text(yaml.safe_dump(config))
    return dict(tensors(path))["w"]


WEIGHTS = st.sampled_from([0.2, 0.5, 1, 0.7, -0.3, 1.5])


@given(
    method=st.sampled_from(["linear", "task_arithmetic"]),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    normalize=st.sampled_from([None, True, False]),
    factor=st.sampled_from([None, 0.5, 2.0]),
)
def test_the_recipe_computes_what_the_configuration_says(
    folder: Path, method: str, weights: list[float], normalize: bool | None, factor: float | None
) -> None:
    listed = NAMES if method == "linear" else NAMES[1:]
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(listed, weights, strict=False)]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "parameters": {}}
    if method == "task_arithmetic":
        config["base_model"] = "base"
        models.insert(0, {"model": "base"})
    if normalize is not None:
        config["parameters"]["normalize"] = normalize
    if factor is not None and method == "task_arithmetic":
        config["parameters"]["lambda"] = factor
    total = sum(entry["parameters"]["weight"] for entry in models if "parameters" in entry)
    assume(abs(total) > 0.1)
    if method == "linear" and normalize is False and abs(total - 1) > 1e-9:
        with pytest.raises(RequestError, match="add up to"):
            merged(config, folder)
        return
    torch.testing.assert_close(merged(config, folder).double(), by_definition(config, folder), rtol=1e-5, atol=1e-6)


def test_the_three_ways_of_writing_resta_are_resta(folder: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"merge_method": "task_arithmetic", "base_model": "base", "models": [("tuned", 1.0), ("aligned", 0.5)]},
        {"merge_method": "task_arithmetic", "base_model": "tuned", "models": [("aligned", 0.5), ("base", -0.5)]},
        {"merge_method": "linear", "parameters": {"normalize": False},
         "models": [("tuned", 1), ("aligned", 0.5), ("base", -0.5)]},
    ]  # fmt: skip
    for way in ways:
        way["models"] = [{"model": name, "parameters": {"weight": weight}} for name, weight in way["models"]]
    expected = by_definition(ways[2], folder)
    for way in ways:
        torch.testing.assert_close(merged(way, folder).double(), expected, rtol=1e-5, atol=1e-6)
    (folder / "sum.yaml").write_text(yaml.safe_dump(ways[2]))
    assert load_recipe(folder / "sum.yaml").equation == "tuned + 0.5 * (aligned - base)"


def test_dtype_donor_and_names_are_taken_over() -> None:
    recipe = parse_recipe(
        "merge_method: task_arithmetic\nbase_model: org/Base-7B@v1\ndtype: float32\nout_dtype: bfloat16\n"
        "models: [{model: org/Base-7B@v1}, {model: 'other/Base-7B', parameters: {weight: 1}}]\n"
        "parameters: {int8_mask: true}\ntokenizer_source: base\n"
    )
    assert recipe.output.dtype == "bfloat16"
    assert recipe.files_from == recipe.start == "Base_7B"
    assert {name: model.source for name, model in recipe.models.items()} == {
        "Base_7B": "org/Base-7B@v1",
        "Base_7B_": "other/Base-7B",
    }


TASK = "merge_method: task_arithmetic\nbase_model: a\n"
TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0.5}}]\nbase_model: a\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("merge_method: ties\n" + TWO, "'ties'"),
        ("merge_method: slerp\nslices: []\n", "'slerp'"),
        ("merge_method: linear\nslices: []\n", "'slices'"),
        ("merge_method: linear\nmodels: 3\n", "no list of models"),
        ("merge_method: linear\nchat_template: auto\n" + TWO, "'chat_template'"),
        ("merge_method: linear\ntokenizer_source: union\n" + TWO, "'union'"),
        ("merge_method: linear\ndtype: float8\n" + TWO, "'float8'"),
        ("merge_method: task_arithmetic\nparameters: {density: 0.5}\n" + TWO, "'density'"),
        ("merge_method: task_arithmetic\nparameters: {normalize: 1}\n" + TWO, "normalize"),
        (TASK + "models: [{model: b, parameters: {weight: [0, 1]}}]", "weight of b"),
        (TASK + f"models: [{{model: b, parameters: {{weight: {'9' * 400}}}}}]", "400 digits"),
        (TASK + "models: [{model: b+lora, parameters: {weight: 1}}]", "b+lora"),
        (TASK + "models: [{model: b}]", "without a weight"),
        ("merge_method: linear\nbase_model: a\nmodels: [{model: a}]", "without a weight"),
        ("merge_method: task_arithmetic\nmodels: [{model: b, parameters: {weight: 1}}]", "base_model"),
        (TASK + "models: [{model: {path: b}}]", "the entry"),
        ("merge_method: linear\n" + TWO.replace("0.5", "-1"), "add up to 0"),
        ("merge_method: [x]\n" + TWO, "merge_method"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_exactly_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(RequestError, match="mergekit configuration") as caught:
        parse_recipe(text)
    assert named in str(caught.value)


KEYS = st.sampled_from(["models", "base_model", "parameters", "dtype", "name"])
INNER = st.sampled_from(["model", "parameters", "weight"])
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(INNER, inner, max_size=3),
)


@given(st.dictionaries(KEYS, VALUES))
def test_a_configuration_of_any_types_is_read_or_refused(config: dict[str, Any]) -> None:
    for method in ("linear", "task_arithmetic"):
        try:
            parse_recipe(yaml.safe_dump({"merge_method": method, **config}))
        except RequestError:
            continue


def test_a_merge_takes_the_file_and_says_how_it_is_understood(folder: Path, tmp_path: Path) -> None:
    (folder / "their.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\ndtype: bfloat16\n"
        "models: [{model: tuned, parameters: {weight: 1}}, {model: aligned, parameters: {weight: 0.5}}]\n"
    )
    done = CliRunner().invoke(main, ["merge", str(folder / "their.yaml"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "is a mergekit configuration (task_arithmetic)" in done.stderr
    assert "at dtype: bfloat16 it rounds every intermediate" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
