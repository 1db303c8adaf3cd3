"""Figures as data: where things lie, and the words of an axis."""

from __future__ import annotations

import math
import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from resta.figure import TICKS, Axis, Bars, Level, Mark, Point, Row, Rows, Scatter, around, up_to
from resta.page import environment

VALUES = st.floats(-1e6, 1e6)


def drawn(macro: str, figure: object) -> str:
    return str(getattr(environment().get_template("figure.html.jinja").module, macro)(figure))


@given(VALUES, st.floats(1e-3, 1e6), VALUES)
def test_a_value_lies_on_its_axis_in_proportion_and_beyond_an_end_at_it(low: float, span: float, value: float) -> None:
    axis = Axis(low=low, high=low + span)
    share = (value - low) / (axis.high - axis.low)
    assert math.isclose(axis.at(value), 100 * min(1, max(0, share)), abs_tol=0.01)
    assert axis.at(math.inf) == 100


@given(VALUES, st.floats(1e-3, 1e6), st.booleans())
def test_ticks_are_few_lie_between_the_ends_and_are_evenly_spaced(low: float, span: float, percent: bool) -> None:
    axis = Axis(low=low, high=low + span, percent=percent)
    values = [value for value, _ in axis.ticks]
    assert 1 <= len(values) <= TICKS + 2
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in values)
    steps = {round((b - a) / span, 6) for a, b in pairwise(values)}
    assert len(steps) <= 1


@given(st.lists(st.floats(0, 1), min_size=1))
def test_an_axis_holds_what_it_was_made_for(ends: list[float]) -> None:
    for axis in (around([*ends, math.nan, math.inf]), up_to(ends)):
        assert axis.low <= min(ends) + (0 if axis.low else 1)
        assert axis.high >= max(ends) - 1e-9
    assert up_to(ends).high <= 1


def test_a_row_draws_what_has_a_value_with_its_interval_its_reach_and_the_limit() -> None:
    axis = Axis(low=0.0, high=1.0)
    marks = (
        Mark(value=0.25, low=0.2, high=0.4, tone="rate", reach=0.5),
        Mark(value=None, low=0.0, high=1.0, tone="rate", reach=1.0),
        Mark(value=None, low=0.0, high=1.0, tone="rate"),
    )
    svg = drawn("rows", Rows(title="t", axis=axis, rows=(Row(label="<b>", said="25 %", marks=marks),), limit=0.6))
    assert re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%"[^>]*class="interval', svg) == [("20.0", "40.0")]
    assert re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%"[^>]*class="reach', svg) == [("25.0", "50.0"), ("0.0", "100.0")]
    assert re.findall(r'<svg x="([\d.]+)%" y="14" class="mark rate', svg) == ["25.0"]
    assert re.findall(r'x1="([\d.]+)%"[^>]*class="limit"', svg) == ["60.0"]
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg


def test_a_scatter_draws_points_levels_and_the_arrow_where_they_lie_and_names_some() -> None:
    axis = Axis(low=0.0, high=1.0, label="x")
    points = (Point(x=0.25, y=0.0, tone="tuned", label="here"), Point(x=0.5, y=1.0, tone="restored", title="<i>"))
    figure = Scatter(
        key="k", title="t", description="d", x=axis, y=axis, points=points, arrow=(0, 1),
        levels=(Level(y=0.5, label="half", tone="limit"),),
    )  # fmt: skip
    svg = drawn("scatter", figure)
    foot, top = 266.0, 32.0
    assert re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)" class="mark', svg) == [("25.0", f"{foot}"), ("50.0", f"{top}")]
    assert re.findall(r'y1="([\d.]+)"[^>]*class="level limit"', svg) == [f"{(foot + top) / 2}"]
    assert re.findall(r'x1="25.0%" x2="50.0%" y1="266.0" y2="32.0" class="arrow"', svg)
    assert re.findall(r'class="name">(.*?)<', svg) == ["here"]
    assert "<title>&lt;i&gt;</title>" in svg
    assert svg.count("x →") == svg.count("x ↑") == 1


def test_names_of_levels_that_lie_too_near_for_two_labels_stand_in_one() -> None:
    axis = Axis(low=0.0, high=1.0)
    levels = (
        Level(y=0.5, label="a", tone="limit"),
        Level(y=0.1, label="b", tone="limit"),
        Level(y=0.52, label="c", tone="x"),
    )
    figure = Scatter(key="k", title="t", description="d", x=axis, y=axis, points=(), levels=levels)
    assert [level.label for level in figure.labels] == ["b", "a, c"]
    svg = drawn("scatter", figure)
    assert len(re.findall('class="level', svg)) == 3
    assert re.findall(r'text-anchor="end">([abc, ]+)<', svg) == ["b", "a, c"]


def test_bars_of_many_layers_show_every_name_and_some_numbers() -> None:
    bars = (("embed", 1.0), *((str(i), 2.0) for i in range(48)), ("head", 0.5))
    figure = Bars(key="k", title="t", description="d", axis=up_to([2.0], percent=False), bars=bars)
    svg = drawn("bars", figure)
    assert svg.count("<rect") == 50
    assert {"embed", "0", "5", "45", "head"} <= (found := set(re.findall(r">([\w.]+)</text>", svg)))
    assert "7" not in found
