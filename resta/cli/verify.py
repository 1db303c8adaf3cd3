"""`resta verify`: is this model's safety back, and what did it cost? A verdict and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from resta.errors import RequestError

if TYPE_CHECKING:
    from resta.redeval import Target
    from resta.verify import Attacks, Exam, Verification, Views


@click.group(cls=WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Say whether a restored model's safety is back, and what that cost: PASS, FAIL, INCONCLUSIVE or INVALID.

    \b
    resta verify RESTORED --tuned TUNED --aligned ALIGNED        the same command continues after a kill
    resta verify RESTORED --tuned TUNED --aligned ALIGNED --policy policy.yaml --profile quick --bank-dir banks/
    resta verify RESTORED --from SWEEP/chosen.yaml               a sweep's choice, on questions the sweep has not asked
    resta verify report OUT --policy policy.yaml                 decide again, from what was measured

    All three are asked the same questions and given the same tasks, and compared in pairs. A model is anything
    that `resta redeval` takes, or the folder of an earlier measurement (OUT/aligned), which is not made again.
    Exit codes: 0 PASS, 1 FAIL, 2 wrong request, 3 INCONCLUSIVE, 4 INVALID, 5 the run failed.
    """


UTILITY = together(
    click.option(
        "--utility",
        "profile_name",
        metavar="PROFILE",
        help="leaderboard-v1, starling, regression or smoke. [default: regression]",
    ),
    click.option(
        "--tasks",
        "task_folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of lm-eval task files of your own.",
    ),
    click.option(
        "--task",
        "task_names",
        multiple=True,
        metavar="NAME[:METRIC]",
        help="Only these tasks: of the profile, of the folder, or any that lm_eval has.",
    ),
    click.option("--num-fewshot", type=click.IntRange(min=0), help="Shots of every task. [default: each task's own]"),
    click.option("--gen-kwargs", metavar="KEY=VALUE,...", help="For tasks that generate: temperature=0.7,top_p=0.9."),
    click.option("--no-utility", is_flag=True, help="Measure no utility; rules on it are then inconclusive."),
    click.option("--documents", type=click.IntRange(min=1), help="Documents per task. [default: all]"),
    click.option("--tokenizer", metavar="DIR", help="For served models: their tokenizer, which utility needs."),
)

POLICY = click.option(
    "--policy",
    "policy_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The rules. [default: see `resta verify policy`]",
)

