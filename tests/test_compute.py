"""What each term of a merge did: a term that changes nothing is an error, and the facts of each are its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resta
from resta import compute, engine
from resta.auditing import audit
from resta.errors import NoChangeError, RestaError
from resta.recipe import Recipe, make_recipe
from tests import oracle
from tests.builders import Tensors, llama_tensors, nudged, save_model

SAFETY = {"name": "safety", "delta": "aligned - base", "scale": 0.5}
FINETUNE = {"name": "finetune", "delta": "tuned - base", "scale": 1.0, "sparsify": {"density": 0.7}}
BASE = llama_tensors(0)
TUNED = nudged(BASE, 2)


def models_of(folder: Path, **models: Tensors) -> dict[str, str]:
    tensors = {"base": BASE, "aligned": nudged(BASE, 1), "tuned": TUNED, **models}
    return {name: str(save_model(folder / name, part)) for name, part in tensors.items()}


def recipe_of(models: dict[str, str], *terms: dict[str, Any], start: str = "tuned", **rest: Any) -> Recipe:
    return make_recipe({"models": models, "start": start, "terms": terms or (SAFETY,), **rest})


def resta_d(models: dict[str, str], **rest: Any) -> Recipe:
    return recipe_of(models, FINETUNE, SAFETY, start="base", **rest)


def audited(result: engine.Result) -> None:
    """The audit, told where the inputs lie, finds nothing."""
    audit(result.out, moved={name: model.source for name, model in result.plan.recipe.models.items()}).raise_if_any()


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "resta.json").read_text())
    return manifest


RECIPES = {"RESTA": recipe_of, "RESTA_d": resta_d}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_term_that_only_the_arithmetic_shows_to_be_zero_leaves_no_output(tmp_path: Path, kind: str) -> None:
    """The same values in another dtype: no file and no byte of aligned is base's."""
    models = models_of(tmp_path, aligned={name: value.float() for name, value in BASE.items()})
    recipe = RECIPES[kind](models)
    with pytest.raises(NoChangeError, match=r"term safety: 0\.5 .* is zero in every entry"):
        engine.merge(recipe, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "aligned", "tuned"}
    with pytest.raises(NoChangeError, match="aligned and base hold the same values"):
        list(resta.tensors(recipe))


