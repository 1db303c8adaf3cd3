"""Figures of a page as data: where each mark lies, in per cent of the figure's width and pixels of its height.

They grow with the page and their text does not. Colours are the page's own classes, so that a figure follows light,
dark and print. figure.html.jinja draws them. Knows nothing of what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from resta.errors import RequestError

TICKS = 5  # at most so many steps along an axis


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A scale from `low` to `high`; `label` says of what."""

    low: float
    high: float
    label: str = ""
    percent: bool = True

    def at(self, value: float) -> float:
        """Return where a value lies, from 0 to 100; what lies beyond an end is drawn at it."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Return round values between the ends, with their words."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple((i * step, self.words(i * step)) for i in range(first, last + 1))

    def words(self, value: float) -> str:
        """Return a value as the axis shows it."""
        return f"{round(100 * value, 6):g}\u00a0%" if self.percent else f"{round(value, 9):g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An estimate and its interval. `tone` is its colour and shape; a paler line goes on as far as `reach`."""

    value: float | None
    low: float
    high: float
    tone: str
    reach: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a figure: what it is of, what it shows in words, its marks one above the other."""

    label: str
    said: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Estimates one below the other on one axis; a line at `limit`, right of which the ground is `beyond`."""

    title: str
    axis: Axis
    rows: tuple[Row, ...]
    limit: float | None = None
    beyond: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point, its intervals along x and y, and its name where it is shown beside it."""

    x: float
    y: float
    tone: str
    label: str = ""
    title: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    faint: bool = False
    hollow: bool = False
    ringed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A line across a figure at a value of y, with its name; `tone` is its colour and dashes."""

    y: float
    label: str
    tone: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Points on two axes; `arrow` leads from one point to another, by their places in `points`."""

    key: str
    title: str
    description: str
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    levels: tuple[Level, ...] = ()
    arrow: tuple[int, int] | None = None

    @property
    def labels(self) -> tuple[Level, ...]:
        """Return the levels as their labels are shown: those that lie too near for two have one with both names."""
        shown: list[Level] = []
        for level in sorted(self.levels, key=lambda level: level.y):
            if shown and self.y.at(level.y) - self.y.at(shown[-1].y) < 6:
                shown[-1] = replace(shown[-1], label=f"{shown[-1].label}, {level.label}")
            else:
                shown.append(level)
        return tuple(shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """A bar per label, in the order given. Of labels that are numbers only some are shown."""

    key: str
    title: str
    description: str
    axis: Axis
    bars: tuple[tuple[str, float], ...]

    @property
    def shown(self) -> frozenset[int]:
        """Return the bars that have room for their label."""
        numbered = [i for i, (label, _) in enumerate(self.bars) if label.isdigit()]
        every = max(1, -(-len(numbered) // 10))
        return frozenset(i for i, (label, _) in enumerate(self.bars) if i not in numbered or int(label) % every == 0)


def around(ends: Iterable[float], *, label: str = "", percent: bool = True, at_most: float = math.inf) -> Axis:
    """Return an axis that holds all finite values with something to spare on both sides."""
    finite = [end for end in ends if math.isfinite(end)]
    spare = 0.14 * (max(finite) - min(finite)) or 0.05
    return Axis(low=min(finite) - spare, high=min(at_most, max(finite) + spare), label=label, percent=percent)


def up_to(ends: Sequence[float], *, label: str = "", percent: bool = True) -> Axis:
    """Return an axis from 0 to a round value above all, for shares at most 1."""
    highest = max(0.05, math.ceil(20 * max(ends) - 1e-9) / 20) if percent else max(ends) * 1.05 or 1.0
    return Axis(low=0.0, high=min(1.0, highest) if percent else highest, label=label, percent=percent)


def require_matplotlib() -> None:
    """Raise RequestError unless matplotlib is there, which draws figures as files of their own."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError('figures as files need matplotlib: pip install "resta[plots]"') from error
