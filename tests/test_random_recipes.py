"""Two thousand random recipes, bit for bit against numpy: an oracle that shares no code with the engine.

`python -m tests.test_random_recipes` prints one digest over all of their bytes: two versions that print the
same write the same.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import resta
from resta.errors import RequestError
from resta.recipe import make_recipe
from tests import oracle
from tests.builders import save_model

RECIPES = 2000
BLOCK = 100
PREFIX = "base_model.model."
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The shapes that a checkpoint may have: scalars, no rows, one element, more than a tile of 2048, odd lengths.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6), "head.weight": (11, 6), "layers.0.mlp.weight": (9, 7), "layers.0.norm.weight": (7,),
    "layers.1.mlp.weight": (61, 67), "layers.1.norm.weight": (1,), "scalar": (), "empty": (0, 3), "plain": (5, 4),
}  # fmt: skip
ADAPTED = ("layers.0.mlp", "layers.1.mlp", "plain")


@dataclass
class Case:
    """A recipe as plain data, and what its models hold: {model: {tensor: values}}, adapters as factors."""

    recipe: dict[str, Any]
    models: dict[str, dict[str, torch.Tensor]]
    adapters: dict[str, tuple[float, dict[str, torch.Tensor]]] = field(default_factory=dict)


def draw_values(dice: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Weights with their awkward neighbours: zeros of both signs, denormals, and large and small magnitudes."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values * 10.0 ** dice.choice([-6, -2, -1, 0, 1])
    odd = torch.rand(shape, generator=generator)
    for share, value in ((0.02, 0.0), (0.04, -0.0), (0.06, 1e-7), (0.08, -3e-42)):
        values = torch.where((odd < share) & (odd >= share - 0.02), torch.tensor(value, dtype=torch.float64), values)
    return values.to(dtype)


def draw_case(number: int) -> Case:
    """One recipe with its models, decided by its number alone."""
    dice = random.Random(number)
    names = ["base", "tuned", "aligned", "other"][: dice.choice([2, 3, 3, 4])]
    mixed = dice.random() < 0.3
    dtype = dice.choice(list(DTYPES.values()))
    models: dict[str, dict[str, torch.Tensor]] = {}
    for name in names:
        kinds = {tensor: dice.choice(list(DTYPES.values())) if mixed else dtype for tensor in SHAPES}
        models[name] = {tensor: draw_values(dice, shape, kinds[tensor]) for tensor, shape in SHAPES.items()}
        models[name] |= {"ids": torch.arange(5), "mask": torch.tensor([True, False])}
    sources: dict[str, dict[str, Any]] = {name: {} for name in names}
    case = Case({"models": sources, "start": "base", "terms": [], "rules": [], "min_coverage": 0}, models)
    if dice.random() < 0.4:
        add_adapter(dice, case)
    terms: Any = [draw_term(dice, list(sources), index) for index in range(dice.choice([1, 1, 2, 3, 4]))]
    used = {end for term in terms for end in term["delta"].split(" - ")}
    used |= {sources[name]["on"] for name in used if "on" in sources[name]}
    start = dice.choice(sorted(used))
    used |= {sources[start]["on"]} if "on" in sources[start] else set()
    case.recipe |= {"terms": terms, "start": start, "seed": dice.randrange(1000)}
    case.recipe["models"] = {name: model for name, model in sources.items() if name in used}
    case.models = {name: tensors for name, tensors in models.items() if name in used}
    draw_output(dice, case)
    draw_rules(dice, case)
    return case


def add_adapter(dice: random.Random, case: Case) -> None:
    rank, factors = dice.choice([1, 2, 4, 5]), {}
    kind = dice.choice([torch.float32, torch.bfloat16, torch.float64])
    for module in dice.sample(ADAPTED, dice.choice([1, 2, 3])):
        rows, columns = SHAPES[f"{module}.weight" if module != "plain" else "plain"]
        if module == "plain":
            continue  # not called .weight: peft has no name for it
        factors[f"{module}.lora_A.weight"] = draw_values(dice, (rank, columns), kind)
        factors[f"{module}.lora_B.weight"] = draw_values(dice, (rows, rank), kind)
    if factors:
        alpha = dice.choice([1, 3, 16])
        case.adapters["lora"] = (alpha / rank, factors)
        case.recipe["models"]["lora"] = {"on": "base"}


def draw_term(dice: random.Random, names: list[str], index: int) -> dict[str, Any]:
    to, from_ = dice.sample(names, 2)
    scale = dice.choice([0.5, 1.0, -0.5, 0.1, 1.5, round(dice.uniform(-2, 2), 3) or 0.25])
    term: dict[str, Any] = {"name": f"t{index}", "delta": f"{to} - {from_}", "scale": scale}
    if dice.random() < 0.4:
        term["sparsify"] = {"density": dice.choice([0.1, 0.5, 0.7, 0.999, 1.0])}
    return term


def draw_output(dice: random.Random, case: Case) -> None:
    output: dict[str, Any] = {"dtype": dice.choice(["same", "same", *DTYPES]), "files_from": case.recipe["start"]}
    output["shard_size"] = dice.choice(["5GB", "1kB", "100B"])
    stored = {tensor.dtype for tensor in case.models[real_model(case, case.recipe["start"])].values()}
    stored = stored if output["dtype"] == "same" else {DTYPES[output["dtype"]]}
    if dice.random() < 0.4 and stored & {torch.bfloat16, torch.float16}:
        output["rounding"] = "stochastic"
    case.recipe["output"] = output


def draw_rules(dice: random.Random, case: Case) -> None:
    """Rules that leave `layers.1.mlp.weight` alone, so that no term is zero everywhere."""
    start = case.recipe["start"]
    others = [name for name in case.models if name != real_model(case, start)]
    rules = case.recipe["rules"]
    if dice.random() < 0.3:
        rules.append({"match": "layers.0.norm.weight", "keep": True})
    if dice.random() < 0.3:
        factors: Any = {"t0": dice.choice([0, 0.5, 2.0])} if dice.random() < 0.5 else dice.choice([0, 0.25, -1.0])
        rules.append({"match": ["layers.0.mlp*", "scalar"], "scale_by": factors})
    if others and dice.random() < 0.3:
        del case.models[dice.choice(others)]["plain"]
        rules.append({"match": "plain", "missing": "skip"})
    if others and dice.random() < 0.3:
        del case.models[dice.choice(others)]["head.weight"]
        rules.append({"match": "head*", "stand_in": "embed.weight"})
    if others and dice.random() < 0.3:
        longer = dice.choice(list(case.models))
        extended = case.models[longer]["embed.weight"]
        rows = draw_values(dice, (2, 6), extended.dtype)
        case.models[longer]["embed.weight"] = torch.cat([extended, rows])
        rules.append({"match": "embed.weight", "rows": "shared"})
        if any("stand_in" in rule for rule in rules):
            rules[:] = [rule for rule in rules if "stand_in" not in rule]
            for name, tensors in case.models.items():
                tensors.setdefault("head.weight", draw_values(random.Random(name), (11, 6), torch.float32))
    if others and dice.random() < 0.3:
        case.models[dice.choice(others)]["extra.weight"] = torch.ones(3)
        rules.append({"match": "extra.*", "extra": "ignore"})


def real_model(case: Case, name: str) -> str:
    """The full model behind a name."""
    return str(case.recipe["models"][name].get("on", name))


def write_case(case: Case, folder: Path, number: int) -> dict[str, Any]:
    """Write the models; return the recipe with their places."""
    dice = random.Random(number)
    models = {}
    for name, tensors in case.models.items():
        prefix = dice.choice(["", "", "module."]) if name != "base" else ""
        named = {prefix + tensor: values for tensor, values in tensors.items()}
        save_model(folder / name, named, shards=dice.choice([1, 2, 3]))
        models[name] = {"source": str(folder / name)} | ({"strip_prefix": prefix} if prefix else {})
    for name, (scaling, factors) in case.adapters.items():
        if name not in case.recipe["models"]:
            continue
        rank = next(values.shape[0] for tensor, values in factors.items() if "lora_A" in tensor)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": scaling * rank, "base_model_name_or_path": "base"}
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        save_file({PREFIX + tensor: v for tensor, v in factors.items()}, folder / name / "adapter_model.safetensors")
        models[name] = {"source": str(folder / name), "on": "base"}
    return case.recipe | {"models": models}


# ---- the oracle: numpy in float32 or float64, one operation at a time


def wide(values: torch.Tensor, work: type) -> np.ndarray:
    return values.to(torch.float64).numpy().astype(work)


def operand(case: Case, model: str, tensor: str, work: type) -> np.ndarray:
    values = wide(case.models[real_model(case, model)][tensor], work)
    if model in case.adapters:
        scaling, factors = case.adapters[model]
        module = tensor.removesuffix(".weight")
        if f"{module}.lora_A.weight" in factors:
            left, right = (wide(factors[f"{module}.lora_{side}.weight"], work) for side in "BA")
            product = np.zeros(values.shape, work)
            for k in range(right.shape[0]):
                product = product + left[:, k : k + 1] * right[k : k + 1]
            values = values + work(scaling) * product
    return values


def rule_of(case: Case, tensor: str) -> dict[str, Any]:
    for rule in case.recipe["rules"]:
        globs = rule["match"] if isinstance(rule["match"], list) else [rule["match"]]
        if any(tensor.startswith(glob[:-1]) if glob.endswith("*") else tensor == glob for glob in globs):
            return dict(rule)
    return {}


def ends_of(case: Case, index: int, tensor: str) -> list[tuple[str, str]] | None:
    """(model, tensor) of both ends of a term, or None where it does not act."""
    rule, ends = rule_of(case, tensor), []
    for model in case.recipe["terms"][index]["delta"].split(" - "):
        held = case.models[real_model(case, model)]
        name = tensor if tensor in held else rule.get("stand_in")
        if name is None:
            assert rule.get("missing") == "skip"
            return None
        ends.append((model, name))
    factor = rule.get("scale_by", 1.0)
    factor = factor.get(f"t{index}", 1.0) if isinstance(factor, dict) else factor
    return None if rule.get("keep") or factor == 0 else ends


def same_difference(case: Case, ends: list[tuple[str, str]]) -> bool:
    """Whether both ends are the same stored bytes: an adapter that leaves the tensor alone, and its base."""
    (to, to_name), (from_, frm_name) = ends
    module = to_name.removesuffix(".weight")
    touched = any(
        f"{module}.lora_A.weight" in case.adapters[model][1] for model in (to, from_) if model in case.adapters
    )
    return not touched and (real_model(case, to), to_name) == (real_model(case, from_), frm_name)


def is_nowhere(case: Case, index: int) -> bool:
    """Whether a term takes part in no tensor: rules leave it out wherever an adapter differs from its base."""
    start = case.models[real_model(case, case.recipe["start"])]
    tensors = [name for name, value in start.items() if value.is_floating_point()]
    found = [ends_of(case, index, name) for name in tensors]
    return all(ends is None or same_difference(case, ends) for ends in found)


def is_double(case: Case, tensor: str, active: list[list[tuple[str, str]]]) -> bool:
    ends = [(case.recipe["start"], tensor), *(end for pair in active for end in pair)]
    for model, name in ends:
        kinds = {case.models[real_model(case, model)][name].dtype}
        if model in case.adapters:
            module = name.removesuffix(".weight")
            kinds |= {v.dtype for key, v in case.adapters[model][1].items() if key.startswith(f"{module}.lora_")}
        if torch.float64 in kinds:
            return True
    return False


def words_of(seed: int, purpose: str, term: int, tensor: str, count: int) -> np.ndarray:
    """The tensor's random words, as tests/oracle.py says them in Python integers, many blocks at once."""
    text = json.dumps([seed, purpose, term, tensor]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    x = [blocks & mask, blocks >> half, np.zeros_like(blocks), np.zeros_like(blocks)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(p1 >> half) ^ x[1] ^ np.uint64(k0), p1 & mask, (p0 >> half) ^ x[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(x, axis=-1).reshape(-1)[:count]


def expected(case: Case, tensor: str) -> torch.Tensor:
    """What the equation gives for one tensor, as stored."""
    recipe = case.recipe
    start = case.models[real_model(case, recipe["start"])][tensor]
    if not start.is_floating_point():
        return start
    found = {index: ends_of(case, index, tensor) for index in range(len(recipe["terms"]))}
    active = {index: ends for index, ends in found.items() if ends and not same_difference(case, ends)}
    work = np.float64 if is_double(case, tensor, list(active.values())) else np.float32
    values = operand(case, recipe["start"], tensor, work)
    flat, delta = values.reshape(-1), np.full(values.size, -0.0, work)
    sides = {index: [operand(case, *end, work) for end in ends] for index, ends in active.items()}
    rows = min((side.shape[0] for pair in (*sides.values(), [values]) for side in pair if side.ndim), default=1)
    count = values[:rows].size if values.ndim else 1
    for index, pair in sides.items():
        to, from_ = (side.reshape(-1)[:count] for side in pair)
        term = recipe["terms"][index]
        factor = rule_of(case, tensor).get("scale_by", 1.0)
        factor = factor.get(term["name"], 1.0) if isinstance(factor, dict) else factor
        density = term.get("sparsify", {}).get("density", 1.0)
        added = delta[:count] + work(term["scale"] * factor * (1 / density)) * (to - from_)
        if density < 1:
            kept = words_of(recipe["seed"], "dare", index, tensor, values.size)[:count] < round(density * 2**32)
            added = np.where(kept, added, delta[:count])
        delta[:count] = added
    dtype = DTYPES.get(recipe["output"]["dtype"], start.dtype)
    total = flat + delta
    if recipe["output"].get("rounding") == "stochastic" and dtype in (torch.bfloat16, torch.float16):
        words = words_of(recipe["seed"], "rounding", 0, tensor, values.size)
        return stochastic(total, words, dtype).reshape(values.shape)
    return rounded(total, dtype).reshape(values.shape)


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """One rounding to nearest even, from float64 as well."""
    if dtype == torch.float16:
        return torch.from_numpy(values.astype(np.float16))
    if dtype == torch.bfloat16:
        return torch.from_numpy(oracle.rounded(values.astype(np.float64), "bfloat16")).to(dtype)
    return torch.from_numpy(values.copy()).to(dtype)


def stochastic(values: np.ndarray, words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Random bits are added to those that are dropped, and what is carried over rounds up, in magnitude."""
    single = np.abs(values).astype(np.float32)
    single = np.where(single > np.abs(values), np.nextafter(single, np.float32(0)), single)
    bits = single.view(np.uint32) | (single != np.abs(values))  # what a float64 holds beyond float32 is kept in mind
    if dtype == torch.bfloat16:
        cut = (bits.astype(np.uint64) + (words & np.uint64(0xFFFF))) >> np.uint64(16)
        out = torch.from_numpy(cut.astype(np.uint16).view(np.int16)).view(dtype)
    else:
        magnitude = bits.astype(np.uint32).view(np.float32)
        low = (words & np.uint64(0x1FFF)).astype(np.float32) * np.float32(2.0**-13)
        step = oracle.quantum(magnitude.astype(np.float64), "float16").astype(np.float32)
        normal = np.floor(magnitude.astype(np.float64) / step + low) * step
        denormal = np.floor(magnitude * np.float32(2.0**24) + low) * np.float32(2.0**-24)
        out = torch.from_numpy(np.where(magnitude < 2.0**-14, denormal, normal)).to(dtype)
    return torch.where(torch.from_numpy(np.signbit(values)), -out, out)


# ---- the claims


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(number: int, folder: Path, digest: Any = None) -> int:
    """Compare one recipe's tensors with the oracle's, every tenth also as files; return how many elements."""
    case = draw_case(number)
    recipe = make_recipe(write_case(case, folder, number))
    if any(is_nowhere(case, index) for index in range(len(recipe.terms))):
        with pytest.raises(RequestError, match="changes nothing"):
            resta.merge(recipe, folder / "out")
        return 0
    got = dict(resta.tensors(recipe))
    start = case.models[real_model(case, recipe.start)]
    if number % 10 == 0 and any(not torch.equal(value, start[name].to(value.dtype)) for name, value in got.items()):
        out = resta.merge(recipe, folder / "out", workers=number // 10 % 3 + 1).out
        files = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
        assert files.keys() == got.keys()
        assert all(raw_bytes(value) == raw_bytes(got[name]) for name, value in files.items())
    assert got.keys() == case.models[real_model(case, recipe.start)].keys()
    for name, value in sorted(got.items()):
        want = expected(case, name)
        assert (value.dtype, value.shape) == (want.dtype, want.shape), f"recipe {number}, {name}"
        same = raw_bytes(value) == raw_bytes(want)
        assert same, f"recipe {number}, tensor {name}: {case.recipe}"
        if digest is not None:
            digest.update(raw_bytes(value))
    return sum(value.numel() for value in got.values())


@pytest.mark.parametrize("first", range(0, RECIPES, BLOCK))
def test_random_recipes_agree_with_the_oracle_in_every_bit(tmp_path: Path, first: int) -> None:
    elements = sum(check(number, tmp_path / str(number)) for number in range(first, first + BLOCK))
    assert elements > 100_000


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return rounded_rightly(np.nextafter(values, np.inf, dtype=values.dtype), dtype)

    rounded_rightly = rounded
    monkeypatch.setattr("tests.test_random_recipes.rounded", off_by_one)
    failed = 0
    for number in range(10):
        try:
            check(number, tmp_path / str(number))
        except AssertionError:
            failed += 1
    assert failed >= 5


def test_the_oracles_random_words_are_the_published_ones() -> None:
    assert words_of(7, "dare", 1, "w", 37).tolist() == oracle.words(7, "dare", 1, "w", 37).tolist()


if __name__ == "__main__":
    total, everything = 0, hashlib.sha256()
    for index in range(int(sys.argv[1]) if len(sys.argv) > 1 else RECIPES):
        with tempfile.TemporaryDirectory() as place:
            total += check(index, Path(place) / "case", everything)
    print(f"{total} elements, sha256 {everything.hexdigest()}")
