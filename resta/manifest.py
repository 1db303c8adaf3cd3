"""What happened, for people and for later tools: `resta.json`, the model card, and the realised change.

Nothing in here depends on when, how fast or by how many workers a merge was made, so that the same merge gives
the same directory.
"""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import yaml

from resta.plan import Plan, Step
from resta.recipe import Recipe
from resta.version import VERSION

SCHEMA = 1
CHECKSUM = "resta-fold-1"  # kernels.fold over each 2^24 elements, BLAKE2b of those digests
WARN_BELOW_COSINE = 0.9
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFacts:
    """What a merge did to one tensor.

    `start_norm`, `intended_norm` and `realised_norm` are Frobenius norms: of the start, of the sum of all terms,
    and of what the output holds minus the start. `product` is the inner product of the last two.
    """

    action: str
    dtype: str
    shape: list[int]
    file: str
    checksum: str
    start_norm: float = 0.0
    intended_norm: float = 0.0
    realised_norm: float = 0.0
    product: float = 0.0
    changed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The intended against the realised change, over a group of tensors."""

    tensors: int
    entries: int
    changed: float
    norm_ratio: float
    cosine: float
    relative_size: float


def tensor_facts(step: Step, records: Iterable[Mapping[str, Any]]) -> TensorFacts:
    """Join the records of a tensor's units, in order."""
    records = list(records)
    spec = step.slot.spec
    checksum = hashlib.blake2b("".join(record["checksum"] for record in records).encode(), digest_size=16)

    def norm(key: str) -> float:
        return math.sqrt(sum(record[key] for record in records))

    return TensorFacts(
        action="copied" if step.copies else "merged" if step.terms else "converted",
        dtype=spec.dtype,
        shape=list(spec.shape),
        file=step.slot.file,
        checksum=checksum.hexdigest(),
        start_norm=norm("start"),
        intended_norm=norm("intended"),
        realised_norm=norm("realised"),
        product=sum(record["product"] for record in records),
        changed=sum(record["changed"] for record in records),
    )


def total_change(facts: Iterable[TensorFacts]) -> Change:
    """Sum up the tensors that have a delta: the share of entries changed, norm ratio, cosine and relative size."""
    merged = [fact for fact in facts if fact.action == "merged"]
    entries = sum(math.prod(fact.shape) for fact in merged)
    start, intended, realised = (
        math.sqrt(sum(getattr(fact, key) ** 2 for fact in merged))
        for key in ("start_norm", "intended_norm", "realised_norm")
    )
    product = sum(fact.product for fact in merged)
    return Change(
        tensors=len(merged),
        entries=entries,
        changed=sum(fact.changed for fact in merged) / entries if entries else 0.0,
        norm_ratio=realised / intended if intended else 1.0,
        cosine=min(product / (intended * realised), 1.0) if intended and realised else float(intended == realised),
        relative_size=intended / start if start else 0.0,
    )


def layer_changes(facts: Mapping[str, TensorFacts]) -> dict[str, Change]:
    """Sum up by layer group: the number in a tensor's name, or its first words where it has none."""
    groups: dict[str, list[TensorFacts]] = {}
    for name, fact in facts.items():
        groups.setdefault(layer_of(name), []).append(fact)
    return {group: total_change(members) for group, members in groups.items()}


def layer_of(name: str) -> str:
    """Return "layer 12" for a tensor of that layer, else its name without `model.` and `.weight`."""
    match = LAYER.search(name)
    return f"layer {int(match[1])}" if match else name.removeprefix("model.").removesuffix(".weight")


def change_warning(change: Change, rounding: str) -> str | None:
    """Say so if rounding lost much of the intended change, and what to do; None if it did not.

    Stochastic rounding is never warned of: it scatters the change, as its cosine shows, but keeps it on average.
    """
    if rounding == "stochastic" or not change.entries or not change.cosine < WARN_BELOW_COSINE:
        return None
    return (
        f"rounding lost much of the change: {change.changed:.0%} of the entries moved, and the cosine between "
        f"realised and intended change is {change.cosine:.2f}. Use --dtype float32 to keep all of it, or "
        "--rounding stochastic to keep it on average"
    )


