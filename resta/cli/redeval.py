"""`resta redeval`: ask a model harmful questions, have the answers judged, report the Attack Success Rate."""

from __future__ import annotations

import contextlib
import csv
import math
from dataclasses import asdict, replace
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
from resta.errors import BankError, ModelError, RestaError, ResumeError, UnansweredError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from resta.redeval.judges import Judge
    from resta.redeval.plan import Conditions, Plan, Request
    from resta.redeval.records import Label, RunDir
    from resta.redeval.targets import Target


@click.group(cls=WithDefault, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure how often a model can be led to harm (Red-Eval).

    \b
    resta redeval MODEL              ask, judge, report; the same command goes on after a kill
    resta redeval MODEL --profile quick --bank-dir banks/ --judge granite-guardian
    resta redeval NAME --base-url http://localhost:8000/v1

    MODEL is a directory, a Hub id, a PEFT adapter's directory, a recipe (an unwritten merge), a served
    model's name with --base-url, or inspect:PROVIDER/NAME. Folders hold harmful text: they are private, and
    what is shown is redacted.
    """


WHAT = options(
    click.argument("model"),
    QUESTIONS,
    WHERE,
    output(type=click.Path(path_type=Path), help="The run's folder. [default: redeval-runs/MODEL-DIGEST]"),
)

SHOW = options(
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
def run(**given: Any) -> None:
    """Ask, judge and report. The same command goes on with what is missing."""
    from resta.journal import FolderLock
    from resta.redeval.judges import check_languages
    from resta.redeval.judging import check_judges, make_ready, note_judges
    from resta.redeval.plan import answer_phase, missing_asks, ready_target
    from resta.redeval.records import environment, find_run, start_run

    request, plan = plan_of_run(given)
    judges = check_judges(judges_of(given), request.target, allow_self=given["allow_self_judge"])
    check_languages(judges, plan.questions)
    path = _place(given, request, plan)
    there = find_run(path, plan.config)
    asking = there is None or bool(missing_asks(there, plan))
    make_ready(judges, None if asking else there, given["judge_device"])
    local = ready_target(request.target, plan) if asking else None
    private()
    folder = start_run(path, plan.config, plan.questions, environment())
    with FolderLock(folder.path):
        _say_plan(folder, plan)
        note_judges(folder, judges)
        stopped: list[str] = []
        with conditions_of(given) as conditions:
            with _borne(stopped, UnansweredError):
                answer_phase(folder, plan, request.target, conditions, judges=judges, local=local)
            del local  # judges come next, and need the memory
            _judge(folder, judges, conditions, stopped)
        _report(folder, **_show(given))
        _end(folder, judges, stopped, answers_too=True)


@command.command("judge")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@JUDGES
@SERVERS
@SHOW
def judge_run(path: Path, **given: Any) -> None:
    """Set more judges on the answers of the run in PATH."""
    from resta.journal import FolderLock
    from resta.redeval.judges import check_languages
    from resta.redeval.judging import check_judges, make_ready, note_judges
    from resta.redeval.records import load_run

    folder = load_run(path)
    judges = check_judges(judges_of(given), _target_of(folder), allow_self=given["allow_self_judge"])
    check_languages(judges, folder.questions().values())
    make_ready(judges, folder, given["judge_device"])
    private()
    with FolderLock(path):
        note_judges(folder, judges)
        stopped: list[str] = []
        with conditions_of(given) as conditions:
            _judge(folder, judges, conditions, stopped)
        _report(folder, **_show(given))
        _end(folder, judges, stopped, answers_too=False)


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@SHOW
def report(path: Path, **given: Any) -> None:
    """Score and report the run in PATH again, complete or not."""
    from resta.journal import FolderLock
    from resta.redeval.records import load_run

    folder = load_run(path)
    private()
    with FolderLock(path):
        _report(folder, **_show(given))


@command.command("export")
@WHAT
@HOW
@click.option("--batch", type=click.Path(path_type=Path), required=True, help="The batch file to write.")
def export(batch: Path, **given: Any) -> None:
    """Write what is to be asked as an OpenAI batch file, to be run elsewhere (`vllm run-batch`)."""
    from resta.journal import FolderLock
    from resta.redeval.batchfile import check_new, write_batch
    from resta.redeval.plan import missing_asks
    from resta.redeval.records import environment, start_run
    from resta.redeval.targets import BATCH

    given["base_url"] = given["base_url"] or BATCH
    request, plan = plan_of_run(given)
    check_new(batch)
    private()
    folder = start_run(_place(given, request, plan), plan.config, plan.questions, environment())
    with FolderLock(folder.path):
        extra = plan.protocol.rendering.template_args
        count = write_batch(batch, missing_asks(folder, plan), request.target.name, plan.decoding, extra)
    click.echo(f"{count} requests in {batch}; import the replies with: resta redeval import {folder.path} FILE")


@command.command("import")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("batch", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_batch(path: Path, batch: Path) -> None:
    """Take the replies in BATCH, the output of a batch, into the run in PATH."""
    from resta.journal import FolderLock, Journal
    from resta.redeval.batchfile import read_batch
    from resta.redeval.plan import keep_answer, missing_asks, plan_of
    from resta.redeval.records import Failure, load_run

    folder = load_run(path)
    plan = plan_of(folder)
    private()
    with FolderLock(path):
        missing = {ask.id: ask for ask in missing_asks(folder, plan)}
        replies, failures = read_batch(batch, plan.asks)
        new = [reply for reply in replies if reply.id in missing]
        with Journal(folder.path / "answers.jsonl") as journal:
            for reply in new:
                journal.append(keep_answer(plan, missing[reply.id], reply))
        with Journal(folder.path / "failures.jsonl") as journal:
            for failure in failures:
                if failure.id in missing:
                    journal.append(Failure(ask_id=failure.id, asked="model", reason=failure.reason))
    for failure in failures[:5]:
        click.echo(f"note: {failure.id}: {failure.reason}", err=True)
    left = len(missing) - len(new)
    said = f"{len(new)} answers taken in, {len(failures)} requests failed, {left} missing"
    if left and not new:
        raise UnansweredError(f"{batch}: {said}; export what is missing again, or judge what is there")
    click.echo(said)


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@SHOW
def labels(path: Path, file: Path, **given: Any) -> None:
    """Take human labels from FILE, disagreements.csv with `human_label` filled in (harmful or safe)."""
    from resta.journal import FolderLock, Journal
    from resta.redeval.records import load_run

    folder = load_run(path)
    rows = read_labels(file, {answer.id for answer in folder.answers()}, required=True)
    private()
    with FolderLock(path):
        with Journal(folder.path / "labels.jsonl") as journal:
            for label in rows:
                journal.append(label)
        _report(folder, **_show(given))


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


# -- from options to requests --------------------------------------------------------------------------------


def plan_of_run(given: dict[str, Any]) -> tuple[Request, Plan]:
    """Return what is asked of the one model that is named, and the plan of it."""
    from resta.redeval.plan import make_plan

    request = request_of(given, given["model"])
    local = request.target.local
    if local and local.base is not None and not local.is_adapter:
        raise ModelError(f"--base is for an adapter's directory; {local.model} holds no adapter_config.json")
    if local and local.files is not None and not local.is_recipe:
        raise ModelError(f"--files is for a recipe; {local.model} is none (.yaml)")
    return request, make_plan(request)


def _target_of(folder: RunDir) -> Target:
    from resta.redeval.models import LocalSpec
    from resta.redeval.targets import Target

    facts = folder.config["target"]
    return Target(name=facts["name"], local=LocalSpec(model=facts["name"]) if facts["kind"] == "local" else None)


def _place(given: dict[str, Any], request: Request, plan: Plan) -> Path:
    """Return the run's folder, whether it is there or not."""
    from resta.fingerprint import digest

    place = request.target.identity  # of a folder its whole path, so that "." has a name, too
    short = place.rstrip("/").split("/")[-1].removesuffix(".yaml")
    return given["out"] or Path("redeval-runs") / f"{short}-{digest(plan.config)[:12]}"


def _say_plan(folder: RunDir, plan: Plan) -> None:
    done = len(folder.answers())
    kept = f", {done} of them answered already" if done else ""
    click.echo(
        f"run {folder.run_id} in {folder.path}, protocol {plan.protocol.name}: {plan.protocol.about}",
        err=True,
    )
    click.echo(f"{len(plan.questions)} questions, {len(plan.asks)} prompts{kept}", err=True)
    for bank, count in plan.repeats.items():
        treated = "asked once" if plan.config["duplicates"] == "once" else "asked as often as published"
        click.echo(f"note: {count} questions of {bank} repeat an earlier one; {treated}", err=True)


# -- what does not go through --------------------------------------------------------------------------------


@contextlib.contextmanager
def _borne(stopped: list[str], kind: type[RestaError]) -> Iterator[None]:
    """Note an error and go on: what is there is judged and reported all the same, and the end says what is not."""
    try:
        yield
    except kind as error:
        stopped.append(str(error))


def _judge(folder: RunDir, judges: Sequence[Judge], conditions: Conditions, stopped: list[str]) -> None:
    from resta.redeval.judging import judge_phase

    for judge in judges:
        with _borne(stopped, RestaError):
            judge_phase(folder, judge, conditions)


def _end(folder: RunDir, judges: Sequence[Judge], stopped: Sequence[str], *, answers_too: bool) -> None:
    """Say what is missing after all that was asked for, and how to go on. Raises UnansweredError if anything is."""
    from resta.redeval.judging import pending, untested
    from resta.redeval.plan import missing_asks, plan_of

    plan, lines = plan_of(folder), list(stopped)
    if answers_too and (missing := missing_asks(folder, plan)):
        reasons = {failure.ask_id: failure.reason for failure in folder.failures()}
        why = next((f", the first for: {reasons[ask.id]}" for ask in missing if ask.id in reasons), "")
        lines.append(f"{len(missing)} of {len(plan.asks)} questions have no answer and count as unanswered{why}")
    for judge in judges:
        if left := len(pending(folder, judge)):
            lines.append(f"{judge.id} has no verdict on {left} answers")
        if left := len(untested(folder, judge)):
            lines.append(f"{judge.id} is yet to be tested on {left} known answers")
    if lines:
        raise UnansweredError(
            f"{'; '.join(lines)}. What is there is kept, judged and reported. The same command asks only the rest; "
            f"resta redeval judge {folder.path} sets judges on the answers that are there, and "
            f"resta redeval report {folder.path} shows them"
        )


def _show(given: dict[str, Any]) -> dict[str, Any]:
    return {"include_text": given["include_text"], "spot_check": given["spot_check"]}


# -- reports and labels --------------------------------------------------------------------------------------


def _report(folder: RunDir, *, include_text: bool, spot_check: int) -> None:
    """Write every view of a run's records and print the short one."""
    from rich.console import Console

    from resta.journal import document, to_json, write_whole
    from resta.redeval.control import controls_of
    from resta.redeval.plan import plan_of
    from resta.redeval.records import SCHEMA
    from resta.redeval.report import disagreement_csv, make_report, print_report, to_html, to_markdown
    from resta.redeval.score import disagreements, join, missing_rows, score

    questions, answers, verdicts = folder.questions(), folder.answers(), folder.current_verdicts()
    asks, rows = plan_of(folder).asks, join(questions, answers, verdicts)
    measures = {judge: facts["measures"] for judge, facts in folder.judges().items()}
    scores = score(questions, answers, verdicts, folder.labels(), missing_rows(questions, asks, measures, rows))
    scores = replace(scores, controls=controls_of(folder))
    made = make_report(
        folder.config,
        scores,
        rows,
        folder.judges(),
        answered=(len(answers), len(asks)),
        include_text=include_text,
    )
    views = {
        "report.md": to_markdown(made),
        "report.html": to_html(made),
        "report.json": document("redeval", {"config": folder.config, "scores": asdict(scores)}, schema=SCHEMA),
        "scores.jsonl": "".join(to_json(asdict(c)) + "\n" for c in (*scores.cells, *scores.categories)),
        "disagreements.csv": disagreement_csv(
            rows,
            {label.answer_id: "harmful" if label.harmful else "safe" for label in folder.labels()},
            spot_check=spot_check,
        ),
    }
    for name, text in views.items():
        if name == "disagreements.csv" and (waiting := _labels_waiting(folder)):
            click.echo(f"note: {folder.path / name} holds {waiting}; it stays as it is", err=True)
        else:
            write_whole(folder.path / name, text)
    _score_logs(folder)
    print_report(made, Console())
    if disagreements(rows)[0] or spot_check:
        click.echo(f"to label by hand: {folder.path / 'disagreements.csv'} (private: questions and answers in full)")
    click.echo(f"report: {folder.path / 'report.html'}   log: inspect view --log-dir {folder.path / 'logs'}")


def _labels_waiting(folder: RunDir) -> str:
    """Return what a person has written into the run's CSV and not imported yet; hours of work may lie there."""
    file = folder.path / "disagreements.csv"
    if not file.exists():
        return ""
    imported = {label.answer_id: label.harmful for label in folder.labels()}
    try:
        found = read_labels(file, {answer.id for answer in folder.answers()}, required=False)
    except RestaError as error:
        return f"labels that cannot be read ({error})"
    new = sum(imported.get(label.answer_id) is not label.harmful for label in found)
    return f"{new} labels that are not imported (resta redeval labels {folder.path} {file})" if new else ""


def _score_logs(folder: RunDir) -> None:
    """Put the verdicts into the answers' logs, where there are any."""
    if not (folder.path / "logs" / "answers").is_dir():
        return
    from resta.redeval.engine import LoggedScore, score_logs

    scores: dict[str, list[LoggedScore]] = {}
    counts: dict[str, list[int]] = {}
    questions = folder.questions()
    asked = {answer.id: questions[answer.qid] for answer in folder.answers()}
    for verdict in folder.current_verdicts():
        if verdict.answer_id not in asked:  # its line was damaged and taken out
            continue
        logged = LoggedScore(judge=verdict.judge, label=verdict.label, explanation=verdict.raw)
        scores.setdefault(verdict.answer_id, []).append(logged)
        if not asked[verdict.answer_id].safe:
            tally = counts.setdefault(verdict.judge, [0, 0])
            tally[0] += verdict.label == "harmful"
            tally[1] += 1
    rates = {judge: {"asr": harmful / total} for judge, (harmful, total) in counts.items()}
    score_logs(folder.path / "logs" / "answers", scores, rates)


def read_labels(file: Path, known: set[str], *, required: bool) -> list[Label]:
    """Return the labels filled in in a CSV; `required` at least one. Raises BankError, ResumeError."""
    from resta.redeval.records import Label

    words = {"harmful": True, "unharmful": False, "safe": False, "refused": False}
    found = []
    for number, row in enumerate(_label_rows(file), 2):
        word = (row["human_label"] or "").strip().lower()
        if not word:
            continue
        if word not in words:
            raise BankError(f"{file}: line {number}: human_label must be harmful or safe, found {word!r}")
        if row["answer_id"] not in known:
            raise ResumeError(f"{file}: line {number}: {row['answer_id']!r} is no answer of this run")
        try:
            weight = float(row.get("weight") or 1)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise BankError(f"{file}: line {number}: weight must be a number above 0, found {row['weight']!r}")
        found.append(Label(answer_id=row["answer_id"], harmful=words[word], weight=weight))
    if required and not found:
        raise BankError(f"{file}: no human_label is filled in")
    return found


def _label_rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise BankError(f"{file}: not CSV in UTF-8: {error}") from error
    if not {"answer_id", "human_label"} <= set(names):
        shown = ", ".join(names)[:80]
        raise BankError(f"{file}: expected the columns answer_id and human_label, comma-separated, found {shown!r}")
    return rows
