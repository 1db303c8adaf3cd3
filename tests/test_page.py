"""Text from elsewhere: nothing of it is obeyed, by a terminal or rich, in Markdown or in HTML."""

from __future__ import annotations

import html
import io
import re
import tomllib
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from resta.cli import main
from resta.page import (
    PROSE,
    Cell,
    Entry,
    console,
    markdown,
    markdown_table,
    printable,
    printable_lines,
    render,
    table,
    to_html,
    to_terminal,
)
from tests.builders import llama_tensors, nudged, save_model

HOSTILE = ["[/v1]", "[v2]", "[bold]x[/bold]", ":smile:", "a\x1b]0;pwned\x07b", "a\u202eb", "a\nerror: b", "\x9b31m"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@given(st.text())
def test_what_is_printed_is_one_visible_line_and_visible_text_is_kept(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    assert printable_lines(text).count("\n") == text.count("\n")


TAKES_HOLD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text(st.characters()))
def test_prose_keeps_its_lines_and_every_script_and_nothing_that_takes_hold_of_a_screen(text: str) -> None:
    shown = printable(text, keep=PROSE)
    assert not TAKES_HOLD.search(shown)
    shown.encode()
    for letter in text:
        if letter.isprintable() or letter in "\t\n" or unicodedata.category(letter) == "Zs":
            assert letter in shown
    for prose in ("a\tb\nשלום 你好 👩‍🔬", "می‌خواهم", "1\xa0000 €", "\u0601\u06f5"):
        assert printable(prose, keep=PROSE) == prose


@given(st.text(max_size=60))
def test_rich_prints_the_very_text_that_it_is_given(text: str) -> None:
    file = io.StringIO()
    console(file=file, width=1000).print(printable(text))
    assert file.getvalue().rstrip("\n").rstrip() == printable(text).rstrip()


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\n" not in name])
def test_a_merge_into_a_folder_of_any_name_says_where_it_is_and_ends_well(
    trio: dict[str, str], tmp_path: Path, name: str
) -> None:
    out = tmp_path / name.replace("/", "") / ("x" + name.replace("/", ""))
    done = run("merge", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "--scale", 1, "-o", out)
    assert done.exit_code == 0, done.output
    assert out.is_dir()
    assert printable(out) in done.stdout
    assert done.stdout.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_and_inputs_of_any_name_are_compared_and_refused_in_visible_text(tmp_path: Path, name: str) -> None:
    tensors = {f"{name}.weight": torch.ones(4, 4), **llama_tensors(0)}
    folder = "in" + printable(name.replace("/", ""))
    models = [save_model(tmp_path / folder / side, nudged(tensors, seed)) for seed, side in enumerate("ab")]
    lacking = save_model(tmp_path / folder / "c", llama_tensors(3))
    done = run("diff", *models)
    assert done.exit_code == 0, done.output
    assert done.stdout.replace("\n", "").isprintable()
    flags = ("--aligned", models[0], "--base", lacking, "--scale", 1, "-o", tmp_path / "out")
    refused = run("merge", models[1], *flags)
    assert refused.exit_code == 2
    assert printable(f"{name}.weight") in refused.stderr
    assert refused.stderr.replace("\n", "").isprintable()
    planned = run("merge", models[1], "--aligned", models[0], "--base", models[0], *flags[4:], "--dry-run")
    assert planned.stdout.replace("\n", "").isprintable()


# -- tables --------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        *HOSTILE,
        "<script>alert(1)</script>",
        "![x](http://h/x.png)",
        "a | b",
        "`a`",
        "數據",
        "28.7 % [20.1-35.0]",
        "ﷺ",
        "👩‍🔬",
    ]
)
GRIDS = st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[TEXTS] * n), min_size=2, max_size=5))


