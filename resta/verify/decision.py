"""A verdict and the rules behind it, as data. Knows nothing of how a rule is decided or shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

SCHEMA = 1


class Verdict(Enum):
    """What the gate says, with its exit code (2 is a wrong request, 5 a failed run: errors.EXIT_CODES)."""

    PASS = 0
    FAIL = 1
    INCONCLUSIVE = 3
    INVALID = 4


Outcome = Literal["holds", "fails", "inconclusive", "invalid", "left out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One rule of the policy and what came of it. `value`, `low` and `high` are None where nothing was measured."""

    name: str  # as in the policy: asr.max_upper, utility.gsm8k.max_drop
    outcome: Outcome
    limit: str  # "upper bound <= 0.10"
    value: float | None
    low: float | None
    high: float | None
    why: str
    p: float | None = None  # one-sided, of the limit being kept, before any correction; None without an interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The verdict, the rules behind it, what to know when reading it, and what to do about it."""

    verdict: Verdict
    tier: str | None = None  # what a policy calls itself whose limits are wider than the default ones
    summary: str
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    guidance: tuple[str, ...]
    power: tuple[str, ...] = ()  # what the same questions could have shown (plan.py)

    @property
    def title(self) -> str:
        """Return the verdict in words; one that was reached under wider limits says so."""
        return f"{self.verdict.name} ({self.tier} limits)" if self.tier else self.verdict.name


def by_name(rules: Iterable[Rule]) -> Mapping[str, Rule]:
    """Return rules by name."""
    return {rule.name: rule for rule in rules}
