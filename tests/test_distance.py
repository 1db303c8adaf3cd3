"""A diff is what a naive float64 comparison says, and no misfit of two models stops it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from resta.cli import main
from resta.compute import CHUNK
from resta.distance import Diff, Distance, describe, diff, join, kind_of, write_plot
from resta.errors import RequestError
from tests.builders import Tensors, llama_tensors, nudged, save_model

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Q0 = "model.layers.0.self_attn.q_proj.weight"

GROUP = {
    "type": "object",
    "required": ["tensors", "entries", "relative", "differing", "share_differing", "norm_a", "norm_diff", "non_finite"],
    "properties": {"relative": {"type": ["number", "null"]}, "share_differing": {"minimum": 0, "maximum": 1}},
}
GROUPS = {"type": "object", "additionalProperties": GROUP}
DOCUMENT = {
    "type": "object",
    "required": ["schema", "kind", "a", "b", "only_in_a", "only_in_b", "mismatches"],
    "properties": {
        "schema": {"const": 1},
        "kind": {"const": "diff"},
        "total": GROUP,
        "layers": GROUPS,
        "modules": GROUPS,
        "tensors": GROUPS,
    },
}


def assert_distance(found: Distance, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The figures of a group are those of its tensors in float64."""
    a = torch.cat([mine.double().flatten() for mine, _ in pairs])
    b = torch.cat([theirs.double().flatten() for _, theirs in pairs])
    assert (found.tensors, found.entries) == (len(pairs), a.numel())
    assert found.differing == int((a != b).sum())
    assert math.isclose(found.norm_a, a.norm().item(), rel_tol=1e-5)
    assert math.isclose(found.norm_diff, (b - a).norm().item(), rel_tol=1e-5, abs_tol=1e-12)
    assert found.relative == pytest.approx((b - a).norm().item() / a.norm().item(), rel=1e-5, abs=1e-12)