def test_a_zero_term_is_found_by_the_merge_that_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(tmp_path, aligned={name: value.float() for name, value in BASE.items()})
    monkeypatch.setattr(engine, "UNIT", 2048)
    seen: list[str] = []

    def stop_late(name: str, nbytes: int) -> None:
        seen.append(name)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.merge(resta_d(models), tmp_path / "out", workers=1, progress=stop_late)
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(NoChangeError, match="term safety"):
        engine.merge(resta_d(models), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_one_entry_that_differs_is_a_change_whichever_attempt_met_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opposite of the above: the only entry was met before the kill, and only the journal remembers it."""
    aligned = {name: value.float() for name, value in BASE.items()}
    first = next(iter(resta.tensors(recipe_of(models_of(tmp_path / "order")))))[0]
    aligned[first].view(-1)[0] += 1
    models = models_of(tmp_path / "models", aligned=aligned)
    monkeypatch.setattr(engine, "UNIT", 2048)

    def stop_soon(name: str, nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.merge(recipe_of(models), tmp_path / "out", workers=1, progress=stop_soon)
    out = engine.merge(recipe_of(models), tmp_path / "out").out
    assert manifest_of(out)["change"]["cosine"] == pytest.approx(1, abs=0.01)


def test_a_change_that_rounding_loses_in_every_entry_is_no_merge(tmp_path: Path) -> None:
    ones = {"w": torch.ones(64, 64, dtype=torch.bfloat16)}
    aligned = {"w": torch.full((64, 64), 1 + 2.0**-7, dtype=torch.bfloat16)}
    models = models_of(tmp_path, base=ones, tuned=ones, aligned=aligned)
    weak = {"name": "safety", "delta": "aligned - base", "scale": 0.1}
    with pytest.raises(NoChangeError, match=r"rounding to BF16 lost every change.*float32"):
        engine.merge(recipe_of(models, weak), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wide = engine.merge(recipe_of(models, weak, output={"dtype": "float32"}), tmp_path / "out").out
    assert manifest_of(wide)["terms"][0]["change"]["kept"] == pytest.approx(1, rel=1e-4)


def test_terms_that_cancel_are_no_merge(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    opposite = {"delta": "base - aligned", "scale": 0.5}
    with pytest.raises(NoChangeError, match="the terms cancel each other out"):
        engine.merge(recipe_of(models, SAFETY, opposite), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["same", "float32", "float16"])
@pytest.mark.parametrize("rescale", ["inverse_density", "l1_norm"])
def test_the_facts_of_a_term_are_those_of_the_definition(tmp_path: Path, dtype: str, rescale: str) -> None:
    models = models_of(tmp_path)
    finetune = FINETUNE | {"sparsify": {"density": 0.6, "rescale": rescale}}
    recipe = recipe_of(models, finetune, SAFETY, start="base", seed=3, output={"dtype": dtype, "files_from": "tuned"})
    result = engine.merge(recipe, tmp_path / "out")
    got, aligned = dict(resta.tensors(recipe)), nudged(BASE, 1)
    sums, whole = np.zeros((2, 4)), np.zeros((2, 2))
    for name, base in BASE.items():
        start = oracle.double(base).ravel()
        kept = oracle.words(3, "dare", 0, name, start.size) < 0.6 * 2**32
        finetuned = oracle.double(TUNED[name]).ravel() - start
        factor = 1 / 0.6 if rescale == "inverse_density" else abs(finetuned).sum() / abs(finetuned[kept]).sum()
        parts = [factor * kept * finetuned, 0.5 * (oracle.double(aligned[name]).ravel() - start)]
        held = start.astype(np.float16).astype(float) if dtype == "float16" else start
        loss = oracle.double(got[name]).ravel() - held - sum(parts)
        measured = np.arange(start.size) // 2048 % 13 == 0
        scale_up = start.size / measured.sum()
        for index, part in enumerate(parts):
            growth, product = (scale_up * (e @ loss)[()] for e in ((2 * part + loss) * measured, part * measured))
            square = part @ part
            sums[index] += [square, square + growth, square + product, start @ start]
            whole[index] += [(part + loss) @ (part + loss), part @ (part + loss)]
        assert result.tensors[name].terms[0].selected == kept.sum()
        assert result.tensors[name].terms[1].selected == kept.size
    for exact, (intended, realised, product, start), term in zip(
        whole, sums, manifest_of(result.out)["terms"], strict=True
    ):
        change = term["change"]
        assert change["intended_norm"] == pytest.approx(intended**0.5, rel=1e-4)
        assert change["realised_norm"] == pytest.approx(realised**0.5, rel=1e-4)
        assert change["cosine"] == pytest.approx(product / (intended * realised) ** 0.5, abs=1e-4)
        assert change["kept"] == pytest.approx(product / intended, abs=1e-4)
        assert change["relative_size"] == pytest.approx((intended / start) ** 0.5, rel=1e-4)
        assert [change["realised_norm"] ** 2, change["kept"] * intended] == pytest.approx(exact, rel=0.02)  # of all
    audited(result)


@given(st.integers(1, 300_000))
@settings(max_examples=30)
def test_the_loss_of_terms_is_measured_on_every_thirteenth_tile(merged_count: int) -> None:
    class Step:
        terms = (0, 0)

    step = Step()
    step.merged_count = merged_count  # type: ignore[attr-defined]
    assert compute.count_measured(step) == (np.arange(merged_count) // 2048 % 13 == 0).sum()  # type: ignore[arg-type]


def test_scale_zero_says_that_nothing_is_restored(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    result = engine.merge(recipe_of(models, SAFETY | {"scale": 0}), tmp_path / "out")
    manifest, card = manifest_of(result.out), (result.out / "README.md").read_text()
    assert manifest["change"]["cosine"] is None
    assert manifest["change"]["norm_ratio"] is None
    assert manifest["safety"]["restored"] is False
    assert "Nothing is restored: the safety vector has scale 0" in card
    assert "with a safety vector" not in card
    assert "- safety" not in card
    audited(result)


SAFETY_TERMS: dict[str, tuple[str, list[dict[str, Any]], tuple[int, ...]]] = {
    "RESTA": ("tuned", [{"delta": "aligned - base", "scale": 0.5}], (0,)),
    "RESTA_d": ("base", [{"delta": "tuned - base", "scale": 1}, {"delta": "aligned - base", "scale": 0.5}], (1,)),
    "WiSE-FT": ("tuned", [{"delta": "aligned - tuned", "scale": 0.5}], (0,)),
    "in halves": ("tuned", [{"delta": "aligned - base", "scale": 0.25}] * 2, (0, 1)),
    "named": (
        "tuned",
        [{"delta": "base - tuned", "scale": 1}, {"delta": "tuned - base", "scale": 1, "name": "safety"}],
        (1,),
    ),
    "only the fine-tune": ("base", [{"delta": "tuned - base", "scale": 1}], ()),
    "towards two models": (
        "tuned",
        [{"delta": "aligned - base", "scale": 1}, {"delta": "base - aligned", "scale": 1}],
        (),
    ),
}


@pytest.mark.parametrize("case", SAFETY_TERMS)
def test_which_term_is_the_safety_vector(case: str) -> None:
    start, terms, expected = SAFETY_TERMS[case]
    models = {start, *(end for term in terms for end in term["delta"].split(" - "))}
    assert make_recipe({"models": dict.fromkeys(models, "x"), "start": start, "terms": terms}).safety_terms == expected


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (SAFETY | {"scale": -0.5}, "leads away from the aligned model"),
        (SAFETY | {"delta": "base - aligned"}, "leads away from the aligned model"),
        ({"delta": "base - aligned", "scale": -0.5, "name": "safety"}, "The safety vector was added"),
        (SAFETY, "The safety vector was added: 0.5 \\* \\(aligned - base\\). Rounding kept \\d+% of it"),
    ],
)
def test_the_card_rests_on_the_safety_term_and_its_direction(tmp_path: Path, term: dict[str, Any], words: str) -> None:
    models = models_of(tmp_path)
    out = engine.merge(recipe_of(models, FINETUNE, term, start="base"), tmp_path / "out").out
    safety, card = manifest_of(out)["safety"], (out / "README.md").read_text()
    assert re.search(words, safety["statement"])
    assert safety["statement"] in card
    assert safety["restored"] == ("with a safety vector" in card) == ("was added" in words)
    assert safety["terms"] == [1]


def test_a_manifest_whose_terms_or_safety_were_altered_is_found(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    result = engine.merge(resta_d(models), tmp_path / "out")
    out = result.out
    sane = (out / "resta.json").read_text()

    def findings(*path: Any, value: Any) -> str:
        manifest = json.loads(sane)
        place = manifest
        for key in path[:-1]:
            place = place[key]
        assert place[path[-1]] != value
        place[path[-1]] = value
        (out / "resta.json").write_text(json.dumps(manifest))
        with pytest.raises(RestaError) as caught:
            audited(result)
        return str(caught.value)

    name = "model.layers.0.mlp.up_proj.weight"
    assert "terms.1.change.kept is" in findings("terms", 1, "change", "kept", value=1.0)
    assert "terms.0.coverage.not_selected is" in findings("terms", 0, "coverage", "not_selected", value=0)
    assert "safety.statement is" in findings("safety", "statement", value="certified safe")
    assert "warnings is" in findings("warnings", value=["none"])
    assert "the manifest has other terms" in findings("tensors", name, "terms", value=[])
    part = json.loads(sane)["tensors"][name]["terms"]
    assert "term 1: intended_norm" in findings("tensors", name, "terms", 1, "intended_norm", value=9.0)
    assert "term 1: realised_norm" in findings("tensors", name, "terms", 1, "realised_norm", value=9.0)
    assert "term 1: product" in findings("tensors", name, "terms", 1, "product", value=0.0)
    assert "term 0 keeps" in findings("tensors", name, "terms", 0, "selected", value=part[0]["selected"] + 1)
    (out / "resta.json").write_text(sane)
    audited(result)
