"""Models that fit each other, that nearly do, and that don't: what is planned, what is refused, and the way out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import resta
from resta.checkpoint import read_weights
from resta.errors import RequestError
from resta.hub import locate
from resta.plan import Plan, make_plan
from resta.recipe import Recipe, make_recipe
from tests.builders import CONFIG, Tensors, llama_tensors, nudged, save_model
from tests.oracle import assert_rounded_well, double

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
BASE = llama_tensors(0)
ALIGNED = nudged(BASE, 1)
TUNED = nudged(BASE, 2)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


class Bench:
    """Model directories under one folder, and recipes over them; RESTA at scale 0.5 unless said otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, Any] = {}

    def add(self, name: str, tensors: Tensors, **config: object) -> Path:
        folder = save_model(self.folder / name, tensors, **config)
        self.models[name] = {"source": str(folder)}
        return folder

    def trio(self, **others: Tensors) -> Bench:
        for name, tensors in {"base": BASE, "aligned": ALIGNED, "tuned": TUNED, **others}.items():
            self.add(name, tensors)
        return self

    def recipe(self, *rules: dict[str, Any], **more: Any) -> Recipe:
        """What rules leave out is not held against the recipe here."""
        plain = {"models": self.models, "start": "tuned", "terms": [{"delta": "aligned - base", "scale": 0.5}]}
        return make_recipe(plain | {"rules": rules, "min_coverage": 0} | more)

    def plan(self, *rules: dict[str, Any], **more: Any) -> Plan:
        return make_plan(self.recipe(*rules, **more))

    def result(self, *rules: dict[str, Any], **more: Any) -> Tensors:
        return dict(resta.tensors(self.recipe(*rules, **more)))

    def refusal(self, *rules: dict[str, Any], **more: Any) -> str:
        with pytest.raises(RequestError) as caught:
            self.plan(*rules, **more)
        assert "nothing was written" in str(caught.value)
        return str(caught.value)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def assert_merged(got: torch.Tensor, start: torch.Tensor, to: torch.Tensor, from_: torch.Tensor, scale: float) -> None:
    exact = double(start) + scale * (double(to) - double(from_))
    largest = np.maximum.reduce([np.abs(double(t)) for t in (start, to, from_)])
    assert_rounded_well(got, exact, largest)
    assert not torch.equal(got, start)


def assert_same_bytes(first: torch.Tensor, second: torch.Tensor) -> None:
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    assert torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def test_models_that_fit_are_planned_and_merged(bench: Bench) -> None:
    plan = bench.trio().plan()
    assert [step.name for step in plan.steps] == list(dict(bench.result()))
    assert {step.name for step in plan.steps} == BASE.keys()
    assert all(len(step.operands) == 3 and not step.copies for step in plan.steps)
    for name, tensor in bench.result().items():
        assert_merged(tensor, TUNED[name], ALIGNED[name], BASE[name], 0.5)


# ---- tensors that one model has and another lacks


def test_a_tied_output_layer_is_refused_with_the_rule_to_add(bench: Bench) -> None:
    bench.add("base", without(BASE, HEAD), tie_word_embeddings=True)
    bench.add("aligned", ALIGNED)
    bench.add("tuned", TUNED)
    message = bench.refusal()
    assert f"base lacks tensors of the start: {HEAD}." in message
    assert f"stand_in: {EMBED}" in message
    assert "missing: skip" in message


def test_a_stand_in_is_read_where_the_tensor_is_lacking_and_only_there(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD))
    result = bench.result({"match": HEAD, "stand_in": EMBED})
    assert_merged(result[HEAD], TUNED[HEAD], ALIGNED[HEAD], BASE[EMBED], 0.5)
    assert_merged(result[EMBED], TUNED[EMBED], ALIGNED[EMBED], BASE[EMBED], 0.5)


def test_a_stand_in_in_all_other_models_is_the_embedding_delta_on_the_output_layer(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD), aligned=without(ALIGNED, HEAD))
    result = bench.result({"match": HEAD, "stand_in": EMBED})
    assert_merged(result[HEAD], TUNED[HEAD], ALIGNED[EMBED], BASE[EMBED], 0.5)


def test_missing_skip_leaves_the_terms_out_and_copies_the_tensor(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD))
    result = bench.result({"match": HEAD, "missing": "skip"})
    assert_same_bytes(result[HEAD], TUNED[HEAD])
    assert_merged(result[EMBED], TUNED[EMBED], ALIGNED[EMBED], BASE[EMBED], 0.5)


