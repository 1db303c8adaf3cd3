"""Check a finished merge or conversion against its manifest and its inputs, computing its tensors a second time.

The arithmetic here is written from the definition, in numpy, and shares no code with the merge: not the kernels, not
the loop. The recipe, the plan and the reading of headers are the merge's own. Two programs that make the same bytes in
two ways are the evidence; that is why this is the one place with a second implementation. A conversion, which adds
nothing, is held against what torch itself loads from the PyTorch files.

    d   = sum over the terms, in order, of scale * mask * (to - from)       float32, or float64 if an input is F64
    out = round( start + d )                                                 once, to the output's dtype
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resta.adapter import base_name, is_adapter
from resta.checkpoint import LowRank, Operand, identify
from resta.claims import (
    Finding,
    Manifest,
    check_claims,
    check_files,
    check_heads,
    check_manifest,
    entries,
    has_verdict,
    lay_out_again,
    not_proved,
    read_manifest,
)
from resta.conversion import plan_conversion
from resta.digests import hash_files
from resta.engine import UNIT, Checksum, default_workers
from resta.errors import CheckFailedError, RequestError
from resta.header import DTYPE_BITS, FLOAT_DTYPES, read_header
from resta.hub import Located, locate
from resta.manifest import TensorFacts, TermFacts
from resta.output import MARK
from resta.plan import Plan, Step, StepTerm, make_plan
from resta.stored import Stored, View
from resta.strict import did_you_mean

PIECE = 1 << 18  # elements at a time; also the stretch over which the L1 norms are summed in working precision
L1_LANES = 256  # element e of a stretch belongs to partial sum e % 256; the partial sums are added in float64
SAMPLED = 1 << 24  # of a larger tensor a sample recomputes this many elements: the first half and the last
# The merge's norms are float32 sums over 1024 entries, added in float64: at worst 2^-14 of a sum.
NORM_TOLERANCE = 1e-4
LOSS_TILE, LOSS_EVERY = 2048, 13  # of several terms, the loss of each is measured on every 13th 2048 entries
WORDS = 2**32
WEYL = (0x9E3779B9, 0xBB67AE85)  # Philox adds these to its key after every round

# Significand bits behind the point, exponent of the smallest normal number, smallest magnitude that is infinite.
HALVES = {"BF16": (7, -126, 2.0**128), "F16": (10, -14, 2.0**16)}
NUMPY_NAMES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]  # tensor or file, its bytes, which are now checked, of how many in all


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit checked and found, and in `not_proved` what it leaves open, each as the end of a sentence.

    `elements` and `tensors` count what was recomputed. `sha256` is of every file of the output, and of every input
    unless a sample was asked for, by "NAME/file"; they took `hashing_s` of one core.
    """

    out: Path
    files: int
    checksums: int
    checked_bytes: int
    inputs: int
    tensors: int
    elements: int
    sha256: dict[str, str]
    hashing_s: float = field(compare=False)
    findings: tuple[Finding, ...]
    not_proved: tuple[str, ...]

    def raise_if_any(self) -> None:
        """Raise CheckFailedError with every finding, if there are any."""
        if self.findings:
            count = f"{len(self.findings)} finding" + ("s" if len(self.findings) > 1 else "")
            lines = [f"{finding.what}: {finding.problem}" for finding in self.findings]
            raise CheckFailedError("\n  ".join([f"{self.out}: the audit failed with {count}:", *lines]))


