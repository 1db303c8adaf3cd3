from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import resta
from resta import compute, engine
from resta.errors import NonFiniteError, RestaError
from resta.manifest import total_change
from resta.plan import derive_key
from resta.recipe import Model, make_recipe
from tests import oracle
from tests.builders import (
    CONFIG,
    RESTA,
    RESTA_D,
    assert_same_tensors,
    llama_tensors,
    nudged,
    read,
    recipe_of,
    save_model,
)


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["same", "float32", "float16", "float64"])
def test_resta_is_correctly_rounded(trio: dict[str, str], tmp_path: Path, dtype: str) -> None:
    result = engine.merge(recipe_of(trio, "tuned", RESTA, output={"dtype": dtype}), tmp_path / "out")
    got, models = read(result.out), {name: read(path) for name, path in trio.items()}
    assert got.keys() == models["tuned"].keys()
    for name, value in got.items():
        tuned, aligned, base = (oracle.double(models[model][name]) for model in ("tuned", "aligned", "base"))
        exact = oracle.merged(tuned, [(0.5, 1, aligned, base)])
        largest = np.maximum(np.maximum(abs(tuned), abs(aligned)), abs(base))
        if dtype == "float64" or dtype == "float32":
            assert (abs(oracle.double(value) - exact) <= 2.0**-22 * largest).all()
        else:
            oracle.assert_rounded_well(value, exact, largest)


def test_resta_d_masks_are_philox_and_dropped_entries_are_exact(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "base", RESTA_D, seed=7, output={"dtype": "float32", "files_from": "tuned"})
    got, models = read(engine.merge(recipe, tmp_path / "out").out), {name: read(path) for name, path in trio.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tuned, aligned, base = (models[model][name].float().numpy() for model in ("tuned", "aligned", "base"))
    kept = oracle.words(7, "dare", 0, name, tuned.size).reshape(tuned.shape) < 0.7 * 2**32
    exact = oracle.merged(base, [(1 / 0.7, kept, tuned, base), (0.5, 1, aligned, base)])
    np.testing.assert_allclose(got[name].numpy(), exact, rtol=0, atol=2.0**-22 * abs(base).max())
    safety_only = base + np.float32(0.5) * (aligned - base)
    np.testing.assert_array_equal(got[name].numpy()[~kept], safety_only[~kept])
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / kept.size)


def test_a_lower_density_keeps_a_subset(trio: dict[str, str]) -> None:
    def kept(density: float) -> torch.Tensor:
        terms = [{"delta": "tuned - base", "scale": 1.0, "sparsify": {"density": density}}]
        recipe = recipe_of(trio, "base", terms, output={"dtype": "float32", "files_from": "base"})
        tensors, base = dict(engine.tensors(recipe)), read(trio["base"])
        return torch.cat([(tensors[name] != base[name].float()).flatten() for name in sorted(tensors)])

    low, middle, high = kept(0.2), kept(0.5), kept(0.9)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert low.sum() < middle.sum() < high.sum()


def test_the_l1_rule_keeps_the_l1_norm_and_the_paper_keeps_the_mean(trio: dict[str, str]) -> None:
    base = read(trio["base"])
    tuned = read(trio["tuned"])
    for rescale in ("inverse_density", "l1_norm"):
        sparsify = {"density": 0.3, "rescale": rescale}
        terms = [{"delta": "tuned - base", "scale": 1.0, "sparsify": sparsify}]
        recipe = recipe_of(trio, "base", terms, output={"dtype": "float64", "files_from": "base"})
        for name, value in engine.tensors(recipe):
            delta = oracle.double(tuned[name]) - oracle.double(base[name])
            got = oracle.double(value) - oracle.double(base[name])
            kept = got != 0
            if rescale == "l1_norm":
                np.testing.assert_allclose(abs(got).sum(), abs(delta).sum(), rtol=1e-4)
            else:
                np.testing.assert_allclose(got[kept], delta[kept] / 0.3, rtol=1e-3, atol=1e-8)