def test_missing_skip_leaves_out_only_the_terms_that_lack_the_tensor(bench: Bench) -> None:
    bench.trio(aligned=without(ALIGNED, HEAD))
    bench.add("other", nudged(BASE, 3))
    terms = [{"delta": "aligned - base", "scale": 0.5}, {"delta": "other - base", "scale": 0.25}]
    result = bench.result({"match": HEAD, "missing": "skip"}, terms=terms)
    assert_merged(result[HEAD], TUNED[HEAD], nudged(BASE, 3)[HEAD], BASE[HEAD], 0.25)


def test_a_stand_in_that_is_not_there_either_is_refused(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD))
    message = bench.refusal({"match": HEAD, "stand_in": "model.embed.weight"})
    assert f"base lacks: {HEAD}. Its stand_in 'model.embed.weight' is not there either" in message


def test_a_buffer_of_the_start_alone_is_refused_and_then_kept(bench: Bench) -> None:
    buffer = {INV_FREQ: torch.arange(4.0) / 7}
    bench.trio(tuned=TUNED | buffer)
    assert f"aligned lacks tensors of the start: {INV_FREQ}" in bench.refusal()
    assert_same_bytes(bench.result({"match": "*.inv_freq", "missing": "skip"})[INV_FREQ], buffer[INV_FREQ])
    assert_same_bytes(bench.result({"match": "*.inv_freq", "keep": True})[INV_FREQ], buffer[INV_FREQ])


def test_a_buffer_of_another_model_alone_is_refused_and_then_left_out(bench: Bench) -> None:
    bench.trio(aligned=ALIGNED | {INV_FREQ: torch.ones(4)})
    message = bench.refusal()
    assert f"aligned has tensors that the start 'tuned' lacks: {INV_FREQ}." in message
    assert "extra: ignore" in message
    assert bench.result({"match": "*.inv_freq", "extra": "ignore"}).keys() == TUNED.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("model", ["base", "aligned", "tuned"])
def test_a_prefix_is_refused_with_the_words_that_remove_it(bench: Bench, prefix: str, model: str) -> None:
    plain = {"base": BASE, "aligned": ALIGNED, "tuned": TUNED}
    bench.trio(**{model: prefixed(plain[model], prefix)})
    message = bench.refusal()
    whose = "for the start" if model == "tuned" else "for that model"
    assert f"say strip_prefix: {prefix!r} {whose}" in message
    bench.models[model]["strip_prefix"] = prefix
    for name, tensor in bench.result().items():
        assert_merged(tensor, TUNED[name], ALIGNED[name], BASE[name], 0.5)


# ---- shapes


def taller(tensors: Tensors, rows: int) -> Tensors:
    """The model with `rows` more tokens in its vocabulary."""
    extra = torch.full((rows, 64), 0.25, dtype=torch.bfloat16)
    return tensors | {name: torch.cat([tensors[name], extra]) for name in (EMBED, HEAD)}


SHARED = {"match": [EMBED, HEAD], "rows": "shared"}


def test_an_extended_vocabulary_is_refused_with_the_rule_to_add(bench: Bench) -> None:
    message = bench.trio(tuned=taller(TUNED, 5)).refusal()
    for model in ("aligned", "base"):
        assert f"{model} has shape [96, 64] where the start has [101, 64]: " in message
    assert "rows: shared" in message
    assert EMBED in message
    assert HEAD in message


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_shared_rows_get_the_delta_and_the_starts_extra_rows_are_kept_bit_for_bit(bench: Bench, density: float) -> None:
    start = taller(TUNED, 5)
    bench.trio(tuned=start)
    terms = [{"delta": "aligned - base", "scale": 0.5, "sparsify": {"density": density}}]
    result = bench.result(SHARED, terms=terms)
    for name in (EMBED, HEAD):
        assert_same_bytes(result[name][96:], start[name][96:])
        if density == 1:
            assert_merged(result[name][:96], TUNED[name], ALIGNED[name], BASE[name], 0.5)
        else:
            kept = (result[name][:96] != TUNED[name]).double().mean().item()
            assert 0.2 < kept < 0.6


def test_rows_that_only_other_models_have_are_left_out(bench: Bench) -> None:
    bench.trio(aligned=taller(ALIGNED, 3), base=taller(BASE, 1))
    result = bench.result(SHARED)
    for name in (EMBED, HEAD):
        assert_merged(result[name], TUNED[name], ALIGNED[name], BASE[name], 0.5)


