"""`resta audit`: check a finished merge, say what was checked, fail with all that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import resta
from resta.auditing import Audit
from resta.checkpoint import following_links
from resta.errors import RequestError
from resta.page import console, printable

EPILOG = """\b
Examples:
  resta audit ./restored                     (inputs from the Hub are fetched at the commits that they had)
  resta audit ./restored --model tuned=./tuned --model aligned=./starling --model base=/mnt/models/vicuna
  resta audit ./restored --model tuned=./tuned --sample 20
"""
SCHEMA = 1


@click.command(epilog=EPILOG)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Recompute N tensors, the largest among them (default: all); checksums are always all checked.",
)
@click.option("--model", "moved", multiple=True, metavar="NAME=PATH", help="Where a local input is.")
@click.option("--follow-links", is_flag=True, help="Trust links that lead out of a model's directory.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads (default: processors, at most 8).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    out: Path, sample: int | None, moved: tuple[str, ...], workers: int | None, as_json: bool, follow_links: bool
) -> None:
    """Re-read the finished merge OUT and recompute its tensors, independently of the merge.

    Checks every file of OUT, every claim of its resta.json, the inputs' identities and, from the inputs, the value of
    every element. Exit code 1 and a list of findings if anything differs. What an audit does not prove is printed too.
    """
    with following_links(trusted=follow_links), byte_progress("tensors", shown=sys.stderr.isatty()) as progress:
        report = resta.audit(out, sample=sample, moved=_parse_moved(moved), workers=workers, progress=progress)
    if as_json:
        click.echo(json.dumps(describe(report), indent=1))  # escaped: a file's name need not be text
    else:
        _print(report)
    report.raise_if_any()


def _print(report: Audit) -> None:
    """Print the verdict if it is a good one, what it rests on, and in any case what it does not prove."""
    if not report.findings:
        click.echo(
            f"{printable(report.out)}: every file is as the merge writes it ({report.files} of them weights, "
            f"{report.checksums} checksums over {report.checked_bytes:,} bytes) and {report.inputs} inputs are as the "
            f"manifest says; {report.elements:,} elements of {report.tensors} tensors of {report.checksums} were "
            "recomputed and equal"
        )
    click.echo(f"SHA-256 of {len(report.sha256)} files took {report.hashing_s:.1f} s of one core; --json lists them")
    for item in report.not_proved:
        click.echo(f"not proved: {printable(item)}")


def describe(report: Audit) -> dict[str, Any]:
    """Return a report as a versioned document."""
    return {"schema": SCHEMA, "kind": "audit", "passed": not report.findings, **asdict(report), "out": str(report.out)}


@contextmanager
def byte_progress(label: str, *, shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show bytes, rate and time left on stderr; yields what is to be called with (name, bytes, bytes in all)."""
    if not shown:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda name, nbytes, total: bar.update(task, advance=nbytes, total=total)


def _parse_moved(moved: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in moved:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise RequestError(f"--model {text}: expected NAME=PATH, such as base=/mnt/models/vicuna")
        if name in found:
            raise RequestError(f"--model {name}: is given twice")
        found[name] = path
    return found
