"""A PEFT LoRA directory as a checkpoint: the base's tensors, with `scaling * B @ A` on top of some of them.

LoRA: W + (alpha / rank) B A (arXiv 2106.09685, eq. 3); rank-stabilised LoRA: alpha / sqrt(rank) (arXiv 2312.03732).
The products are formed tile by tile during the merge and never stored. Unlike `peft`'s own merge, nothing is
rounded to the base's dtype on the way. Whatever this file does not know is refused by name: an adapter applied in
part is a different model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from resta.checkpoint import LINK_ADVICE, SINGLE, LowRank, Operand, Weights, identify, inside, read_json
from resta.errors import RequestError
from resta.fingerprint import file_fingerprint
from resta.header import FLOAT_DTYPES, read_header
from resta.hub import INDEX, Located
from resta.stored import Stored
from resta.tied import untie_for

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
MANIFEST = "resta.json"
PREFIX = "base_model.model."

# Settings that say how to apply the adapter, and those that only say how it was trained.
APPLIED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"}
APPLIED |= {"lora_bias", "modules_to_save", "base_model_name_or_path", "revision", "init_lora_weights"}
HARMLESS = {"task_type", "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "auto_mapping"}
HARMLESS |= {
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "eva_config",
    "qalora_group_size",
    "peft_version",
}
MOST_STEPS = 1e7  # paths that the patterns for one module may have: a tenth of a second, and real ones have hundreds
_REPETITION = re.compile(r"[*+?]|\{\d*,?\d*\}")
_TOKEN = re.compile(rf"\\.|\[\^?\]?[^\]]*\]|\((?:\?:)?|{_REPETITION.pattern}|.", re.DOTALL)
# Initialisations that leave the base weights as they were; PiSSA, OLoRA, CorDA and LoftQ change them.
BASE_KEEPING = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no full model."""
    return (folder / CONFIG).is_file() and not any((folder / name).exists() for name in (SINGLE, INDEX))


def read_adapter(located: Located, base: Weights, *, recorded_base: str | None = None) -> Weights:
    """Read an adapter on its base as one virtual checkpoint.

    Args:
        located: the adapter's directory.
        base: the full checkpoint that it is applied to.
        recorded_base: the user's confirmation, if the adapter records its base under another name, or other contents.

    Raises:
        RequestError: it is for another base, not complete, or of a kind that cannot be applied exactly.
    """
    folder = located.folder
    config = read_json(folder / CONFIG)
    _check_config(config, folder)
    _check_base(config, base, recorded_base, folder)
    specs = _read_tensors(folder)
    base = untie_for(str(folder / FILE), map(_target, specs), base)
    tensors, used = _replace(specs, base, folder)
    modules = _group(specs, used, folder)
    _check_complete(config, modules, used, base, folder)
    for module, parts in modules.items():
        target = f"{module}.weight"
        low_rank = _low_rank(module, parts, config, base, folder)
        tensors[target] = _on_top(target, tensors.get(target), low_rank, folder)
        if "lora_B.bias" in parts:
            bias = f"{module}.bias"
            if parts["lora_B.bias"].spec.dtype not in FLOAT_DTYPES or len(parts["lora_B.bias"].spec.shape) != 1:
                raise RequestError(f"{folder / FILE}: the bias of {module!r} is not a vector of floating point")
            low_rank = LowRank(left=parts["lora_B.bias"], right=None, transposed=False, scaling=low_rank.scaling)
            tensors[bias] = _on_top(bias, tensors.get(bias), low_rank, folder)
    own = (folder / CONFIG, folder / FILE)  # the config holds the scalings, which decide every byte
    return replace(
        base,
        located=located,
        tensors=tensors,
        files={**base.files, **{file: identify(file, located) for file in own}},
        tokenizer_folders=(*base.tokenizer_folders, folder),
        is_adapter=True,
    )