def test_terms_act_on_the_rows_that_all_models_have(bench: Bench) -> None:
    start = taller(TUNED, 5)
    bench.trio(tuned=start, aligned=taller(ALIGNED, 2))
    result = bench.result(SHARED)[EMBED]
    assert_same_bytes(result[96:], start[EMBED][96:])
    assert_merged(result[:96], TUNED[EMBED], ALIGNED[EMBED], BASE[EMBED], 0.5)


def test_a_vector_of_the_vocabulary_can_be_shared_too(bench: Bench) -> None:
    bias = {"lm_head.bias": torch.arange(96).to(torch.bfloat16)}
    start = {"lm_head.bias": torch.arange(99).to(torch.bfloat16)}
    bench.trio(tuned=TUNED | start, base=BASE | bias, aligned=ALIGNED | {"lm_head.bias": bias["lm_head.bias"] + 2})
    result = bench.result({"match": "lm_head.bias", "rows": "shared"})["lm_head.bias"]
    assert_same_bytes(result[96:], start["lm_head.bias"][96:])
    assert torch.equal(result[:96], (torch.arange(96) + 1).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(96, 65), (96,), (96, 64, 1), (64, 97), ()], ids=str)
def test_other_shapes_are_refused_even_where_rows_may_be_shared(bench: Bench, shape: tuple[int, ...]) -> None:
    bench.trio(base=BASE | {EMBED: torch.zeros(shape, dtype=torch.bfloat16)})
    message = bench.refusal({"match": EMBED, "rows": "shared"})
    assert f"base has shape {list(shape)} where the start has [96, 64]: {EMBED}." in message
    assert "keep: true" in message
    assert_same_bytes(bench.result({"match": EMBED, "keep": True})[EMBED], TUNED[EMBED])


# ---- dtypes


def test_integer_and_boolean_tensors_that_agree_are_copied(bench: Bench) -> None:
    same = {"ids": torch.arange(300_000), "mask": torch.tensor([True, False])}
    bench.trio(base=BASE | same, aligned=ALIGNED | same, tuned=TUNED | same)
    result = bench.result()
    for name, tensor in same.items():
        assert_same_bytes(result[name], tensor)


@pytest.mark.parametrize(
    "other",
    [torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([[1, 2, 3]]), torch.ones(3)],
    ids=["values", "dtype", "shape", "float"],
)
def test_integer_tensors_that_differ_are_refused_and_can_be_kept(bench: Bench, other: torch.Tensor) -> None:
    mine = torch.tensor([1, 2, 3])
    bench.trio(base=BASE | {"ids": mine.clone()}, aligned=ALIGNED | {"ids": other}, tuned=TUNED | {"ids": mine})
    message = bench.refusal()
    assert "aligned differs from the start in I64 tensors, which cannot be interpolated: ids." in message
    assert "base differs" not in message
    assert_same_bytes(bench.result({"match": "ids", "keep": True})["ids"], mine)


def test_the_last_byte_of_a_large_integer_tensor_counts(bench: Bench) -> None:
    mine = torch.zeros(3_000_001, dtype=torch.uint8)
    other = mine.clone()
    other[-1] = 1
    bench.trio(base=BASE | {"ids": mine.clone()}, aligned=ALIGNED | {"ids": other}, tuned=TUNED | {"ids": mine})
    assert "aligned differs from the start in U8 tensors" in bench.refusal()


def test_an_integer_where_the_start_has_floats_is_refused(bench: Bench) -> None:
    bench.trio(base=BASE | {NORM: torch.ones(64, dtype=torch.int8)})
    message = bench.refusal()
    assert f"base has I8 where the start has BF16: {NORM}. To copy the start's tensor" in message


@pytest.mark.parametrize("output", ["same", "float32", "float64"])
def test_models_of_different_dtypes_are_computed_in_the_widest_and_rounded_once(bench: Bench, output: str) -> None:
    aligned = {name: (value.float() + 1e-4).to(torch.float32) for name, value in ALIGNED.items()}
    base = {name: value.to(torch.float16) for name, value in BASE.items()}
    bench.trio(aligned=aligned, base=base)
    for name, tensor in bench.result(output={"dtype": output}).items():
        exact = double(TUNED[name]) + 0.5 * (double(aligned[name]) - double(base[name]))
        largest = np.maximum.reduce([np.abs(double(model[name])) for model in (TUNED, aligned, base)])
        if output == "same":
            assert tensor.dtype == torch.bfloat16
            assert_rounded_well(tensor, exact, largest)
        else:  # the arithmetic itself is float32, since no input is wider
            assert str(tensor.dtype) == f"torch.{output}"
            assert (np.abs(double(tensor) - exact) <= 2.0**-22 * largest).all()


