"""What to say where one model has a tensor that another lacks: often it has the same weights under other names.

Leaving them out would then lose them, and the result would keep what was to be restored. Knows nothing of recipes.
"""

from __future__ import annotations

from collections.abc import Mapping

from resta.checkpoint import Operand, Weights


def missing_advice(name: str, start: Weights, model: Weights) -> str:
    """Return what to do where a model lacks a tensor of the start."""
    if renamed := _renamed(name, start.tensors, model.tensors, ("the start", "that model")):
        return renamed
    if layout := _layout_advice(name, start, model):
        return layout
    if model.config.get("tie_word_embeddings"):
        return (
            "If its output layer is tied to its embeddings, add a rule with match and "
            "stand_in: model.embed_tokens.weight; to leave the terms out there, missing: skip"
        )
    return "To leave the terms out there, add a rule with match and missing: skip"


def extra_advice(name: str, start: Weights, model: Weights) -> str:
    """Return what to do where a model has a tensor that the start lacks."""
    return (
        _renamed(name, model.tensors, start.tensors, ("that model", "the start"))
        or _layout_advice(name, start, model)
        or "If they may be left out of the result, add a rule with match and extra: ignore"
    )


def _renamed(
    name: str, mine: Mapping[str, Operand], theirs: Mapping[str, Operand], owners: tuple[str, str]
) -> str | None:
    """Say so if one side's names have a prefix in front; `name` is only among mine."""
    found = [(prefix, owners[0]) for prefix in _prefixes(name) if name.removeprefix(prefix) in theirs]
    found += [(prefix, owners[1]) for prefix in _prefixes(next(iter(theirs), "")) if prefix + name in theirs]
    for prefix, owner in found[:1]:
        whose = "The start's" if owner == "the start" else "Its"
        return f"{whose} names begin with {prefix!r}; say strip_prefix: {prefix!r} for {owner}"
    return None


def _layout_advice(name: str, start: Weights, model: Weights) -> str | None:
    """Say so if one model keeps all experts of a layer in one tensor, and the other each in its own."""
    mine, theirs = start.expert_layout, model.expert_layout
    if ".experts." not in name or None in (mine, theirs) or mine == theirs:
        return None
    return (
        f"Its experts are stored {theirs}, those of the start {mine}: the same weights in two layouts, which no rule "
        "can pair; leaving them out would lose the change of every expert. First bring all models into one layout: "
        "load and save each with the same version of transformers"
    )


def _prefixes(name: str) -> list[str]:
    """What a name may have in front: "a.b.c" -> ["a.", "a.b."]."""
    return [name[: index + 1] for index, letter in enumerate(name) if letter == "."]
