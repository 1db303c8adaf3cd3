"""A whole run as one call: every answer, every judge, scores and reports. What the command line and scripts share."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resta.errors import RestaError, UnansweredError
from resta.fingerprint import digest
from resta.journal import FolderLock, Journal, document, to_json, write_whole
from resta.redeval.answering import answer_phase, keep_answer, missing_requests, ready_target
from resta.redeval.batchfile import check_new, read_batch, write_batch
from resta.redeval.control import controls_of
from resta.redeval.judges import Judge, check_languages, parse_judge
from resta.redeval.judging import check_judges, judge_phase, make_ready, note_judges, pending, untested
from resta.redeval.labels import FILE, labels_waiting, read_labels
from resta.redeval.messages import NoReply
from resta.redeval.models import LocalModel, LocalSpec
from resta.redeval.plan import RunPlan, make_plan, plan_of, read_spec
from resta.redeval.profiles import Questions
from resta.redeval.progress import RunOptions
from resta.redeval.questions import Question
from resta.redeval.records import (
    SCHEMA,
    Answer,
    Failure,
    Judgement,
    RunDir,
    environment,
    find_run,
    load_run,
    private_files,
    start_run,
)
from resta.redeval.report import Report, disagreement_csv, make_report, to_html, to_markdown
from resta.redeval.score import Scores, disagreements, join, missing_rows, score
from resta.redeval.targets import Target, parse_target

JUDGES = ("refusal-strings",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What a run's reports show: questions and answers, and how many agreed answers the CSV to label holds."""

    include_text: bool = False
    spot_check: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run came to. Its records, of which all else is a view, lie in `path`.

    `scores.cells` hold the rates of every judge, bank and template with their intervals, `scores.categories` those of
    every category, `scores.overall` those of all harmful questions together. What has no answer or no verdict counts as
    unanswered there, and `missing` says it in words; it is empty where everything was answered and judged.
    """

    path: Path
    scores: Scores
    report: Report
    missing: tuple[str, ...]
    to_label: bool  # whether disagreements.csv holds answers for people to label

    @property
    def answers(self) -> list[Answer]:
        """Return every answer."""
        return load_run(self.path).answers()

    @property
    def verdicts(self) -> list[Judgement]:
        """Return what every judge, as it is declared now, said of them."""
        return load_run(self.path).current_verdicts()

    def raise_if_missing(self) -> None:
        """Raise UnansweredError, saying how to go on, where an answer or a verdict is missing."""
        if self.missing:
            raise UnansweredError(
                f"{'; '.join(self.missing)}. What is there is kept, judged and reported. The same command asks only "
                f"the rest; resta redeval judge {self.path} judges the answers that there are, and "
                f"resta redeval report {self.path} shows them"
            )


def run(
    model: str | Path | Target,
    *,
    questions: Questions = Questions(),
    judges: Sequence[str | Judge] = JUDGES,
    allow_self_judge: bool = False,
    out: str | Path | None = None,
    views: Views = Views(),
    options: RunOptions = RunOptions(),
) -> Run:
    """Ask a model harmful questions, have the answers judged, score and report them.

        from resta.redeval import Questions

        asked = Questions(banks=["questions.json"], safe_banks=["smoke-safe"], templates=["standard", "cou"], limit=4)
        run = resta.redeval.run("restored", questions=asked, judges=["refusal-strings"], out="asked")
        for cell in run.scores.cells:
            print(cell.judge, cell.bank, cell.template, cell.asr.value, cell.asr.low, cell.asr.high)
        run.raise_if_missing()

    Args:
        model: a directory, a Hub id, an adapter, a recipe (an unwritten merge), or what `parse_target` returns.
        questions: what is asked and how; by default a few built-in questions.
        judges: NAME, NAME=MODEL or NAME=MODEL@URL, of a built-in judge or one's own YAML file.
        allow_self_judge: let the model under test judge itself.
        out: the run's folder; by default redeval-runs/MODEL-DIGEST. A run that broke off goes on there.
        views: what the reports show.
        options: how fast, on what device judges run, and what is called as it goes on.

    Raises:
        RequestError: the request cannot be carried out; nothing was asked.
        RestaError: asking broke off; what was answered is kept. Single failures are in the result.
    """
    target = model if isinstance(model, Target) else parse_target(model)
    spec = read_spec(questions)
    plan = make_plan(spec, target)
    named = check_judges(read_judges(judges), target, allow_self=allow_self_judge)
    check_languages(named, plan.questions)
    path = Path(out) if out is not None else default_place(plan, target)
    with private_files():
        folder, local = start(path, plan, target, named, options)
        with FolderLock(folder.path):
            _say_plan(folder, plan, [*spec.notes], options)
            note_judges(folder, named)
            stopped: list[str] = []
            with _borne(stopped, UnansweredError):
                answer_phase(folder, plan, target, options, judges=named, local=local)
            del local  # judges come next, and need the memory
            _judge(folder, named, options, stopped)
            return _result(folder, views, options, (*stopped, *_unanswered(folder), *_unjudged(folder, named)))


def judge(
    path: Path,
    *,
    judges: Sequence[str | Judge] = JUDGES,
    allow_self_judge: bool = False,
    views: Views = Views(),
    options: RunOptions = RunOptions(),
) -> Run:
    """Set more judges on the answers of the run in `path`. Raises RequestError, RestaError, as `run` does."""
    folder = load_run(path)
    named = check_judges(read_judges(judges), _target_of(folder), allow_self=allow_self_judge)
    check_languages(named, folder.questions().values())
    make_ready(named, folder, options.judge_device)
    with private_files(), FolderLock(path):
        note_judges(folder, named)
        stopped: list[str] = []
        _judge(folder, named, options, stopped)
        return _result(folder, views, options, (*stopped, *_unjudged(folder, named)))


def report(path: Path, *, views: Views = Views(), options: RunOptions = RunOptions()) -> Run:
    """Score and report the run in `path` again, complete or not. Raises ResumeError."""
    folder = load_run(path)
    with private_files(), FolderLock(path):
        return _result(folder, views, options, (*_unanswered(folder), *_without_verdict(folder)))


def label(path: Path, file: Path, *, views: Views = Views(), options: RunOptions = RunOptions()) -> Run:
    """Take people's labels from a CSV into the run in `path`, and report it again. Raises RequestError, ResumeError."""
    folder = load_run(path)
    rows = read_labels(file, {answer.id for answer in folder.answers()}, required=True)
    with private_files(), FolderLock(path):
        with Journal(folder.path / "labels.jsonl") as journal:
            for row in rows:
                journal.append(row)
        return _result(folder, views, options, (*_unanswered(folder), *_without_verdict(folder)))