DURABILITY = together(
    click.option(
        "--durability",
        is_flag=True,
        help="Also attack the aligned and the restored model in known ways, in memory, and report what is left of "
        "their safety. Slow; local models only; no verdict rests on it.",
    ),
    click.option(
        "--durability-questions",
        type=click.IntRange(min=1),
        metavar="N",
        help="Harmful questions of the gate's that attacked models are asked, at most. [default: 100]",
    ),
    click.option(
        "--durability-data",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Harmless conversations that an attacked model is fine-tuned on, as `resta sft` reads them. [default: "
        "built-in prompts with TUNED's own answers]",
    ),
)

SHOW = together(
    click.option("--include-text", is_flag=True, help="Show questions and answers in the HTML report."),
    click.option("--card", is_flag=True, help="Put the result into RESTORED's README.md, in a section of its own."),
)


def _take_settings(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let what a sweep's choice carries stand for the options that are not given."""
    if path is None:
        return
    from resta.sweep.settings import read_settings

    known = {each.name for each in ctx.command.params} - {parameter.name, "restored", "out"}
    ctx.default_map = {**(ctx.default_map or {}), **read_settings(path, known)}


@command.command("run")
@click.argument("restored")
@click.option(
    "--from",
    "settings",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_take_settings,
    expose_value=False,
    is_eager=True,
    metavar="CHOSEN.yaml",
    help="Ask as the sweep that wrote this file did, but other questions; options given here take precedence.",
)
@click.option("--tuned", required=True, metavar="MODEL", help="The fine-tuned model before restoration.")
@click.option("--aligned", required=True, metavar="MODEL", help="The safety-aligned model.")
@POLICY
@QUESTIONS
@UTILITY
@JUDGES
@WHERE
@HOW
@SERVERS
@DURABILITY
@SHOW
@click.option("--dry-run", is_flag=True, help="Say what would be asked and what that can show; ask and write nothing.")
@output(type=click.Path(file_okay=False, path_type=Path), default=Path("verify"), show_default=True)
def run(restored: str, tuned: str, aligned: str, out: Path, **given: Any) -> None:
    """Measure what is missing, compare, decide, report. The same command continues with what is missing."""
    from resta import verify
    from resta.verify.release import forecast_durability

    with _no_verdict():
        attacks = _attacks(given)
        models = [_model(given, name) for name in (restored, tuned, aligned)]
        asked = {"tuned": models[1], "aligned": models[2], "policy": given["policy_path"], "exam": exam_of(given)}
        if given["dry_run"]:
            power = verify.forecast(models[0], **asked)
            click.echo("\n".join(power.lines))
            if attacks is not None:
                models_only = {name: asked[name] for name in ("tuned", "aligned", "exam")}
                click.echo("\n".join(forecast_durability(models[0], **models_only, durability=attacks)))
            sys.exit(verify.Verdict.PASS.value if power.can_pass else verify.Verdict.INCONCLUSIVE.value)
        with run_options(given) as options:
            made = verify.run(models[0], **asked, durability=attacks, out=out, views=_views(given), options=options)
        _show(made)
    sys.exit(made.exit_code)


@command.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@POLICY
@SHOW
def report(out: Path, **given: Any) -> None:
    """Decide and report again on what `resta verify` measured in OUT, under another policy or with the text shown."""
    from resta.verify.release import decide_again

    with _no_verdict():
        made = decide_again(out, policy=given["policy_path"], views=_views(given))
        _show(made)
    sys.exit(made.exit_code)


@command.command("import")
@click.argument("measurement", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--task", "names", multiple=True, metavar="NAME[:METRIC]", help="Only these tasks, by this metric.")
def import_logged(measurement: Path, files: tuple[Path, ...], names: tuple[str, ...]) -> None:
    """Add what lm_eval has logged (samples_TASK_DATE.jsonl) as the utility of a MEASUREMENT that has none.

    Measure with --no-utility, add the files of each model to OUT/aligned, OUT/tuned and OUT/restored, then decide with
    `resta verify report OUT`.
    """
    from resta.redeval.records import private_files
    from resta.verify.measurement import is_measurement
    from resta.verify.samples import import_samples

    if not is_measurement(measurement):
        raise RequestError(
            f"{measurement} holds no measurement; expected a folder such as OUT/aligned of `resta verify`"
        )
    with private_files():
        found = import_samples(measurement / "utility", files, names)
    for each in found:
        mean = sum(document.value for document in each.documents) / len(each.documents)
        click.echo(f"{each.task}: {each.facts['metric']} {mean:.3f} over {len(each.documents)} documents")


@command.command("policy")
def show_policy() -> None:
    """Print the default policy, every rule explained; a start for one's own."""
    from resta.verify.policy import default_policy

    click.echo(default_policy(), nl=False)


@contextmanager
def _no_verdict() -> Iterator[None]:
    """Say below any failure to measure that there is no verdict."""
    try:
        yield
    except RequestError:
        raise
    except Exception:
        click.echo("no verdict; the same command measures what is missing", err=True)
        raise


def _model(given: Mapping[str, Any], name: str) -> Target | Path:
    """Return the model that a name means, or the folder of its measurement. Raises RequestError."""
    from resta.verify.measurement import is_measurement

    return Path(name) if is_measurement(Path(name)) else target_of(name, given)


def exam_of(given: Mapping[str, Any]) -> Exam:
    """Return what is measured of every model, as the options say. Raises RequestError."""
    from resta.verify import Exam, Utility

    utility = Utility(
        profile=given["profile_name"],
        folder=given["task_folder"],
        names=given["task_names"],
        num_fewshot=given["num_fewshot"],
        gen_kwargs=_gen_kwargs(given["gen_kwargs"]),
        documents=given["documents"],
        tokenizer=given["tokenizer"],
    )
    return Exam(
        questions=questions_of(given),
        judges=given["judges"],
        utility=None if given["no_utility"] else utility,
        allow_self_judge=given["allow_self_judge"],
    )


def _gen_kwargs(text: str | None) -> dict[str, Any]:
    """Return KEY=VALUE,... as what it says, values read as YAML. Raises RequestError."""
    from resta.dialect import parse_untyped
    from resta.strict import named

    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or key.strip() in found:
            raise RequestError(f"--gen-kwargs {text}: expected KEY=VALUE,... with each key once, found {part!r}")
        with named(f"--gen-kwargs {part}"):
            found[key.strip()] = parse_untyped(value)
    return found


def _attacks(given: Mapping[str, Any]) -> Attacks | None:
    """Return what is asked of attacked models; None where none is to be attacked. Raises RequestError."""
    from resta.verify import Attacks

    count, data = given["durability_questions"], given["durability_data"]
    if given["durability"]:
        return Attacks(data=data) if count is None else Attacks(questions=count, data=data)
    if count is not None or data is not None:
        raise RequestError("--durability-questions and --durability-data would change nothing without --durability")
    return None


def _views(given: Mapping[str, Any]) -> Views:
    from resta.verify import Views

    return Views(include_text=given["include_text"], card=given["card"])


def _show(made: Verification) -> None:
    from resta.verify.report import print_decision

    print_decision(made.comparison, made.decision, made.ruling, made.durability)
    click.echo(f"report: {made.files['report.html']}")
