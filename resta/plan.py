"""Recipe and headers in, every step out: what is read, computed and written, or every reason why not.

Once a plan exists nothing can be wrong with the request. Planning reads headers and small files; of tensor data only
integer and boolean tensors, which all models must agree on.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from resta.auxiliary import AuxiliaryFile, plan_auxiliary_files
from resta.checkpoint import LowRank, Operand, Weights
from resta.compatibility import differences
from resta.coverage import Coverage, Ledger, readable_share
from resta.errors import RequestError
from resta.header import FLOAT_DTYPES, Spec, count_bytes, lay_out
from resta.naming import extra_advice, missing_advice
from resta.opened import Opened, open_models
from resta.page import printable
from resta.recipe import Recipe, Rule
from resta.stored import Stored, View
from resta.version import MERGE_CODE, VERSION

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Settings that change what a tensor of the same shape means.
SAME_IN_ALL_CONFIGS = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
# Names under which quantisation libraries keep packed weights and their scales.
QUANTISED_NAMES = (
    *(".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", "_blocks", "_scales"),
)
KEEP_ALL = 2**32
FLOAT32_MAX = float(np.finfo(np.float32).max)

_End = tuple[str, Operand]  # one side of a term: whose tensor, and the tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTerm:
    """One term of one tensor: rows of the step's operands, and how the difference is masked and scaled.

    `term` is its place among the recipe's terms. `factor` is what DARE's rescaling multiplies the scale by: 1 / density
    (arXiv 2311.03099, eq. 3), unless a pass over the tensor settles it (`engine.settle`).
    """

    term: int
    to: int
    from_: int
    scale: float
    density: float = 1.0
    rescale: str = "inverse_density"
    factor: float = 1.0
    key: int = 0

    @property
    def keep(self) -> int:
        """An entry stays if its 32-bit word is below this, so that a lower density keeps a subset."""
        return round(self.density * KEEP_ALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a tensor goes: file name and header entry."""

    file: str
    spec: Spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Everything that decides one output tensor. Without terms it is start's tensor, converted or copied.

    Operand 0 is the start; `owners` names each operand's model. Terms act on the first `merged_count` elements.
    """

    name: str
    operands: tuple[Operand, ...]
    owners: tuple[str, ...]
    terms: tuple[StepTerm, ...]
    slot: Slot
    merged_count: int
    rounding_key: int | None
    allow_nonfinite: bool

    @property
    def copies(self) -> bool:
        """Whether the output bytes are the start's bytes."""
        start = self.operands[0]
        return not self.terms and not start.low_ranks and start.dtype == self.slot.spec.dtype

    @property
    def double(self) -> bool:
        """Whether the arithmetic is done in float64: when an input is F64, be it a factor."""
        return any(stored.spec.dtype == "F64" for operand in self.operands for stored in stored_parts(operand))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that can only fail for reasons outside the request."""

    recipe: Recipe
    weights: Mapping[str, Weights]
    steps: tuple[Step, ...]
    coverage: tuple[Coverage, ...]  # of each term of the recipe
    headers: Mapping[str, bytes]
    auxiliary_files: tuple[AuxiliaryFile, ...]
    left_out: tuple[str, ...]

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that the merge reads, low-rank factors included."""
        return sum(stored_bytes(operand) for step in self.steps for operand in step.operands)

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files and copied auxiliary files."""
        headers = sum(len(head) for head in self.headers.values())
        tensors = sum(step.slot.spec.nbytes for step in self.steps)
        return headers + tensors + sum(len(file.content) for file in self.auxiliary_files)

    @property
    def files(self) -> dict[Path, str]:
        """Every input weight file, and the name of a model that it belongs to."""
        return {path: name for name, weights in self.weights.items() for path in weights.files}

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the output: what a partial output must match to be resumed."""
        inputs = {
            str(path): [identity.bytes, identity.mtime_ns, identity.header_sha256, identity.sha256]
            for weights in self.weights.values()
            for path, identity in weights.files.items()
        }
        sides = {file.name: hashlib.sha256(file.content).hexdigest() for file in self.auxiliary_files}
        configs = {name: weights.config for name, weights in self.weights.items()}
        added = {
            step.name: [[row, *_low_rank_facts(operand.low_ranks)] for row, operand in enumerate(step.operands)]
            for step in self.steps
            if any(operand.low_ranks for operand in step.operands)
        }
        code = [VERSION, MERGE_CODE]
        text = json.dumps([code, self.recipe.digest, inputs, configs, added, sides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _low_rank_facts(low_ranks: tuple[LowRank, ...]) -> list[Any]:
    """What an adapter's config, and not its weights, decides about a term."""
    return [fact for part in low_ranks for fact in (part.scaling, part.transposed)]


def stored_parts(operand: Operand) -> list[Stored | View]:
    """The stored tensors behind an operand: its own, and the factors on top of it."""
    factors = (factor for part in operand.low_ranks for factor in (part.left, part.right))
    return [operand.stored, *(factor for factor in factors if factor)]


def stored_bytes(operand: Operand) -> int:
    """Bytes on disk behind an operand."""
    return sum(part.spec.nbytes for part in stored_parts(operand))


def make_plan(recipe: Recipe, *, weights: Opened | None = None) -> Plan:
    """Turn a recipe into steps.

    Args:
        recipe: what is asked for.
        weights: its models and perhaps more, opened already; for whoever makes several plans of the same models.

    Raises RequestError: a model cannot be read; or with every reason why the models, the rules and the recipe do not
    fit together.
    """
    recipe.check_terms()
    opened = weights or open_models(recipe.models)
    models = opened.of(recipe.models)
    problems = _Problems()
    _check_models(recipe, models, opened, problems)
    _check_terms(recipe, models, problems)
    matcher = _Matcher(recipe.rules)
    ledgers = [Ledger() for _ in recipe.terms]
    start = models[recipe.start]
    drafts = [
        _draft_step(recipe, name, operand, _Draft(models, start, matcher(name), problems, opened, ledgers))
        for name, operand in start.tensors.items()
    ]
    _check_extras(recipe, models, matcher, problems)
    if not opened.has_config(recipe.files_from):
        problems.add(recipe.files_from, "has no config.json; name a model that has one in output.files_from")
    _check_donor(recipe, models, drafts, matcher, problems)
    for rule in matcher.unmatched():
        problems.add("rules", f"no tensor is decided by the rule {', '.join(rule.globs)!r}; remove or correct it")
    if recipe.output.rounding == "stochastic" and not any(step.rounding_key is not None for step in drafts):
        problems.add("rounding", "stochastic rounding needs bfloat16 or float16 output; there is none")
    problems.raise_if_any()
    coverage = tuple(ledger.close() for ledger in ledgers)
    _check_coverage(recipe, coverage, problems)
    _check_zero(recipe, models, opened, drafts, coverage, problems)
    problems.raise_if_any()
    headers, steps = place(drafts, recipe.output.shard_size)
    found, left_out = opened.auxiliary_files(recipe.files_from)
    dtypes = [(step.slot.spec.dtype, step.slot.spec.nbytes) for step in steps]
    return Plan(
        recipe=recipe,
        weights=models,
        steps=steps,
        coverage=coverage,
        headers=headers,
        auxiliary_files=plan_auxiliary_files(found, dtypes, is_untied=models[recipe.files_from].is_untied),
        left_out=left_out,
    )


@dataclass
class _Problems:
    """Reasons against a plan, grouped so that a thousand tensors with one cause make one message."""

    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, what: str, advice: str, tensor: str | None = None) -> None:
        self.found.setdefault((what, advice), []).extend([tensor] if tensor else [])

    def raise_if_any(self) -> None:
        lines = []
        for (what, advice), tensors in self.found.items():
            more = f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""
            shown = ", ".join(printable(name) for name in tensors[:4]) + more
            lines.append(f"{what}: {shown}. {advice}" if tensors else f"{what}: {advice}")
        if lines:
            count = f"{len(lines)} reasons:" if len(lines) > 1 else ""
            raise RequestError("\n  ".join(["the merge is refused; nothing was written. " + count, *lines]))


class _Matcher:
    """The first rule that matches a tensor's name; remembers which rules ever decided one."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)
        self._used: set[int] = set()

    def __call__(self, name: str) -> Rule | None:
        for index, rule in enumerate(self._rules):
            if any(fnmatch.fnmatchcase(name, glob) for glob in rule.globs):
                self._used.add(index)
                return rule
        return None

    def unmatched(self) -> list[Rule]:
        """Rules that decide nothing, but for a last one for all the rest, of which there may be none."""
        rules = self._rules[:-1] if self._rules and "*" in self._rules[-1].globs else self._rules
        return [rule for index, rule in enumerate(rules) if index not in self._used]


def _check_models(recipe: Recipe, weights: Mapping[str, Weights], opened: Opened, problems: _Problems) -> None:
    start = weights[recipe.start]
    for name, model in weights.items():
        if model.config.get("quantization_config"):
            problems.add(name, "is quantised; dequantise it, or merge the originals and quantise the result")
        for key in SAME_IN_ALL_CONFIGS:
            mine, theirs = start.config.get(key), model.config.get(key)
            if mine is not None and theirs is not None and mine != theirs:
                problems.add(
                    name,
                    f"config.json has {key} {theirs!r} but {recipe.start} has {mine!r}; these are different models",
                )
        for setting, mine, theirs in differences(start.config, model.config):
            if setting not in recipe.allow_config and start.config and model.config:
                problems.add(
                    name,
                    f"config.json has {setting} {theirs!r} but {recipe.start} has {mine!r}, so that the same weights "
                    "mean something else there; merge models that agree, or if it is known to do no harm, say "
                    f"allow_config: [{setting}] in the recipe (--allow-config {setting})",
                )
        if recipe.tokenizers == "same" and model is not start:
            conflict = opened.tokenizer_conflict(recipe.start, name)
            if conflict:
                problems.add(
                    name,
                    f"its tokenizer differs from that of {recipe.start}: {conflict}. Embedding rows would be mixed "
                    "up; if the difference does no harm, say `tokenizers: ignore`",
                )
        for tensor, operand in model.tensors.items():
            if operand.dtype.startswith(("F8_", "F6_", "F4")) or tensor.endswith(QUANTISED_NAMES):
                problems.add(
                    f"{name}: quantised tensors",
                    "Dequantise the model, or merge the originals and quantise the result",
                    tensor,
                )
            elif operand.dtype == "C64":
                problems.add(f"{name}: complex tensors", "Only real floating point can be merged", tensor)


def _check_terms(recipe: Recipe, weights: Mapping[str, Weights], problems: _Problems) -> None:
    """A term whose two models are the same files is zero: a slip that would restore nothing and say nothing."""
    for term in recipe.terms:
        to, from_ = term.ends
        if term.scale != 0 and weights[to].tensors == weights[from_].tensors:
            problems.add(term.delta, "both are the same files, so that the term is zero; name two different models")


@dataclass
class _Draft:
    """What deciding one tensor needs to look at."""

    weights: Mapping[str, Weights]
    start: Weights
    rule: Rule | None
    problems: _Problems
    opened: Opened
    ledgers: list[Ledger]


def _draft_step(recipe: Recipe, name: str, start: Operand, draft: _Draft) -> Step:
    rule, floating = draft.rule, start.dtype in FLOAT_DTYPES
    operands, owners = [start], [recipe.start]
    ends = {} if rule and rule.keep else _find_ends(recipe, name, draft)
    terms, reached = [], {}
    for index, (to, from_) in ends.items() if floating else ():
        scale = recipe.terms[index].scale * _factor(rule, recipe.terms[index].name)
        _check_scale(recipe, index, name, scale, draft)
        fits = [scale != 0 and _fits(name, start, end, draft) for end in (to, from_)]  # both are reported
        if not all(fits):
            continue
        if to[1] == from_[1]:  # an adapter does not touch this tensor: the difference is exactly zero
            reached[index] = _count_shared([start, to[1]])
        else:
            rows = [_row(operands, owners, end) for end in (to, from_)]
            terms.append(_make_term(recipe, index, name, scale, rows))
    merged_count = _count_shared(operands)
    if floating:
        reached |= dict.fromkeys((term.term for term in terms), merged_count)
        _note_coverage(recipe, name, start.stored.spec.count, reached, draft)
    else:
        for end in {model: operand for pair in ends.values() for model, operand in pair}.items():
            _check_equal(name, start, end, draft)
    dtype = DTYPES.get(recipe.output.dtype, start.dtype) if floating else start.dtype
    rounds = recipe.output.rounding == "stochastic" and dtype in ("BF16", "F16")
    return Step(
        name=name,
        operands=tuple(operands),
        owners=tuple(owners),
        terms=tuple(terms),
        slot=Slot(file="", spec=Spec(dtype=dtype, shape=start.shape, start=0, nbytes=0)),
        merged_count=merged_count,
        rounding_key=derive_key(recipe.seed, "rounding", 0, name) if rounds else None,
        allow_nonfinite=bool(rule and rule.nonfinite),
    )


def _count_shared(operands: list[Operand]) -> int:
    """Return how many elements the rows hold that all operands have; the first is the start."""
    count, shape = operands[0].stored.spec.count, operands[0].shape
    if not shape or not shape[0]:
        return count
    return min(operand.shape[0] for operand in operands if operand.shape) * (count // shape[0])


def _note_coverage(recipe: Recipe, name: str, count: int, reached: Mapping[int, int], draft: _Draft) -> None:
    rule = draft.rule
    for index, (term, ledger) in enumerate(zip(recipe.terms, draft.ledgers, strict=True)):
        if term.scale == 0:
            ledger.note_off(count)
            continue
        if rule and rule.keep:
            reason = "rules keep the tensors of the start"
        elif _factor(rule, term.name) == 0:
            reason = "rules scale it by 0"
        elif index in reached:
            reason = "only the start has those rows"
        else:
            reason = "its models lack the tensors, and rules skip it there"
        ledger.note(name, count, reached.get(index, 0), reason)


def _check_scale(recipe: Recipe, index: int, name: str, scale: float, draft: _Draft) -> None:
    term = recipe.terms[index]
    if abs(scale) / (term.sparsify.density if term.sparsify else 1.0) > FLOAT32_MAX:
        draft.problems.add(
            f"{term.delta}: its scale of {scale:g} is more than float32 holds, in which the arithmetic is",
            "Choose a smaller scale or scale_by",
            name,
        )


def derive_key(seed: int, purpose: str, term: int, tensor: str) -> int:
    """Return the 64-bit Philox key of one tensor's random stream."""
    text = json.dumps([seed, purpose, term, tensor])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _make_term(recipe: Recipe, index: int, name: str, scale: float, rows: list[int]) -> StepTerm:
    sparsify = recipe.terms[index].sparsify
    if sparsify is None or sparsify.density == 1:
        return StepTerm(term=index, to=rows[0], from_=rows[1], scale=scale)
    return StepTerm(
        term=index,
        to=rows[0],
        from_=rows[1],
        scale=scale,
        density=sparsify.density,
        rescale=sparsify.rescale,
        factor=1 / sparsify.density,
        key=derive_key(recipe.seed, sparsify.method, index, name),
    )


def _factor(rule: Rule | None, term: str | None) -> float:
    if rule is None or rule.scale_by is None:
        return 1.0
    if isinstance(rule.scale_by, dict):
        return rule.scale_by.get(term or "", 1.0)
    return rule.scale_by


def _row(operands: list[Operand], owners: list[str], end: _End) -> int:
    """Return the operand's row, adding it if it is new, so that a model used twice is read once."""
    model, operand = end
    if operand not in operands:
        operands.append(operand)
        owners.append(model)
    return operands.index(operand)


def _find_ends(recipe: Recipe, name: str, draft: _Draft) -> dict[int, tuple[_End, _End]]:
    """Find `to` and `from` of every term for one tensor; terms that a rule leaves out are not in the result."""
    found = {}
    for index, term in enumerate(recipe.terms):
        pair = [(model, _find(name, model, draft)) for model in term.ends]
        if all(operand is not None for _, operand in pair):
            found[index] = (pair[0], pair[1])
    return found  # type: ignore[return-value]  # no None is left


def _find(name: str, model: str, draft: _Draft) -> Operand | None:
    tensors, rule = draft.weights[model].tensors, draft.rule
    if name in tensors:
        return tensors[name]
    if rule and rule.stand_in:
        if rule.stand_in not in tensors:
            draft.problems.add(f"{model} lacks", f"Its stand_in {rule.stand_in!r} is not there either", name)
        return tensors.get(rule.stand_in)
    if not (rule and rule.missing):
        draft.problems.add(
            f"{model} lacks tensors of the start",
            missing_advice(name, draft.start, draft.weights[model]),
            name,
        )
    return None


def _fits(name: str, start: Operand, end: _End, draft: _Draft) -> bool:
    model, operand = end
    if operand.dtype not in FLOAT_DTYPES:
        draft.problems.add(
            f"{model} has {operand.dtype} where the start has {start.dtype}",
            "To copy the start's tensor, add a rule with match and keep: true",
            name,
        )
        return False
    if operand.shape == start.shape:
        return True
    rows_differ = len(operand.shape) == len(start.shape) > 0 and operand.shape[1:] == start.shape[1:]
    if rows_differ and draft.rule and draft.rule.rows:
        return True
    advice = "These are different models; to copy the start's tensor, add a rule with match and keep: true"
    if rows_differ:
        advice = (
            "If only the vocabulary was extended, add a rule with match and rows: shared, "
            "which keeps the start's extra rows as they are"
        )
    draft.problems.add(f"{model} has shape {list(operand.shape)} where the start has {list(start.shape)}", advice, name)
    return False


def _check_equal(name: str, start: Operand, end: _End, draft: _Draft) -> None:
    model, operand = end
    alike = operand.dtype == start.dtype and operand.shape == start.shape
    if not (alike and draft.opened.same_bytes(start.stored, operand.stored)):
        draft.problems.add(
            f"{model} differs from the start in {start.dtype} tensors, which cannot be interpolated",
            "To copy the start's tensor, add a rule with match and keep: true",
            name,
        )


def _check_coverage(recipe: Recipe, coverage: tuple[Coverage, ...], problems: _Problems) -> None:
    for term, reached in zip(recipe.terms, coverage, strict=True):
        if reached.share < recipe.min_coverage:
            share = math.floor(reached.share * 100) / 100
            problems.add(
                f"{term.label} ({term.delta}) would reach {readable_share(reached.share)} of {reached.parameters:,} "
                f"parameters, less than {readable_share(recipe.min_coverage)}",
                f"the rest would stay as it is. Left out: {'; '.join(map(str, reached.left_out))}. Mend the rules or "
                f"the models; or if it is meant, say min_coverage: {share:g} in the recipe (--min-coverage {share:g})",
            )


def _check_zero(
    recipe: Recipe,
    weights: Mapping[str, Weights],
    opened: Opened,
    drafts: list[Step],
    coverage: tuple[Coverage, ...],
    problems: _Problems,
) -> None:
    """A term that changes nothing restores nothing; what only the arithmetic can show, the merge finds at its end."""
    for index, (term, reached) in enumerate(zip(recipe.terms, coverage, strict=True)):
        pairs = [
            (step.operands[part.to], step.operands[part.from_])
            for step in drafts
            for part in step.terms
            if part.term == index
        ]
        to, from_ = term.ends
        if term.scale != 0 and not pairs:
            why = "; ".join(map(str, reached.left_out)) or f"{to} and {from_} are the same in every tensor"
            problems.add(f"{term.label} ({term.delta})", f"changes nothing: {why}")
        elif term.scale != 0 and opened.same_content(pairs):
            problems.add(
                f"{term.label} ({term.delta})",
                f"changes nothing: {to} ({weights[to].located.source}) and {from_} ({weights[from_].located.source}) "
                "hold the same bytes in every tensor; one is a copy of the other. Name two models that differ",
            )


def _check_extras(recipe: Recipe, weights: Mapping[str, Weights], matcher: _Matcher, problems: _Problems) -> None:
    start = weights[recipe.start]
    for model in dict.fromkeys(end for term in recipe.terms for end in term.ends):
        for name in (name for name in weights[model].tensors if name not in start.tensors):
            rule = matcher(name)
            if not (rule and rule.extra):
                problems.add(
                    f"{model} has tensors that the start {recipe.start!r} lacks",
                    extra_advice(name, start, weights[model]),
                    name,
                )


def _check_donor(
    recipe: Recipe, weights: Mapping[str, Weights], drafts: list[Step], matcher: _Matcher, problems: _Problems
) -> None:
    """The result's config comes from one model; its tensors must be what that config promises."""
    donor = weights[recipe.files_from]
    if donor is weights[recipe.start]:
        return
    shapes = {step.name: step.slot.spec.shape for step in drafts}
    about = f"the result would have the config of {recipe.files_from!r} but"
    for name, operand in donor.tensors.items():
        rule = matcher(name)
        if name not in shapes and not (rule and rule.extra):
            problems.add(f"{about} lack its tensors", "Start from that model, or choose files_from", name)
        elif name in shapes and shapes[name] != operand.shape:
            problems.add(f"{about} other shapes", "Start from that model, or choose files_from", name)
    for name in (name for name in shapes if name not in donor.tensors):
        rule = matcher(name)
        if not (rule and (rule.missing or rule.stand_in or rule.keep)):
            problems.add(f"{about} tensors that it lacks", "Start from that model, or choose files_from", name)


def place(drafts: Iterable[Step], shard_size: int) -> tuple[dict[str, bytes], tuple[Step, ...]]:
    """Fill files in the start's order, up to `shard_size` tensor bytes each, and give every tensor its slot."""
    shards: list[list[Step]] = [[]]
    used = 0
    for step in drafts:
        spec = step.slot.spec
        nbytes = count_bytes(spec.dtype, spec.shape)
        if shards[-1] and used + nbytes > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(step)
        used += nbytes
    headers, placed = {}, []
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        headers[file], slots = lay_out((step.name, step.slot.spec.dtype, step.slot.spec.shape) for step in shard)
        placed += [replace(step, slot=Slot(file=file, spec=slots[step.name])) for step in shard]
    return headers, tuple(placed)
