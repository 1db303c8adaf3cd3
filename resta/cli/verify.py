"""`resta verify`: is this model's safety back, and what did it cost? A verdict and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resta.cli.asking import (
    HOW,
    JUDGES,
    QUESTIONS,
    SERVERS,
    WHERE,
    WithDefault,
    conditions_of,
    judges_of,
    options,
    private,
    request_of,
)
from resta.cli.output import output
from resta.errors import ModelError, RequestError, TaskError

if TYPE_CHECKING:
    from resta.redeval.plan import Conditions
    from resta.redeval.targets import Target
    from resta.verify.measure import Budget
    from resta.verify.measurement import Measurement
    from resta.verify.policy import Policy


@click.group(cls=WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Say whether a restored model's safety is back, and what that cost: PASS, FAIL, INCONCLUSIVE or INVALID.

    \b
    resta verify RESTORED --tuned TUNED --aligned ALIGNED        the same command goes on after a kill
    resta verify RESTORED --tuned TUNED --aligned ALIGNED --policy policy.yaml --profile quick --bank-dir banks/
    resta verify RESTORED --from SWEEP/chosen.yaml               a sweep's choice, on questions that it has not asked
    resta verify report OUT --policy policy.yaml                 decide again, from what was measured

    All three are asked the same questions and given the same tasks, and compared in pairs. A model is anything
    that `resta redeval` takes, or the folder of an earlier measurement (OUT/aligned), which is not made again.
    Exit codes: 0 PASS, 1 FAIL, 2 wrong request, 3 INCONCLUSIVE, 4 INVALID, 5 the run failed.
    """