def export_batch(
    batch: Path, target: Target, *, questions: Questions, out: Path | None, options: RunOptions
) -> tuple[Path, int]:
    """Write what a run has yet to ask as an OpenAI batch file; return the run's folder and the number of requests."""
    spec = read_spec(questions)
    plan = make_plan(spec, target)
    check_new(batch)
    for line in spec.notes:
        options.note(f"note: {line}")
    with private_files():
        folder = start_run(out or default_place(plan, target), plan.config, plan.questions, environment())
        with FolderLock(folder.path):
            extra = plan.protocol.rendering.template_args
            return folder.path, write_batch(batch, missing_requests(folder, plan), target.name, plan.decoding, extra)


def import_batch(path: Path, batch: Path) -> tuple[int, list[NoReply], int]:
    """Take a batch's replies into the run in `path`; return how many, what failed, and how many are missing still."""
    folder = load_run(path)
    plan = plan_of(folder)
    with private_files(), FolderLock(path):
        missing = {request.id: request for request in missing_requests(folder, plan)}
        replies, failures = read_batch(batch, plan.requests)
        new = [reply for reply in replies if reply.id in missing]
        with Journal(folder.path / "answers.jsonl") as journal:
            for reply in new:
                journal.append(keep_answer(plan, missing[reply.id], reply))
        with Journal(folder.path / "failures.jsonl") as journal:
            for failure in failures:
                if failure.id in missing:
                    journal.append(Failure(ask_id=failure.id, asked="model", reason=failure.reason))
    return len(new), failures, len(missing) - len(new)


def read_judges(judges: Sequence[str | Judge]) -> list[Judge]:
    """Return the judges that are named. Raises RequestError."""
    return [each if isinstance(each, Judge) else parse_judge(each) for each in judges or JUDGES]


def default_place(plan: RunPlan, target: Target) -> Path:
    """Return the folder of a run for which none is named, whether it is there or not."""
    place = target.identity  # of a folder its whole path, so that "." has a name, too
    short = place.rstrip("/").split("/")[-1].removesuffix(".yaml")
    return Path("redeval-runs") / f"{short}-{digest(plan.config)[:12]}"


def start(
    path: Path,
    plan: RunPlan,
    target: Target,
    judges: Sequence[Judge],
    options: RunOptions,
    *,
    local: LocalModel | None = None,
) -> tuple[RunDir, LocalModel | None]:
    """Return the run in a folder, made or gone on with, and where something is to be asked the loaded model, if local.

    Before anything is written, the judges and the model that are needed have shown that they can be asked, so that a
    run that cannot work leaves nothing behind. Raises RequestError, ResumeError, UnansweredError.
    """
    there = find_run(path, plan.config)
    asking = there is None or bool(missing_requests(there, plan))
    make_ready(judges, None if asking else there, options.judge_device)
    if asking and local is None:
        local = ready_target(target, plan)
    return start_run(path, plan.config, plan.questions, environment()), local


