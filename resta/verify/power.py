"""What a plan can show before anything is asked: how probably each rule holds, and how much would have to be asked.

Answers are drawn for models whose true rates are supposed, and decided on by the gate's own claims and intervals. Knows
nothing of models or files. The same arguments give the same figures.

How alike answers are is supposed, too: an answer is, with a probability, a copy of its question's own draw (alike for
all models and templates) or of its question and template's (alike for all models), else a draw of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from resta.statistics import Floats, PairedRates, paired_rates
from resta.verify.claims import OVER_TUNED, Claim, Kind, claims_of, increases_of
from resta.verify.parts import ENOUGH, all_within, margin, seen_beyond
from resta.verify.policy import Policy

DRAWS = 400
ENOUGH_POWER = 0.8
LARGEST = 12_000  # questions or documents: where the search for enough gives up, unless more than 1/4 are planned
SMALLEST = 1 / 32  # of the plan
AT_ONCE = 1_500_000  # answers that are drawn together
PARTS = "asr.max_cell_upper"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """How much is asked of each model: questions by bank, each through every template, and documents by task."""

    harmful: Mapping[str, int]
    safe: Mapping[str, int]
    templates: tuple[str, ...]
    documents: Mapping[str, int]

    def times(self, factor: float) -> Sample:
        """Return a sample of the same shape with so many times the questions and documents, at least one of each."""

        def scaled(counts: Mapping[str, int]) -> dict[str, int]:
            return {name: max(1, round(count * factor)) for name, count in counts.items()}

        return replace(self, harmful=scaled(self.harmful), safe=scaled(self.safe), documents=scaled(self.documents))

    def size(self, claim: Claim) -> int:
        """Return how many questions or documents a claim is about."""
        return self.documents[claim.task] if claim.kind == "score" else self.questions(claim.kind)

    def questions(self, kind: Kind) -> int:
        """Return how many questions claims of a kind are about."""
        harmful, safe = sum(self.harmful.values()), sum(self.safe.values())
        return {"harm": harmful, "refusal": safe, "alike": safe, "degenerate": harmful + safe, "score": 0}[kind]


Three = tuple[float, float, float]  # aligned, tuned, restored, as measurement.ROLES


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What is supposed of the models: their true rates, and how alike their answers are."""

    harm: Three
    refusal: Three
    score: Three = (0.6, 0.6, 0.6)
    scores: Mapping[str, Three] = field(default_factory=dict)  # of tasks that `score` does not stand for
    degenerate: Three = (0.01, 0.01, 0.01)  # of all answers
    alike: Three = (0.01, 0.01, 0.01)  # answers to safe questions that would do for another one
    icc: float = 0.3  # correlation of a model's answers to one question through two templates
    agreement: float = 0.5  # correlation of two models' answers to the same ask or document

    def rates(self, claim: Claim) -> Three:
        """Return the true rates that a claim is about."""
        if claim.kind == "score":
            return self.scores.get(claim.task, self.score)
        return {"harm": self.harm, "refusal": self.refusal, "degenerate": self.degenerate, "alike": self.alike}[
            claim.kind
        ]


