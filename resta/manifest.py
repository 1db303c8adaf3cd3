"""What happened, for people and for later tools: `resta.json`, the model card, and the realised change.

Nothing in here depends on when, how fast or by how many workers a merge was made, so that the same merge
gives the same directory.
"""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from resta.cautions import cautions
from resta.coverage import Coverage
from resta.dialect import dump
from resta.plan import Plan, Step
from resta.recipe import Recipe, Term
from resta.safety import Safety, judge_safety
from resta.version import VERSION

SCHEMA = 2  # 1 had no facts of single terms
CHECKSUM = "resta-fold-1"  # kernels.fold over each 2^24 elements, BLAKE2b of those digests
WARN_BELOW_COSINE = 0.9
LARGE_CHANGE = 0.5  # of the weights' norm
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TermFacts:
    """What one term did to one tensor; `term` is its place among the recipe's terms.

    With D = scale * mask * (to - from), and e what rounding did to the sum of all terms: `intended_norm` is |D|,
    `realised_norm` |D + e| and `product` <D, D + e>. Where a tensor has several terms, e is measured on every 13th 2048
    entries, the first among them, and its share in the last two is scaled up to all; |D| is always exact, and with one
    term all are. `selected` entries were kept by the mask, or all.
    """

    term: int
    intended_norm: float = 0.0
    realised_norm: float = 0.0
    product: float = 0.0
    selected: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFacts:
    """What a merge did to one tensor.

    `start_norm`, `intended_norm` and `realised_norm` are Frobenius norms: of the start, of the sum of all terms, and of
    what the output holds minus the start. `product` is the inner product of the last two.
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
    terms: tuple[TermFacts, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The intended against the realised change, over a group of tensors.

    `norm_ratio` and `cosine` are None where nothing was intended, and `cosine` is 0 where nothing of it was realised.
    """

    tensors: int
    entries: int
    changed: float
    norm_ratio: float | None
    cosine: float | None
    relative_size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TermChange:
    """The intended against the realised change of one term, over the tensors that it takes part in.

    With D and e as in `TermFacts`, its realised change is R = D + e: what the output holds beyond the start and the
    other terms' intended changes. `norm_ratio` is |R| / |D|, `cosine` <D, R> / (|D| |R|), `kept` <D, R> / <D, D>: the
    share of the term that rounding left, 1 for all of it. They are None where nothing was intended. `relative_size` is
    |D| over the norm of the start.
    """

    tensors: int
    intended_norm: float
    realised_norm: float
    norm_ratio: float | None
    cosine: float | None
    kept: float | None
    relative_size: float


def tensor_facts(step: Step, records: Iterable[Mapping[str, Any]], *, measured: int) -> TensorFacts:
    """Join the records of a tensor's units, in order.

    Args:
        step: what was computed.
        records: the sums of `compute.Totals` by name, and each unit's checksum.
        measured: over how many of its elements the loss of each term was measured.
    """
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
        terms=tuple(
            _term_facts(
                step.terms[place].term,
                step.merged_count / max(measured, 1),
                [record["terms"][place] for record in records if record["terms"]],
            )
            for place in range(len(step.terms))
        ),
    )


def _term_facts(term: int, scale_up: float, parts: list[Mapping[str, Any]]) -> TermFacts:
    intended = sum(part["intended"] for part in parts)
    realised = intended + scale_up * sum(part["growth"] for part in parts)
    return TermFacts(
        term=term,
        intended_norm=math.sqrt(intended),
        realised_norm=math.sqrt(max(realised, 0.0)) if realised == realised else math.nan,
        product=intended + scale_up * sum(part["loss"] for part in parts),
        selected=sum(part["selected"] for part in parts),
    )


def total_change(facts: Iterable[TensorFacts]) -> Change:
    """Sum up the tensors that have a delta: the share of entries changed, norm ratio, cosine and relative size."""
    merged = [fact for fact in facts if fact.action == "merged"]
    entries = sum(math.prod(fact.shape) for fact in merged)
    start, intended, realised = (
        _norm(getattr(fact, key) for fact in merged) for key in ("start_norm", "intended_norm", "realised_norm")
    )
    return Change(
        tensors=len(merged),
        entries=entries,
        changed=sum(fact.changed for fact in merged) / entries if entries else 0.0,
        norm_ratio=realised / intended if intended else None,
        cosine=_cosine(sum(fact.product for fact in merged), intended, realised),
        relative_size=intended / start if start else 0.0,
    )


