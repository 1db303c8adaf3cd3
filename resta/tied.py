"""Tied embeddings: an output layer that shares its matrix with the embeddings, and its untying.

A base that ties them stores one matrix. An adapter that trains the embeddings moves only those (peft keeps the output
layer's matrix as it was), so what it makes has two, and a config that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from resta.checkpoint import Weights
from resta.errors import RequestError

# Embeddings -> output layer of the causal language models of transformers. Names not in here are not guessed at: a
# library that finds no output layer under the name that it expects makes a random one.
OUTPUT_OF = {
    "model.embed_tokens.weight": "lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
}


def untie(weights: Weights) -> Weights:
    """Return a checkpoint with an output layer of its own, which still holds what it shared; others unchanged."""
    pair = _tied_pair(weights)
    if pair is None:
        return weights
    embeddings, output = pair
    return replace(
        weights,
        tensors={**weights.tensors, output: weights.tensors.get(output, weights.tensors[embeddings])},
        config={**weights.config, "tie_word_embeddings": False},
        is_untied=True,
    )


def untie_for(adapter: str, trained: Iterable[str], base: Weights) -> Weights:
    """Return the base that an adapter's trained tensors are put on: untied if they touch what it ties.

    Args:
        adapter: what messages call the adapter.
        trained: names of the tensors that it changes or replaces.
        base: a full checkpoint.

    Raises:
        RequestError: the adapter touches tied embeddings of an architecture that is not known.
    """
    pair, touched = _tied_pair(base), set(trained)
    if pair:
        return untie(base) if touched & set(pair) else base
    if _is_tied(base) and (name := _reaches_vocabulary(touched, base)):
        raise RequestError(
            f"{adapter}: changes {name!r}, and {base.located.source} ties its output layer to its embeddings: the two "
            "would have to be stored apart, and where is not known of this architecture. Load base and adapter with "
            "peft, untie them there, merge_and_unload, and merge the model that it saves"
        )
    return base


def shared_output(weights: Weights) -> tuple[str, str] | None:
    """Return the names of tied embeddings and an output layer that is stored as the very same bytes; else None."""
    pair = _tied_pair(weights)
    found = [weights.tensors.get(name) for name in pair or ()]
    return pair if pair and found[0] == found[1] else None


def _is_tied(weights: Weights) -> bool:
    """Whether output layer and embeddings are one matrix: said so, or said nothing and no output layer stored."""
    text = weights.config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    said = weights.config.get("tie_word_embeddings", nested)
    return said is not False and not (said is None and any(name in weights.tensors for name in OUTPUT_OF.values()))


def _tied_pair(weights: Weights) -> tuple[str, str] | None:
    """Return the names of tied embeddings and output layer, or None if they are not tied or not known."""
    config = weights.config
    if not _is_tied(weights) or "text_config" in config or config.get("auto_map"):
        return None
    if not str(config.get("architectures")).endswith(("ForCausalLM']", "LMHeadModel']")):
        return None
    return next(((name, output) for name, output in OUTPUT_OF.items() if name in weights.tensors), None)


def _reaches_vocabulary(touched: Iterable[str], base: Weights) -> str | None:
    """Return the name of a changed tensor that has a row for every token, or that is called as those are."""
    text = base.config.get("text_config")
    sizes = {base.config.get("vocab_size"), text.get("vocab_size") if isinstance(text, Mapping) else None} - {None}
    for name in sorted(touched):
        shape = base.tensors[name].shape if name in base.tensors else ()
        called = name.endswith(("lm_head.weight", "embed_out.weight", "wte.weight")) or "embed" in name
        if called or (len(shape) == 2 and shape[0] in sizes):
            return name
    return None
