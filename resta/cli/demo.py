"""`resta demo`: safety lost and regained, from nothing, on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from resta.errors import DemoError, MissingExtraError


@click.command(short_help="Train three tiny models, give one its safety back, and measure it.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("resta-demo"))
@click.option(
    "--model",
    "instruct",
    metavar="PATH|ID",
    help="An instruct model to do the same with, in place of a tiny one trained from nothing.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def command(folder: Path, instruct: str | None, seed: int) -> None:
    """Train three tiny models in FOLDER, give the one that lost its safety that safety back, and measure all four.

    Real training, real answers to questions that were never trained on. The exit code is 1 if it fails to show that
    the fine-tune lost its safety and the merge regained it.
    """
    try:
        from resta.demo.run import run_demo, shown
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise MissingExtraError(f"resta demo needs {library}: pip install 'resta[sft,redeval]'") from None
    began = time.monotonic()

    def note(line: str) -> None:
        click.echo(f"{time.monotonic() - began:6.1f} s  {line}", err=True)

    rates = run_demo(folder, instruct=instruct, seed=seed, note=note)
    click.echo("held-out questions   harmful answered   safe refused")
    for name, found in rates.items():
        click.echo(f"{name:20}{found.asr:17.1%}{found.over_refusal:15.1%}")
    click.echo(f"again: resta merge {folder / 'recipe.yaml'} -o {folder / 'restored-again'}")
    if failures := shown(rates):
        raise DemoError("the demo does not show its point here: " + "; ".join(failures))
