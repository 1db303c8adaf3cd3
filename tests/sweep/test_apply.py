from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resta import merge
from resta.errors import ChangedError, RequestError
from resta.recipe import OutputChoices, dump_recipe, named_models
from resta.redeval.models import LocalModel, LocalSpec, load_local
from resta.sweep.apply import apply, write_files
from resta.sweep.candidates import Candidate, Family, recipe_of, tuned_recipe

CANDIDATES = [
    Candidate(method="resta", scale=0.5),
    Candidate(method="resta_d", scale=0.3, density=0.7),
    Candidate(method="interpolation", scale=0.4),
    Candidate(method="both", scale=0.5),
    Candidate(method="random", scale=0.5),
]
RECIPES = CANDIDATES[:-1]


def family_of(trio: dict[str, Path], **output: str) -> Family:
    models = named_models({name: str(path) for name, path in trio.items()})
    return Family(models=models, output=OutputChoices(files_from="tuned", **output))  # type: ignore[arg-type]


def load(family: Family, folder: Path) -> LocalModel:
    write_files(family, folder / "files")
    (folder / "tuned.yaml").write_text(dump_recipe(tuned_recipe(family)))
    return load_local(LocalSpec(model=str(folder / "tuned.yaml"), files=str(folder / "files"), device="cpu"))


def state(local: LocalModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in local.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value.view(torch.uint8), two[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_an_applied_candidate_is_a_written_merge_byte_for_byte(
    dtype: str, trio: dict[str, Path], tmp_path: Path
) -> None:
    family = family_of(trio, dtype=dtype)
    local = load(family, tmp_path)
    for candidate in RECIPES:
        out = merge(recipe_of(candidate, family), tmp_path / candidate.name).out
        apply(local, candidate, family)
        assert_same(state(local), state(load_local(LocalSpec(model=str(out), device="cpu"))))


def test_nothing_is_left_of_what_was_applied_before(trio: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(trio, dtype="bfloat16")
    local = load(family, tmp_path)
    apply(local, CANDIDATES[0], family)
    first = state(local)
    for candidate in CANDIDATES:
        apply(local, candidate, family)
    with pytest.raises(AssertionError):
        assert_same(state(local), first)
    apply(local, CANDIDATES[0], family)
    assert_same(state(local), first)


@pytest.mark.parametrize("candidate", RECIPES, ids=lambda each: each.name)
def test_the_change_is_the_distance_from_tuned_on_disk(
    candidate: Candidate, trio: dict[str, Path], tmp_path: Path
) -> None:
    family = family_of(trio)
    change = apply(load(family, tmp_path), candidate, family)
    written = load_file(merge(recipe_of(candidate, family), tmp_path / "out").out / "model.safetensors")
    tuned = load_file(trio["tuned"] / "model.safetensors")
    squares = [((written[name].double() - value.double()) ** 2).sum() for name, value in tuned.items()]
    assert change.norm == pytest.approx(math.sqrt(float(sum(squares))), rel=1e-12)
    assert change.changed == sum(int((written[name] != value).sum()) for name, value in tuned.items())
    assert change.entries == sum(value.numel() for value in tuned.values())


def control(trio: dict[str, Path], folder: Path, scale: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    family = family_of(trio)
    family = replace(family, seed=seed)
    folder.mkdir()
    local = load(family, folder)
    apply(local, Candidate(method="random", scale=scale), family)
    return state(local)


def test_the_random_control_has_the_vectors_norm_tensor_by_tensor(trio: dict[str, Path], tmp_path: Path) -> None:
    found = control(trio, tmp_path / "one")
    tuned, aligned, base = (load_file(trio[name] / "model.safetensors") for name in ("tuned", "aligned", "base"))
    for name, value in tuned.items():
        moved = (found[name].double() - value.double()).flatten()
        vector = 0.5 * (aligned[name].double() - base[name].double()).flatten()
        assert float(moved.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
        if moved.numel() > 1000:  # and no direction of it
            assert abs(float(moved @ vector / moved.norm() / vector.norm())) < 5 / math.sqrt(moved.numel())


def test_the_random_control_is_drawn_from_the_seed_and_nothing_else(trio: dict[str, Path], tmp_path: Path) -> None:
    first = control(trio, tmp_path / "one")
    assert_same(first, control(trio, tmp_path / "two"))
    with pytest.raises(AssertionError):
        assert_same(first, control(trio, tmp_path / "three", seed=1))


def test_weights_that_the_merge_does_not_name_are_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(trio)
    local: Any = load(family, tmp_path)
    local.model.register_parameter("another", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(RequestError, match="another"):
        apply(local, CANDIDATES[0], family)


def test_tied_weights_that_differ_in_the_merge_are_refused(babbling: dict[str, Path], tmp_path: Path) -> None:
    own = {}
    for name, path in babbling.items():
        own[name] = tmp_path / name
        own[name].mkdir()
        for file in path.iterdir():
            (own[name] / file.name).write_bytes(file.read_bytes())
    family = family_of(own)
    local = load(family, tmp_path)  # tied, as its config says
    for path in own.values():
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    family = family_of(own)
    apply(local, Candidate(method="resta", scale=0.5), family)
    with pytest.raises(RequestError, match="tied"):  # each name draws a mask of its own
        apply(local, Candidate(method="resta_d", scale=0.5, density=0.5), family)


def test_a_model_that_changes_between_two_candidates_is_noticed(trio: dict[str, Path], tmp_path: Path) -> None:
    aligned = tmp_path / "aligned"
    shutil.copytree(trio["aligned"], aligned)
    family = family_of({**trio, "aligned": aligned})
    local = load(family, tmp_path)
    apply(local, CANDIDATES[0], family)
    tensors = load_file(aligned / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, aligned / "model.safetensors")
    with pytest.raises(ChangedError, match="aligned/model"):
        apply(local, CANDIDATES[1], family)
