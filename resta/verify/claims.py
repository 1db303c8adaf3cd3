"""A policy's rules on rates and scores, each as one claim: a weighed sum of the three models' rates is at most a limit.

The gate decides claims on what was measured, the power plan on what might be (power.py), so both know the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from resta.verify.measurement import ROLES
from resta.verify.policy import ANY_TASK, Policy

Kind = Literal["harm", "refusal", "score", "degenerate", "alike"]
# Weights of (aligned, tuned, restored), as ROLES.
RATE = (0.0, 0.0, 1.0)
OVER_ALIGNED = (-1.0, 0.0, 1.0)
OVER_TUNED = (0.0, -1.0, 1.0)
DROP = (0.0, 1.0, -1.0)
assert ROLES == ("aligned", "tuned", "restored")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The upper bound of `weights` (aligned, tuned, restored) times their rates is at most `limit`."""

    name: str  # as in the policy: asr.max_upper, utility.gsm8k.max_drop
    kind: Kind
    weights: tuple[float, float, float]
    limit: float
    task: str = ""  # of a score


def claims_of(policy: Policy, tasks: Iterable[str]) -> tuple[Claim, ...]:
    """Return the claims of a policy in its own order, those on utility for each task that is measured."""
    asr, over, regained = policy.asr, policy.over_refusal, policy.regained
    rates: tuple[tuple[str, Kind, tuple[float, float, float], float | None], ...] = (
        ("asr.max_upper", "harm", RATE, asr.max_upper),
        ("asr.max_increase_over_aligned", "harm", OVER_ALIGNED, asr.max_increase_over_aligned),
        # (tuned - restored) / (tuned - aligned) >= min without the ratio, which needs tuned to be worse.
        ("regained.min", "harm", mixture(regained.min), 0.0) if regained else ("", "harm", RATE, None),
        ("over_refusal.max_upper", "refusal", RATE, over.max_upper),
        ("over_refusal.max_increase", "refusal", OVER_ALIGNED, over.max_increase),
        ("over_refusal.max_increase_over_tuned", "refusal", OVER_TUNED, over.max_increase_over_tuned),
    )
    found = [
        Claim(name=name, kind=kind, weights=weights, limit=limit)
        for name, kind, weights, limit in rates
        if limit is not None
    ]
    for task in tasks:
        rules = policy.utility.get(task) or policy.utility.get(ANY_TASK)
        if rules is not None:
            name = f"utility.{task}.max_drop"
            found.append(Claim(name=name, kind="score", weights=DROP, limit=rules.max_drop, task=task))
    return tuple(found)


def increases_of(policy: Policy) -> tuple[Claim, ...]:
    """Return the claims on how answers look, which the gate decides in its rules on the measurement itself (trust.py).

    Of a `degenerate` one aligned stands for whichever of the two others restored exceeds the least.
    """
    found: tuple[tuple[str, Kind, float | None], ...] = (
        ("degenerate.max_increase", "degenerate", policy.degenerate.max_increase),
        ("one_answer.max_increase", "alike", policy.one_answer.max_increase),
    )
    return tuple(
        Claim(name=name, kind=kind, weights=OVER_ALIGNED, limit=limit)
        for name, kind, limit in found
        if limit is not None
    )


def mixture(share: float) -> tuple[float, float, float]:
    """Return the weights of restored - ((1 - share) tuned + share aligned)."""
    return (-share, share - 1, 1.0)
