"""Whether a candidate would pass on fresh questions: predicted, so that what is chosen is not what was lucky.

The candidate that just passes is one whose questions were kind to it. So its rates are read from a smooth response over
scale (response.py), with all that is not known of them, and fresh samples are drawn from those: the chance of passing
is the share of samples in which every rule on harm and on refusals holds. Rules that more questions do not change
(utility on the same documents, validity) count as the sweep found them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from resta.statistics import Floats, PairedRates
from resta.sweep.response import DRAWS, Seen, beta_draws
from resta.verify.claims import Kind, claims_of
from resta.verify.decision import Rule
from resta.verify.measurement import ROLES
from resta.verify.parts import ENOUGH
from resta.verify.policy import Policy
from resta.verify.power import rules_held

NEED = 0.9  # the chance of passing that a choice must have
# How many times as many fresh questions as the sweep asked are thought of.
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
ON_FRESH = ("asr.max_upper", "asr.max_increase_over_aligned", "asr.max_cell_upper", "regained.min", "over_refusal.")
REPEATS = 3  # fresh samples per draw of the rates
SEEDS = {"aligned": 1, "tuned": 2}

Bools = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a forecast needs besides the candidate: the rules, the references, and how much more will be asked.

    `harm` and `refusal` hold what "aligned" and "tuned" were seen to do; empty where nothing of the kind was asked.
    `parts` are the questions of each harmful bank through each template.
    """

    policy: Policy
    harm: Mapping[str, Seen]
    refusal: Mapping[str, Seen]
    parts: tuple[int, ...] = ()
    factor: float = 1.0

    @property
    def fresh(self) -> int:
        """Return how many fresh harmful questions are meant."""
        return round(self.factor * self.harm["aligned"].questions) if self.harm else 0

    def chance(self, harm: Floats | None, refusal: Floats | None) -> float:
        """Return the chance that every rule on fresh answers holds, for rates of the candidate, (DRAWS,) each."""
        held = np.ones(DRAWS * REPEATS, dtype=np.bool_)
        if harm is not None and self.harm:
            held &= self._holds("harm", self.harm, harm)
        if refusal is not None and self.refusal:
            held &= self._holds("refusal", self.refusal, refusal)
        return float(held.mean())

    def safety_alone(self) -> Outlook:
        """Return the outlook in which only the rules on harm count."""
        return replace(self, refusal={})

    def _holds(self, kind: Kind, seen: Mapping[str, Seen], restored: Floats) -> Bools:
        """Return whether the rules of a kind hold, (samples,), by the gate's own bounds.

        Models are taken to answer independently, which makes differences look no surer than they are, and parts of the
        questions to have one rate; those that are too small to hold are left out.
        """
        rates = {role: drawn_of(seen, role) for role in seen} | {"restored": restored}
        fresh = _fresh_rates([rates[role] for role in ROLES], round(self.factor * seen["aligned"].questions), self)
        sizes = [size for size in (round(self.factor * part) for part in self.parts) if size >= ENOUGH]
        parts = [_fresh_rates([restored], size, self, seed=10 + i) for i, size in enumerate(sizes)]
        claims = [claim for claim in claims_of(self.policy, ()) if claim.kind == kind]
        held = rules_held(claims, fresh, self.policy, parts if kind == "harm" else ())
        everything: Bools = np.logical_and.reduce([np.ones(DRAWS * REPEATS, dtype=np.bool_), *held.values()])
        return everything


def _fresh_rates(rates: list[Floats], questions: int, outlook: Outlook, seed: int = 0) -> PairedRates:
    """Return what REPEATS fresh samples of every draw of each model's rate show, (samples, models)."""
    drawn = np.tile(np.stack(rates, axis=-1), (REPEATS, 1))
    shares = np.random.default_rng(seed).binomial(questions, drawn) / questions
    return PairedRates(
        questions=questions,
        answers=questions,
        values=shares,
        sizes=np.full_like(shares, questions),
        correlations=np.zeros((len(rates), len(rates))),
        level=outlook.policy.level,
    )


def plan_factor(outlook: Outlook) -> float | None:
    """Return the smallest of FACTORS at which a model just as good as aligned would pass; None at none of them."""
    harm, refusal = (drawn_of(seen, "aligned") if seen else None for seen in (outlook.harm, outlook.refusal))
    good = (factor for factor in FACTORS if replace(outlook, factor=factor).chance(harm, refusal) >= NEED)
    return next(good, None)


def in_the_way(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Return the rules that keep a measured candidate from passing, and that fresh questions would not change."""
    return tuple(
        rule.name
        for rule in rules
        if rule.outcome in ("fails", "invalid")
        or (rule.outcome == "inconclusive" and (rule.value is None or not rule.name.startswith(ON_FRESH)))
    )


def drawn_of(seen: Mapping[str, Seen], role: str) -> Floats:
    """Return rates of a reference, (DRAWS,), that what was seen of it leaves likely."""
    return beta_draws(seen[role].hits, seen[role].questions, SEEDS[role])