UTILITY = options(
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

SHOW = options(
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
    help="Ask as the sweep did that wrote this file, but what it has not asked; options that are given come first.",
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
@SHOW
@click.option("--dry-run", is_flag=True, help="Say what would be asked and what that can show; ask and write nothing.")
@output(type=click.Path(file_okay=False, path_type=Path), default=Path("verify"), show_default=True)
def run(restored: str, tuned: str, aligned: str, out: Path, **given: Any) -> None:
    """Measure what is missing, compare, decide, report. The same command goes on with what is missing."""
    from resta.redeval.targets import Target
    from resta.verify.decision import Verdict
    from resta.verify.gate import check_tasks
    from resta.verify.measure import check_budget, measure_all
    from resta.verify.measurement import note_places, read_measurement
    from resta.verify.plan import plan_power
    from resta.verify.policy import read_policy
    from resta.verify.views import remove_reports

    with _no_verdict():
        policy = read_policy(given["policy_path"])
        names = {"aligned": aligned, "tuned": tuned, "restored": restored}
        budget = budget_of(given, tuned)
        targets = {role: target_of(given, name) for role, name in names.items()}
        if any(isinstance(target, Target) for target in targets.values()):  # else the measurements say what there is
            check_tasks(policy, [task.name for task in budget.suite.tasks] if budget.suite else [])
        check_budget(budget, targets)
        if given["card"]:
            target = targets["restored"]
            _card_of(read_measurement(target).name if isinstance(target, Path) else target.name)
        power = plan_power(policy, budget, targets)
        if given["dry_run"]:
            click.echo("\n".join(power.lines))
            sys.exit(Verdict.PASS.value if power.can_pass else Verdict.INCONCLUSIVE.value)
        private()
        out.mkdir(parents=True, exist_ok=True)
        remove_reports(out)
        with conditions_of(given) as conditions:
            for line in power.lines:
                conditions.note(line)
            models = measure_all(targets, budget, out, conditions)
            note_places(models, out)
            target = targets["aligned"]
            reader = target if isinstance(target, Target) else _measured(models["aligned"], given["device"])
            verdict = _decide(models, reader, out, policy, conditions, given)
    sys.exit(verdict)


def _measured(model: Measurement, device: str) -> Target | None:
    from resta.verify.places import find_model

    return find_model(model.path, model.config["target"], device=device)


@command.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@POLICY
@SHOW
def report(out: Path, **given: Any) -> None:
    """Decide and report again on what `resta verify` measured in OUT, under another policy or with the text shown."""
    from resta.redeval.plan import Conditions
    from resta.verify.measurement import read_measurement, read_places
    from resta.verify.policy import read_policy

    with _no_verdict():
        policy = read_policy(given["policy_path"])
        models = {role: read_measurement(path) for role, path in read_places(out).items()}
        if given["card"]:
            _card_of(models["restored"].name)
        private()
        verdict = _decide(models, None, out, policy, Conditions(), given)
    sys.exit(verdict)


@command.command("import")
@click.argument("measurement", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--task", "names", multiple=True, metavar="NAME[:METRIC]", help="Only these tasks, by this metric.")
def import_logged(measurement: Path, files: tuple[Path, ...], names: tuple[str, ...]) -> None:
    """Add what lm_eval has logged (samples_TASK_DATE.jsonl) as the utility of a MEASUREMENT that has none.

    Measure with --no-utility, add the files of each model to OUT/aligned, OUT/tuned and OUT/restored, then decide with
    `resta verify report OUT`.
    """
    from resta.verify.measurement import is_measurement
    from resta.verify.samples import import_samples

    if not is_measurement(measurement):
        raise ModelError(f"{measurement} holds no measurement; expected a folder such as OUT/aligned of `resta verify`")
    private()
    for each in import_samples(measurement / "utility", files, names):
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
        click.echo("no verdict; the same command goes on with what is missing", err=True)
        raise


def target_of(given: dict[str, Any], name: str) -> Target | Path:
    """Return the model that a name means, or the folder of its measurement. Raises ModelError."""
    from resta.verify.measurement import is_measurement

    if is_measurement(Path(name)):
        return Path(name)
    return request_of(given, name).target


def budget_of(given: dict[str, Any], model: str) -> Budget:
    """Return what the options say is measured of every model. Raises the errors of banks, judges and tasks."""
    from resta.verify.measure import Budget
    from resta.verify.utility import read_suite

    profile, folder = given["profile_name"], given["task_folder"]
    if profile is None and folder is None and not given["task_names"]:
        profile = "regression"
    return Budget(
        request=request_of(given, model),
        judges=tuple(judges_of(given)),
        suite=None
        if given["no_utility"]
        else read_suite(
            profile,
            folder,
            given["task_names"],
            num_fewshot=given["num_fewshot"],
            gen_kwargs=_gen_kwargs(given["gen_kwargs"]),
        ),
        documents=given["documents"],
        tokenizer=given["tokenizer"],
        allow_self_judge=given["allow_self_judge"],
    )


def _gen_kwargs(text: str | None) -> dict[str, Any]:
    """Return KEY=VALUE,... as what it says, values read as YAML. Raises TaskError."""
    from resta.dialect import parse_untyped
    from resta.strict import named

    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or key.strip() in found:
            raise TaskError(f"--gen-kwargs {text}: expected KEY=VALUE,... with each key once, found {part!r}")
        with named(f"--gen-kwargs {part}", TaskError):
            found[key.strip()] = parse_untyped(value)
    return found


def _decide(
    models: dict[str, Measurement],
    aligned: Target | None,
    out: Path,
    policy: Policy,
    conditions: Conditions,
    given: dict[str, Any],
) -> int:
    """Write every report, print the short one and return the verdict's exit code."""
    from resta.redeval.records import environment
    from resta.verify.gate import decide
    from resta.verify.measure import compare_all
    from resta.verify.plan import with_power
    from resta.verify.report import print_decision, to_card
    from resta.verify.trace import make_ruling, with_earlier
    from resta.verify.views import write_reports

    comparison = compare_all(models, aligned, out, policy, conditions)
    ruling = make_ruling(out, policy, given["policy_path"], environment())
    decision = with_power(with_earlier(comparison, decide(comparison, policy), ruling), comparison, policy)
    write_reports(out, comparison, decision, ruling, include_text=given["include_text"])
    if given["card"]:
        _update_card(_card_of(models["restored"].name), to_card(comparison, decision, ruling))
    print_decision(comparison, decision, ruling)
    click.echo(f"report: {out / 'report.html'}")
    return int(decision.verdict.value)


def _card_of(model: str) -> Path:
    """Return the card of a model in a local directory. Raises ModelError."""
    folder = Path(model)
    if not folder.is_dir():
        raise ModelError(f"--card: {folder} is not a local directory; leave --card out, and paste OUT/card.md instead")
    return folder / "README.md"


def _update_card(path: Path, section: str) -> None:
    from resta.journal import write_whole
    from resta.verify.report import with_section

    card = path.read_text(encoding="utf-8") if path.exists() else ""
    write_whole(path, with_section(card, section))