@pytest.mark.parametrize("wide", ["base", "aligned", "tuned"])
def test_with_a_float64_input_the_arithmetic_is_float64(bench: Bench, wide: str) -> None:
    models = {"base": BASE, "aligned": ALIGNED, "tuned": TUNED}
    models[wide] = {name: value.double() * (1 + 1e-9) for name, value in models[wide].items()}
    bench.trio(**models)
    for name, tensor in bench.result(output={"dtype": "float64"}).items():
        start, to, from_ = (models[model][name].double() for model in ("tuned", "aligned", "base"))
        torch.testing.assert_close(tensor, start + 0.5 * (to - from_), rtol=1e-15, atol=1e-18)


# ---- quantised models


@pytest.mark.parametrize("model", ["base", "aligned", "tuned"])
def test_a_quantised_config_is_refused_with_what_to_do(bench: Bench, model: str) -> None:
    for name, tensors in {"base": BASE, "aligned": ALIGNED, "tuned": TUNED}.items():
        config = {"quantization_config": {"quant_method": "gptq"}} if name == model else {}
        bench.add(name, tensors, **config)
    message = bench.refusal()
    assert f"{model}: is quantised; dequantise it" in message
    assert message.count("is quantised") == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_tensors_are_refused_with_what_to_do(bench: Bench, dtype: torch.dtype) -> None:
    bench.trio(aligned=ALIGNED | {NORM: torch.ones(64).to(dtype)})
    assert f"aligned: quantised tensors: {NORM}. Dequantise the model" in bench.refusal()


@pytest.mark.parametrize(
    "name", ["a.qweight", "a.qzeros", "a.g_idx", "a.SCB", "a.weight_packed", "a.weight_scale", "a.gate_up_proj_blocks"]
)
def test_packed_tensors_are_refused_by_their_names(bench: Bench, name: str) -> None:
    packed = {name: torch.ones(4, dtype=torch.int32)}
    bench.trio(base=BASE | packed, aligned=ALIGNED | packed, tuned=TUNED | packed)
    for model in ("base", "aligned", "tuned"):
        assert f"{model}: quantised tensors: {name}." in bench.refusal()


def test_complex_tensors_are_refused(bench: Bench) -> None:
    bench.trio(aligned=ALIGNED | {NORM: torch.ones(64, dtype=torch.complex64)})
    assert f"aligned: complex tensors: {NORM}" in bench.refusal()


# ---- rules


def test_the_first_rule_that_matches_decides_alone(bench: Bench) -> None:
    bench.trio()
    result = bench.result(
        {"match": "*.layers.0.*", "scale_by": 2},
        {"match": ["*.layers.*", NORM], "keep": True},
        {"match": "*", "scale_by": 0},
    )
    for name, tensor in result.items():
        if ".layers.0." in name:
            assert_merged(tensor, TUNED[name], ALIGNED[name], BASE[name], 1.0)
        else:
            assert_same_bytes(tensor, TUNED[name])


def test_scale_by_a_term_leaves_the_other_terms_alone(bench: Bench) -> None:
    bench.trio()
    terms = [
        {"delta": "aligned - base", "scale": 0.5, "name": "safety"},
        {"delta": "tuned - base", "scale": 0.25, "name": "task"},
    ]
    rules = {"match": HEAD, "scale_by": {"safety": 0}}, {"match": EMBED, "scale_by": {"task": -2}}
    result = bench.result(*rules, terms=terms)
    assert_merged(result[HEAD], TUNED[HEAD], TUNED[HEAD], BASE[HEAD], 0.25)
    exact = double(TUNED[EMBED]) + 0.5 * (double(ALIGNED[EMBED]) - double(BASE[EMBED]))
    exact -= 0.5 * (double(TUNED[EMBED]) - double(BASE[EMBED]))
    assert_rounded_well(result[EMBED], exact, np.abs(double(TUNED[EMBED])) + np.abs(double(BASE[EMBED])))