def base_name(folder: Path) -> str:
    """Return the name of the base that an adapter was trained on, as it records it ("" if it does not)."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise RequestError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged")
    if config.get("use_dora"):
        raise RequestError(f"{folder}: is a DoRA adapter, whose norms need whole matrices; merge it with peft first")
    initial = config.get("init_lora_weights", True)
    if initial not in BASE_KEEPING:
        raise RequestError(
            f"{folder}: init_lora_weights is {initial!r}, which also changes the base weights; "
            "convert the adapter to plain LoRA with peft first"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise RequestError(f"{folder / CONFIG}: modules_to_save is {saved!r}; expected a list of names")
    unknown = sorted(key for key, value in config.items() if value and key not in APPLIED | HARMLESS)
    if unknown:
        raise RequestError(
            f"{folder}: {unknown[0]} is {config[unknown[0]]!r}, which is not supported; "
            "merge the adapter with peft first"
        )


def _check_base(config: Mapping[str, Any], base: Weights, recorded_base: str | None, folder: Path) -> None:
    if base.is_adapter:
        raise RequestError(f"{folder}: its base {base.located.source} is an adapter itself; merge that first")
    recorded = str(config.get("base_model_name_or_path") or "")
    located = base.located
    if recorded_base != recorded:
        confirm = f"confirm it with recorded_base: {recorded!r} in the recipe (--recorded-base on the command line)"
        same = _same_files(base, folder)
        for file in (file for file, found in same.items() if found is False):
            raise RequestError(
                f"{folder}: its {MANIFEST} says that it was trained on another {file.name} than {file}. Name the right "
                f"base; or, to put it on these weights all the same, {confirm}"
            )
        if not all(same.values()) and not _same_model(recorded, located):
            raise RequestError(
                f"{folder}: was trained on {recorded or 'a base that it does not name'!r}, and would be put on "
                f"{located.source!r}. If those are the same weights, {confirm}; otherwise name the right base"
            )
    revision = str(config.get("revision") or "")
    if located.commit and re.fullmatch(r"[0-9a-f]{40}", revision) and revision != located.commit:
        raise RequestError(f"{folder}: was trained on revision {revision} of its base; {located.commit} is given")


def _same_files(base: Weights, folder: Path) -> dict[Path, bool | None]:
    """Return for each file of a base whether `resta sft` trained on it.

    None where it noted no file of that name: it did not make the adapter, or the base has been cut into other shards.
    """
    manifest = folder / MANIFEST
    facts = read_json(manifest) if manifest.is_file() else {}
    noted = _mapping(_mapping(facts.get("base")).get("files")) if facts.get("kind") in ("sft", "patch") else {}
    files = {path: _mapping(noted.get(path.name)) for path in base.files}
    # Earlier adapters call it `sketch`.
    known = {path: facts.get("fingerprint", facts.get("sketch")) for path, facts in files.items()}
    return {path: None if digest is None else file_fingerprint(path) == digest for path, digest in known.items()}


def _mapping(value: object) -> dict[str, Any]:
    """Return a mapping that another program wrote, or none in its place."""
    return value if isinstance(value, dict) else {}


def _same_model(recorded: str, located: Located) -> bool:
    """Whether a recorded name and a base are called the same: Hub ids in full, else by their last part."""
    if located.hub_id and re.fullmatch(r"[\w.-]+/[\w.-]+", recorded):
        return recorded == located.hub_id
    name = recorded.rstrip("/").rpartition("/")[2]
    return bool(name) and name in (located.folder.name, (located.hub_id or "").rpartition("/")[2])


def _read_tensors(folder: Path) -> dict[str, Stored]:
    file = folder / FILE
    if not file.is_file():
        pickled = "; adapter_model.bin is a pickle, which is never read: save it as safetensors with peft"
        raise RequestError(f"{folder}: has no {FILE}{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    if not inside(file, folder):
        raise RequestError(f"{file}: is a link out of its directory, to {file.resolve()}; {LINK_ADVICE}")
    stored = {}
    for name, spec in read_header(file).items():
        if not name.startswith(PREFIX):
            raise RequestError(f"{file}: tensor {name!r} does not begin with {PREFIX!r}; save the adapter with peft")
        stored[name.removeprefix(PREFIX)] = Stored(file=file, spec=spec)
    return stored


def _target(name: str) -> str:
    """Return the name of the base's tensor that one of the adapter's changes or replaces."""
    if ".lora_" in name:
        module, _, part = name.rpartition(".lora_")
        return f"{module}.{'bias' if part == 'B.bias' else 'weight'}"
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _replace(specs: Mapping[str, Stored], base: Weights, folder: Path) -> tuple[dict[str, Operand], set[str]]:
    """Put whole tensors that the adapter stores (modules_to_save, biases) in the place of the base's."""
    replaced: dict[str, Operand] = {}
    used = set()
    for name, stored in specs.items():
        if ".lora_" in name:
            continue
        target = _target(name)
        if target not in base.tensors:
            raise RequestError(f"{folder / FILE}: replaces {target!r}, a tensor that the base does not have")
        if target in replaced:
            raise RequestError(f"{folder / FILE}: replaces {target!r} twice; save the adapter with peft again")
        if stored.spec.dtype not in FLOAT_DTYPES:
            raise RequestError(f"{folder / FILE}: {name!r} is {stored.spec.dtype}; expected floating point")
        shape = base.tensors[target].shape
        if stored.spec.shape != shape:
            raise RequestError(
                f"{folder / FILE}: replaces {target!r} by one of shape {stored.spec.shape}, but the base has {shape}; "
                "if its vocabulary was extended, merge the adapter with peft first"
            )
        replaced[target] = Operand(stored=stored)
        used.add(name)
    return {**base.tensors, **replaced}, used


