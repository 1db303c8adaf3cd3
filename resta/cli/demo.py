"""`resta demo`: safety lost and regained, from nothing, on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from resta.cli.output import output
from resta.errors import CheckFailedError, RequestError


@click.command(short_help="Train tiny models, give one its safety back, and prove it.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), required=False)
@output(type=click.Path(file_okay=False, path_type=Path), help="The same as FOLDER. [default: resta-demo]")
@click.option(
    "--model",
    "instruct",
    metavar="PATH|ID",
    help="An instruct model to do the same with, in place of a tiny one trained from nothing; one of 135M parameters "
    "takes ten minutes on two cores.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def command(folder: Path | None, out: Path | None, instruct: str | None, seed: int) -> None:
    """Train three models in FOLDER, restore the safety of the one that lost it, and put the result through the gate.

    Real training, real answers to questions that were never trained on: the scale is chosen by a sweep on some of them
    and verified on others. The exit code is 1 if that fails to show safety lost and regained.
    """
    try:
        from resta.demo.run import failures, run_demo
        from resta.sweep.report import print_outcome
        from resta.verify.report import print_decision
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise RequestError(f"resta demo needs {library}: pip install 'resta[sft,redeval,utility]'") from None
    if folder is not None and out is not None:
        raise RequestError(f"{folder} and --out {out}: name the folder once")
    folder = folder or out or Path("resta-demo")
    began = time.monotonic()

    def note(line: str) -> None:
        click.echo(f"{time.monotonic() - began:6.1f} s  {line}", err=True)

    shown = run_demo(folder, instruct=instruct, seed=seed, note=note)
    print_outcome(shown.outcome, folder / "sweep")
    if made := shown.verified:
        print_decision(made.comparison, made.decision, made.ruling)
        click.echo(f"report: {made.files['report.html']}")
    note("done")
    if found := failures(shown):
        raise CheckFailedError(f"the demo does not show its point here: {'; '.join(found)}")