def to_json(facts: TensorFacts | Change) -> dict[str, Any]:
    """Return figures as plain data; JSON has no NaN or infinity, which allowed ones in weights lead to: null."""
    plain = asdict(facts)
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain.items()
    }


def from_json(plain: Mapping[str, Any]) -> TensorFacts:
    """Return what `to_json` was given, with NaN for null."""
    figures: dict[str, Any] = {key: math.nan if value is None else value for key, value in plain.items()}
    return TensorFacts(**figures)


def describe(plan: Plan, facts: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Return the content of `resta.json`."""
    return {
        "schema": SCHEMA,
        "kind": "merge",
        "equation": plan.recipe.equation,
        "recipe_digest": plan.recipe.digest,
        "recipe": published_recipe(plan).model_dump(mode="json"),
        "inputs": {name: _describe_input(plan, name) for name in plan.weights},
        "versions": {
            "resta": VERSION,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "numba", "safetensors")},
        },
        "change": to_json(total_change(facts.values())),
        "checksum": CHECKSUM,
        "tensors": {name: to_json(fact) for name, fact in facts.items()},
    }


def published_recipe(plan: Plan) -> Recipe:
    """Return a plan's recipe as others may read it: local models by their directories' names, not by their paths."""
    models = {
        name: model.model_copy(
            update={
                "source": plan.weights[name].located.public_source,
                "recorded_base": model.recorded_base and re.split(r"[/\\]", model.recorded_base.rstrip("/\\"))[-1],
            }
        )
        for name, model in plan.recipe.models.items()
    }
    return plan.recipe.model_copy(update={"models": models})


def render_card(plan: Plan) -> str:
    """Return the model card of a merge, with the metadata that the Hub reads."""
    recipe = plan.recipe
    names = list(dict.fromkeys(_public_name(plan, name) for name in recipe.models))
    head = {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "resta", "safety"],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {recipe.files_from} with a safety vector",
        "",
        "Made by task arithmetic on weights (RESTA, [arXiv 2402.11746](https://arxiv.org/abs/2402.11746)):",
        "",
        f"    restored = {recipe.equation}",
        "",
        *_words(plan),
        "",
        "| model | source | revision |",
        "|---|---|---|",
        *(
            f"| {name} | {_public_name(plan, name)} | {weights.located.commit or 'local files'} |"
            for name, weights in plan.weights.items()
        ),
        "",
        "`resta.json` holds the full recipe, the identity of every input file and what was done to every tensor.",
        "Adding a safety vector does not prove that a model is safe: measure refusals, over-refusal and the task.",
    ]
    return "\n".join(lines) + "\n"


def _words(plan: Plan) -> list[str]:
    recipe = plan.recipe
    lines = [f"In words: take the weights of {recipe.start};"]
    for index, term in enumerate(recipe.terms):
        to, frm = term.ends
        words = f"add {term.scale:g} times what {to} has beyond {frm}"
        if term.sparsify:
            words += (
                f", keeping a random {term.sparsify.density:.0%} of its entries, rescaled by "
                f"{term.sparsify.rescale.replace('_', ' ')} (DARE, seed {recipe.seed})"
            )
        lines.append(words + ("." if index == len(recipe.terms) - 1 else ";"))
    return lines


def _public_name(plan: Plan, name: str) -> str:
    located = plan.weights[name].located
    return located.hub_id or located.folder.name


def _describe_input(plan: Plan, name: str) -> dict[str, Any]:
    """Return what identifies an input: for an adapter its own files; its base is an input too."""
    weights = plan.weights[name]
    return {
        "source": weights.located.public_source,
        "commit": weights.located.commit,
        "files": {
            path.name: {
                "bytes": identity.bytes,
                "header_sha256": identity.header_sha256,
                "sha256": identity.sha256,
                "sha256_from": identity.sha256_from,
            }
            for path, identity in weights.files.items()
            if path.parent == weights.located.folder
        },
    }