class Cells(HTMLParser):
    """The text of a table's cells, row by row, and the tags of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def shown(text: str) -> str:
    """Return text as a reader of HTML or Markdown finds it: spaces and line breaks are one space."""
    return " ".join(printable(text, keep=PROSE).split())


@given(GRIDS)
def test_a_table_in_html_has_each_cell_as_it_is_and_no_element_but_its_own(grid: list[tuple[str, ...]]) -> None:
    page = Cells(to_html(table("<b>", grid[0], grid[1:])))
    assert [[" ".join(cell.split()) for cell in row] for row in page.rows] == [list(map(shown, row)) for row in grid]
    assert set(page.tags) <= {"div", "table", "caption", "span", "thead", "tbody", "tr", "th", "td", "bdi"}


@given(GRIDS)
def test_a_table_in_markdown_has_each_cell_as_it_is_and_nothing_that_begins_anything(
    grid: list[tuple[str, ...]],
) -> None:
    header, rule, *rows = markdown_table(table("", grid[0], grid[1:]))
    assert rule == "|" + "---|" * len(grid[0])
    for line, row in zip([header, *rows], grid, strict=True):
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        assert [html.unescape(cell) for cell in cells] == [
            printable(" ".join(text.split()), keep=PROSE) for text in row
        ]
        figures = re.sub(r"\[[-+\d., ]+\](?![(\[:])", "", line)  # an interval is no link
        assert not re.search(r"[<>`*\[\]~\\\n]", figures)


@given(GRIDS)
def test_a_table_on_a_terminal_has_each_cell_whole_whatever_the_width_of_its_letters(
    grid: list[tuple[str, ...]],
) -> None:
    file = io.StringIO()
    console(file=file, width=400).print(to_terminal(table("", grid[0], grid[1:])))
    drawn = file.getvalue()
    assert drawn.replace("\n", "").isprintable()
    for row in grid:
        assert any(all(printable(text).strip() in line for text in row) for line in drawn.splitlines())


@pytest.mark.parametrize("width", [50, 80])
def test_a_narrow_terminal_breaks_names_and_never_figures(width: int) -> None:
    file = io.StringIO()
    made = table("", ("name", "figure"), [("a name that is long " * 5, "28.7 % [20.1-35.0]"), ("數據" * 30, "-")])
    console(file=file, width=width).print(to_terminal(made))
    lines = file.getvalue().splitlines()
    assert any("28.7 % [20.1-35.0]" in line for line in lines)
    wide = [sum(2 if unicodedata.east_asian_width(letter) == "W" else 1 for letter in line) for line in lines]
    assert max(wide) <= width


def test_what_a_column_holds_is_told_by_its_cells() -> None:
    sentence = "a sentence that is longer than a column without one may be"
    row: tuple[Entry, ...] = (
        "7 dwarfs",
        "28.7 %",
        "-0.1 [-0.2, +0.3]",
        "< 0.001",
        "-",
        sentence,
        Cell("60af", tone="code"),
    )
    made = table("", ["x"] * 7, [row, ("a", "-", "", "1", "–", "b", "c")])
    assert [made.kind(i) for i in range(7)] == ["name", "number", "number", "number", "number", "wide", ""]


def test_code_in_a_table_is_code_that_nothing_ends_early() -> None:
    made = table("", ("a", "b"), [("x", Cell("a`|`b_c.d\x1b<i>", tone="code"))])
    assert markdown_table(made)[-1] == r"| x | `a'/'b_c.d\x1b<i>` |"
    assert "<code>a`|`b_<wbr>c.<wbr>d\\x1b&lt;i&gt;</code>" in to_html(made)


def test_a_page_with_a_fact_left_out_is_not_written() -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        render("page.html.jinja", title="t")


def test_markdown_of_any_text_is_one_line_that_fetches_nothing() -> None:
    assert markdown("28.7 % [20.1-35.0], +1.5 [-0.4, +3.2]") == "28.7 % [20.1-35.0], +1.5 [-0.4, +3.2]"
    for link in ("[1](http://h)", "[1][2]", "[1]: http://h", "[a]", "[1x]"):
        assert "[" not in markdown(link)[:-3]
    assert markdown("![x](http://h/x.png)\n# <b>`c`") == ("!&#91;x&#93;(http://h/x.png) # &lt;b&gt;&#96;c&#96;")


def test_every_file_beside_the_modules_ships_with_the_package() -> None:
    root = Path(__file__).parents[1]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packages = {name: root / name.replace(".", "/") for name in globs} | {"*": root / "resta"}
    shipped = {
        file
        for package, names in globs.items()
        for name in names
        for file in packages[package].glob(f"**/{name}" if package == "*" else name)
    }
    files = {file for file in (root / "resta").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert files - shipped == {file for file in files if file.suffix in (".py", ".md")}
    assert {root / "resta" / "page.css", root / "resta" / "verify" / "page.html.jinja"} <= shipped
