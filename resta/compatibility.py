"""Settings of a config that say how weights are used: where two models differ in one, equal weights mean other things.

Reads the names of transformers 4 and 5 and of the families that call a setting their own way. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Each setting by the name that recipes allow it by, and by what else families call it.
MEANING: dict[str, tuple[str, ...]] = {
    "rope_theta": ("rotary_emb_base",),
    "rope_scaling": (),
    "rope_local_base_freq": (),
    "partial_rotary_factor": ("rotary_pct",),
    "rms_norm_eps": (),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "sliding_window": (),
    "layer_types": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "residual_multiplier": (),
    "embedding_multiplier": (),
    "logits_scaling": (),
    "num_experts_per_tok": (),
    "norm_topk_prob": (),
}
# What a config that does not name a setting means by it, in every family that has the setting.
DEFAULTS: dict[str, Any] = {"rope_theta": 10000.0, "rope_scaling": None}


def meaning_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a config names, those of its text part if it has several, by the names of MEANING."""
    text = config.get("text_config")
    merged = {**text, **config} if isinstance(text, dict) else dict(config)
    found = {
        name: merged[key] for name, others in MEANING.items() for key in reversed((name, *others)) if key in merged
    }
    found |= _rope(merged.get("rope_parameters"))
    if "rope_scaling" in found:
        found["rope_scaling"] = _scaling(found["rope_scaling"])
    if merged.get("use_sliding_window") is False:
        found["sliding_window"] = None
    return found


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (setting, value of mine, value of theirs) where two configs contradict each other."""
    first, second = (DEFAULTS | meaning_of(config) for config in (mine, theirs))
    for name in MEANING:
        if name in first and name in second and first[name] != second[name]:
            yield name, first[name], second[name]


def unknowns(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the settings that one config names and the other leaves to its family's default, which is not known."""
    first, second = (DEFAULTS | meaning_of(config) for config in (mine, theirs))
    named = {name for name in MEANING if (name in first) != (name in second)}
    return [name for name in MEANING if name in named and (first | second)[name] is not None]


def _rope(parameters: object) -> dict[str, Any]:
    """Return what transformers 5 keeps in `rope_parameters`, by the names that transformers 4 had."""
    if not isinstance(parameters, dict):
        return {}
    found = {}
    local = parameters.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    inner = parameters.get("full_attention", parameters)
    inner = dict(inner) if isinstance(inner, dict) else {}
    found |= {name: inner.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in inner}
    return found | {"rope_scaling": inner}


def _scaling(value: object) -> object:
    """Return a RoPE scaling in one form; None for the kind that scales nothing."""
    if not isinstance(value, dict):
        return value
    plain = {key: part for key, part in value.items() if key not in ("type", "rope_theta")}
    kind = value.get("rope_type", value.get("type", "default"))
    return None if kind == "default" else plain | {"rope_type": kind}