EQUIVALENT = {
    "three-weight form": (
        ("tuned", RESTA),
        ("base", [{"delta": "tuned - base", "scale": 1}, {"delta": "aligned - base", "scale": 0.5}]),
    ),
    "RESTA_d at density 1": (
        ("tuned", RESTA),
        ("base", [RESTA_D[0] | {"sparsify": {"density": 1.0}}, RESTA_D[1]]),
    ),
    "the vector reversed": (("tuned", RESTA), ("tuned", [{"delta": "base - aligned", "scale": -0.5}])),
    "the vector in halves": (("tuned", RESTA), ("tuned", [{"delta": "aligned - base", "scale": 0.25}] * 2)),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_equivalent_recipes_agree_to_float32_rounding(trio: dict[str, str], case: str) -> None:
    (start, terms), (other_start, other_terms) = EQUIVALENT[case]
    output = {"dtype": "float32", "files_from": "tuned"}
    mine = dict(engine.tensors(recipe_of(trio, start, terms, output=output)))
    other = dict(engine.tensors(recipe_of(trio, other_start, other_terms, output=output)))
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2.0**-22 * float(value.abs().max()))


def test_scale_zero_gives_the_bytes_of_the_start(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "tuned", [{"delta": "aligned - base", "scale": 0}])
    result = engine.merge(recipe, tmp_path / "out")
    assert_same_tensors(read(result.out), read(trio["tuned"]))
    assert {fact.action for fact in result.tensors.values()} == {"copied"}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_do_not_depend_on_workers_chunks_units_or_shards(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    def merged(shard_size: str, workers: int, name: str) -> Path:
        output = {"files_from": "tuned", "rounding": rounding, "shard_size": shard_size}
        recipe = recipe_of(trio, "base", RESTA_D, output=output)
        return engine.merge(recipe, tmp_path / name, workers=workers).out

    usual = merged("5GB", 1, "usual")
    many = merged("5GB", 5, "many")
    assert weight_bytes(usual) == weight_bytes(many)  # the manifest and the card included
    shards = merged("30kB", 2, "shards")
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert_same_tensors(read(shards), read(usual))
    monkeypatch.setattr(compute, "CHUNK", 2048)
    monkeypatch.setattr(engine, "CHUNK", 2048)
    monkeypatch.setattr(engine, "UNIT", 4096)
    assert_same_tensors(read(merged("5GB", 3, "chunks")), read(usual))


def test_in_memory_tensors_are_the_files_tensors(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "tuned", RESTA)
    assert_same_tensors(dict(resta.tensors(recipe)), read(engine.merge(recipe, tmp_path / "out").out))


def test_a_recipe_file_merges_like_the_recipe(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "tuned", RESTA)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "models: {tuned: ./tuned, aligned: ./aligned, base: ./base}\n"
        "start: tuned\nterms: [{delta: aligned - base, scale: 0.5}]\n"
    )
    out = resta.merge(file, tmp_path / "out").out
    assert_same_tensors(read(out), read(engine.merge(recipe, tmp_path / "other").out))


def test_transformers_loads_the_result_and_computes_with_it(trio: dict[str, str], tmp_path: Path) -> None:
    out = engine.merge(recipe_of(trio, "tuned", RESTA, output={"shard_size": "60kB"}), tmp_path / "out").out
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name, value in read(out).items():
        assert torch.equal(state[name], value), name
    tokens = torch.arange(5)[None]
    assert model(tokens).logits.isfinite().all()


