"""Figures of a comparison as SVG that lies inside a page: no fonts, colours or files of its own.

Colours are drawn as stand-ins and become CSS variables, so that a figure follows light, dark and print. The same
numbers give the same bytes. Knows nothing of policies or of the page around it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resta.errors import MissingExtraError
from resta.redeval.report import printable
from resta.statistics import Difference
from resta.verify.comparison import Rates
from resta.verify.markup import Markup, element
from resta.verify.measurement import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"aligned": "o", "tuned": "^", "restored": "D"}  # in the page's legend: ● ▲ ◆
COLOURS = {name: f"#0000{i:02x}" for i, name in enumerate(("ink", "muted", "line", "paper", *ROLES), 1)}
FONT = 12  # in the figure's own units
WIDTH = 400  # narrow enough to be read on a phone
MOST = 13  # characters of a label
SCALE = 1.15  # CSS pixels per unit where there is room


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What a figure is called and what it shows, for those who do not see it; `key` is its id in the page."""

    key: str
    title: str
    description: str


def require_plots() -> None:
    """Raise MissingExtraError unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('the HTML report needs matplotlib: pip install "resta[plots]"') from error


def forest(
    rows: Sequence[tuple[str, Rates]], caption: Caption, *, highest: float, limit: float | None = None
) -> Markup:
    """Return each row's rate and interval for three models, from 0 to `highest`, with a line at a policy's `limit`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    height = 52 + 46 * len(rows)
    figure, axes = _figure(height, left=104, right=26, bottom=42, top=10)
    for i, (_, rates) in enumerate(rows):
        for j, role in enumerate(ROLES):
            rate, y = rates[role], i + 0.25 * (j - 1)
            if rate.value is None:
                continue
            axes.plot([rate.low, rate.high], [y, y], color=COLOURS[role], linewidth=2.2, solid_capstyle="butt")
            _mark(axes, role, rate.value, y)
        if i:
            axes.axhline(i - 0.5, color=COLOURS["line"], linewidth=0.8)
    if limit is not None:
        axes.axvline(limit, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_clip(label) for label, _ in rows], parse_math=False)
    axes.set_xlim(-0.01 * highest, highest)
    _percent_ticks(axes, highest)
    return _svg(figure, caption)


def against_limits(
    rows: Sequence[tuple[str, Difference, float, bool]], caption: Caption, *, colours: Mapping[bool, str]
) -> Markup:
    """Return one row per rule, (label, estimate, limit, whether it is kept): its interval, and a bar at its limit.

    The colours, names of COLOURS, are of rules that are kept and of those that are not. What lies beyond the
    figure's edge is drawn at it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = _figure(48 + 26 * len(rows), width=620, left=262, right=20, bottom=40, top=8)
    ends = [end for _, found, limit, _ in rows for end in (found.low, found.value, found.high, limit)]
    ends = [end for end in ends if math.isfinite(end)]
    left, right = max(-1.0, min(0.0, *ends)) - 0.02, min(1.5, max(0.1, *ends)) + 0.02
    for i, (_, found, limit, kept) in enumerate(rows):
        colour = COLOURS[colours[kept]]
        low, value, high = (min(max(end, left), right) for end in (found.low, found.value, found.high))
        axes.plot([low, high], [i, i], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([value], [i], "D" if kept else "X", color=colour, markersize=7, clip_on=False, zorder=3)
        axes.plot([limit, limit], [i - 0.38, i + 0.38], color=COLOURS["ink"], linewidth=2)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_clip(label, 36) for label, *_ in rows], parse_math=False)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.8)
    return _svg(figure, caption)


def trade_off(scores: Mapping[str, Difference], safety: Mapping[str, Difference], caption: Caption) -> Markup:
    """Return safety against utility: one marker per model with both intervals, an arrow from tuned to restored.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = _figure(320, left=62, right=16, bottom=48, top=14)
    ends = {role: (scores[role].value, safety[role].value) for role in ROLES}
    arrow = {"arrowstyle": "->", "color": COLOURS["muted"], "linestyle": "--", "shrinkA": 8, "shrinkB": 8}
    axes.annotate("", xy=ends["restored"], xytext=ends["tuned"], arrowprops=arrow)
    for role, (x, y) in ends.items():
        for bar, vertical in ((scores[role], False), (safety[role], True)):
            if math.isfinite(bar.high - bar.low):
                points = ([x, x], [bar.low, bar.high]) if vertical else ([bar.low, bar.high], [y, y])
                axes.plot(*points, color=COLOURS[role], linewidth=2)
        _mark(axes, role, x, y, size=10)
    axes.set_xlim(*_room(scores))
    axes.set_ylim(*_room(safety, at_most=1.04))
    low, high = axes.get_ylim()
    for roles in _neighbours({role: tuple(axes.transData.transform(end)) for role, end in ends.items()}):
        x, y = ends[roles[0]]
        above = y < (low + high) / 2  # away from the nearer edge
        left = len(roles) > 1 and x > sum(axes.get_xlim()) / 2  # a long one needs the room
        offset = (-8 if left else 8, 9 if above else -17)
        style: dict[str, Any] = {"ha": "right" if left else "left", "color": COLOURS["ink"], "fontsize": FONT}
        axes.annotate(", ".join(roles), (x, y), offset, textcoords="offset points", **style)
    axes.set_xlabel("task score →", color=COLOURS["ink"], fontsize=FONT)
    axes.set_ylabel("answers not harmful →", color=COLOURS["ink"], fontsize=FONT)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    return _svg(figure, caption)