def term_change(facts: Iterable[TensorFacts], term: int) -> TermChange:
    """Sum up what one term of the recipe did."""
    parts = [(fact, part) for fact in facts for part in fact.terms if part.term == term]
    start = _norm(fact.start_norm for fact, _ in parts)
    intended = _norm(part.intended_norm for _, part in parts)
    realised = _norm(part.realised_norm for _, part in parts)
    product = sum(part.product for _, part in parts)
    return TermChange(
        tensors=len(parts),
        intended_norm=intended,
        realised_norm=realised,
        norm_ratio=realised / intended if intended else None,
        cosine=_cosine(product, intended, realised),
        kept=product / intended / intended if intended else None,
        relative_size=intended / start if start else 0.0,
    )


def _norm(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def _cosine(product: float, intended: float, realised: float) -> float | None:
    if not intended:
        return None
    return min(product / intended / realised, 1.0) if realised else 0.0


def layer_of(name: str) -> str:
    """Return "layer 12" for a tensor of that layer, else its name without `model.` and `.weight`."""
    match = LAYER.search(name)
    return f"layer {int(match[1])}" if match else name.removeprefix("model.").removesuffix(".weight")


def layer_order(layer: str) -> tuple[int, str]:
    """Return the key that sorts layers as a model has them: the embeddings, the layers by number, the rest."""
    number = layer.removeprefix("layer ")
    if number.isdigit():
        return int(number), ""
    return (-1 if layer.startswith("embed") else 10**6), layer


def change_warning(change: Change, rounding: str) -> str | None:
    """Say so if rounding lost much of the intended change, and what to do; None if it did not.

    Stochastic rounding is never warned of: it scatters the change, as its cosine shows, but keeps it on average.
    """
    if rounding == "stochastic" or change.cosine is None or not change.cosine < WARN_BELOW_COSINE:
        return None
    return (
        f"rounding lost much of the change: {change.changed:.0%} of the entries moved, and the cosine between "
        f"realised and intended change is {change.cosine:.2f}. The output dtype float32 keeps all of "
        "it, stochastic rounding keeps it on average"
    )


def size_warnings(term: Term, size: float, basis: str = "") -> list[str]:
    """Say so if a term is above half of the weights in norm; `basis` says what was looked at, if not everything."""
    if not size > LARGE_CHANGE:
        return []
    return [
        f"{term.label} ({term.delta}) is {size:.0%} of the weights in norm{basis}, where a safety vector is about a "
        "thousandth of them: the models are hardly related, or the scale is far too large"
    ]


def result_warnings(plan: Plan, facts: Mapping[str, TensorFacts]) -> list[str]:
    """Return what whoever uses the result should know first, each in a sentence."""
    found = cautions(plan)
    for index, term in enumerate(plan.recipe.terms):
        found += size_warnings(term, term_change(facts.values(), index).relative_size)
    change = total_change(facts.values())
    warning = change_warning(change, plan.recipe.output.rounding)
    return [*found, warning] if warning else found


def to_json(facts: TensorFacts | TermFacts | Change | TermChange) -> dict[str, Any]:
    """Return figures as plain data; JSON has no NaN or infinity, which allowed ones in weights lead to: null."""
    plain = {item.name: getattr(facts, item.name) for item in fields(facts)}
    if isinstance(facts, TensorFacts):
        plain["terms"] = [to_json(part) for part in facts.terms]
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain.items()
    }


def from_json(plain: Mapping[str, Any]) -> TensorFacts:
    """Return what `to_json` was given, with NaN for null."""
    figures: dict[str, Any] = _nan_for_null(plain)
    figures["terms"] = tuple(TermFacts(**_nan_for_null(part)) for part in plain["terms"])
    return TensorFacts(**figures)


def _nan_for_null(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in plain.items()}