def test_the_output_keeps_the_config_text_and_records_everything(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(trio, "tuned", RESTA, output={"dtype": "float32"})
    out = engine.merge(recipe, tmp_path / "out").out
    source = (Path(trio["tuned"]) / "config.json").read_text()
    assert (out / "config.json").read_text() == source.replace('"bfloat16"', '"float32"')
    manifest = json.loads((out / "resta.json").read_text())
    assert manifest["recipe_digest"] == recipe.digest
    named = {name: Path(model.source).name for name, model in recipe.models.items()}
    assert make_recipe(manifest["recipe"]) == recipe.model_copy(
        update={"models": {name: Model(source=source) for name, source in named.items()}}
    )
    assert manifest["tensors"].keys() == read(out).keys()
    files = manifest["inputs"]["tuned"]["files"]
    assert {name: facts["bytes"] for name, facts in files.items()} == {
        file.name: file.stat().st_size for file in Path(trio["tuned"]).glob("*.safetensors")
    }
    card = (out / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert "0.5 times what aligned has beyond base" in card
    assert not (out.parent / "out.partial").exists()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_realised_change_is_what_the_files_show(trio: dict[str, str], tmp_path: Path, rounding: str) -> None:
    result = engine.merge(recipe_of(trio, "tuned", RESTA, output={"rounding": rounding}), tmp_path / "out")
    models = {name: read(path) for name, path in trio.items()} | {"out": read(result.out)}
    flat = {
        model: np.concatenate([oracle.double(tensors[name]).ravel() for name in sorted(tensors)])
        for model, tensors in models.items()
    }
    intended = 0.5 * (flat["aligned"] - flat["base"])
    realised = flat["out"] - flat["tuned"]
    change = total_change(result.tensors.values())
    assert change.changed == pytest.approx((realised != 0).mean())
    assert change.norm_ratio == pytest.approx(np.linalg.norm(realised) / np.linalg.norm(intended), rel=1e-4)
    cosine = intended @ realised / np.linalg.norm(intended) / np.linalg.norm(realised)
    assert change.cosine == pytest.approx(cosine, abs=1e-4)
    assert change.relative_size == pytest.approx(np.linalg.norm(intended) / np.linalg.norm(flat["tuned"]), rel=1e-4)


def test_stochastic_rounding_keeps_a_small_vector_that_nearest_loses(tmp_path: Path) -> None:
    base = {"w": torch.full((512, 512), 1.0, dtype=torch.bfloat16)}
    aligned = {"w": torch.full((512, 512), 1.0 + 2.0**-7, dtype=torch.bfloat16)}
    paths = {
        "base": str(save_model(tmp_path / "base", base)),
        "aligned": str(save_model(tmp_path / "aligned", aligned)),
    }
    terms = [{"delta": "aligned - base", "scale": 0.1}]

    def mean_change(rounding: str) -> float:
        recipe = recipe_of(paths, "base", terms, output={"rounding": rounding})
        return float((dict(engine.tensors(recipe))["w"].double() - 1).mean())

    assert mean_change("nearest") == 0
    assert mean_change("stochastic") == pytest.approx(0.1 * 2.0**-7, rel=0.02)


def test_mixed_dtypes_are_computed_in_the_widest(tmp_path: Path) -> None:
    base = llama_tensors(0, torch.float64)
    models = {"tuned": nudged(base, 1), "aligned": nudged(base, 2), "base": base}
    models["aligned"] = {name: value.to(torch.float16) for name, value in models["aligned"].items()}
    models["tuned"] = {name: value.to(torch.bfloat16) for name, value in models["tuned"].items()}
    paths = {name: str(save_model(tmp_path / name, tensors)) for name, tensors in models.items()}
    got = dict(engine.tensors(recipe_of(paths, "tuned", RESTA)))
    for name, value in got.items():
        tuned, aligned, base_values = (oracle.double(models[model][name]) for model in ("tuned", "aligned", "base"))
        exact = oracle.merged(tuned, [(0.5, 1, aligned, base_values)])
        assert value.dtype == torch.bfloat16
        np.testing.assert_array_equal(oracle.double(value), oracle.rounded(exact, "bfloat16"))


@pytest.mark.parametrize("model", ["tuned", "aligned", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name_and_count(tmp_path: Path, model: str, value: float) -> None:
    base = llama_tensors(0)
    models = {"tuned": nudged(base, 1), "aligned": nudged(base, 2), "base": base}
    models[model]["model.layers.1.mlp.up_proj.weight"][3, 4:7] = value
    paths = {name: str(save_model(tmp_path / name, tensors)) for name, tensors in models.items()}
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.mlp\.up_proj\.weight' of {model} holds 3 NaN"):
        engine.merge(recipe_of(paths, "tuned", RESTA), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    rules = [{"match": "*.1.mlp.up_proj.weight", "nonfinite": "allow"}]
    engine.merge(recipe_of(paths, "tuned", RESTA, rules=rules), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["tuned", "aligned", "base"])
def test_nan_is_counted_wherever_it_lies_in_a_tensor_of_several_chunks(
    model: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Float64 beside narrower models: the whole of a chunk is looked at, and nothing past it."""
    entries = torch.randn(3, compute.CHUNK + 4099, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = {name: {"w": entries[row].to(dtype)} for row, name in enumerate(("base", "aligned", "tuned"))}
    models[model]["w"] = entries[0].clone()
    places = [200_000, compute.CHUNK - 1, compute.CHUNK + 4098]
    models[model]["w"][places] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=torch.float64)
    paths = {name: str(save_model(tmp_path / name, tensors)) for name, tensors in models.items()}
    with pytest.raises(NonFiniteError, match=rf"tensor 'w' of {model} holds 3 NaN or infinite values"):
        engine.merge(recipe_of(paths, "tuned", RESTA), tmp_path / "out")


def test_nan_in_a_copied_tensor_is_refused_too(trio: dict[str, str], tmp_path: Path) -> None:
    broken = read(trio["tuned"])
    broken["model.norm.weight"][5] = float("nan")
    trio["tuned"] = str(save_model(tmp_path / "broken", broken))
    rules = [{"match": "model.norm.weight", "keep": True}]
    with pytest.raises(NonFiniteError, match=r"norm\.weight' of tuned holds 1 NaN"):
        engine.merge(recipe_of(trio, "tuned", RESTA, rules=rules), tmp_path / "out")


def test_an_overflow_of_the_output_dtype_is_refused(tmp_path: Path) -> None:
    base = {"w": torch.full((4, 4), 60000.0)}
    paths = {"base": str(save_model(tmp_path / "b", base)), "tuned": str(save_model(tmp_path / "t", nudged(base, 1)))}
    aligned = {"w": torch.full((4, 4), 70000.0)}
    paths["aligned"] = str(save_model(tmp_path / "a", aligned))
    terms = [{"delta": "aligned - base", "scale": 1.0}]
    with pytest.raises(NonFiniteError, match="overflows F16"):
        engine.merge(recipe_of(paths, "tuned", terms, output={"dtype": "float16"}), tmp_path / "out")


def test_integer_and_boolean_tensors_and_empty_ones_pass_through(tmp_path: Path) -> None:
    extra = {
        "ids": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "one": torch.ones(()),
    }
    base = llama_tensors(0) | extra
    models = {"tuned": nudged(base, 1), "aligned": nudged(base, 2), "base": base}
    paths = {name: str(save_model(tmp_path / name, tensors)) for name, tensors in models.items()}
    recipe = recipe_of(paths, "tuned", RESTA)
    got = read(engine.merge(recipe, tmp_path / "out").out)
    for name in ("ids", "mask", "empty"):
        assert torch.equal(got[name], extra[name])
    assert_same_tensors(dict(engine.tensors(recipe)), got)


def test_an_input_that_changes_during_the_merge_is_noticed(trio: dict[str, str], tmp_path: Path) -> None:
    victim = Path(trio["base"]) / "model.safetensors"

    def tamper(name: str, nbytes: int) -> None:
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)

    with pytest.raises(RestaError, match="changed while it was being read"):
        engine.merge(recipe_of(trio, "tuned", RESTA), tmp_path / "out", workers=1, progress=tamper)
    assert not (tmp_path / "out").exists()


def test_keys_differ_by_seed_purpose_term_and_tensor() -> None:
    keys = {
        derive_key(seed, purpose, term, tensor)
        for seed in (0, 1)
        for purpose in ("dare", "rounding")
        for term in (0, 1)
        for tensor in ("a", "b")
    }
    assert len(keys) == 16


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    paths = {"tuned": str(folder), "aligned": str(folder), "base": str(folder)}
    with pytest.raises(RestaError, match=r"no config\.json"):
        engine.merge(recipe_of(paths, "tuned", RESTA), tmp_path / "out")
    assert CONFIG["model_type"] == "llama"