def _group(specs: Mapping[str, Stored], used: set[str], folder: Path) -> dict[str, dict[str, Stored]]:
    """Sort factor tensors by module: {module: {"lora_A.weight": ...}}."""
    modules: dict[str, dict[str, Stored]] = {}
    for name in sorted(specs.keys() - used):
        module, _, part = name.rpartition(".lora_")
        modules.setdefault(module, {})["lora_" + part] = specs[name]
    for module, parts in modules.items():
        kinds = parts.keys() - {"lora_B.bias"}
        if kinds not in ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}):
            raise RequestError(
                f"{folder / FILE}: {module!r} has {', '.join(sorted(parts))}; expected lora_A.weight and "
                "lora_B.weight, or lora_embedding_A and lora_embedding_B"
            )
    return dict(sorted(modules.items()))


def _check_complete(
    config: Mapping[str, Any], modules: Mapping[str, Mapping[str, Stored]], used: set[str], base: Weights, folder: Path
) -> None:
    """An adapter from which tensors were lost would be applied in part."""
    if not modules and not used:
        raise RequestError(f"{folder / FILE}: holds no tensor; save the adapter again")
    for module in config.get("modules_to_save") or ():
        expected, found = (any(f".{module}." in f".{name}" for name in names) for names in (base.tensors, used))
        if expected and not found:
            raise RequestError(f"{folder / FILE}: modules_to_save names {module!r}, but no tensor of it is there")
    for module, parts in modules.items():
        if ("lora_B.bias" in parts) != bool(config.get("lora_bias")) and "lora_B.weight" in parts:
            raise RequestError(
                f"{folder / FILE}: lora_bias is {config.get('lora_bias')!r}, which {module!r} does not agree with"
            )