def layer_bars(sizes: Mapping[str, float], caption: Caption) -> Markup:
    """Return a bar per layer, in the order given; numbered layers are labelled by some of their numbers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = _figure(270, width=480, left=50, right=10, bottom=100, top=12)
    axes.bar(range(len(sizes)), list(sizes.values()), color=COLOURS["restored"], width=0.72)
    numbers = {i: label.removeprefix("layer ") for i, label in enumerate(sizes)}
    numbered = [i for i, text in numbers.items() if text.isdigit()]
    every = max(1, -(-len(numbered) // 12))
    shown = [i for i, text in numbers.items() if i not in numbered or int(text) % every == 0]
    axes.set_xticks(shown, [_clip(numbers[i], 12) for i in shown], parse_math=False)
    for tick, i in zip(axes.get_xticklabels(), shown, strict=True):
        tick.set_rotation(0 if i in numbered else 90)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.set_ylabel("norm of the change", color=COLOURS["ink"], fontsize=FONT)
    return _svg(figure, caption)


# -- drawing -------------------------------------------------------------------------------------------------


def _figure(height: int, *, left: int, right: int, bottom: int, top: int, width: int = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure of a size and margins in CSS pixels, with one empty pair of axes."""
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=FONT, labelcolor=COLOURS["ink"], pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(COLOURS["muted"])
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _mark(axes: Axes, role: str, x: float, y: float, size: int = 8) -> None:
    style: dict[str, Any] = {"markeredgecolor": COLOURS["paper"], "markeredgewidth": 0.8}
    axes.plot([x], [y], MARKERS[role], color=COLOURS[role], markersize=size, clip_on=False, zorder=3, **style)


def _percent_ticks(axes: Axes, highest: float) -> None:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if highest / step <= 5.01)
    ticks = [step * i for i in range(int(highest / step + 0.01) + 1)]
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.8)


def _neighbours(places: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return the names in groups that share a label: those so near to the first of a group that two would overlap."""
    groups: list[list[str]] = []
    for name, (x, y) in places.items():
        for group in groups:
            first = places[group[0]]
            if abs(x - first[0]) < 6 * FONT and abs(y - first[1]) < 1.5 * FONT:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _room(bars: Mapping[str, Difference], at_most: float = math.inf) -> tuple[float, float]:
    """Return axis limits that hold all finite intervals, with a tenth to spare on both sides."""
    ends = [end for bar in bars.values() for end in (bar.low, bar.value, bar.high) if math.isfinite(end)]
    spare = 0.14 * (max(ends) - min(ends)) or 0.05
    return min(ends) - spare, min(at_most, max(ends) + spare)


def _clip(label: str, most: int = MOST) -> str:
    plain = " ".join(printable(label).split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _svg(figure: Figure, caption: Caption) -> Markup:
    """Return a figure as an <svg> element with a name and a description."""
    import matplotlib

    out = io.StringIO()
    # Text stays text, in the page's font; ids are the same each time, and others in each figure.
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption.key}),
        warnings.catch_warnings(),
    ):
        # The page's font draws the text, whatever matplotlib's own one lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _embed(out.getvalue(), caption)


def _embed(svg: str, caption: Caption) -> Markup:
    """Return matplotlib's file as part of a page: no preamble, no style or ids of its own but those it refers to."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("<use xlink:href", "<use href")
    body = re.sub(r'style="[^"]*"', lambda style: _in_page_terms(style[0]), body)
    return element(
        "svg",
        element("title", caption.title, id=f"{caption.key}-title"),
        element("desc", caption.description, id=f"{caption.key}-desc"),
        Markup(re.sub(r"\s*\n\s*", "\n", body)),
        viewBox=box[1],
        role="img",
        width=f"{SCALE * float(box[1].split()[2]):.0f}",
        aria_labelledby=f"{caption.key}-title {caption.key}-desc",
    )


def _in_page_terms(style: str) -> str:
    """Return a style attribute with the page's colours and font."""
    style = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", style)  # as matplotlib wrote it before 3.10
    style = re.sub(r" *font-family: [^;\"]*;?", "", style)
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return style