def test_a_rule_that_decides_no_tensor_is_refused(bench: Bench) -> None:
    message = bench.trio().refusal({"match": "*", "scale_by": 1}, {"match": ["model.*", "nothing"], "keep": True})
    assert "no tensor is decided by the rule 'model.*, nothing'; remove or correct it" in message
    assert "no tensor is decided by the rule 'Model.*'" in bench.refusal({"match": "Model.*", "keep": True})


def test_globs_are_those_of_file_names_and_mind_case(bench: Bench) -> None:
    steps = bench.trio().plan({"match": "model.layers.?.self_attn.[qk]_proj.*", "keep": True}).steps
    copied = {step.name for step in steps if step.copies}
    assert copied == {f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (0, 1) for side in "qk"}
    assert "no tensor is decided by" in bench.refusal({"match": "MODEL.*", "keep": True})


def test_kept_tensors_need_not_be_in_the_other_models(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD), aligned=ALIGNED | {HEAD: torch.zeros(3)})
    assert_same_bytes(bench.result({"match": HEAD, "keep": True})[HEAD], TUNED[HEAD])


def test_stochastic_rounding_without_a_half_precision_output_is_refused(bench: Bench) -> None:
    message = bench.trio().refusal(output={"dtype": "float32", "rounding": "stochastic"})
    assert "stochastic rounding needs bfloat16 or float16 output" in message
    for dtype in ("bfloat16", "float16"):
        steps = bench.plan(output={"dtype": dtype, "rounding": "stochastic"}).steps
        assert len({step.rounding_key for step in steps} - {None}) == len(steps)  # each tensor draws its own numbers
    assert {step.rounding_key for step in bench.plan(output={"dtype": "bfloat16"}).steps} == {None}


def test_a_term_keeps_every_entry_or_the_share_that_its_density_says(bench: Bench) -> None:
    def kept(**sparsify: float) -> set[int]:
        terms = [{"delta": "aligned - base", "scale": 0.5, **({"sparsify": sparsify} if sparsify else {})}]
        return {term.keep for step in bench.plan(terms=terms).steps for term in step.terms}

    bench.trio()
    assert kept() == kept(density=1.0) == {2**32}
    assert kept(density=0.25) == {2**30}
    assert kept(density=0.7) == {round(0.7 * 2**32)}


def test_a_term_between_two_names_of_the_same_files_is_refused(bench: Bench) -> None:
    bench.trio()
    bench.models["aligned"]["source"] = bench.models["base"]["source"]
    assert "aligned - base: both are the same files, so that the term is zero" in bench.refusal()
    assert bench.plan(terms=[{"delta": "aligned - base", "scale": 0}]).steps


# ---- terms that change nothing, and terms that reach too little


def test_a_copy_of_the_base_under_another_name_is_no_aligned_model(bench: Bench) -> None:
    bench.trio(aligned=BASE)
    message = bench.refusal()
    assert "term (aligned - base): changes nothing: aligned (" in message
    assert "hold the same bytes in every tensor" in message
    assert "term (aligned - base): changes nothing" in bench.refusal(**RESTA_D)
    assert bench.plan(terms=[{"delta": "aligned - base", "scale": 0}]).steps


def test_a_copy_cut_into_other_shards_is_still_a_copy(bench: Bench) -> None:
    bench.trio()
    copy = save_model(bench.folder / "copy", dict(reversed(BASE.items())), shards=3)
    bench.models["aligned"]["source"] = str(copy)
    assert "hold the same bytes in every tensor" in bench.refusal()


def test_models_that_differ_in_their_last_byte_alone_are_not_the_same(bench: Bench) -> None:
    large = {"w": torch.zeros(3_000_001)}
    other = {"w": large["w"].clone()}
    other["w"][-1] = 1
    bench.trio(base=large, aligned=other, tuned=large)
    assert bench.plan().steps
    bench.models["aligned"]["source"] = str(save_model(bench.folder / "same", large))
    assert "hold the same bytes in every tensor" in bench.refusal()


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"match": "*", "keep": True}, "rules keep the tensors of the start"),
        ({"match": "*", "scale_by": 0}, "rules scale it by 0"),
        ({"match": "*", "missing": "skip", "extra": "ignore"}, "its models lack the tensors, and rules skip it there"),
    ],
)
def test_a_term_that_rules_leave_out_everywhere_is_refused_whatever_coverage_is_allowed(
    bench: Bench, rule: dict[str, Any], reason: str
) -> None:
    bench.trio()
    if "missing" in rule:
        for name in ("base", "aligned"):
            bench.models[name]["source"] = str(save_model(bench.folder / f"{name}_", prefixed(BASE, "model.")))
    assert f"term (aligned - base): changes nothing: {reason} (86,336 parameters: " in bench.refusal(rule)