def audit(
    out: str | Path,
    *,
    sample: int | None = None,
    moved: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Check a finished merge or conversion: files, each claim of the manifest, inputs, and tensors by recomputing them.

        resta.audit("restored", moved={"tuned": "tuned", "aligned": "aligned", "base": "base"}).raise_if_any()

    Args:
        out: the directory that a merge or a conversion made.
        sample: recompute this many tensors, chosen by a fixed rule, the largest among them; by default all.
        moved: where inputs lie, by model name: every local one, and those of the Hub that are not to be fetched.
        workers: threads.
        progress: called when a tensor or a file has been checked.

    Raises:
        RequestError: `out` is no finished merge, or inputs are not there; the message names all of them.
        CheckFailedError: its manifest cannot be read. What else is wrong is in the report.
    """
    out = Path(out)
    manifest = read_manifest(out)
    sources = _find_inputs(manifest, moved or {})
    findings = [*check_manifest(manifest), *_check_inputs(manifest, sources)]
    plan = None
    if findings:
        findings.append(
            Finding(what="tensors", problem="not recomputed, since the manifest or the inputs are not right")
        )
    else:
        plan = _make_plan(manifest, sources, findings)
    specs = _read_specs(out, manifest, findings)
    tasks = list(_tasks(out, manifest, specs, plan, sample, findings))
    outputs = _output_files(out, manifest)
    named = outputs | (_input_files(plan) if plan and sample is None else {})
    report, workers = _reporter(progress, named, tasks), workers or default_workers()
    digests, hashing_s = hash_files(named, workers, lambda path: report(named[path], path.stat().st_size))
    findings += _check_directory(out, manifest, plan, {outputs.get(p, p): d for p, d in digests.items()})
    elements = _check_tensors(tasks, workers, report, findings)
    return Audit(
        out=out,
        files=len({fact.file for fact in manifest.tensors.values()}),
        checksums=len(tasks),
        checked_bytes=sum(task.stored.spec.nbytes for task in tasks),
        inputs=len(sources),
        tensors=sum(task.step is not None for task in tasks),
        elements=elements,
        sha256={named[path]: digest for path, digest in digests.items()},
        hashing_s=hashing_s,
        findings=tuple(findings),
        not_proved=tuple(
            not_proved(manifest, moved=moved or {}, is_sample=sample is not None, has_verdict=has_verdict(out))
        ),
    )


def check_weights(out: str | Path) -> tuple[Finding, ...]:
    """Return where a merge's directory does not hold the weights that its manifest describes, by every checksum.

    Inputs are not needed, so nothing is recomputed: a manifest may be true to the weights and still not to the models
    that it names. Raises RequestError, CheckFailedError: `out` is no finished merge, or its manifest cannot be read.
    """
    out = Path(out)
    manifest = read_manifest(out)
    findings = list(check_manifest(manifest))
    specs = _read_specs(out, manifest, findings)
    tasks = list(_tasks(out, manifest, specs, None, None, findings))
    report, workers = _reporter(None, {}, tasks), default_workers()
    _check_tensors(tasks, workers, report, findings)
    return tuple(findings)


def choose_tensors(manifest: Manifest, sample: int | None) -> set[str]:
    """Choose what to recompute: all, or the largest tensor and others in an order drawn from the recipe's digest."""
    if sample is None:
        return set(manifest.tensors)

    def lot(name: str) -> bytes:
        return hashlib.sha256(f"{manifest.recipe_digest} {name}".encode()).digest()

    largest = max(manifest.tensors, key=lambda name: (math.prod(manifest.tensors[name].shape), name), default="")
    rest = sorted(manifest.tensors.keys() - {largest}, key=lot)
    return {largest, *rest[: max(sample - 1, 0)]}


def _find_inputs(manifest: Manifest, moved: Mapping[str, str]) -> dict[str, Located]:
    """Find every input: where the user says, or on the Hub at the commit that it was."""
    for name in moved:
        if name not in manifest.inputs:
            raise RequestError(f"--model {name}: is no model of this merge{did_you_mean(name, manifest.inputs)}")
    missing = [name for name, was in manifest.inputs.items() if name not in moved and not was.commit]
    if missing:
        flags = ", ".join(f"--model {name}=PATH (it was called {manifest.inputs[name].source!r})" for name in missing)
        raise RequestError(f"a manifest holds no paths of local inputs; say where they are: {flags}")
    pytorch = manifest.kind == "convert"
    return {
        name: locate(moved.get(name, f"{was.source.partition('@')[0]}@{was.commit}"), pytorch=pytorch)
        for name, was in manifest.inputs.items()
    }


def _check_inputs(manifest: Manifest, sources: Mapping[str, Located]) -> Iterator[Finding]:
    """Compare sizes, headers and, where the Hub names them, digests of all input files with the manifest."""
    for name, was in manifest.inputs.items():
        for file, recorded in was.files.items():
            path = sources[name].folder / file
            if file != path.name or not path.is_file():
                yield Finding(what=str(path), problem=f"the input file of {name} is not there any more")
                continue
            now = identify(path, sources[name])
            for key in ("bytes", "header_sha256", "sha256"):
                before, after = getattr(recorded, key), getattr(now, key)
                if before is not None and after is not None and before != after:
                    problem = f"the input of {name} has changed since the merge: {key} was {before}, is {after}"
                    yield Finding(what=str(path), problem=problem)
                    break


def _make_plan(manifest: Manifest, sources: Mapping[str, Located], findings: list[Finding]) -> Plan | None:
    """Plan the merge or the conversion again from where the inputs lie now."""
    models = {}
    for name, model in manifest.recipe.models.items():
        folder = sources[name].folder
        changes = {"source": str(folder)}
        if model.on and is_adapter(folder):
            # That the base is the right one was settled by the merge; its directory may be called otherwise now.
            changes["recorded_base"] = base_name(folder)
        models[name] = model.model_copy(update=changes)
    plan = make_plan if manifest.kind == "merge" else plan_conversion
    try:
        return plan(manifest.recipe.model_copy(update={"models": models}))
    except RequestError as error:
        findings.append(Finding(what="inputs", problem=f"the {manifest.kind} cannot be planned again: {error}"))
        return None


def _other_terms(manifest: Manifest, plan: Plan) -> str | None:
    """Return the name of a tensor in which other terms take part than the manifest says, or None."""
    steps = {step.name: [term.term for term in step.terms] for step in plan.steps}
    others = (
        name
        for name, fact in manifest.tensors.items()
        if name in steps and steps[name] != [part.term for part in fact.terms]
    )
    return next(others, None)


def _read_specs(out: Path, manifest: Manifest, findings: list[Finding]) -> dict[str, Stored]:
    """Read the output's headers: where each tensor of the manifest lies."""
    stored = {}
    for file in dict.fromkeys(fact.file for fact in manifest.tensors.values()):
        path = out / file
        if file != path.name or not path.is_file():
            findings.append(Finding(what=str(path), problem="the manifest names this file, but it is not there"))
            continue
        try:
            header = read_header(path)
        except RequestError as error:
            findings.append(Finding(what=str(path), problem=str(error).removeprefix(f"{path}: ")))
            continue
        for name, spec in header.items():
            if name in manifest.tensors and manifest.tensors[name].file == file:
                stored[name] = Stored(file=path, spec=spec)
            else:
                problem = f"holds the tensor {name!r}, which the manifest does not have there"
                findings.append(Finding(what=str(path), problem=problem))
        missing = [name for name, fact in manifest.tensors.items() if fact.file == file and name not in header]
        findings += [Finding(what=str(path), problem=f"lacks the tensor {name!r}") for name in missing]
    return stored


def _output_files(out: Path, manifest: Manifest) -> dict[Path, str]:
    """Return the files that the merge says it wrote, as far as they are there, and their names."""
    written = {MARK, *manifest.outputs, *(fact.file for fact in manifest.tensors.values())}
    return {out / name: name for name in entries(out) if name in written and (out / name).is_file()}


def _input_files(plan: Plan) -> dict[Path, str]:
    """Return the files of every input and what reports call them."""
    return {
        path: f"{name}/{path.name}"
        for name, weights in plan.weights.items()
        for path in weights.files
        if path.parent == weights.located.folder
    }


def _check_directory(
    out: Path, manifest: Manifest, plan: Plan | None, taken: Mapping[str | Path, str]
) -> Iterator[Finding]:
    """Compare everything but tensors with what the merge would write; `taken` as `lay_out_again` has it."""
    texts = None
    if plan:
        yield from check_heads(out, plan)
        if other := _other_terms(manifest, plan):
            yield Finding(what=f"tensor {other!r}", problem="the manifest has other terms of it than the recipe gives")
        elif texts := lay_out_again(manifest, plan, taken):
            yield from check_claims(manifest, json.loads(texts[MARK]))
        else:
            yield Finding(what=MARK, problem="holds norms that no merge records")
    yield from check_files(out, manifest, texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """One tensor of the output: what is checked, and against what. Without a step, only its checksum."""

    name: str
    stored: Stored
    fact: TensorFacts
    step: Step | None
    whole: bool


def _tasks(
    out: Path,
    manifest: Manifest,
    stored: Mapping[str, Stored],
    plan: Plan | None,
    sample: int | None,
    findings: list[Finding],
) -> Iterator[_Task]:
    """Compare what manifest, header and plan say of each tensor; yield those whose data can be checked."""
    steps = {step.name: step for step in plan.steps} if plan else {}
    chosen = choose_tensors(manifest, sample)
    if plan:
        for name in sorted(steps.keys() ^ manifest.tensors.keys()):
            problem = "is only in the recipe's result" if name in steps else "is not in the recipe's result"
            findings.append(Finding(what=f"tensor {name!r}", problem=f"{problem}, by the inputs' headers"))
    for name, fact in manifest.tensors.items():
        if name not in stored:
            continue
        spec, step = stored[name].spec, steps.get(name)
        said = [("manifest", (fact.dtype, tuple(fact.shape))), ("header", (spec.dtype, spec.shape))]
        if step:
            said.append(("plan", (step.slot.spec.dtype, step.slot.spec.shape)))
            if (fact.file, fact.action) != (step.slot.file, _action(step)):
                problem = (
                    f"the manifest says {fact.action} in {fact.file}, the plan {_action(step)} in {step.slot.file}"
                )
                findings.append(Finding(what=f"tensor {name!r}", problem=problem))
        if len({what for _, what in said}) > 1:
            problem = "; ".join(f"{who}: {dtype} {list(shape)}" for who, (dtype, shape) in said)
            findings.append(Finding(what=f"tensor {name!r}", problem=problem))
            continue
        yield _Task(
            name=name,
            stored=stored[name],
            fact=fact,
            step=step if name in chosen else None,
            whole=sample is None,
        )


def _action(step: Step) -> str:
    return "copied" if step.copies else "merged" if step.terms else "converted"


def _reporter(progress: Progress | None, files: Iterable[Path], tasks: Iterable[_Task]) -> Callable[[str, int], None]:
    """Return what is to be called with each file that was hashed and each tensor that was checked, and its bytes."""
    total = sum(path.stat().st_size for path in files) + sum(task.stored.spec.nbytes for task in tasks)
    return lambda name, nbytes: progress(name, nbytes, total) if progress else None


def _check_tensors(
    tasks: list[_Task], workers: int, report: Callable[[str, int], None], findings: list[Finding]
) -> int:
    """Check the data of every tensor; return how many elements were recomputed."""
    elements = 0
    try:
        with ThreadPoolExecutor(workers) as pool:
            for task, (problems, count) in zip(tasks, pool.map(_check_tensor, tasks), strict=True):
                what = f"tensor {task.name!r} in {task.stored.file.name}"
                findings += [Finding(what=what, problem=problem) for problem in problems]
                elements += count
                report(task.name, task.stored.spec.nbytes)
    finally:  # a file may be another one by the next audit
        _load.cache_clear()
        _loaded.cache_clear()
    return elements


def _check_tensor(task: _Task) -> tuple[list[str], int]:
    """Check one tensor's data; return what is wrong and how many elements were recomputed."""
    problems = []
    spec = task.stored.spec
    count, width = spec.count, DTYPE_BITS[spec.dtype] // 8
    recomputed = _Recomputed(task.step) if task.step else None
    digests = []
    for unit in range(0, max(count, 1), UNIT):
        checksum = Checksum()
        for first in range(unit, min(unit + UNIT, count), PIECE):
            n = min(PIECE, count - first)
            data = _read(task.stored, first * width, n * width)
            checksum.add(data)
            if recomputed and (task.whole or first < SAMPLED // 2 or first + n > count - SAMPLED // 2):
                recomputed.compare(first, n, data)
        digests.append(checksum.digest())
    found = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
    if found != task.fact.checksum:
        problems.append(f"its checksum is {found}, but the manifest has {task.fact.checksum}")
    if recomputed is None:
        return problems, 0
    if recomputed.differing:
        agrees = "; its checksum is right, so an input or the manifest has changed since" if not problems else ""
        problems.append(
            f"{recomputed.differing:,} of {recomputed.elements:,} elements are not what recipe and inputs give; "
            f"{recomputed.first_difference}{agrees}"
        )
    elif task.whole:
        problems += recomputed.check_facts(task.fact)
    return problems, recomputed.elements


@dataclass
class _Recomputed:
    """The recomputation of one tensor, piece by piece, and what came of comparing it."""

    step: Step
    elements: int = 0
    differing: int = 0
    first_difference: str = ""
    changed: int = 0
    squares: Array = field(default_factory=lambda: np.zeros(4))  # of start, intended, realised; intended * realised
    term_sums: Array = field(init=False)  # (terms, 4): for each D^2, D e, (D + e)^2 - D^2, entries kept
    measured: int = 0  # entries over which the second and the third are taken
    _scales: list[Any] = field(default_factory=list)
    _factors: dict[Stored | View, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._type: Any = np.float64 if self.step.double else np.float32
        for term in self.step.terms:
            self._scales.append(self._type(term.scale * self._rescale(term)))
        self.term_sums = np.zeros((len(self.step.terms), 4))

    def compare(self, first: int, count: int, data: Bytes) -> None:
        """Recompute elements first..first+count and compare them with the output's bytes."""
        self.elements += count
        start = self.step.operands[0]
        with np.errstate(all="ignore"):  # what may not be finite was decided by the merge; here only bytes count
            if self.step.copies:
                width = DTYPE_BITS[start.dtype] // 8
                expected = _copied(self.step, first * width, count * width)
            else:
                expected = self._recompute(first, count)
        self._note(first, data, expected)

    def check_facts(self, fact: TensorFacts) -> Iterator[str]:
        """Compare the sums that the merge recorded with those found here."""
        if self.step.allow_nonfinite:
            return
        if self.changed != fact.changed:
            yield f"{self.changed} entries differ from the start, but the manifest says {fact.changed}"
        slack = 1e-18 * math.sqrt(self.elements)  # squares of smaller numbers vanish in float32
        start, intended, realised, product = self.squares.tolist()
        yield from _compare_norm("start_norm", fact.start_norm, math.sqrt(start), slack)
        yield from _compare_norm("intended_norm", fact.intended_norm, math.sqrt(intended), slack)
        yield from _compare_norm("realised_norm", fact.realised_norm, math.sqrt(realised), slack)
        if not abs(fact.product - product) <= NORM_TOLERANCE * math.sqrt(intended * realised) + slack:
            yield f"product is {product:.6g}, but the manifest says {fact.product:.6g}"
        # A term's loss is a small difference of large numbers, of which the merge keeps float32.
        slack += 2.0**-22 * (math.sqrt(intended) + math.sqrt(realised))
        scale_up = self.step.merged_count / max(self.measured, 1)
        for part, (square, loss, growth, kept) in zip(fact.terms, self.term_sums.tolist(), strict=False):
            if part.selected != kept:
                yield f"term {part.term} keeps {kept:.0f} entries, but the manifest says {part.selected}"
            sums = (square, max(square + scale_up * growth, 0.0), square + scale_up * loss)
            yield from (f"term {part.term}: {problem}" for problem in _compare_term(part, sums, slack))

    def _recompute(self, first: int, count: int) -> Bytes:
        step, slot = self.step, self.step.slot.spec
        merged_count = max(0, min(count, step.merged_count - first))
        start = self._values(step.operands[0], first, count)
        delta = np.full(count, -0.0, self._type)  # the neutral element of addition
        parts = np.zeros((len(step.terms), count), self._type)
        for index, (term, scale) in enumerate(zip(step.terms, self._scales, strict=True)):
            to, from_ = (self._values(step.operands[row], first, merged_count) for row in (term.to, term.from_))
            part = scale * (to - from_)
            kept = (
                philox_words(term.key, first, merged_count) < term.keep
                if term.keep < WORDS
                else np.full(merged_count, True)
            )
            delta[:merged_count] = np.where(kept, delta[:merged_count] + part, delta[:merged_count])
            parts[index, :merged_count] = np.where(kept, part, 0)
            self.term_sums[index, 3] += np.count_nonzero(kept)
        words = None if step.rounding_key is None else philox_words(step.rounding_key, first, count)
        expected = round_values(start + delta, slot.dtype, words)
        # The change counts from the start as the output's dtype can hold it.
        origin = widen(round_values(start, slot.dtype, words), slot.dtype, np.float64)
        realised = widen(expected, slot.dtype, np.float64) - origin
        intended = delta.astype(np.float64)
        self.changed += int(np.count_nonzero(realised))
        self.squares += [origin @ origin, intended @ intended, realised @ realised, intended @ realised]
        self._measure_terms(first, merged_count, parts.astype(np.float64), (realised - intended)[:merged_count])
        return expected

    def _measure_terms(self, first: int, merged_count: int, parts: Array, loss: Array) -> None:
        """Add to the sums of each term; of several, what rounding lost is taken from every 13th tile."""
        tiles = np.arange(first, first + merged_count) // LOSS_TILE
        taken = np.full(merged_count, True) if len(parts) == 1 else tiles % LOSS_EVERY == 0
        self.measured += int(np.count_nonzero(taken))
        for index, part in enumerate(parts[:, :merged_count]):
            d, e = part[taken], loss[taken]
            self.term_sums[index, :3] += [part @ part, d @ e, e @ (2 * d + e)]

    def _note(self, first: int, data: Bytes, expected: Bytes) -> None:
        spec = self.step.slot.spec
        if np.array_equal(data, expected):
            return
        width = DTYPE_BITS[spec.dtype] // 8
        differs = (data.reshape(-1, width) != expected.reshape(-1, width)).any(axis=1)
        shown: list[Any] = [data.reshape(-1, width), expected.reshape(-1, width)]
        if spec.dtype in FLOAT_DTYPES:
            shown = [widen(part, spec.dtype, np.float64) for part in (data, expected)]
            if not self.step.copies:  # which NaN an addition gives is the processor's choice
                differs &= ~(np.isnan(shown[0]) & np.isnan(shown[1]))
        where = np.flatnonzero(differs)
        if where.size and not self.differing:
            at = int(where[0])
            self.first_difference = f"element {first + at} is {shown[0][at]} and should be {shown[1][at]}"
        self.differing += where.size

    def _rescale(self, term: StepTerm) -> float:
        """What a sparse term is multiplied by besides its scale: 1 / density, or the ratio of the L1 norms."""
        if term.rescale != "l1_norm" or term.density == 1:
            return 1 / term.density
        sums = [0.0, 0.0]
        for first in range(0, self.step.merged_count, PIECE):
            count = min(PIECE, self.step.merged_count - first)
            to, from_ = (self._values(self.step.operands[row], first, count) for row in (term.to, term.from_))
            whole = np.abs(to - from_)
            kept = np.where(philox_words(term.key, first, count) < term.keep, whole, whole * 0)
            for index, sizes in enumerate((whole, kept)):
                padded = np.append(sizes, np.zeros(-count % L1_LANES, self._type))
                lanes = np.zeros(L1_LANES, self._type)
                for row in padded.reshape(-1, L1_LANES):
                    lanes += row
                for lane in lanes.tolist():
                    sums[index] += lane
        return sums[0] / sums[1] if sums[1] > 0 else 1.0

    def _values(self, operand: Operand, first: int, count: int) -> Array:
        """Elements of one model's tensor in the working dtype, low-rank term included."""
        width = DTYPE_BITS[operand.dtype] // 8
        values = widen(_read(operand.stored, first * width, count * width), operand.dtype, self._type)
        for low_rank in operand.low_ranks:
            begin, end = max(first, low_rank.first), min(first + count, low_rank.end)
            if begin < end:
                values[begin - first : end - first] += self._product(low_rank, begin - low_rank.first, end - begin)
        return values

    def _product(self, low_rank: LowRank, first: int, count: int) -> Array:
        left, right = self._factor(low_rank, "left"), self._factor(low_rank, "right")
        rows = range(first // right.shape[1], -(-(first + count) // right.shape[1]))
        product = np.zeros((len(rows), right.shape[1]), self._type)
        for k in range(right.shape[0]):  # over the rank in order, each product rounded, then added
            product += np.multiply.outer(left[rows.start : rows.stop, k], right[k])
        begin = first - rows.start * right.shape[1]
        scaled: Array = self._type(low_rank.scaling) * product.ravel()[begin : begin + count]
        return scaled

    def _factor(self, low_rank: LowRank, side: str) -> Array:
        stored: Stored | View | None = getattr(low_rank, side)
        if stored is None:
            return np.ones((1, 1), self._type)
        if stored not in self._factors:
            values = widen(_read(stored, 0, stored.spec.nbytes), stored.spec.dtype, self._type)
            matrix = values.reshape(stored.spec.shape if len(stored.spec.shape) == 2 else (-1, 1))
            self._factors[stored] = matrix.T if low_rank.transposed else matrix
        return self._factors[stored]


def _compare_term(said: TermFacts, sums: tuple[float, float, float], slack: float) -> Iterator[str]:
    """Compare a term's facts with D^2, (D + e)^2 and D (D + e) found here; where e cancels D, D^2 sets the scale."""
    intended, realised, product = sums
    yield from _compare_norm("intended_norm", said.intended_norm, math.sqrt(intended), slack)
    allowed = NORM_TOLERANCE * (intended + realised) + slack * (slack + math.sqrt(intended) + math.sqrt(realised))
    if not abs(said.realised_norm * said.realised_norm - realised) <= allowed:
        yield f"realised_norm is {math.sqrt(realised):.6g}, but the manifest says {said.realised_norm:.6g}"
    if not abs(said.product - product) <= allowed:
        yield f"product is {product:.6g}, but the manifest says {said.product:.6g}"


def _compare_norm(key: str, said: float, found: float, slack: float) -> Iterator[str]:
    if not abs(said - found) <= NORM_TOLERANCE * found + slack:
        yield f"{key} is {found:.6g}, but the manifest says {said:.6g}"


def _read(stored: Stored | View, first_byte: int, nbytes: int) -> Bytes:
    if isinstance(stored, View):
        return _assemble(stored)[first_byte : first_byte + nbytes]
    data = np.fromfile(stored.file, np.uint8, count=nbytes, offset=stored.spec.start + first_byte)
    if data.size != nbytes:
        raise CheckFailedError(f"{stored.file}: ends within a tensor; it was cut while it was read")
    return data


def _assemble(view: View) -> Bytes:
    """Return all bytes of a view, element by element as its strides are defined."""
    width = DTYPE_BITS[view.spec.dtype] // 8
    data = np.empty((view.spec.count, width), np.uint8)
    for piece in view.pieces:
        flat = _read(piece.stored, 0, piece.stored.spec.nbytes).reshape(-1, width)
        row, column = np.indices((piece.rows, piece.columns)).reshape(2, -1)
        into, from_ = (side.first + row * side.down + column * side.across for side in (piece.target, piece.source))
        data[into] = flat[from_]
    return data.ravel()


def _copied(step: Step, first_byte: int, nbytes: int) -> Bytes:
    """Return bytes of the tensor that a step copies: those in a file of safetensors, or what torch makes of another."""
    stored = step.operands[0].stored
    if isinstance(stored, View) or stored.file.suffix == ".safetensors":
        return _read(stored, first_byte, nbytes)
    return _loaded(stored.file, step.name)[first_byte : first_byte + nbytes]


@lru_cache(maxsize=8)
def _loaded(file: Path, name: str) -> Bytes:
    """Return a tensor's bytes in the order of its indices, as torch loads it from its own file, running nothing."""
    import torch  # an audit of a merge does without

    data: Bytes = _load(file)[name].detach().contiguous().flatten().view(torch.uint8).numpy()
    return data


@lru_cache(maxsize=2)
def _load(file: Path) -> Any:
    """Return a PyTorch file's tensors by name, mapped into memory. The plan has refused a file that calls anything."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds
        raise CheckFailedError(f"{file}: torch does not load it: {str(error).splitlines()[0]}") from error


def philox_words(key: int, first: int, count: int) -> NDArray[np.uint32]:
    """Return words first..first+count of a key's stream: word e % 4 of Philox4x32-10 at the counter e // 4.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.arange(first // 4, -(-(first + count) // 4), dtype=np.uint64)
    x = [counter & low, counter >> half, np.zeros_like(counter), np.zeros_like(counter)]
    for turn in range(10):
        keys = [
            np.uint64((word + turn * weyl) % WORDS)
            for word, weyl in zip((key % WORDS, key // WORDS), WEYL, strict=True)
        ]
        product0, product1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(product1 >> half) ^ x[1] ^ keys[0], product1 & low, (product0 >> half) ^ x[3] ^ keys[1], product0 & low]
    words = np.stack(x, axis=1).astype(np.uint32).ravel()
    return words[first % 4 : first % 4 + count]


def widen(data: Bytes, dtype: str, to: Any) -> Array:
    """Return stored numbers as float32 or float64."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(to)
    return data.view(NUMPY_NAMES[dtype]).astype(to)


def round_values(values: Array, dtype: str, words: NDArray[np.uint32] | None) -> Bytes:
    """Round once to a dtype, to nearest even, or by random words: up if the rest and the word reach a whole step.

    Found on the grid of numbers that the dtype has, in float64, where all of it is exact.
    """
    if dtype not in HALVES:
        return values.astype(NUMPY_NAMES[dtype]).view(np.uint8)
    bits, lowest, infinite = HALVES[dtype]
    exact = (values if words is None else narrow_to_odd(values)).astype(np.float64)
    exponent = np.maximum(np.frexp(exact)[1] - 1, lowest)
    step = np.ldexp(1.0, exponent - bits)
    if words is None:
        whole = np.rint(np.abs(exact) / step)
    else:
        spare = 23 - bits  # the bits of a float32 that the dtype does not hold
        share = (words & np.uint32(2**spare - 1)) / 2.0**spare
        total = np.abs(exact) / step + share
        # Below float16's normal numbers there are more bits than that; the merge adds them in float32.
        whole = np.floor(
            np.where(np.abs(exact) < 2.0**lowest, total.astype(np.float32), total) if bits == 10 else total
        )
    rounded = np.copysign(np.where(whole * step >= infinite, np.inf, whole * step), exact)
    rounded = np.where(np.isfinite(exact), rounded, exact)
    if dtype == "F16":
        return rounded.astype("<f2").view(np.uint8)
    return (rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8)


def narrow_to_odd(values: Array) -> NDArray[np.float32]:
    """Narrow to float32 so that a second rounding is as if it were the only one: cut; set the last bit if inexact."""
    single = values.astype(np.float32)
    inexact = (single != values) & np.isfinite(single)
    beyond = inexact & (np.abs(single.astype(np.float64)) > np.abs(values))
    bits: NDArray[np.uint32] = (single.view(np.uint32) - beyond) | inexact
    return bits.view(np.float32)