def _low_rank(
    module: str, parts: Mapping[str, Stored], config: Mapping[str, Any], base: Weights, folder: Path
) -> LowRank:
    embedding = "lora_embedding_A" in parts
    a, b = (
        parts["lora_embedding_A" if embedding else "lora_A.weight"],
        parts["lora_embedding_B" if embedding else "lora_B.weight"],
    )
    for factor in (a.spec, b.spec):
        if len(factor.shape) != 2 or factor.dtype not in FLOAT_DTYPES:
            raise RequestError(
                f"{folder / FILE}: a factor of {module!r} is {factor.dtype} {factor.shape}; expected a float matrix "
                "(convolutions are not supported: merge the adapter with peft first)"
            )
    rank = _pattern(config, "rank_pattern", module, config.get("r", 8), folder)
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8), folder)
    if not a.spec.shape[0] == b.spec.shape[1] == rank > 0:
        raise RequestError(
            f"{folder / FILE}: {module!r} has factors {a.spec.shape} and {b.spec.shape}; rank {rank} is configured"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    transposed = embedding or _is_conv1d(module, (b.spec.shape[0], a.spec.shape[1]), config, base, folder)
    left, right = (a, b) if transposed else (b, a)
    return LowRank(left=left, right=right, transposed=transposed, scaling=scaling)


def _is_conv1d(module: str, shape: tuple[int, int], config: Mapping[str, Any], base: Weights, folder: Path) -> bool:
    """Whether a layer keeps its weight as (in, out), where B @ A has the shape (out, in).

    peft goes by the class of each layer, and leaves in `fan_in_fan_out` what the last one was. Where a matrix is not
    square its shape tells; where it is, the setting is believed unless the base mixes both kinds of layer.
    """
    target = base.tensors.get(f"{module}.weight")
    if target is not None and shape[0] != shape[1] and target.shape in (shape, shape[::-1]):
        return target.shape == shape[::-1]
    if config.get("fan_in_fan_out"):
        return True
    for name, operand in base.tensors.items():
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        rows, columns = operand.shape if name.endswith(".weight") and len(operand.shape) == 2 else (0, 0)
        if bias is not None and rows != columns and bias.shape == (columns,):
            raise RequestError(
                f"{folder}: fan_in_fan_out is false, but the base has layers stored as (in, out), such as {name!r}, "
                f"and {module!r} is square: it could be either. Merge the adapter with peft first"
            )
    return False


def _pattern(config: Mapping[str, Any], name: str, module: str, default: Any, folder: Path) -> Any:
    """Look a module up among regular expressions the way peft does: the first that matches its end wins."""
    patterns, value = config.get(name) or {}, default
    if not isinstance(patterns, dict):
        raise RequestError(f"{folder / CONFIG}: {name} is {patterns!r}; expected a mapping from patterns to numbers")
    if sum(_steps(pattern, module) for pattern in patterns) > MOST_STEPS:
        raise RequestError(
            f"{folder / CONFIG}: {name} holds regular expressions that could take for ever to match {module!r}, such "
            f"as {max(patterns, key=lambda pattern: _steps(pattern, module))!r}; write out the names of the modules"
        )
    try:
        for pattern in patterns:
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = patterns[pattern]
                break
    except (re.error, TypeError) as error:
        raise RequestError(f"{folder}: {name} is not a mapping from regular expressions to numbers: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{folder}: {name} or its default gives {value!r} for {module!r}; expected a number")
    return value


def _steps(pattern: str, module: str) -> float:
    """Return at most how many paths through a regular expression a match of a module's name can try.

    Every repetition may end at every letter, and every group go every way; a group that is repeated is not reckoned.
    """
    repetitions, ways, groups, before = 0, 1, 0, "("
    for token in _TOKEN.findall(pattern):
        if _REPETITION.fullmatch(token):
            if before in ("(", "(?:", ")"):  # also what "(?" begins
                return math.inf
            repetitions += 1
        groups += token in ("(", "(?:")
        ways += token == "|"
        before = token
    return float((len(module) + 1) ** min(repetitions, 99) * ways ** min(max(groups, 1), 99) * (module.count(".") + 1))


def _on_top(target: str, operand: Operand | None, low_rank: LowRank, folder: Path) -> Operand:
    if operand is None:
        raise RequestError(f"{folder / FILE}: targets {target!r}, a tensor that the base does not have")
    if operand.dtype not in FLOAT_DTYPES:
        raise RequestError(
            f"{folder / FILE}: targets {target!r}, which is {operand.dtype} in the base, not floating point"
        )
    expected = low_rank.shape
    if operand.shape != expected:
        raise RequestError(
            f"{folder / FILE}: the adapter's term for {target!r} is {expected}, but the base has {operand.shape}"
        )
    return Operand(stored=operand.stored, low_ranks=(low_rank,))
