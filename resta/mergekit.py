"""A mergekit configuration as a recipe of resta, where the two say exactly the same.

    task_arithmetic    base + lambda sum_i w_i (m_i - base)          w divided by their sum if normalize is true
    linear             sum_i w_i m_i / sum_i w_i                     = m_0 + sum_i w_i (m_i - m_0) with normalised w

The weights are in float32 and rounded once to `out_dtype`, else `dtype`: what mergekit does at `dtype: float32`. At a
narrower `dtype` mergekit rounds every intermediate result to it, so that bits differ. Whatever else a configuration
says is refused by name. This module knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from resta.errors import RequestError

METHODS = ("task_arithmetic", "linear")
KNOWN = {"models", "merge_method", "base_model", "dtype", "out_dtype", "parameters", "name", "tokenizer_source"}
PARAMETERS = {"weight", "normalize", "lambda", "int8_mask"}  # int8_mask changes how masks are kept; these have none
DTYPES = ("float32", "bfloat16", "float16")


def is_mergekit(parsed: object) -> bool:
    """Whether a parsed YAML file is a mergekit configuration."""
    return isinstance(parsed, dict) and "merge_method" in parsed


def convert(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe, as plain data, that says what a mergekit configuration says.

    Raises RequestError: a part of it cannot be said exactly; the message names it.
    """
    method = config["merge_method"]
    if method not in METHODS:
        raise _refusal(f"merge_method {method!r}", f"only {' and '.join(METHODS)} are")
    for key in config:
        if key not in KNOWN:
            raise _refusal(repr(key))
    entries = config.get("models")
    if not isinstance(entries, list) or not entries:
        raise _refusal("no list of models")
    shared = _mapping(config.get("parameters"), "parameters")
    _check_parameters(shared, "parameters")
    base = config.get("base_model")
    pairs = [_weight_of(entry, shared, base if method == "task_arithmetic" else None) for entry in entries]
    models = [(source, weight) for source, weight in pairs if weight is not None]
    if len({source for source, _ in models}) != len(models):
        raise _refusal("a model that is named twice")
    build = _task_arithmetic if method == "task_arithmetic" else _linear
    return build(base, models, shared) | {"output": _output(config, models, base)}


def _task_arithmetic(base: Any, models: list[tuple[str, float]], shared: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(base, str):
        raise _refusal("task_arithmetic without the name of a base_model")
    factor = _number(shared.get("lambda", 1.0), "lambda")
    models = [(source, weight) for source, weight in models if source != base]  # its own difference is zero
    total = _total(models) if _flag(shared, "normalize", default=False) else 1.0
    names = _names([base, *(source for source, _ in models)])
    terms = [
        {"delta": f"{names[source]} - {names[base]}", "scale": factor * weight / total} for source, weight in models
    ]
    return _recipe(names, names[base], terms)


def _linear(base: Any, models: list[tuple[str, float]], shared: Mapping[str, Any]) -> dict[str, Any]:
    if "lambda" in shared:
        raise _refusal("lambda of linear")
    total = _total(models)
    if not _flag(shared, "normalize", default=True) and abs(total - 1) > 1e-9:
        raise _refusal(f"weights that add up to {total:g} without normalize", "such a sum is not between the models")
    models = [(source, weight / total) for source, weight in models]
    sources = [source for source, _ in models]
    names = _names(sources if base is None or base in sources else [*sources, base])
    vector = _safety_vector(models)
    if vector:
        start, plus, minus, scale = vector
        terms = [{"delta": f"{names[plus]} - {names[minus]}", "scale": scale}]
    else:
        start = sources[0]
        terms = [{"delta": f"{names[source]} - {names[start]}", "scale": weight} for source, weight in models[1:]]
    return _recipe({source: names[source] for source in sources}, names[start], terms)


def _safety_vector(models: list[tuple[str, float]]) -> tuple[str, str, str, float] | None:
    """Return (tuned, aligned, base, scale) of `tuned + scale * aligned - scale * base`, if that is the sum."""
    if len(models) != 3:
        return None
    whole = [source for source, weight in models if weight == 1]
    rest = sorted((weight, source) for source, weight in models if source not in whole[:1])
    if not whole or rest[0][0] != -rest[-1][0] or rest[-1][0] == 0:
        return None
    return whole[0], rest[-1][1], rest[0][1], rest[-1][0]


def _recipe(names: Mapping[str, str], start: str, terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"models": {name: source for source, name in names.items()}, "start": start, "terms": terms}


def _output(config: Mapping[str, Any], models: list[tuple[str, float]], base: Any) -> dict[str, Any]:
    """Return dtype and donor of the result; mergekit takes config and tokenizer from the base, not the fine-tune."""
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise _refusal(f"dtype {dtype!r}")
    if config.get("tokenizer_source") not in (None, "base"):
        raise _refusal(f"tokenizer_source {config['tokenizer_source']!r}", "the tokenizer is that of one model")
    sources = [base] if isinstance(base, str) else []
    sources += [source for source, _ in models if source not in sources]
    donor = sources[0]
    if config["merge_method"] == "linear" and donor == base and base not in (source for source, _ in models):
        raise _refusal("a base_model of linear that is not among its models")
    order = sources if config["merge_method"] == "task_arithmetic" else [source for source, _ in models]
    return {"dtype": dtype or "same", "files_from": _names(order)[donor]}


def _weight_of(entry: Any, shared: Mapping[str, Any], base: Any) -> tuple[str, float | None]:
    """Return a model's source and weight; None for a base that is listed and adds nothing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or entry.keys() - {"model", "parameters"}:
        raise _refusal(f"the entry {entry!r}", "expected model and parameters")
    source, own = entry["model"], _mapping(entry.get("parameters"), f"parameters of {entry['model']}")
    if "+" in source:
        raise _refusal(f"the adapter in {source!r}", "write a recipe that says which model it is `on`")
    _check_parameters(own, f"parameters of {source}")
    for name in ("lambda", "normalize"):
        if name in own:
            raise _refusal(f"{name} of a single model ({source})")
    weight = own.get("weight", shared.get("weight"))
    if weight is None:
        if source == base:
            return source, None
        raise _refusal(f"the model {source!r} without a weight")
    return source, _number(weight, f"weight of {source}")


def _check_parameters(parameters: Mapping[str, Any], where: str) -> None:
    for name in parameters:
        if name not in PARAMETERS:
            raise _refusal(f"{name!r} in {where}")


def _total(models: list[tuple[str, float]]) -> float:
    total = sum(weight for _, weight in models)
    if abs(total) < 1e-6:
        raise _refusal("weights that add up to 0 and are to be normalised")
    return total


def _names(sources: list[str]) -> dict[str, str]:
    """Call each model by the last part of its source; numbered where two would be called alike."""
    names: dict[str, str] = {}
    for source in sources:
        last = source.partition("@")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        plain = re.sub(r"[^\w.]", "_", last) or "model"
        name = plain if re.match(r"[^\W\d]", plain) else f"model_{plain}"
        while name in names.values():
            name += "_"
        names[source] = name
    return names


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise _refusal(f"{where} {value!r}", "expected a mapping")
    return value or {}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(f"{where}: {value!r}", "write a gradient over layers, or a filter, as rules with scale_by")
    try:
        return float(value)
    except OverflowError:
        raise _refusal(f"{where}: a number of {len(str(value))} digits", "expected one that float64 holds") from None


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise _refusal(f"{name}: {value!r}", "expected true or false")
    return value


def _refusal(what: str, why: str = "resta has nothing that does exactly the same") -> RequestError:
    return RequestError(f"this is a mergekit configuration, and {what} cannot be translated: {why}")
