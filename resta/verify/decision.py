"""A verdict and the rules behind it, as data. Knows nothing of how a rule is decided or shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from resta.statistics import Difference

SCHEMA = 2  # of verdict.json; since 2 a rule's limit is a number, its words beside it


class Verdict(Enum):
    """What the gate says, with its exit code (2 is a wrong request, 5 a failed run: errors.EXIT_CODES)."""

    PASS = 0
    FAIL = 1
    INCONCLUSIVE = 3
    INVALID = 4


Outcome = Literal["holds", "fails", "inconclusive", "invalid", "left out"]


BOUNDS = {"high": "upper bound", "low": "lower bound", "value": "observed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A number that a bound of what was measured, or the measured value itself, is held against."""

    bound: Literal["high", "low", "value"]
    op: Literal["<=", ">="]
    value: float

    def kept(self, found: Difference) -> bool:
        """Return whether an estimate keeps the limit."""
        number = {"high": found.high, "low": found.low, "value": found.value}[self.bound]
        return number <= self.value if self.op == "<=" else number >= self.value

    def __str__(self) -> str:
        return f"{BOUNDS[self.bound]} {self.op} {self.value:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One rule of the policy and what came of it. `value`, `low` and `high` are None where nothing was measured."""

    name: str  # as in the policy: asr.max_upper, utility.gsm8k.max_drop
    outcome: Outcome
    limit: Limit | None = None  # the rule holds where it is kept; None where no one number decides
    test: str = ""  # in words what is asked where there is no limit, or what it is a limit of
    value: float | None
    low: float | None
    high: float | None
    why: str
    p: float | None = None  # one-sided, of the limit being kept, before any correction; None without an interval

    @property
    def limit_words(self) -> str:
        """Return what is asked in words: "upper bound <= 0.1"; empty where the rule's name says it all."""
        return ": ".join(part for part in (self.test, str(self.limit) if self.limit else "") if part)


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
