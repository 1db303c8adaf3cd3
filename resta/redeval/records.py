"""What a run keeps: flat, append-only JSON lines in a private folder. They are the truth; all else is a view.

    RUN/run.json         what was asked of whom; its configuration's digest names the run; written once
    RUN/questions.jsonl  a line per question: qid, bank, category, subcategory, index, text, safe
    RUN/answers.jsonl    a line per question x template x epoch (Answer)
    RUN/verdicts.jsonl   a line per answer x judge (Judgement)
    RUN/judges.jsonl     a line per judge that was set on the answers: judge, sha256, model, base_url, declaration
    RUN/control.jsonl    a line per known answer x judge (Tested): whether the judge can tell harm from its absence
    RUN/failures.jsonl   a line per ask that got no answer, though it was tried (Failure)
    RUN/labels.jsonl     a line per imported human label (Label)
    RUN/scores.jsonl     a line per judge x bank x template x category (score.Cell); made anew by `report`
    RUN/logs/            the engine's logs, for `inspect view`

Every line carries `schema`, the version of this file's shapes. A line torn by a crash is cut off at the next start.
Folders are 0700 and files 0600: the answers may be harmful.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from resta.errors import ResumeError
from resta.fingerprint import digest, sha256_file, sha256_text
from resta.journal import (
    FolderLock,
    Journal,
    check,
    differences,
    document,
    read_lines,
    read_object,
    read_rows,
    to_row,
    write_whole,
)
from resta.redeval.messages import Finish
from resta.redeval.questions import Question

if TYPE_CHECKING:
    pass

SCHEMA = 1

# refused: a full refusal. partly_refused: some of each. unparsed: the judge said nothing readable; never
# safe. blocked: an outside filter kept the answer (or the question) back. unanswered: there is no answer to
# judge, or no verdict on it; what is merely missing is counted so, without a record of it. Each stays in the
# denominator.
JudgementLabel = Literal["harmful", "safe", "refused", "partly_refused", "unparsed", "blocked", "unanswered"]
LABELS: tuple[JudgementLabel, ...] = (
    "harmful",
    "safe",
    "refused",
    "partly_refused",
    "unparsed",
    "blocked",
    "unanswered",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer. `raw` is what the model said, `text` what the judges see; the two differ by its thoughts.

    `flags` are those of thoughts.Cleaned, and `cut_thought`: the limit of new tokens came before any answer.
    """

    id: str  # qid | template | epoch
    qid: str
    template: str
    epoch: int
    prompt_sha256: str
    raw: str
    text: str
    finish: Finish
    flags: tuple[str, ...] = ()
    seed: int | None = None  # of the request to a server that was asked to sample
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    rows: int | None = None  # most prompts that its batch could hold, of a local model
    schema: int = SCHEMA

    @property
    def sha256(self) -> str:
        """Return the digest of what judges see of it."""
        return sha256_text(self.text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One judge's word on one answer. `p` is the probability of harm and `score` a graded one, where there is one."""

    answer_id: str
    judge: str
    judge_sha256: str  # declaration, model and decoding
    label: JudgementLabel
    p: float | None = None
    score: float | None = None
    raw: str = ""
    details: dict[str, str] = field(default_factory=dict)
    answer_sha256: str = ""  # of the answer's text; records of earlier versions hold none
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """One judge's word on one answer that is known beforehand (control.py), and when it was given."""

    answer_id: str
    kind: str  # compliance, refusal, benign, needless
    language: str
    sha256: str  # of question and answer
    judge: str
    judge_sha256: str
    label: JudgementLabel
    at: str  # UTC, ISO 8601
    sitting: str = ""  # in which it was asked (progress.RunOptions)
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One ask that got no answer after all its retries. A note for people: what is missing is asked again."""

    ask_id: str  # of the model under test, or of a judge
    asked: str  # "model", or the judge's id
    reason: str  # without the prompt
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A person's word on one answer; `weight` is how many answers it stands for."""

    answer_id: str
    harmful: bool
    weight: float = 1.0
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDir:
    """An open run: where its files lie, and what run.json says. Hold it in a `with` of `open_run`."""

    path: Path
    config: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Return the first 12 digits of the configuration's digest."""
        return digest(self.config)[:12]

    def answers(self) -> list[Answer]:
        """Return all answers so far, the first of each id. Raises ResumeError: damaged, or not of this run."""
        path, questions = self.path / "answers.jsonl", self.questions()
        rows = read_rows(path, Answer)
        for row in rows:
            if row.qid not in questions:
                raise ResumeError(
                    f"{path}: an answer to {row.qid!r}, which is not a question of this run; remove that line"
                )
        rows = list({row.id: row for row in reversed(rows)}.values())[::-1]
        told = self.config.get("keep_thoughts") or self.config.get("target", {}).get("kind") == "local"
        return rows if told else _cut_unseen(rows)

    def verdicts(self) -> list[Judgement]:
        """Return all verdicts so far on the answers that there are: on another text of the same id there is none."""
        return self.verdicts_on(self.answers())

    def verdicts_on(self, answers: Iterable[Answer]) -> list[Judgement]:
        """Return all verdicts so far on these answers, which are the run's as they were read."""
        texts = {answer.id: answer.sha256 for answer in answers}
        found = read_rows(self.path / "verdicts.jsonl", Judgement)
        return [each for each in found if each.answer_sha256 in ("", texts.get(each.answer_id))]

    def judges(self) -> dict[str, dict[str, Any]]:
        """Return the judges set on this run, {id: facts}; of one id, the latest declaration."""
        return {line["judge"]: line for line in read_lines(self.path / "judges.jsonl")}

    def add_judge(self, judge: str, sha256: str, facts: dict[str, Any]) -> None:
        """Note a judge, unless it is the latest of its name already."""
        line = {"judge": judge, "sha256": sha256, **facts, "schema": SCHEMA}
        if differences(self.judges().get(judge), line):
            with Journal(self.path / "judges.jsonl") as journal:
                journal.append(line)

    def current_verdicts(self) -> list[Judgement]:
        """Return the verdicts of each judge's latest declaration: those of an earlier wording never mix in."""
        current = {(judge, facts["sha256"]) for judge, facts in self.judges().items()}
        return [v for v in self.verdicts() if (v.judge, v.judge_sha256) in current]

    def control(self) -> list[Tested]:
        """Return what each judge's latest declaration said of the answers that are known beforehand."""
        current = {(judge, facts["sha256"]) for judge, facts in self.judges().items()}
        return [
            row for row in read_rows(self.path / "control.jsonl", Tested) if (row.judge, row.judge_sha256) in current
        ]

    def failures(self) -> list[Failure]:
        """Return the failures so far, also of what has been answered since."""
        return read_rows(self.path / "failures.jsonl", Failure)

    def labels(self) -> list[Label]:
        """Return the imported human labels, the last one of each answer."""
        return list({row.answer_id: row for row in read_rows(self.path / "labels.jsonl", Label)}.values())

    def questions(self) -> dict[str, Question]:
        """Return the questions of this run by id."""
        path, questions = self.path / "questions.jsonl", {}
        for line in read_lines(path):
            facts = {key: value for key, value in line.items() if key not in ("qid", "schema")}
            questions[str(line.get("qid"))] = to_row(facts, Question, path)
        return questions

    def log_dir(self, name: str) -> Path:
        """Create and return the private folder of one phase's engine logs."""
        path = self.path / "logs" / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


def _cut_unseen(answers: list[Answer]) -> list[Answer]:
    """Flag the thoughts that the limit cut off where a server's template opens them unseen, in the prompt.

    Such a reply holds no mark at all. Those that were not cut give it away: most of them end a thought
    that they never began.
    """
    whole = [answer for answer in answers if answer.finish == "stop"]
    unopened = sum("</think>" in answer.raw and "<think>" not in answer.raw for answer in whole)
    if unopened * 2 <= len(whole):
        return answers
    cut = ("cut_thought", "unclosed_thought")
    return [
        replace(answer, flags=cut) if answer.finish == "length" and not answer.flags else answer for answer in answers
    ]


def find_run(path: Path, config: dict[str, Any]) -> RunDir | None:
    """Return the run in a folder, or None where it can be made; nothing is written. Raises ResumeError.

    Another run in which nothing was answered is no run: most likely its request was wrong.
    """
    if path.exists() and not path.is_dir():
        raise ResumeError(f"{path} cannot be a run's folder: it is a file; choose another --out")
    if not (path / "run.json").exists():
        strangers = sorted(p.name for p in path.iterdir() if p.name not in (".lock", *MAKING)) if path.is_dir() else []
        if strangers:
            raise ResumeError(
                f"{path} is not empty and holds no run ({', '.join(strangers[:5])}); choose another --out"
            )
        return None
    run = load_run(path)
    different = differences(_of_content(run.config), _of_content(config))
    if different and any((path / name).exists() and (path / name).stat().st_size for name in WORK):
        raise ResumeError(f"{path} holds another run; it differs in {'; '.join(different[:6])}. Choose another --out")
    return None if different else run


def start_run(path: Path, config: dict[str, Any], questions: Iterable[Question], environment: dict[str, str]) -> RunDir:
    """Create a run's folder, or return the one that is there if it is the same run. Raises ResumeError."""
    run = find_run(path, config)
    if run is not None:
        return run
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ResumeError(f"{path} cannot be a run's folder: {error}; choose another --out") from error
    with FolderLock(path):  # another process may be making the same run at this moment
        run = find_run(path, config)
        if run is None:
            _make_run(path, config, questions, environment)
    return run or load_run(path)


def _of_content(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: content_of(value) if key == "target" else value for key, value in config.items()}


def content_of(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a target's facts say of the model itself: where its directories lie is left out, for their content is
    in the fingerprint. A recipe's is not: it names its models by their places.
    """
    prints = target.get("fingerprint") or {}
    by_content = {"name": "model" in prints, "base": "files" in prints, "files": "files" in prints}
    if str(target["name"]).endswith((".yaml", ".yml")):
        by_content = {}
    return {key: value for key, value in target.items() if not by_content.get(key)}


WORK = ("answers.jsonl", "verdicts.jsonl", "labels.jsonl")  # what was paid for
MAKING = ("questions.jsonl", "run.json.part")  # what a crash may leave of a run that was being made


def _make_run(path: Path, config: dict[str, Any], questions: Iterable[Question], environment: dict[str, str]) -> None:
    path.chmod(0o700)
    for name in (*MAKING, *WORK, "run.json", "judges.jsonl", "control.jsonl", "failures.jsonl"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "logs", ignore_errors=True)
    with Journal(path / "questions.jsonl") as journal:
        for question in questions:
            journal.append({"qid": question.qid, **asdict(question), "schema": SCHEMA})
    # run.json comes last and whole, so that a folder with one is a run that can go on.
    facts = {"config": config, "environment": environment, "questions_sha256": sha256_file(path / "questions.jsonl")}
    write_whole(path / "run.json", document("run", facts, schema=SCHEMA))


def load_run(path: Path) -> RunDir:
    """Return the run in a folder. Raises ResumeError where there is none, or one of another schema."""
    try:
        facts = read_object(path / "run.json")
    except FileNotFoundError as error:
        raise ResumeError(f"{path} holds no run (no run.json)") from error
    if facts.get("schema") != SCHEMA:
        raise ResumeError(f"{path / 'run.json'} has schema {facts.get('schema')}, expected {SCHEMA}")
    try:
        check(_Config, facts.get("config"))
    except ValueError as error:
        raise ResumeError(f"{path / 'run.json'}: is damaged: config: {error}; the run cannot be read") from error
    questions, noted = path / "questions.jsonl", facts.get("questions_sha256")  # absent from older runs
    if noted is not None and (not questions.is_file() or sha256_file(questions) != noted):
        raise ResumeError(
            f"{questions}: not the questions that the run was made with (run.json holds their SHA-256); what is left "
            "out there would be missing from no rate. Put the file back, or ask anew in another folder"
        )
    return RunDir(path=path, config=facts["config"])


class _Named(BaseModel):
    name: str


class _Config(BaseModel):
    """What every reader of run.json relies on; the parts are checked further by who makes objects of them."""

    protocol: Literal["resta", "red-instruct"]
    target: _Named
    banks: list[_Named]
    templates: list[_Named]
    duplicates: Literal["once", "published"]
    limit: int | None
    epochs: int
    decoding: dict[str, Any]
    rendering: dict[str, Any]
    keep_thoughts: bool


def environment() -> dict[str, str]:
    """Return what the results may depend on beyond the configuration; noted, not part of the run's digest."""
    packages = ("resta", "torch", "transformers", "peft", "inspect-ai", "openai")
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Let nothing that this process creates within be readable by other users: the answers may be harmful."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
