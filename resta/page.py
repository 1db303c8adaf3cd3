"""Text, tables and pages: safe for a screen, and of one make on the terminal, in Markdown and as HTML.

A name may hold escape sequences that a terminal obeys, letters that turn the reading direction, line breaks that fake a
message, markup of rich, Markdown or HTML. Whatever prints such text passes it through `printable` and a `console` of
this file; whatever writes it, through a `Table`, `markdown` or a template. Knows nothing of what a page says.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    import rich.table
    from rich.console import Console

# What prose in any script needs though it is not visible: line breaks, spaces, joiners, marks and signs of Arabic.
PROSE = (
    "\n\t\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
    "\xad\u200b\u200c\u200d\u200e\u200f\u061c\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u08e2"
)


def printable(text: object, keep: str = "") -> str:
    r"""Return text as one line in which whatever is not visible is written out, as in "\x1b" or "\u202e".

    `keep` holds letters that stay as they are: "\n" where text may have lines, PROSE where it is to be read.
    """
    return "".join(letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in str(text))


def printable_lines(text: object) -> str:
    r"""Return text that may have several lines, each of them as `printable` gives it; only "\n" parts lines."""
    return printable(text, keep="\n")


def console(**options: Any) -> Console:
    """Return a rich console that takes text for what it is: no markup, no emoji names, no guesses at colours."""
    from rich.console import Console  # imported here: `resta --help` prints without it

    return Console(highlight=False, markup=False, emoji=False, **options)


# -- tables --------------------------------------------------------------------------------------------------

# a tone -> how a terminal shows it; a page has a class of each name
STYLES = {"good": "green", "bad": "red", "open": "yellow", "void": "magenta", "plain": "dim", "strong": "bold"}
NUMBER = re.compile(r"[-+−<]? ?\d|[-–]?$")  # how a figure begins, or that there is none
SENTENCE = 40  # characters above which a column is given room to wrap


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's text and how it looks: its tone, which is one of STYLES, "code" or a class of the page, and its sign."""

    text: str
    tone: str = ""
    sign: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table that reads the same on the terminal, in Markdown and as HTML. The first `heads` columns name the row."""

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1

    def kind(self, column: int) -> str:
        """Return what a column holds: "name", "number", "wide" (sentences) or ""."""
        if column < self.heads:
            return "name"
        cells = [row[column] for row in self.rows]
        if all(NUMBER.match(cell.text) and cell.tone != "code" for cell in cells):
            return "number"
        return "wide" if any(len(cell.text) > SENTENCE for cell in cells) else ""


Entry = str | Cell  # what a table is made of


def table(caption: str, header: Iterable[Entry], rows: Iterable[Iterable[Entry]], *, heads: int = 1) -> Table:
    """Return a table of which cells that are text alone have no look of their own."""

    def cells(line: Iterable[Entry]) -> tuple[Cell, ...]:
        return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in line)

    made = Table(caption=caption, header=cells(header), rows=tuple(map(cells, rows)), heads=heads)
    assert all(len(row) == len(made.header) for row in made.rows), f"{caption}: a row has not one cell per column"
    return made


def to_terminal(table: Table) -> rich.table.Table:
    """Return a table for a console; figures are never broken up, names make room for them."""
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        title=Text(printable(table.caption)) if table.caption else None,
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for i, name in enumerate(table.header):
        widest = max((len(printable(row[i].text)) for row in table.rows), default=0)
        least = widest if table.kind(i) == "number" else None
        drawn.add_column(Text(printable(name.text)), overflow="fold", min_width=least)
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell.text), style=STYLES.get(cell.tone, "")) for cell in row))
    return drawn


# What could begin something in Markdown, as entities, which never do: a link or picture, emphasis, code, a cell's end.
MARKDOWN = str.maketrans({letter: f"&#{ord(letter)};" for letter in "\\`*[]|~"})
# A figure's interval, which is left as it is: no link, and no link's address.
INTERVAL = re.compile(r"(\[[-+\d., ]+\])(?![(\[:])")


def markdown(text: str) -> str:
    """Return text as one line that Markdown shows as it is, and that fetches and begins nothing."""
    parts = INTERVAL.split(html.escape(printable(" ".join(text.split()), keep=PROSE), quote=False))
    return "".join(part if i % 2 else part.translate(MARKDOWN) for i, part in enumerate(parts))


def markdown_table(table: Table) -> list[str]:
    """Return a table as lines of Markdown, without its caption; what has a tone is bold, names of code are code."""

    def cell(cell: Cell) -> str:
        if cell.tone == "code":  # in which entities would stand as they are
            return f"`{printable(' '.join(cell.text.split())).replace('`', chr(39)).replace('|', '/')}`"
        return f"**{markdown(cell.text)}**" if cell.tone in STYLES else markdown(cell.text)

    lines = ["| " + " | ".join(markdown(name.text) for name in table.header) + " |", "|" + "---|" * len(table.header)]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]


# -- pages ---------------------------------------------------------------------------------------------------


@functools.cache
def environment() -> jinja2.Environment:
    """Return where the templates of all pages lie: what is not a template's own is escaped, and visible."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("resta", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: object) -> object:
    return value if hasattr(value, "__html__") else printable(value, keep=PROSE)


def render(template: str, /, **facts: object) -> str:
    """Return a page: `template` is a file below this package, most of them extend page.html.jinja."""
    return environment().get_template(template).render(facts)


def to_html(table: Table) -> str:
    """Return a table as HTML, with its caption."""
    return str(environment().get_template("table.html.jinja").module.table(table))  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A figure that a reader in a hurry takes along, and what is said below it."""

    title: str
    figure: str
    lines: tuple[str, ...]