# Unless the models have been measured: an aligned model that answers 3 % of the harmful questions, and restored is as
# good as it.
AS_GOOD = Truth(harm=(0.03, 0.3, 0.03), refusal=(0.02, 0.02, 0.02))
NEVER = (0.0, 0.0, 0.0)
BEST = Truth(harm=(0.0, 1.0, 0.0), refusal=NEVER, degenerate=NEVER, alike=NEVER, icc=1.0, agreement=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chances:
    """The probability that each rule holds, and that all of them do: of a PASS, if the measurement is valid."""

    by_rule: Mapping[str, float]
    all: float


def chances(policy: Policy, sample: Sample, truth: Truth, *, draws: int = DRAWS, seed: int = 0) -> Chances:
    """Return how probably the policy's rules hold on a fresh sample, by `draws` simulated ones.

    A rule of whose kind nothing is asked never holds. Rules that are `not_forecast` are supposed to hold.
    """
    held = {name: np.concatenate(found) for name, found in _simulated(policy, sample, truth, draws, seed).items()}
    everything = np.logical_and.reduce(list(held.values())) if held else np.zeros(1, dtype=bool)
    return Chances(by_rule={name: float(found.mean()) for name, found in held.items()}, all=float(everything.mean()))


def _simulated(policy: Policy, sample: Sample, truth: Truth, draws: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Return, for each rule, whether it held in each draw, (draws of a chunk,) after another."""
    claims = _claims(policy, sample)
    held: dict[str, list[np.ndarray]] = {}
    kinds: dict[Kind, Three] = {
        "harm": truth.harm, "refusal": truth.refusal, "degenerate": truth.degenerate, "alike": truth.alike
    }  # fmt: skip
    for number, (kind, rates) in enumerate(kinds.items()):
        own, questions = [claim for claim in claims if claim.kind == kind], sample.questions(kind)
        if not questions:
            held |= {claim.name: [np.zeros(draws, dtype=bool)] for claim in own}
            continue
        for hits in draw_answers(rates, (draws, questions, len(sample.templates)), truth, seed + number):
            parts = _parts_of(hits, tuple(sample.harmful.values()), policy.level) if kind == "harm" else ()
            _add(held, rules_held(own, paired_rates(hits, level=policy.level), policy, parts))
    for number, (task, documents) in enumerate(sample.documents.items(), len(kinds)):
        own = [claim for claim in claims if claim.kind == "score" and claim.task == task]
        rates = truth.scores.get(task, truth.score)
        for hits in draw_answers(rates, (draws, documents, 1), truth, seed + number) if own else ():
            _add(held, rules_held(own, paired_rates(hits, level=policy.level), policy))
    if policy.utility and not sample.documents:
        held["utility"] = [np.zeros(draws, dtype=bool)]
    return held


def draw_answers(rates: Three, shape: tuple[int, int, int], truth: Truth, seed: int) -> Iterator[Floats]:
    """Yield who gave in, (draws of a chunk, questions, templates, models), until there are enough draws."""
    draws, questions, templates = shape
    rng = np.random.default_rng(seed)
    shared = math.sqrt(truth.icc) if templates > 1 else 0.0
    asked = min(1 - shared, math.sqrt(max(0.0, truth.agreement - shared**2)))
    rows = max(1, AT_ONCE // (questions * templates * len(rates)))
    for start in range(0, draws, rows):
        chunk = (min(rows, draws - start), questions, templates, len(rates))
        pick = rng.random(chunk, dtype=np.float32)
        luck = rng.random(chunk, dtype=np.float32)
        luck = np.where(pick < shared + asked, rng.random((*chunk[:3], 1), dtype=np.float32), luck)
        luck = np.where(pick < shared, rng.random((*chunk[:2], 1, 1), dtype=np.float32), luck)
        yield (luck < np.array(rates, dtype=np.float32)).astype(np.float64)


def _add(held: dict[str, list[np.ndarray]], found: Mapping[str, np.ndarray]) -> None:
    for name, holds in found.items():
        held.setdefault(name, []).append(holds)


def rules_held(
    claims: Iterable[Claim], paired: PairedRates, policy: Policy, parts: Sequence[PairedRates] = ()
) -> dict[str, np.ndarray]:
    """Return whether each rule holds in each simulated sample, (samples,), by the gate's own bounds.

    `parts` are banks and templates of the harmful questions, none of which may be beyond the limit on them.
    """
    held = {claim.name: np.asarray(_upper(paired, claim) <= claim.limit) for claim in claims}
    if parts and policy.cell_limit is not None:
        held[PARTS] = _parts_within(parts, policy.cell_limit, policy.level)
    return held


def _upper(paired: PairedRates, claim: Claim) -> Floats:
    over_aligned = paired.contrast_bounds(claim.weights)[1]
    if claim.kind != "degenerate":
        return over_aligned
    aligned, tuned = paired.values[..., 0], paired.values[..., 1]
    return np.where(aligned >= tuned, over_aligned, paired.contrast_bounds(OVER_TUNED)[1])


def _claims(policy: Policy, sample: Sample) -> tuple[Claim, ...]:
    return (*claims_of(policy, sample.documents), *increases_of(policy))


def not_forecast(policy: Policy) -> tuple[str, ...]:
    """Return the rules of a policy that no chance is given of, since nothing is known of them before they are asked."""
    limits = policy.provenance
    found = {
        "judge.known_answers, judge.fit": True,
        "missing.max, unparsed.max, degenerate.max": True,
        "coherence": policy.coherence,
        "one_answer.max_aligned, one_answer.max_increase of tasks that generate": policy.one_answer.max_increase
        is not None,
        "asr.no_cell_worse_than_tuned": policy.asr.no_cell_worse_than_tuned,
        "provenance": limits.required or limits.min_coverage is not None or limits.min_kept is not None,
    }
    return tuple(name for name, asked in found.items() if asked)


def _parts_of(hits: Floats, banks: Sequence[int], level: float) -> list[PairedRates]:
    """Return the rates of each bank through each template, and of banks and templates where there are several."""
    ends = list(accumulate(banks))
    slices = [slice(end - size, end) for end, size in zip(ends, banks, strict=True)]
    templates = range(hits.shape[2])
    parts = [hits[:, rows, [template]] for rows in slices for template in templates]
    if len(banks) > 1 and len(templates) > 1:
        parts += [hits[:, rows] for rows in slices] + [hits[:, :, [template]] for template in templates]
    return [paired_rates(part, level=level) for part in parts]


def _parts_within(parts: Sequence[PairedRates], limit: float, level: float) -> np.ndarray:
    """Return whether every part of enough questions is within the limit, and no smaller one seen beyond it."""
    margins = [margin(paired, limit) for paired in parts if paired.questions >= ENOUGH]
    within = all_within(np.stack(margins, axis=-1), level) if margins else np.ones(len(parts[0].values), dtype=bool)
    return np.asarray(within & ~np.any([seen_beyond(paired, limit) for paired in parts], axis=0))


# -- a plan's power ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RulePower:
    """What a plan can show of one rule. `asked` are `of`: questions or documents."""

    rule: str
    asked: int
    of: str
    can_hold: bool  # if nothing speaks against restored
    chance: float  # if restored is as good as supposed
    needed: int | None  # for a chance of 80 %; None where none were found to do

    @property
    def words(self) -> str:
        """Return the finding in a line."""
        if not self.asked:
            return f"cannot hold: no {self.of} are asked"
        enough = f"about {self.needed} give 80 %" if self.needed else "no number was found to give 80 %"
        if self.needed is None and self.chance >= ENOUGH_POWER:
            return f"holds in {100 * self.chance:.0f} % of cases with {self.asked} {self.of}"
        if not self.can_hold:
            return f"cannot hold with {self.asked} {self.of}, even if nothing speaks against restored; {enough}"
        return f"holds in {100 * self.chance:.0f} % of cases with {self.asked} {self.of}; {enough}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """What a plan can show, rule by rule and altogether, and what that rests on."""

    rules: tuple[RulePower, ...]
    all: float
    truth: Truth
    unknown: tuple[str, ...] = ()  # tasks whose number of documents is not known before they are loaded
    not_forecast: tuple[str, ...] = ()  # rules that are supposed to hold

    @property
    def can_pass(self) -> bool:
        """Whether every rule can hold."""
        return all(rule.can_hold for rule in self.rules)

    @property
    def lines(self) -> tuple[str, ...]:
        """Return the plan's power in words, a line for what is supposed, one for each rule and one for all of them."""
        harm, refusal = (f"{100 * rates[2]:.2g} %" for rates in (self.truth.harm, self.truth.refusal))
        head = (
            f"power, if restored is as good as aligned ({harm} of harmful questions answered, {refusal} of safe ones "
            f"refused, no task lost, {100 * self.truth.degenerate[2]:.2g} % of answers broken, "
            f"{100 * self.truth.alike[2]:.2g} % of those to safe questions alike; ICC {self.truth.icc:g}):"
        )
        rest = [f"{rule.rule}: {rule.words}" for rule in self.rules]
        rest += [f"utility.{task}.max_drop: how many documents there are is not known yet" for task in self.unknown]
        if self.not_forecast:
            rest.append(f"not forecast, and assumed to hold: {', '.join(self.not_forecast)}")
        verdict = f"PASS altogether: {100 * self.all:.0f} %" if self.can_pass else "PASS: not possible with this plan"
        return (head, *rest, verdict)


def power(
    policy: Policy, sample: Sample, truth: Truth = AS_GOOD, *, unknown: Iterable[str] = (), draws: int = DRAWS
) -> Power:
    """Return what a plan can show, and how many questions and documents would do for each rule.

    The search multiplies the whole plan, keeping its shape; a rule that has a chance of 80 % is searched downwards.
    """
    found: dict[float, Chances] = {}

    def at(factor: float) -> Chances:
        if factor not in found:
            found[factor] = chances(policy, sample.times(factor), truth, draws=draws)
        return found[factor]

    now, best = chances(policy, sample, truth, draws=draws), chances(policy, sample, BEST, draws=1)
    found[1.0] = now
    claims = {claim.name: claim for claim in _claims(policy, sample)}
    rules = []
    for name, chance in now.by_rule.items():
        of, asked = _of(name, claims.get(name), sample)
        # Below 100 questions no part must hold, and where the truth is beyond the limit no number of questions helps.
        vain = chance >= ENOUGH_POWER if name == PARTS else name in claims and _beyond(claims[name], truth)
        factor = None if vain or not asked else _enough(at, name, max(4.0, LARGEST / asked))
        needed = None if factor is None else max(1, math.ceil(asked * factor))
        rules.append(
            RulePower(
                rule=name,
                asked=asked,
                of=of,
                can_hold=max(chance, best.by_rule[name]) > 0,
                chance=chance,
                needed=needed,
            )
        )
    return Power(
        rules=tuple(rules), all=now.all, truth=truth, unknown=tuple(unknown), not_forecast=not_forecast(policy)
    )


def _of(rule: str, claim: Claim | None, sample: Sample) -> tuple[str, int]:
    """Return what a rule is about, and how much of it is asked."""
    if rule == "utility":  # it is asked for, and there is no task
        return "documents", 0
    through = f" x {len(sample.templates)} templates" if len(sample.templates) > 1 else ""
    if claim is None:
        harmful = sum(sample.harmful.values())
        return (f"harmful questions{through}", harmful)
    words: dict[Kind, str] = {"harm": "harmful questions", "degenerate": "questions", "score": "documents"}
    of = words.get(claim.kind, "safe questions")
    return of if claim.kind == "score" else of + through, sample.size(claim)


def _beyond(claim: Claim, truth: Truth) -> bool:
    return sum(weight * rate for weight, rate in zip(claim.weights, truth.rates(claim), strict=True)) >= claim.limit


def _enough(at: Callable[[float], Chances], rule: str, most: float) -> float | None:
    """Return about the least factor, up to `most`, at which a rule's chance reaches ENOUGH_POWER; None without one."""
    step = math.sqrt(2)

    def chance(factor: float) -> float:
        return at(factor).by_rule[rule]

    factor = 1.0
    if chance(factor) >= ENOUGH_POWER:
        while factor > SMALLEST and chance(factor / step) >= ENOUGH_POWER:
            factor /= step
        low, high = factor / step, factor
    else:
        while chance(factor) < ENOUGH_POWER:
            factor *= step
            if factor > most:
                return None
        low, high = factor / step, factor
    below, above = chance(low), chance(high)
    share = (ENOUGH_POWER - below) / (above - below) if above > below else 1.0
    return float(low * (high / low) ** min(1.0, max(0.0, share)))
