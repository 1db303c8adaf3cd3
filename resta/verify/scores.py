"""What lm_eval's value of one document says, as a number that documents can be compared by in pairs.

Most metrics are the mean of a score from 0 to 1. A perplexity is no mean, but its logarithm is one of losses: of each
document its loss is kept, in nats per word, byte or whole answer, or in bits per byte. A drop of 0.05 is then a
perplexity that is 5 % worse (exp(0.05) = 1.05).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from resta.errors import RequestError

# lm_eval's metric -> what its document's loss is divided by beside the count that comes with it; None: comes without
LOSSES = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2), "perplexity": None}


def is_loss(metric: str) -> bool:
    """Whether a metric (with or without its filter) is kept as a loss."""
    return metric.partition(",")[0] in LOSSES


def value_of(metric: str, found: object, *, higher_is_better: bool, where: str) -> float:
    """Return a document's value: a score from 0 to 1, or a loss or error that is 0 at best. Raises RequestError."""
    name = metric.partition(",")[0]
    if name in LOSSES:
        return _loss(name, found, where)
    number = float(found) if isinstance(found, Real) else math.nan
    if not 0 <= number <= (1.0 if higher_is_better else math.inf) or math.isinf(number):  # NaN is not either
        expected = "a number from 0 to 1" if higher_is_better else "a number from 0"
        raise RequestError(f"{where}: {metric} of a document is {found!r}; expected {expected}")
    return number


def _loss(name: str, found: object, where: str) -> float:
    unit = LOSSES[name]
    parts: Sequence[object] = found if isinstance(found, tuple | list) else (found,)
    numbers = [float(part) for part in parts if isinstance(part, Real)]
    if len(numbers) != (1 if unit is None else 2) or not all(map(math.isfinite, numbers)) or 0 in numbers[1:]:
        expected = "a log-likelihood" if unit is None else "a log-likelihood and a count"
        raise RequestError(f"{where}: {name} of a document is {found!r}; expected {expected}")
    return -numbers[0] if unit is None else -numbers[0] / (numbers[1] * unit)
