"""The audit agrees with the merge byte for byte, and names whatever was altered afterwards.

Passing on every kind of merge, it is also the independent oracle of the merge's arithmetic; its own roundings and
random words are held here against torch and against published numbers.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resta.auditing
from resta.auditing import Audit, audit, choose_tensors, philox_words, read_manifest, round_values
from resta.cli import main
from resta.engine import merge
from resta.errors import CheckFailedError, RequestError
from resta.recipe import make_recipe
from tests.builders import llama_tensors, lora_models, nudged, save_model

SMALL = {"terms": [{"delta": "aligned - base", "scale": 0.5}]}
Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"


PLACES: dict[Path, dict[str, str]] = {}  # where the inputs of what `make` made lie: no output says it


def make(folder: Path, models: dict[str, Any], **recipe: Any) -> Path:
    """Carry out a recipe, `tuned` its start unless said otherwise."""
    chosen = make_recipe({"models": models, "start": "tuned", **recipe})
    merge(chosen, folder, workers=2)
    PLACES[folder] = {name: model.source for name, model in chosen.models.items()}
    return folder


def audited(out: Path, **options: Any) -> Audit:
    return audit(out, **{"moved": PLACES.get(out), **options})


def flags(out: Path) -> list[str]:
    return [part for name, place in PLACES[out].items() for part in ("--model", f"{name}={place}")]


def assert_passes(out: Path, **options: Any) -> None:
    report = audited(out, **options)
    report.raise_if_any()
    facts = read_manifest(out).tensors
    assert report.checksums == len(facts)
    if "sample" not in options:
        assert report.tensors == len(facts)
        assert report.elements == sum(math.prod(fact.shape) for fact in facts.values())


def assert_fails(out: Path, *parts: str, **options: Any) -> str:
    """The audit fails, and one of its findings holds all the parts."""
    report = audited(out, **options)
    with pytest.raises(CheckFailedError) as raised:
        report.raise_if_any()
    lines = str(raised.value).splitlines()
    assert any(all(part in line for part in parts) for line in lines), str(raised.value)
    return str(raised.value)


def dare(density: float, rescale: str = "inverse_density") -> dict[str, Any]:
    return {"density": density, "rescale": rescale}


def two_terms(**sparsify: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"delta": "aligned - base", "scale": 0.5, "sparsify": sparsify.get("aligned")},
        {"delta": "tuned - base", "scale": -0.3, "sparsify": sparsify.get("tuned")},
    ]


KINDS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "a scale that float32 rounds": {"terms": [{"delta": "aligned - base", "scale": 0.1}]},
    "two terms": {"terms": two_terms()},
    "dare": {"terms": two_terms(aligned=dare(0.3), tuned=dare(0.9)), "seed": 2**63 - 1},
    "dare by l1 norm": {"terms": two_terms(aligned=dare(0.3, "l1_norm"), tuned=dare(0.7, "l1_norm"))},
    "dare that drops nearly all": {"terms": two_terms(aligned=dare(1e-4, "l1_norm")), "seed": 5},
    "stochastic bfloat16": {**SMALL, "output": {"rounding": "stochastic"}},
    "stochastic float16": {**SMALL, "output": {"rounding": "stochastic", "dtype": "float16"}, "seed": 3},
    "float16": {**SMALL, "output": {"dtype": "float16"}},
    "float32": {**SMALL, "output": {"dtype": "float32"}},
    "float64": {**SMALL, "output": {"dtype": "float64"}},
    "many shards": {**SMALL, "output": {"shard_size": 20_000}},
    "rules": {
        **SMALL,
        "rules": [{"match": "*norm*", "keep": True}, {"match": "*layers.1*", "scale_by": 0.3}],
    },
    "scale zero, converted": {"terms": [{"delta": "aligned - base", "scale": 0}], "output": {"dtype": "float32"}},
    "scale zero, copied": {"terms": [{"delta": "aligned - base", "scale": 0}]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_of_a_merge_is_recomputed_to_the_same_bytes(
    kind: str, trio: dict[str, str], tmp_path: Path
) -> None:
    assert_passes(make(tmp_path / "out", trio, **KINDS[kind]))


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_models_of_four_dtypes_are_recomputed(order: int, rounding: str, tmp_path: Path) -> None:
    """Sizes that no tile divides, a tensor of several pieces, and one without elements."""
    generator = torch.Generator().manual_seed(order)
    shapes = {"a.weight": (601, 513), "b.weight": (2049,), "c.weight": (3, 5, 7), "d": (), "e.weight": (0, 8)}
    models = {}
    for index, name in enumerate(("tuned", "aligned", "base", "other")):
        dtype = DTYPES[(index + order) % 4]
        tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
        models[name] = str(save_model(tmp_path / name, tensors))
    terms = [
        {"delta": "aligned - base", "scale": 0.37, "sparsify": dare(0.6, "l1_norm")},
        {"delta": "other - base", "scale": 1.7, "sparsify": dare(0.2)},
    ]
    for dtype in ("bfloat16", "float16"):
        output = {"dtype": dtype, "rounding": rounding}
        assert_passes(make(tmp_path / dtype, models, terms=terms, output=output))


def test_the_smallest_and_largest_numbers_are_recomputed(tmp_path: Path) -> None:
    """Subnormal numbers, signed zeros, and sums that cancel, in all roundings."""
    random = np.random.default_rng(0)
    sizes = 2.0 ** random.uniform(-150, 15, (3, 4096)) * random.choice([-1, 1], (3, 4096))
    sizes[:, ::5] = 0.0
    sizes[:, 1::5] = -0.0
    sizes[2, ::7] = -sizes[1, ::7]
    models = {
        name: str(save_model(tmp_path / name, {"w": torch.tensor(row, dtype=torch.float32)}))
        for name, row in zip(("base", "aligned", "tuned"), sizes, strict=True)
    }
    for rounding in ("nearest", "stochastic"):
        for dtype in ("float16", "bfloat16"):
            output = {"dtype": dtype, "rounding": rounding}
            terms = [{"delta": "aligned - base", "scale": 1.0}]
            assert_passes(make(tmp_path / (rounding + dtype), models, terms=terms, output=output))


def test_nan_and_infinity_that_a_rule_allows_are_recomputed(tmp_path: Path) -> None:
    base = {"w": torch.randn(300, generator=torch.Generator().manual_seed(0))}
    aligned = {"w": base["w"].clone()}
    aligned["w"][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    models = {"tuned": str(save_model(tmp_path / "b", base)), "aligned": str(save_model(tmp_path / "a", aligned))}
    terms = [{"delta": "aligned - tuned", "scale": 0.5}]
    rules = [{"match": "w", "nonfinite": "allow"}]
    for dtype in ("float32", "bfloat16", "float16"):
        out = make(tmp_path / dtype, models, terms=terms, rules=rules, output={"dtype": dtype})
        assert_passes(out)
        manifest = json.loads((out / "resta.json").read_bytes(), parse_constant=pytest.fail)  # NaN is not JSON
        assert manifest["change"]["cosine"] is manifest["tensors"]["w"]["product"] is None


def test_integers_and_booleans_are_copied_and_compared(tmp_path: Path) -> None:
    extra = {"position_ids": torch.arange(77), "mask": torch.tensor([True, False, True])}
    base = llama_tensors(0)
    models = {
        "tuned": str(save_model(tmp_path / "t", {**nudged(base, 1), **extra})),
        "base": str(save_model(tmp_path / "b", {**base, **extra})),
    }
    assert_passes(make(tmp_path / "out", models, terms=[{"delta": "tuned - base", "scale": 0.5}]))


def test_rows_that_only_the_start_has_are_recomputed(trio: dict[str, str], tmp_path: Path) -> None:
    tensors = llama_tensors(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:5] * 2])
    models = {**trio, "tuned": str(save_model(tmp_path / "extended", tensors, vocab_size=101))}
    rules = [{"match": ["*embed_tokens*", "lm_head*"], "rows": "shared"}]
    for rounding in ("nearest", "stochastic"):
        terms = two_terms(aligned=dare(0.5))
        assert_passes(make(tmp_path / rounding, models, terms=terms, rules=rules, output={"rounding": rounding}))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_rank_terms_are_recomputed(dtype: torch.dtype, rounding: str, tmp_path: Path) -> None:
    models = lora_models(tmp_path, dtype)
    output = {"rounding": rounding, "dtype": "bfloat16"}
    assert_passes(make(tmp_path / "start", models, **SMALL, output=output))
    terms = two_terms(tuned=dare(0.4, "l1_norm"))
    assert_passes(make(tmp_path / "term", models, start="base", terms=terms, output=output))


def test_the_random_words_are_philox_as_published() -> None:
    """Random123's kat_vectors for philox4x32-10 with counter and key zero, the one that a tensor can reach."""
    assert philox_words(0, 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40), count=st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_the_random_words_are_those_of_a_naive_loop(key: int, first: int, count: int) -> None:
    def word(element: int) -> int:
        x = [element // 4 % 2**32, element // 4 // 2**32, 0, 0]
        k = [key % 2**32, key // 2**32]
        for _ in range(10):
            p, q = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [q // 2**32 ^ x[1] ^ k[0], q % 2**32, p // 2**32 ^ x[3] ^ k[1], p % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return x[element % 4]

    assert philox_words(key, first, count).tolist() == [word(first + index) for index in range(count)]


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_rounding_to_a_half_is_that_of_torch(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    for dtype, expected in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        with np.errstate(all="ignore"):
            found = torch.from_numpy(round_values(values, dtype, None)).view(expected)
        torch.testing.assert_close(found, torch.from_numpy(values).to(expected), rtol=0, atol=0, equal_nan=True)
        finite = np.isfinite(values)
        assert (torch.signbit(found).numpy() == np.signbit(values))[finite].all()


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_rounding_a_float64_to_a_half_rounds_once(numbers: list[float]) -> None:
    """numpy rounds float64 to float16 in one step; through float32 it would be two."""
    values = np.array(numbers)
    with np.errstate(all="ignore"):
        assert round_values(values, "F16", None).tobytes() == values.astype("<f2").tobytes()


def test_the_recomputation_shares_no_arithmetic_with_the_merge() -> None:
    taken = {
        name.name
        for node in ast.walk(ast.parse(Path(resta.auditing.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module in ("resta", "resta.engine", "resta.kernels", "resta.compute")
        for name in node.names
    }
    assert taken == {"UNIT", "Checksum", "default_workers"}


# What was altered afterwards is found and named.


@pytest.fixture
def merged(trio: dict[str, str], tmp_path: Path) -> Path:
    return make(tmp_path / "out", trio, terms=two_terms(aligned=dare(0.5)), output={"shard_size": 60_000})


def location(out: Path, name: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where its bytes begin and end; found without resta."""
    file = out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return file, 8 + length + begin, 8 + length + end


def rewrite(file: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((out / "resta.json").read_text())
    change(manifest)
    (out / "resta.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def module_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    base = llama_tensors(0)
    models = {
        "base": str(save_model(folder / "base", base)),
        "aligned": str(save_model(folder / "aligned", nudged(base, 1))),
        "tuned": str(save_model(folder / "tuned", nudged(base, 2))),
    }
    return make(folder / "out", models, **SMALL, output={"shard_size": 60_000})


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_flipped_bit_of_any_tensor_is_found(module_output: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(read_manifest(module_output).tensors)))
    file, begin, end = location(module_output, name)
    at, bit = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7))

    def flip(content: bytearray) -> None:
        content[at] ^= 1 << bit

    rewrite(file, flip)
    try:
        assert_fails(module_output, f"tensor {name!r} in {file.name}", "checksum")
        message = assert_fails(module_output, f"tensor {name!r}", f"1 of {(end - begin) // 2:,} elements")
        assert f"element {(at - begin) // 2} " in message
        assert len(audited(module_output, sample=1).findings) >= 1  # checksums are checked of all, sampled or not
    finally:
        rewrite(file, flip)
    assert_passes(module_output)


def test_a_flipped_bit_under_a_forged_checksum_is_found_by_recomputing(merged: Path) -> None:
    file, begin, _ = location(merged, Q0)
    rewrite(file, lambda content: content.__setitem__(begin, content[begin] ^ 1))
    finding = next(finding for finding in audited(merged).findings if "its checksum is" in finding.problem)
    forged = finding.problem.split()[3].rstrip(",")

    def forge(manifest: dict[str, Any]) -> None:
        manifest["tensors"][Q0]["checksum"] = forged

    edit_manifest(merged, forge)
    message = assert_fails(merged, repr(Q0), "not what recipe and inputs give", "its checksum is right")
    assert "but the manifest has" not in message


def test_two_swapped_tensors_are_both_named(merged: Path) -> None:
    places = [location(merged, name) for name in (Q0, Q1)]
    parts = [place[0].read_bytes()[place[1] : place[2]] for place in places]
    for (file, begin, end), part in zip(places, reversed(parts), strict=True):
        rewrite(file, lambda content, b=begin, e=end, p=part: content.__setitem__(slice(b, e), p))
    for name in (Q0, Q1):
        assert_fails(merged, repr(name), "its checksum is")
        assert_fails(merged, repr(name), "not what recipe and inputs give")


def test_a_truncated_shard_is_named_and_the_rest_is_still_checked(merged: Path) -> None:
    file = location(merged, Q0)[0]
    rewrite(file, lambda content: content.__delitem__(slice(len(content) - 1, None)))
    assert_fails(merged, file.name, "truncated")
    report = audited(merged)
    assert [finding.what for finding in report.findings] == [str(file)]
    with safe_open(next(path for path in merged.glob("*.safetensors") if path != file), "pt") as other:
        assert report.tensors >= len(other.keys()) > 0


def test_a_missing_shard_is_named(merged: Path) -> None:
    file = location(merged, Q0)[0]
    file.unlink()
    assert_fails(merged, file.name, "not there")


def test_a_file_written_anew_with_the_same_tensors_has_another_header(merged: Path) -> None:
    file = location(merged, Q0)[0]
    save_file(load_file(file), file, metadata={"format": "pt", "by": "someone"})
    assert_fails(merged, file.name, "header")


def test_input_data_that_changed_are_found_by_recomputing(merged: Path, trio: dict[str, str]) -> None:
    tensors = load_file(Path(trio["base"]) / "model.safetensors")
    tensors[Q0][0, 0] += 1
    save_file(tensors, Path(trio["base"]) / "model.safetensors", metadata={"format": "pt"})
    report = audited(merged)
    assert [finding.what for finding in report.findings] == [f"tensor {Q0!r} in {location(merged, Q0)[0].name}"]
    assert "an input or the manifest has changed since" in report.findings[0].problem


def test_an_input_with_another_header_is_named(merged: Path, trio: dict[str, str]) -> None:
    file = Path(trio["base"]) / "model.safetensors"
    tensors = load_file(file)
    tensors[Q0] = tensors[Q0].T.contiguous()[:32]
    save_file(tensors, file)
    assert_fails(merged, str(file), "has changed since the merge")
    assert_fails(merged, "not recomputed")


def test_an_input_file_that_is_gone_is_named(merged: Path, trio: dict[str, str]) -> None:
    file = Path(trio["base"]) / "model.safetensors"
    file.unlink()
    assert_fails(merged, str(file), "not there any more")


def edits() -> dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]]:
    """Alterations of a manifest, and what the finding says."""

    def put(*path: Any) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            *parents, key, value = path
            for parent in parents:
                manifest = manifest[parent]
            manifest[key] = value

        return change

    def forge_scale(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["terms"][0]["scale"] = 0.25
        recipe = make_recipe(manifest["recipe"])
        manifest["recipe_digest"], manifest["equation"] = recipe.digest, recipe.equation

    def forge_norm(manifest: dict[str, Any]) -> None:
        manifest["tensors"][Q0]["intended_norm"] *= 1.001

    def drop(manifest: dict[str, Any]) -> None:
        del manifest["tensors"][Q0]

    return {
        "scale": (put("recipe", "terms", 0, "scale", 0.25), ("resta.json", "recipe_digest")),
        "scale and digest": (forge_scale, (repr(Q0), "not what recipe and inputs give")),
        "seed": (put("recipe", "seed", 1), ("resta.json", "recipe_digest")),
        "equation": (put("equation", "tuned"), ("resta.json", "equation")),
        "checksum": (put("tensors", Q0, "checksum", "0" * 32), (repr(Q0), "its checksum is")),
        "changed": (put("tensors", Q0, "changed", 0), ("resta.json", "change.changed")),
        "norm": (forge_norm, ("resta.json", "change.")),
        "shape": (put("tensors", Q0, "shape", [32, 128]), (repr(Q0), "manifest: BF16 [32, 128]")),
        "dtype": (put("tensors", Q0, "dtype", "F16"), (repr(Q0), "manifest: F16")),
        "file": (put("tensors", Q0, "file", "../x.safetensors"), ("x.safetensors", "not there")),
        "action": (put("tensors", Q0, "action", "copied"), ("resta.json", "change.")),
        "dropped tensor": (drop, (repr(Q0), "which the manifest does not have")),
        "input size": (put("inputs", "base", "files", "model.safetensors", "bytes", 1), ("model.safetensors", "bytes")),
        "norm beyond all": (put("tensors", Q0, "start_norm", 1e300), ("resta.json", "norms that no merge records")),
        "cosine": (put("change", "cosine", 1.0), ("resta.json", "change.cosine")),
    }


@pytest.mark.parametrize("edit", edits())
def test_an_edited_manifest_is_found(edit: str, merged: Path) -> None:
    change, parts = edits()[edit]
    edit_manifest(merged, change)
    assert_fails(merged, *parts)


def test_recorded_figures_that_agree_with_each_other_but_not_with_the_data_are_found(merged: Path) -> None:
    from dataclasses import asdict

    from resta.manifest import total_change

    for key in ("changed", "start_norm", "intended_norm", "realised_norm", "product"):
        copy = merged.with_name(key)
        shutil.copytree(merged, copy)
        PLACES[copy] = PLACES[merged]

        def forge(manifest: dict[str, Any], key: str = key, copy: Path = copy) -> None:
            fact = manifest["tensors"][Q0]
            fact[key] = fact[key] + 1 if key == "changed" else fact[key] * 1.01
            edited = {**read_manifest(copy).tensors}
            edited[Q0] = type(edited[Q0])(**fact)
            manifest["change"] = asdict(total_change(edited.values()))

        edit_manifest(copy, forge)
        assert_fails(copy, repr(Q0), "differ from the start" if key == "changed" else f"{key} is")


def test_a_manifest_that_is_no_manifest_is_an_audit_error(merged: Path, tmp_path: Path) -> None:
    sane = {"schema": 1, "kind": "merge", "checksum": "resta-fold-1"}
    for tensors in ([], {"w": 1}, {"w": {}}, {"w": {"shape": "x", "dtype": 1, "file": 2, "action": 3, "checksum": 4}}):
        (merged / "resta.json").write_text(json.dumps({**sane, "tensors": tensors}))
        with pytest.raises(CheckFailedError, match=r"resta\.json"):
            audited(merged)
    for text in ("", "[]", "{}", '{"schema": 1, "kind": "merge", "checksum": "resta-fold-1"}', '{"schema": 99}'):
        (merged / "resta.json").write_text(text)
        with pytest.raises(CheckFailedError, match=r"resta\.json"):
            audited(merged)
    with pytest.raises(RequestError, match="expected the output directory"):
        audited(tmp_path)


def test_small_files_that_a_reader_would_load_are_checked(merged: Path) -> None:
    index = merged / "model.safetensors.index.json"
    (merged / "adapter_config.json").write_text("{}")
    (merged / "extra.safetensors").write_bytes(b"")
    (merged / "config.json").write_text((merged / "config.json").read_text().replace("500000.0", "10000.0"))
    content = json.loads(index.read_text())
    content["weight_map"][Q0] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(content))
    for parts in (
        ("adapter_config.json", "not written by the merge"),
        ("extra.safetensors", "not written by the merge"),
        ("config.json", "differs from"),
        ("index.json", repr(Q0), "model-00099"),
    ):
        assert_fails(merged, *parts)
    index.unlink()
    assert_fails(merged, "index.json", "cannot be read")


# Where and how much.


def test_inputs_that_moved_are_found_where_the_user_says(tmp_path: Path) -> None:
    out = make(tmp_path / "out", lora_models(tmp_path), **SMALL)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"base.* does not exist"):
        audited(out)
    PLACES[out]["base"] = str(tmp_path / "elsewhere")
    assert_passes(out)
    result = CliRunner().invoke(main, ["audit", str(out), *flags(out)])
    assert result.exit_code == 0, result.output
    assert "recomputed and equal" in result.output


def test_an_audit_says_which_inputs_it_has_not_been_told_of(merged: Path, trio: dict[str, str]) -> None:
    for known in ((), ("base",), ("tuned", "base")):
        with pytest.raises(RequestError) as raised:
            audit(merged, moved={name: trio[name] for name in known})
        for name in trio:
            assert (f"--model {name}=PATH (it was called '{name}')" in str(raised.value)) == (name not in known)


def test_an_input_at_another_place_must_be_the_same(merged: Path, trio: dict[str, str]) -> None:
    assert_fails(merged, "model.safetensors", "not there any more", moved={**trio, "base": trio["aligned"]})


def test_a_sample_holds_the_largest_tensor_and_never_changes(merged: Path) -> None:
    manifest = read_manifest(merged)
    largest = max(math.prod(fact.shape) for fact in manifest.tensors.values())
    chosen = [choose_tensors(manifest, count) for count in range(1, len(manifest.tensors) + 3)]
    for count, names in enumerate(chosen, start=1):
        assert len(names) == min(count, len(manifest.tensors))
        assert any(math.prod(manifest.tensors[name].shape) == largest for name in names)
    assert all(few <= more for few, more in pairwise(chosen))
    report = audited(merged, sample=3)
    report.raise_if_any()
    assert (report.tensors, report.checksums) == (3, len(manifest.tensors))
    assert report.elements == sum(math.prod(manifest.tensors[name].shape) for name in chosen[2])


def test_a_tensor_past_one_unit_is_checked_whole_and_sampled_in_part(tmp_path: Path) -> None:
    count, middle = (1 << 24) + (1 << 20) + 77, (1 << 23) + (1 << 19)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(count, generator=generator).to(torch.bfloat16)}
    models = {"tuned": str(save_model(tmp_path / "tuned", base))}
    models["aligned"] = str(save_model(tmp_path / "aligned", {"w": base["w"].roll(1)}))
    terms = [{"delta": "aligned - tuned", "scale": 0.5, "sparsify": dare(0.5)}]
    out = make(tmp_path / "out", models, terms=terms)
    assert_passes(out)
    report = audited(out, sample=1)
    report.raise_if_any()
    assert 1 << 24 <= report.elements < count
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(2 * (middle - count), 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert_fails(out, "'w'", f"element {middle} ")
    assert "element" not in assert_fails(out, "'w'", "its checksum is", sample=1)


def test_the_number_of_workers_changes_nothing(merged: Path) -> None:
    rewrite(location(merged, Q0)[0], lambda content: content.__setitem__(-1, content[-1] ^ 1))
    assert audited(merged, workers=1) == audited(merged, workers=5)


def test_the_command_prints_json_and_fails_with_exit_code_1(merged: Path, tmp_path: Path) -> None:
    good = CliRunner().invoke(main, ["audit", str(merged), *flags(merged), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["passed"] is True
    file, begin, _ = location(merged, Q0)
    rewrite(file, lambda content: content.__setitem__(begin, content[begin] ^ 1))
    bad = CliRunner().invoke(main, ["audit", str(merged), *flags(merged), "--json", "--sample", "2"])
    assert bad.exit_code == 1
    document = json.loads(bad.stdout)
    assert (document["kind"], document["schema"], document["passed"]) == ("audit", 1, False)
    assert Q0 in document["findings"][0]["what"]
    assert Q0 in bad.stderr


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--model", "bse=x"], 'did you mean "base"'),
        (["--model", "base"], "expected NAME=PATH"),
        (["--model", "base=/no/such/place"], "/no/such/place"),
        (["--model", "base=a", "--model", "base=b"], "given twice"),
    ],
)
def test_a_wrong_request_has_exit_code_2(wrong: list[str], words: str, merged: Path) -> None:
    others = [] if wrong[1] != "base=/no/such/place" else ["--model", "tuned=.", "--model", "aligned=."]
    result = CliRunner().invoke(main, ["audit", str(merged), *wrong, *others])
    assert result.exit_code == 2
    assert words in result.stderr