def _target_of(folder: RunDir) -> Target:
    facts = folder.config["target"]
    return Target(name=facts["name"], local=LocalSpec(model=facts["name"]) if facts["kind"] == "local" else None)


def _say_plan(folder: RunDir, plan: RunPlan, notes: Sequence[str], options: RunOptions) -> None:
    done = len(folder.answers())
    kept = f", {done} of them answered already" if done else ""
    options.note(f"run {folder.run_id} in {folder.path}, protocol {plan.protocol.name}: {plan.protocol.about}")
    options.note(f"{len(plan.questions)} questions, {len(plan.requests)} prompts{kept}")
    for line in notes:
        options.note(f"note: {line}")


# -- what does not go through --------------------------------------------------------------------------------


@contextlib.contextmanager
def _borne(stopped: list[str], kind: type[RestaError]) -> Iterator[None]:
    """Note an error and go on: what is there is judged and reported all the same, and the end says what is not."""
    try:
        yield
    except kind as error:
        stopped.append(str(error))


def _judge(folder: RunDir, judges: Sequence[Judge], options: RunOptions, stopped: list[str]) -> None:
    for each in judges:
        with _borne(stopped, RestaError):
            judge_phase(folder, each, options)


def _unanswered(folder: RunDir) -> Iterator[str]:
    plan = plan_of(folder)
    if missing := missing_requests(folder, plan):
        reasons = {failure.ask_id: failure.reason for failure in folder.failures()}
        why = next((f", the first for: {reasons[request.id]}" for request in missing if request.id in reasons), "")
        yield f"{len(missing)} of {len(plan.requests)} questions have no answer and count as unanswered{why}"


def _unjudged(folder: RunDir, judges: Sequence[Judge]) -> Iterator[str]:
    for each in judges:
        if left := len(pending(folder, each)):
            yield f"{each.id} has no verdict on {left} answers"
        if left := len(untested(folder, each)):
            yield f"{each.id} is yet to be tested on {left} known answers"


def _without_verdict(folder: RunDir) -> Iterator[str]:
    """Say of every judge of a run how many answers it has yet to judge, whether or not it is at hand."""
    questions, answers = folder.questions(), folder.answers()
    there = {answer.id for answer in answers}
    requests = [request for request in plan_of(folder).requests if request.id in there]
    measures = {judge: facts["measures"] for judge, facts in folder.judges().items()}
    missing = missing_rows(questions, requests, measures, join(questions, answers, folder.current_verdicts()))
    for name, left in Counter(row.judge for row in missing).items():
        yield f"{name} has no verdict on {left} answers"


# -- scores and reports --------------------------------------------------------------------------------------


def _result(folder: RunDir, views: Views, options: RunOptions, missing: tuple[str, ...]) -> Run:
    """Score a run's records and write every view of them."""
    questions, answers, verdicts = folder.questions(), folder.answers(), folder.current_verdicts()
    requests, rows = plan_of(folder).requests, join(questions, answers, verdicts)
    measures = {judge: facts["measures"] for judge, facts in folder.judges().items()}
    scores = score(questions, answers, verdicts, folder.labels(), missing_rows(questions, requests, measures, rows))
    scores = replace(scores, controls=controls_of(folder))
    made = make_report(
        folder.config,
        scores,
        rows,
        folder.judges(),
        answered=(len(answers), len(requests)),
        include_text=views.include_text,
    )
    labels = {each.answer_id: "harmful" if each.harmful else "safe" for each in folder.labels()}
    texts = {
        "report.md": to_markdown(made),
        "report.html": to_html(made),
        "report.json": document("redeval", {"config": folder.config, "scores": asdict(scores)}, schema=SCHEMA),
        "scores.jsonl": "".join(to_json(asdict(c)) + "\n" for c in (*scores.cells, *scores.categories)),
        FILE: disagreement_csv(rows, labels, spot_check=views.spot_check),
    }
    for name, text in texts.items():
        if name == FILE and (waiting := labels_waiting(folder)):
            options.note(f"note: {folder.path / name} holds {waiting}; it stays as it is")
        else:
            write_whole(folder.path / name, text)
    _score_logs(folder, {answer.id: questions[answer.qid] for answer in answers}, verdicts)
    to_label = bool(disagreements(rows)[0] or views.spot_check)
    return Run(path=folder.path, scores=scores, report=made, missing=missing, to_label=to_label)


def _score_logs(folder: RunDir, asked: Mapping[str, Question], verdicts: Sequence[Judgement]) -> None:
    """Put the verdicts into the answers' logs, where there are any; `asked` are the questions by answer id."""
    if not (folder.path / "logs" / "answers").is_dir():
        return
    from resta.redeval.engine import LoggedScore, score_logs

    scores: dict[str, list[LoggedScore]] = {}
    counts: dict[str, list[int]] = {}
    for verdict in verdicts:
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
