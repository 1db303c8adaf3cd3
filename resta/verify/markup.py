"""HTML that cannot be broken into: a plain `str` is text and gets escaped, only `Markup` stands as it is.

Knows nothing of what a page says or how it looks.
"""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence

from resta.redeval.report import printable

VOID = frozenset({"meta", "wbr"})  # elements without an end


class Markup(str):
    """HTML made by this module."""

    __slots__ = ()


def element(tag: str, /, *children: str, **attributes: str | None) -> Markup:
    """Return an element. Attributes are named as in HTML, `_` for `-` and one at the end of Python's own words
    (`class_`); None leaves one out.
    """
    shown = {key.removesuffix("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{html.escape(printable(value))}"' for key, value in shown.items())
    return Markup(f"<{tag}{head}>" if tag in VOID else f"<{tag}{head}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Return children one after the other, text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(printable(child)) for child in children))


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    heads: int = 1,
    right: Container[int] = (),
    wide: Container[int] = (),
    class_: str | None = None,
) -> Markup:
    """Return a table that scrolls by itself where the page is too narrow. The first `heads` columns name the rows.

    `right` are columns of numbers, `wide` those of sentences. A cell may be a whole <td> already.
    """

    def kind(column: int) -> str | None:
        return "right" if column in right else "wide" if column in wide else "name" if column < heads else None

    def cell(column: int, content: str) -> Markup:
        if isinstance(content, Markup) and content.startswith("<td"):
            return content
        if column < heads:
            return element("th", content, scope="row", class_=kind(column))
        return element("td", content, class_=kind(column))

    head = (element("th", name, scope="col", class_=kind(i)) for i, name in enumerate(header))
    body = (element("tr", *(cell(i, content) for i, content in enumerate(row))) for row in rows)
    parts = (
        element("caption", element("span", caption)),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element(
        "div",
        element("table", *parts, class_=class_),
        class_="scroll",
        role="region",
        aria_label=f"Table: {caption}",
        tabindex="0",
    )