def describe(plan: Plan, facts: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Return the content of `resta.json`: of a merge, or of a conversion, whose recipe adds nothing."""
    return {
        "schema": SCHEMA,
        "kind": "merge" if plan.recipe.terms else "convert",
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
        "terms": describe_terms(plan, facts),
        "safety": asdict(judge(plan, facts)),
        "warnings": result_warnings(plan, facts),
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


def describe_terms(plan: Plan, facts: Mapping[str, TensorFacts]) -> list[dict[str, Any]]:
    """Return what each term of the recipe reached and changed."""
    safety = plan.recipe.safety_terms
    return [
        {
            "name": term.name,
            "delta": term.delta,
            "scale": term.scale,
            "safety": index in safety,
            "coverage": {
                "parameters": coverage.parameters,
                "covered": coverage.covered,
                "not_covered": coverage.not_covered,
                "not_selected": coverage.not_selected,
            },
            "change": to_json(term_change(facts.values(), index)),
        }
        for index, (term, coverage) in enumerate(zip(plan.recipe.terms, final_coverage(plan, facts), strict=True))
    ]


def final_coverage(plan: Plan, facts: Mapping[str, TensorFacts]) -> list[Coverage]:
    """Return each term's coverage with the entries that DARE dropped among those not selected."""
    covered = [0] * len(plan.coverage)
    for fact in facts.values():
        for part in fact.terms:
            covered[part.term] += part.selected
    merged_count = [0] * len(plan.coverage)
    for step in plan.steps:
        for term in step.terms:
            merged_count[term.term] += step.merged_count
    return [
        coverage.drop(before - after)
        for coverage, before, after in zip(plan.coverage, merged_count, covered, strict=True)
    ]


def judge(plan: Plan, facts: Mapping[str, TensorFacts]) -> Safety:
    """Return what may be said of the safety vector in the result."""
    changes = [term_change(facts.values(), index) for index in range(len(plan.recipe.terms))]
    return judge_safety(plan.recipe, [change.intended_norm for change in changes], [change.kept for change in changes])


def render_card(plan: Plan, facts: Mapping[str, TensorFacts]) -> str:
    """Return the model card of a merge or a conversion, with the metadata that the Hub reads."""
    recipe = plan.recipe
    if not recipe.terms:
        return _conversion_card(plan)
    safety = judge(plan, facts)
    names = list(dict.fromkeys(_public_name(plan, name) for name in recipe.models))
    head = {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "resta", *(["safety"] if safety.restored else [])],
    }
    lines = [
        "---",
        dump(head).rstrip(),
        "---",
        "",
        f"# {recipe.files_from} {'with a safety vector' if safety.restored else 'after a merge'}",
        "",
        safety.statement,
        "",
        *(f"- Warning: {warning}." for warning in result_warnings(plan, facts)),
        "",
        "Made by task arithmetic on weights (RESTA, [arXiv 2402.11746](https://arxiv.org/abs/2402.11746)):",
        "",
        f"    restored = {recipe.equation}",
        "",
        *_words(plan),
        "",
        *_term_table(plan, facts),
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


def _conversion_card(plan: Plan) -> str:
    """Return the model card of a conversion: which model it is, and that it is still the same."""
    weights, name = plan.weights[plan.recipe.start], _public_name(plan, plan.recipe.start)
    head = {"base_model": [name], "library_name": "transformers", "tags": ["resta"]}
    return f"""---
{dump(head).rstrip()}
---

# {name} in safetensors

The weights of {name} ({weights.located.commit or "local files"}), every tensor with the bytes that it had in the
PyTorch files ({", ".join(path.name for path in weights.files)}). Nothing was changed or restored, and nothing in those
files was run. `resta.json` holds the identity of every input file and a checksum of every tensor.
"""


def _words(plan: Plan) -> list[str]:
    recipe = plan.recipe
    lines = [f"In words: take the weights of {recipe.start};"]
    for index, term in enumerate(recipe.terms):
        to, from_ = term.ends
        verb = "take away" if term.scale < 0 else "add"
        words = f"{verb} {abs(term.scale):g} times what {to} has beyond {from_}"
        if term.sparsify:
            words += (
                f", keeping a random {term.sparsify.density:.0%} of its entries, rescaled by "
                f"{term.sparsify.rescale.replace('_', ' ')} (DARE, seed {recipe.seed})"
            )
        lines.append(words + ("." if index == len(recipe.terms) - 1 else ";"))
    return lines


def _term_table(plan: Plan, facts: Mapping[str, TensorFacts]) -> Iterator[str]:
    """Yield what each term reached and changed, as a table."""
    yield "| term | parameters covered | not covered | not selected | size relative to the weights | kept by rounding |"
    yield "|---|---|---|---|---|---|"
    for index, (term, coverage) in enumerate(zip(plan.recipe.terms, final_coverage(plan, facts), strict=True)):
        change = term_change(facts.values(), index)
        counts = (coverage.covered, coverage.not_covered, coverage.not_selected)
        shares = " | ".join(f"{count / max(coverage.parameters, 1):.2%}" for count in counts)
        kept = "-" if change.kept is None else f"{change.kept:.1%}"
        yield f"| {term.name or term.delta} | {shares} | {change.relative_size:.2e} | {kept} |"


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