def test_scaling_a_named_term_by_nothing_is_refused_though_another_moves_the_weights(bench: Bench) -> None:
    terms = [RESTA_D["terms"][0], RESTA_D["terms"][1] | {"name": "safety"}]
    rule = {"match": "*", "scale_by": {"safety": 0}}
    assert "term safety (aligned - base): changes nothing" in bench.trio().refusal(rule, start="base", terms=terms)


COUNT = sum(value.numel() for value in BASE.values())


def test_coverage_is_counted_in_parameters_and_refused_below_95_percent(bench: Bench) -> None:
    bench.trio()
    norms = {"match": "*norm*", "keep": True}
    assert bench.plan(norms, min_coverage=0.95).coverage[0].not_covered == 5 * 64  # 5 of 20 tensors, 0.4 %
    message = bench.refusal(norms, {"match": HEAD, "scale_by": 0}, min_coverage=0.95)
    share = 1 - (5 * 64 + 6144) / COUNT
    assert f"would reach {100 * share:.2f} % of {COUNT:,} parameters, less than 95.00 %: " in message
    assert "rules scale it by 0 (6,144 parameters: lm_head.weight)" in message
    assert "rules keep the tensors of the start (320 parameters: " in message
    assert "min_coverage: 0.92" in message
    assert bench.plan(norms, {"match": HEAD, "scale_by": 0}, min_coverage=0.92).steps


def test_every_term_is_held_to_the_coverage_by_itself(bench: Bench) -> None:
    bench.trio(aligned=without(ALIGNED, HEAD))
    message = bench.refusal({"match": HEAD, "missing": "skip"}, min_coverage=0.95, **RESTA_D)
    assert "term (aligned - base) would reach 92.88 %" in message
    assert "tuned - base" not in message


def test_rows_that_only_the_start_has_are_not_covered(bench: Bench) -> None:
    plan = bench.trio(tuned=taller(TUNED, 5)).plan(SHARED)
    assert plan.coverage[0].parameters == COUNT + 2 * 5 * 64
    assert plan.coverage[0].covered == COUNT
    assert plan.coverage[0].left_out[0].reason == "only the start has those rows"


def test_integers_are_no_parameters_and_a_term_of_scale_zero_selects_none(bench: Bench) -> None:
    ids = {"ids": torch.arange(1000)}
    bench.trio(base=BASE | ids, aligned=ALIGNED | ids, tuned=TUNED | ids)
    plan = bench.plan(terms=[{"delta": "aligned - base", "scale": 0}], min_coverage=1)
    assert (plan.coverage[0].parameters, plan.coverage[0].not_selected) == (COUNT, COUNT)
    assert bench.plan(min_coverage=1).coverage[0].covered == COUNT


def experts(count: int, *, fused: bool) -> Tensors:
    """One layer with experts, in a tensor each or in one for all."""
    stem = "model.layers.0.mlp.experts."
    parts = {f"{stem}{expert}.down_proj.weight": torch.full((4, 4), float(expert)) for expert in range(count)}
    return {f"{stem}down_proj": torch.stack(list(parts.values()))} if fused else parts


@pytest.mark.parametrize("fused", [True, False])
def test_experts_in_two_layouts_are_refused_without_advice_that_loses_them(bench: Bench, fused: bool) -> None:
    mine, theirs = experts(4, fused=fused), experts(4, fused=not fused)
    bench.trio(tuned=TUNED | mine, base=BASE | theirs, aligned=ALIGNED | theirs)
    message = bench.refusal()
    layouts = ("one by one", "fused") if fused else ("fused", "one by one")
    assert f"Its experts are stored {layouts[0]}, those of the start {layouts[1]}" in message
    assert "load and save each with the same version of transformers" in message
    assert "missing: skip" not in message
    assert "extra: ignore" not in message


