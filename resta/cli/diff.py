"""`resta diff`: two checkpoints in, tables out, and a document or a picture if asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click
from rich.table import Table

import resta
from resta.checkpoint import following_links
from resta.cli.audit import byte_progress
from resta.distance import Diff, Distance, write_json, write_plot
from resta.errors import RequestError
from resta.figure import require_matplotlib
from resta.page import console, printable

EPILOG = """\b
Examples:
  resta diff ./base ./tuned
  resta diff ./base ./lora --on ./base --plot lora.png
  resta diff org/base org/aligned --json distance.json
"""
MOST_NAMES = 6


@click.command(epilog=EPILOG)
@click.argument("a")
@click.argument("b")
@click.option("--on", metavar="BASE", help="The model that adapters among A and B are applied to.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Save every figure here.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Save a PNG heat map here.")
@click.option("--follow-links", is_flag=True, help="Trust links that lead out of a model's directory.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads (default: processors, at most 8).")
def command(
    a: str,
    b: str,
    on: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    workers: int | None,
    follow_links: bool,
) -> None:
    """Show how far the checkpoint B is from A, per layer and kind of module.

    A and B are model directories, Hub ids or LoRA adapters. The relative size of a difference is |B - A| / |A|
    (Frobenius norms). Entries differ if their values do; an adapter's are taken before any rounding.
    """
    if plot_file:
        require_matplotlib()
    for path in (json_file, plot_file):
        if path and not path.absolute().parent.is_dir():
            raise RequestError(f"{path}: there is no directory {path.absolute().parent}")
    with following_links(trusted=follow_links), byte_progress("comparing", shown=sys.stderr.isatty()) as progress:
        result = resta.diff(a, b, on=on, workers=workers, progress=progress)
    _print(result)
    if json_file:
        write_json(result, json_file)
    if plot_file:
        write_plot(result, plot_file)


def _print(result: Diff) -> None:
    terminal = console(soft_wrap=True)
    terminal.print(_table("by layer", result.layers))
    terminal.print(_table("by module", result.modules))
    total = result.total
    terminal.print(
        f"{total.tensors} tensors compared: |B - A| / |A| = {_relative(total)}, {total.differing:,} of "
        f"{total.entries:,} entries differ ({total.share:.2%})"
    )
    if total.non_finite:
        names = tuple(name for name, distance in result.tensors.items() if distance.non_finite)
        terminal.print(f"{total.non_finite:,} entries are NaN or infinite, in {_names(names)}")
    for side, names in (("A", result.only_in_a), ("B", result.only_in_b)):
        if names:
            terminal.print(f"only in {side}: {_names(names)}")
    for name, problem in result.mismatches.items():
        terminal.print(printable(f"{name}: {problem}"))


def _table(title: str, distances: Mapping[str, Distance]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("tensors", "relative size", "entries that differ"):
        table.add_column(heading, justify="right")
    for name, distance in distances.items():
        table.add_row(printable(name), str(distance.tensors), _relative(distance), f"{distance.share:.2%}")
    return table


def _relative(distance: Distance) -> str:
    return "-" if distance.relative is None else f"{distance.relative:.3g}"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return printable(", ".join(names[:MOST_NAMES])) + more