def assert_tensors(result: Diff, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert result.tensors.keys() == a.keys() & b.keys()
    for name, distance in result.tensors.items():
        assert_distance(distance, [(a[name], b[name])])


@pytest.fixture
def pair(trio: dict[str, str]) -> tuple[str, str]:
    return trio["base"], trio["tuned"]


def test_the_oracle_can_fail(pair: tuple[str, str]) -> None:
    a = load_file(Path(pair[0]) / "model.safetensors")
    with pytest.raises(AssertionError):
        assert_tensors(diff(*pair), a, a)


def test_groups_are_those_of_a_naive_comparison(pair: tuple[str, str]) -> None:
    a = load_file(Path(pair[0]) / "model.safetensors")
    b: Tensors = {}
    for file in Path(pair[1]).glob("*.safetensors"):
        b |= load_file(file)
    result = diff(*pair)
    assert_tensors(result, a, b)
    assert_distance(result.total, [(a[name], b[name]) for name in a])
    assert list(result.layers) == ["embed_tokens", "layer 0", "layer 1", "lm_head", "norm"]
    for number in range(2):
        names = [name for name in a if f"layers.{number}." in name]
        assert_distance(result.layers[f"layer {number}"], [(a[name], b[name]) for name in names])
    for kind in ("q_proj", "down_proj", "input_layernorm"):
        names = [name for name in a if f".{kind}." in name]
        assert_distance(result.modules[kind], [(a[name], b[name]) for name in names])
    assert sum(group.tensors for group in result.modules.values()) == len(a)


@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_dtypes_mix_and_no_difference_is_rounded_away(
    a_dtype: torch.dtype, b_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Sizes that no tile divides; one tensor takes two chunks; some entries are equal, others differ by one bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.3.mlp.w": (523, 511), "v": (4097,), "s": ()}
    a = {name: torch.randn(shape, generator=generator).to(a_dtype) for name, shape in shapes.items()}
    b = {name: value.to(b_dtype) for name, value in a.items()}
    moved = b["v"][::3]
    b["v"][::3] = torch.nextafter(moved, moved + 1) if b_dtype != torch.float16 else moved * 1.5
    folders = [str(save_model(tmp_path / name, tensors)) for name, tensors in (("a", a), ("b", b))]
    assert_tensors(diff(*folders), a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_float64_is_counted_and_printed_wherever_it_lies(dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.randn(CHUNK + 4099, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = a.to(dtype, copy=True)
    a[[200_000, CHUNK - 1, CHUNK + 4098]] = math.nan
    folders = [str(save_model(tmp_path / name, {"w": values})) for name, values in (("a", a), ("b", b))]
    assert diff(*folders).tensors["w"].non_finite == 3
    result = CliRunner().invoke(main, ["diff", *folders])
    assert "3 entries are NaN or infinite, in w" in result.stdout
    assert "0 of 266,243 entries differ" not in result.stdout


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_entries_differ_exactly_where_their_values_do(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[float, float]]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    values = torch.tensor(entries, dtype=torch.float32).T.contiguous()
    folders = [str(save_model(folder / name, {"w": row.clone()})) for name, row in zip("ab", values, strict=True)]
    found = diff(*folders).tensors["w"]
    finite = values.isfinite().all(dim=0)
    assert found.non_finite == int((~values.isfinite()).sum())
    if finite.all():
        assert found.differing == int((values[0] != values[1]).sum())
    else:
        assert found.relative in (None, 0.0)
    json.dumps(describe(diff(*folders)), allow_nan=False)


def test_a_model_is_at_no_distance_from_itself(pair: tuple[str, str], tmp_path: Path) -> None:
    copy = save_model(tmp_path / "copy", load_file(Path(pair[0]) / "model.safetensors"), shards=2)
    for other in (pair[0], str(copy)):
        total = diff(pair[0], other).total
        assert (total.differing, total.norm_diff, total.relative) == (0, 0.0, 0.0)
        assert total.norm_a > 0


def test_no_misfit_stops_a_diff_and_each_is_named(tmp_path: Path) -> None:
    a = llama_tensors(0)
    b = nudged(a, 1)
    b["model.embed_tokens.weight"] = torch.cat([b["model.embed_tokens.weight"], torch.ones(5, 64).bfloat16()])
    del b["lm_head.weight"]
    b["extra.weight"] = torch.ones(3)
    b[Q0] = b[Q0].reshape(32, 128)
    a |= {"ids": torch.arange(9), "mask": torch.tensor([True, False]), "kind": torch.arange(4), "none": torch.ones(0)}
    b |= {"ids": torch.arange(9).flip(0), "mask": torch.tensor([True, True]), "kind": torch.ones(4)}
    b |= {"none": torch.ones(0)}
    folders = [
        str(save_model(tmp_path / "a", a)),
        str(save_model(tmp_path / "b", b, num_attention_heads=8, model_type="other", tie_word_embeddings=True)),
    ]
    result = diff(*folders)
    assert result.only_in_a == ("lm_head.weight",)
    assert result.only_in_b == ("extra.weight",)
    assert result.mismatches == {
        "model.embed_tokens.weight": "shape [96, 64] in A, [101, 64] in B; the first 96 rows were compared",
        Q0: "shape [64, 64] in A, [32, 128] in B",
        "kind": "I64 in A, F32 in B",
    }
    assert_distance(
        result.tensors["model.embed_tokens.weight"],
        [(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"][:96])],
    )
    assert Q0 not in result.tensors
    assert (result.tensors["ids"].differing, result.tensors["ids"].entries) == (8, 9)
    assert (result.tensors["mask"].differing, result.tensors["none"].entries) == (1, 0)
    swapped = diff(folders[1], folders[0])
    assert swapped.only_in_b == ("lm_head.weight",)
    assert swapped.total.differing == result.total.differing


def test_quantised_tensors_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    folders = []
    for index in range(2):
        numbers = torch.linspace(-2, 2, 64).to(torch.float8_e4m3fn)
        numbers[:index] = 1.0
        folders.append(str(save_model(tmp_path / str(index), {"w": numbers}, quantization_config={"bits": 8})))
    assert diff(*folders).tensors["w"].differing == 1


def save_adapter(folder: Path, base: str) -> tuple[Path, torch.Tensor]:
    """A LoRA on one projection, and its term in float64."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    module = "base_model.model." + Q0.removesuffix(".weight")
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, 0.25 * up.double() @ down.double()


def test_an_adapter_is_as_far_from_its_base_as_its_product(pair: tuple[str, str], tmp_path: Path) -> None:
    adapter, product = save_adapter(tmp_path / "lora", "org/base-under-another-name")
    result = diff(pair[0], str(adapter), on=pair[0])
    assert {name for name, each in result.tensors.items() if each.differing} == {Q0}
    assert result.total.norm_diff == pytest.approx(product.norm().item(), rel=1e-5)
    assert diff(str(adapter), pair[0], on=pair[0]).total.norm_diff == pytest.approx(result.total.norm_diff)
    assert diff(str(adapter), str(adapter), on=pair[0]).total.differing == 0


def test_an_adapter_needs_its_base_and_nothing_else_has_one(pair: tuple[str, str], tmp_path: Path) -> None:
    adapter, _ = save_adapter(tmp_path / "lora", "org/base")
    with pytest.raises(RequestError, match="--on org/base"):
        diff(pair[0], str(adapter))
    with pytest.raises(RequestError, match="neither"):
        diff(*pair, on=pair[0])


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    """More elements than one unit holds, so that workers share a tensor."""
    values = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0)).bfloat16().repeat((1 << 12) + 3)
    folders = [str(save_model(tmp_path / name, {"w": values.roll(shift)})) for name, shift in (("a", 0), ("b", 1))]
    alone, together = (diff(*folders, workers=workers) for workers in (1, 3))
    assert alone.tensors == together.tensors
    assert_distance(alone.tensors["w"], [(values, values.roll(1))])


def test_progress_speaks_of_every_byte_of_a(pair: tuple[str, str]) -> None:
    calls: list[tuple[str, int, int]] = []
    diff(*pair, progress=lambda name, done, total: calls.append((name, done, total)))
    tensors = load_file(Path(pair[0]) / "model.safetensors")
    total = sum(value.nbytes for value in tensors.values())
    assert {call[2] for call in calls} == {total}
    assert sum(call[1] for call in calls) == total
    assert {call[0] for call in calls} == set(tensors)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "q_proj"),
        ("model.layers.12.self_attn.q_proj.bias", "q_proj.bias"),
        ("model.layers.3.mlp.experts.17.down_proj.weight", "down_proj"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.0.3", "layers"),
        ("7", "7"),
        ("bias", "bias"),
    ],
)
def test_a_tensor_is_of_the_kind_of_its_module(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@given(st.lists(st.tuples(st.floats(0, 1e300), st.floats(0, 1e300), st.integers(0, 9)), max_size=8))
def test_joining_is_the_same_in_any_grouping(figures: list[tuple[float, float, int]]) -> None:
    parts = [Distance(tensors=1, entries=9, norm_a=a, norm_diff=d, differing=n, non_finite=0) for a, d, n in figures]
    whole, halves = join(parts), join([join(parts[:3]), join(parts[3:])])
    assert (whole.tensors, whole.entries, whole.differing) == (halves.tensors, halves.entries, halves.differing)
    assert whole.norm_a == pytest.approx(halves.norm_a)
    assert whole.norm_diff == pytest.approx(halves.norm_diff)


# The command.


def test_the_command_prints_and_saves_what_the_library_finds(pair: tuple[str, str], tmp_path: Path) -> None:
    document, picture = tmp_path / "diff.json", tmp_path / "diff.png"
    result = CliRunner().invoke(main, ["diff", *pair, "--json", str(document), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    saved = json.loads(document.read_text())
    jsonschema.validate(saved, DOCUMENT)
    found = diff(*pair)
    assert saved == describe(found)
    assert saved["a"]["folder"] == pair[0]
    for words in ("layer 0", "layer 1", "lm_head", "q_proj", f"{found.total.relative:.3g}", f"{found.total.share:.2%}"):
        assert words in result.stdout
    assert result.stderr == ""  # no bar where there is no terminal
    image = imread(picture)
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert image.std() > 0.05


def test_the_command_names_what_it_could_not_compare(tmp_path: Path) -> None:
    names = [f"only.{index}" for index in range(9)]
    a = {"w": torch.ones(4), "x": torch.ones(4, 2), **{name: torch.ones(1) for name in names}}
    b = {"w": torch.tensor([1.0, math.nan, 1.0, 1.0]), "x": torch.ones(5, 2)}
    folders = [str(save_model(tmp_path / name, tensors)) for name, tensors in (("a", a), ("b", b))]
    result = CliRunner().invoke(main, ["diff", *folders])
    assert result.exit_code == 0, result.output
    assert "1 entries are NaN or infinite, in w" in result.stdout
    assert "only in A: only.0, only.1" in result.stdout
    assert "and 3 more" in result.stdout
    assert "x: shape [4, 2] in A, [5, 2] in B; the first 4 rows were compared" in result.stdout


def test_a_wrong_request_has_exit_code_2(pair: tuple[str, str], tmp_path: Path) -> None:
    for flags, words in (
        ([pair[0], str(tmp_path / "nowhere")], "nowhere"),
        ([*pair, "--json", str(tmp_path / "no" / "x.json")], "there is no directory"),
        ([*pair, "--on", pair[0]], "neither"),
    ):
        result = CliRunner().invoke(main, ["diff", *flags])
        assert result.exit_code == 2, result.output
        assert words in result.stderr


def test_without_matplotlib_a_plot_is_refused_with_the_command_that_installs_it(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    command = [sys.executable, "-m", "resta", "diff", *pair, "--plot", str(tmp_path / "x.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert 'pip install "resta[plots]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("layers", [0, 1, 100])
def test_a_heat_map_of_any_depth_is_drawn(layers: int, pair: tuple[str, str], tmp_path: Path) -> None:
    near = Distance(tensors=1, entries=4, norm_a=1.0, norm_diff=1e-3, differing=4, non_finite=0)
    odd = Distance(tensors=1, entries=4, norm_a=0.0, norm_diff=1.0, differing=4, non_finite=0)
    same = Distance(tensors=1, entries=4, norm_a=1.0, norm_diff=0.0, differing=0, non_finite=0)
    tensors = {"model.embed_tokens.weight": same} if layers != 1 else {}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.q_proj.weight"] = near
        tensors[f"model.layers.{layer}.k_proj.weight"] = (odd, same)[layer % 2]
    found = diff(*pair)
    drawn = Diff(a=found.a, b=found.b, tensors=tensors, only_in_a=(), only_in_b=(), mismatches={})
    write_plot(drawn, tmp_path / "x.png")
    assert np.isfinite(imread(tmp_path / "x.png")).all()


def test_a_folder_whose_name_is_no_line_of_text_is_one_refusal(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a\nb", {"w": torch.ones(2)})
    with pytest.raises(RequestError, match="one line of text"):
        diff(str(folder), str(folder))
