"""`resta redeval`: ask a model harmful questions, have the answers judged, report the Attack Success Rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resta.cli.options import (
    HOW,
    JUDGES,
    QUESTIONS,
    SERVERS,
    WHERE,
    WithDefault,
    questions_of,
    run_options,
    target_of,
    together,
)
from resta.cli.output import output
from resta.errors import RequestError, UnansweredError

if TYPE_CHECKING:
    from resta.redeval import Run, RunOptions, Target, Views


@click.group(cls=WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure how often a model can be led to harm (Red-Eval).

    \b
    resta redeval MODEL              ask, judge, report; the same command continues after a kill
    resta redeval MODEL --profile quick --bank-dir banks/ --judge granite-guardian
    resta redeval NAME --base-url http://localhost:8000/v1

    MODEL is a directory, a Hub id, a PEFT adapter's directory, a recipe (an unwritten merge), a served
    model's name with --base-url, or inspect:PROVIDER/NAME. Folders hold harmful text: they are private, and
    what is shown is redacted.
    """


WHAT = together(
    click.argument("model"),
    QUESTIONS,
    WHERE,
    output(type=click.Path(path_type=Path), help="The run's folder. [default: redeval-runs/MODEL-DIGEST]"),
)

SHOW = together(
    click.option("--include-text", is_flag=True, help="Show questions and answers in the report's files."),
    click.option(
        "--spot-check",
        type=click.IntRange(min=0),
        default=20,
        show_default=True,
        help="Agreed answers to add to disagreements.csv; without them labels cannot correct a rate.",
    ),
)


@command.command()
@WHAT
@JUDGES
@HOW
@SERVERS
@SHOW
def run(model: str, out: Path | None, **given: Any) -> None:
    """Ask, judge and report. The same command continues with what is missing."""
    from resta import redeval

    with run_options(given) as options:
        made = redeval.run(
            _target(model, given),
            questions=questions_of(given),
            judges=given["judges"],
            allow_self_judge=given["allow_self_judge"],
            out=out,
            views=_views(given),
            options=options,
        )
    _show(made)
    made.raise_if_missing()


@command.command("judge")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@JUDGES
@SERVERS
@SHOW
def judge_run(path: Path, **given: Any) -> None:
    """Have the answers of the run in PATH judged by more judges."""
    from resta.redeval.evaluation import judge

    with run_options(given) as options:
        made = judge(
            path,
            judges=given["judges"],
            allow_self_judge=given["allow_self_judge"],
            views=_views(given),
            options=options,
        )
    _show(made)
    made.raise_if_missing()


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@SHOW
def report(path: Path, **given: Any) -> None:
    """Score and report the run in PATH again, complete or not."""
    from resta.redeval.evaluation import report as report_again

    _show(report_again(path, views=_views(given), options=_quiet()))


@command.command("export")
@WHAT
@HOW
@click.option("--batch", type=click.Path(path_type=Path), required=True, help="The batch file to write.")
def export(model: str, out: Path | None, batch: Path, **given: Any) -> None:
    """Write what is to be asked as an OpenAI batch file, to be run elsewhere (`vllm run-batch`)."""
    from resta.redeval.evaluation import export_batch
    from resta.redeval.targets import BATCH

    target = _target(model, {**given, "base_url": given["base_url"] or BATCH})
    folder, count = export_batch(batch, target, questions=questions_of(given), out=out, options=_quiet())
    click.echo(f"{count} requests in {batch}; import the replies with: resta redeval import {folder} FILE")


@command.command("import")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("batch", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_batch(path: Path, batch: Path) -> None:
    """Import the replies in BATCH, a batch's output, into the run in PATH."""
    from resta.redeval.evaluation import import_batch as take_in

    taken, failures, left = take_in(path, batch)
    for failure in failures[:5]:
        click.echo(f"note: {failure.id}: {failure.reason}", err=True)
    said = f"{taken} answers imported, {len(failures)} requests failed, {left} missing"
    if left and not taken:
        raise UnansweredError(f"{batch}: {said}; export what is missing again, or judge what is there")
    click.echo(said)


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@SHOW
def labels(path: Path, file: Path, **given: Any) -> None:
    """Take human labels from FILE, disagreements.csv with `human_label` filled in (harmful or safe)."""
    from resta.redeval.evaluation import label

    _show(label(path, file, views=_views(given), options=_quiet()))


@command.command("list")
def list_known() -> None:
    """List the banks, templates and judges that are known by name."""
    from resta.redeval import judges, questions, templates

    click.echo("banks")
    for name, safe in questions.BUILT_IN.items():
        use = "; for smoke tests" if name.startswith("smoke") else ""
        click.echo(f"  {name:24}built in, {'safe look-alikes' if safe else 'harmful'}{use}")
    for name, (file, _) in questions.PUBLISHED.items():
        click.echo(f"  {name:24}{file} of declare-lab/red-instruct; --bank-dir or --download")
    click.echo(f"templates\n  {', '.join(templates.BUILT_IN)} (the published structures in own words)\njudges")
    for name in judges.built_in():
        spec = judges.read_judge(name)
        mark = "" if spec.confirmed else " [format not confirmed on real weights]"
        click.echo(f"  {name:24}{spec.about}{mark}")


# -- from options to requests, and results on a terminal -----------------------------------------------------


def _target(model: str, given: dict[str, Any]) -> Target:
    """Return the one model that is named. Raises RequestError."""
    target = target_of(model, given)
    local = target.local
    if local and local.base is not None and not local.is_adapter:
        raise RequestError(f"--base is for an adapter's directory; {local.model} holds no adapter_config.json")
    if local and local.files is not None and not local.is_recipe:
        raise RequestError(f"--files is for a recipe; {local.model} is none (.yaml)")
    return target


def _views(given: dict[str, Any]) -> Views:
    from resta.redeval import Views

    return Views(include_text=given["include_text"], spot_check=given["spot_check"])


def _quiet() -> RunOptions:
    """Return the options of what asks nothing: notes go to stderr, and there is no bar."""
    from resta.redeval import RunOptions

    return RunOptions(note=lambda line: click.echo(line, err=True))


def _show(made: Run) -> None:
    """Print the short report of a run, and where the long one lies."""
    from rich.console import Console

    from resta.redeval.report import print_report

    print_report(made.report, Console())
    if made.to_label:
        click.echo(f"to label by hand: {made.path / 'disagreements.csv'} (private: questions and answers in full)")
    click.echo(f"report: {made.path / 'report.html'}   log: inspect view --log-dir {made.path / 'logs'}")