def test_experts_that_rules_leave_out_are_counted_and_refused(bench: Bench) -> None:
    """Whoever leaves them out all the same is told by how much the restoration falls short."""
    large = {name: value.repeat(100, 1) for name, value in experts(8, fused=False).items()}
    bench.trio(tuned=TUNED | large)
    rule = {"match": "*.experts.*", "missing": "skip", "extra": "ignore"}
    lost = sum(value.numel() for value in large.values())
    share = 100 * COUNT / (COUNT + lost)
    assert f"would reach {int(share * 100) / 100:.2f} % of" in bench.refusal(rule, min_coverage=0.95)


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_names_with_a_prefix_are_never_advised_to_be_left_out(bench: Bench, model: str) -> None:
    plain = {"base": BASE, "tuned": TUNED}
    message = bench.trio(**{model: prefixed(plain[model], "module.")}).refusal()
    assert "say strip_prefix: 'module.'" in message
    assert "missing: skip" not in message
    assert "extra: ignore" not in message


# ---- the model that the config comes from


RESTA_D = {
    "start": "base",
    "terms": [{"delta": "tuned - base", "scale": 1}, {"delta": "aligned - base", "scale": 0.5}],
}


def test_resta_d_takes_the_config_of_the_tuned_model_and_merges(bench: Bench) -> None:
    bench.add("base", BASE, rope_theta=1.0)
    bench.add("aligned", ALIGNED, rope_theta=2.0)
    bench.add("tuned", TUNED, rope_theta=3.0)
    allowed = RESTA_D | {"allow_config": ["rope_theta"]}
    config = {file.name: file.content for file in bench.plan(**allowed).auxiliary_files}["config.json"]
    assert config == (bench.folder / "tuned" / "config.json").read_bytes()
    for name, tensor in bench.result(**allowed).items():
        exact = double(TUNED[name]) + 0.5 * (double(ALIGNED[name]) - double(BASE[name]))
        assert_rounded_well(tensor, exact, np.abs(double(TUNED[name])) + np.abs(double(BASE[name])))


def test_a_donor_without_a_config_is_refused_among_the_other_reasons(bench: Bench) -> None:
    bench.trio(base=without(BASE, HEAD))
    (bench.folder / "tuned" / "config.json").unlink()
    message = bench.refusal()
    assert "tuned: has no config.json; name a model that has one in output.files_from" in message
    assert "base lacks tensors of the start" in message
    assert bench.plan({"match": HEAD, "missing": "skip"}, output={"files_from": "aligned"}).steps


def test_a_config_that_promises_other_shapes_than_the_result_has_is_refused(bench: Bench) -> None:
    message = bench.trio(tuned=taller(TUNED, 5)).refusal(SHARED, **RESTA_D)
    assert "the result would have the config of 'tuned' but other shapes: " in message
    assert "Start from that model, or choose files_from" in message
    assert bench.plan(SHARED, output={"files_from": "base"}, **RESTA_D).steps


def test_a_config_that_promises_tensors_that_the_result_lacks_is_refused(bench: Bench) -> None:
    bench.trio(tuned=TUNED | {"score.weight": torch.ones(2)})
    message = bench.refusal(**RESTA_D)
    assert "the result would have the config of 'tuned' but lack its tensors: score.weight." in message
    assert bench.result({"match": "score.*", "extra": "ignore"}, **RESTA_D).keys() == BASE.keys()


def test_a_result_with_tensors_that_its_config_does_not_know_is_refused(bench: Bench) -> None:
    bench.trio(tuned=without(TUNED, HEAD))
    message = bench.refusal(
        terms=[{"delta": "aligned - base", "scale": 1}], start="base", output={"files_from": "tuned"}
    )
    assert f"the result would have the config of 'tuned' but tensors that it lacks: {HEAD}." in message


# ---- models that are not of one kind


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "mistral"), ("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 32)],
)
def test_models_of_another_kind_are_refused_though_their_shapes_agree(bench: Bench, key: str, value: object) -> None:
    bench.add("base", BASE, head_dim=16)
    bench.add("aligned", ALIGNED, **({"head_dim": 16} | {key: value}))
    bench.add("tuned", TUNED, head_dim=16)
    mine = (CONFIG | {"head_dim": 16})[key]
    message = bench.refusal()
    assert f"aligned: config.json has {key} {value!r} but tuned has {mine!r}; these are different models" in message
    assert "base: config.json" not in message


def test_tokenizers_that_contradict_each_other_are_refused_unless_the_recipe_says_otherwise(bench: Bench) -> None:
    bench.trio()
    for name, token in {"base": "a", "aligned": "b", "tuned": "a"}.items():
        (bench.folder / name / "tokenizer.json").write_text(f'{{"model": {{"vocab": {{"{token}": 0}}}}}}')
    message = bench.refusal()
    assert "aligned: its tokenizer differs from that of tuned: id 0 is 'b', not 'a' (1 ids differ)." in message
    assert "tokenizers: ignore" in message
    assert bench.plan(tokenizers="ignore").steps


