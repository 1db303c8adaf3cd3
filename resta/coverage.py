"""How much of a model each term of a merge reaches, in parameters: a count of tensors would hide a lost expert layer.

A parameter, an element of a floating-point tensor of the result, is for one term
    covered         both ends were found there and their difference is taken; exactly zero by construction (a tensor
                    that an adapter does not touch) included
    not covered     a rule leaves the term out, or a model has no such tensor or row
    not selected    the equation itself leaves it alone: the scale is 0, or DARE drops the entry
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

EXAMPLES = 3  # tensors that are named for each reason


def readable_share(share: float) -> str:
    """Return a share in percent, cut and not rounded, so that nothing short of all reads as 100 %."""
    return f"{math.floor(share * 10_000) / 100:.2f} %"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Parameters that a term does not cover, for one reason, and the first tensors that hold them."""

    reason: str
    parameters: int
    tensors: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """The reason, how much it concerns, and where."""
        more = f" and {self.tensors - len(self.examples)} more" if self.tensors > len(self.examples) else ""
        return f"{self.reason} ({self.parameters:,} parameters: {', '.join(self.examples)}{more})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What one term reaches. Before a merge, `covered` includes the entries that DARE is yet to drop."""

    parameters: int
    covered: int
    not_selected: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def not_covered(self) -> int:
        """Parameters that a rule, a missing name or a missing row keeps from the term."""
        return self.parameters - self.covered - self.not_selected

    @property
    def share(self) -> float:
        """The share of parameters that is not kept from the term; 1.0 where there are none."""
        return 1 - self.not_covered / self.parameters if self.parameters else 1.0

    def drop(self, entries: int) -> Coverage:
        """Return the coverage once it is known how many covered entries the term's mask dropped."""
        return replace(self, covered=self.covered - entries, not_selected=self.not_selected + entries)


@dataclass
class Ledger:
    """Counts one term's parameters, tensor by tensor."""

    parameters: int = 0
    covered: int = 0
    not_selected: int = 0
    _left_out: dict[str, tuple[int, int, tuple[str, ...]]] = field(default_factory=dict)

    def note(self, tensor: str, count: int, covered: int, reason: str) -> None:
        """Note that a term covers this many of a tensor's parameters, and what keeps it from the rest."""
        self.parameters += count
        self.covered += covered
        if covered < count:
            parameters, tensors, examples = self._left_out.get(reason, (0, 0, ()))
            examples = (*examples, tensor)[:EXAMPLES]
            self._left_out[reason] = (parameters + count - covered, tensors + 1, examples)

    def note_off(self, count: int) -> None:
        """Note a tensor's parameters for a term whose scale is 0."""
        self.parameters += count
        self.not_selected += count

    def close(self) -> Coverage:
        """Return what was counted, the largest reason first."""
        left_out = [
            LeftOut(reason=reason, parameters=parameters, tensors=tensors, examples=examples)
            for reason, (parameters, tensors, examples) in self._left_out.items()
        ]
        return Coverage(
            parameters=self.parameters,
            covered=self.covered,
            not_selected=self.not_selected,
            left_out=tuple(sorted(left_out, key=lambda part: -part.parameters)),
        )