def test_everything_that_is_wrong_is_said_at_once(bench: Bench) -> None:
    bench.add("base", without(BASE, HEAD) | {NORM: torch.ones(3, dtype=torch.bfloat16)}, model_type="gpt2")
    bench.add("aligned", ALIGNED | {INV_FREQ: torch.ones(2)}, quantization_config={"bits": 4})
    bench.add("tuned", TUNED | {"ids": torch.arange(2)})
    message = bench.refusal({"match": "nothing", "keep": True})
    for part in (
        "base lacks tensors of the start: ",
        "base has shape [3] where the start has [64]",
        "base: config.json has model_type 'gpt2'",
        "aligned: is quantised",
        "aligned lacks tensors of the start: ids",
        "aligned has tensors that the start 'tuned' lacks",
        "no tensor is decided by the rule 'nothing'",
    ):
        assert part in message
    assert f"{len(message.splitlines()) - 1} reasons:" in message


def test_a_refusal_names_the_first_tensors_in_the_order_of_their_files(bench: Bench) -> None:
    bench.trio(aligned=prefixed(ALIGNED, "module."))
    names = list(read_weights(locate(str(bench.folder / "aligned"))).tensors)
    assert f"lacks: {', '.join(names[:4])} and {len(names) - 4} more" in bench.refusal()


def test_ten_thousand_tensors_under_a_prefix_are_told_in_no_time(bench: Bench) -> None:
    """Looking each name up among all others took half a minute for a mixture of experts."""
    experts = {f"layers.{number}.weight": torch.zeros(1) for number in range(10_000)}
    bench.trio(base=experts, aligned=prefixed(experts, "module."), tuned=experts)
    begun = time.process_time()
    assert "say strip_prefix: 'module.' for that model" in bench.refusal()
    assert time.process_time() - begun < 5  # it takes 0.5 s; a quadratic search takes 10


def test_a_thousand_tensors_with_one_cause_make_one_line(bench: Bench) -> None:
    bench.trio(base=without(BASE, *(name for name in BASE if "layers" in name)))
    message = bench.refusal()
    assert len(message.splitlines()) == 2
    assert "and 14 more" in message


# ---- what a plan says of itself


def test_a_plan_counts_the_bytes_that_it_reads_and_writes(bench: Bench, tmp_path: Path) -> None:
    plan = bench.trio().plan({"match": HEAD, "keep": True}, output={"shard_size": "20KB"})
    size = sum(value.nbytes for value in BASE.values())
    assert plan.bytes_read == 3 * size - 2 * BASE[HEAD].nbytes
    resta.merge(plan.recipe, tmp_path / "out")
    written = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    made = ("README.md", "resta.json", "model.safetensors.index.json")
    assert plan.bytes_written == sum(size for name, size in written.items() if name not in made)
    assert len(plan.headers) > 3


@pytest.mark.parametrize("change", ["recipe", "config", "header", "time"])
def test_the_digest_of_a_plan_sees_whatever_decides_the_output(bench: Bench, change: str) -> None:
    before = bench.trio().plan().digest
    assert bench.plan().digest == before
    folder = bench.folder / "tuned"
    if change == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    elif change == "header":
        names = sorted(TUNED, reverse=True)
        (folder / "model.safetensors").unlink()
        save_model(bench.folder / "again", {name: TUNED[name] for name in names})
        (bench.folder / "again" / "model.safetensors").rename(folder / "model.safetensors")
    elif change == "time":
        os.utime(folder / "model.safetensors", ns=(0, 1))
    assert bench.plan(seed=1 if change == "recipe" else 0).digest != before


def test_a_scale_past_float32_is_refused_as_what_it_is(bench: Bench) -> None:
    bench.trio()
    assert "scale of 1e+39 is more than float32 holds" in bench.refusal(
        {"match": "*", "scale_by": 1e30}, terms=[{"delta": "aligned - base", "scale": 1e9}]
    )


def test_a_last_rule_for_the_rest_may_find_no_rest(bench: Bench) -> None:
    rules = [{"match": ["model.*", "lm_head.*"], "scale_by": 0.5}, {"match": "*", "keep": True}]
    assert all(step.terms for step in bench.trio().plan(*rules).steps)
    assert "no tensor is decided by the rule '*'" in bench.refusal(rules[1], {"match": "*", "keep": True}, rules[0])
