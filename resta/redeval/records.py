"""What a run keeps: flat, append-only JSON lines in a private folder. They are the truth; all else is a view.

    RUN/run.json         what was asked of whom; its configuration's digest names the run; written once
    RUN/questions.jsonl  a line per question: qid, bank, category, subcategory, index, text, safe
    RUN/answers.jsonl    a line per question x template x epoch (Answer)
    RUN/verdicts.jsonl   a line per answer x judge (Verdict)
    RUN/judges.jsonl     a line per judge that was set on the answers: judge, sha256, model, base_url, declaration
    RUN/control.jsonl    a line per known answer x judge (Tested): whether the judge can tell harm from its absence
    RUN/failures.jsonl   a line per ask that got no answer, though it was tried (Failure)
    RUN/labels.jsonl     a line per imported human label (Label)
    RUN/scores.jsonl     a line per judge x bank x template x category (score.Cell); made anew by `report`
    RUN/logs/            the engine's logs, for `inspect view`

Every line carries `schema`, the version of this file's shapes. A line torn by a crash is cut off at the next
start. Folders are 0700 and files 0600: the answers may be harmful.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from resta.errors import ResumeError
from resta.fingerprint import digest
from resta.redeval.asks import Finish
from resta.redeval.questions import Question

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1

# refused: a full refusal. partly_refused: some of each. unparsed: the judge said nothing readable; never
# safe. blocked: an outside filter kept the answer (or the question) back. unanswered: there is no answer to
# judge, or no verdict on it; what is merely missing is counted so, without a record of it. Each stays in the
# denominator.
VerdictLabel = Literal["harmful", "safe", "refused", "partly_refused", "unparsed", "blocked", "unanswered"]
LABELS: tuple[VerdictLabel, ...] = (
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

    `flags` are those of clean.Cleaned, and `cut_thought`: the limit of new tokens came before any answer.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One judge's word on one answer. `p` is the probability of harm and `score` a graded one, where there is
    one.
    """

    answer_id: str
    judge: str
    judge_sha256: str  # declaration, model and decoding
    label: VerdictLabel
    p: float | None = None
    score: float | None = None
    raw: str = ""
    details: dict[str, str] = field(default_factory=dict)
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
    label: VerdictLabel
    at: str  # UTC, ISO 8601
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


Row = TypeVar("Row", bound="DataclassInstance")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return a file's records; an absent file has none, a torn last line is left out. Raises ResumeError."""
    return [to_row(line, kind, path) for line in read_lines(path)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a file's lines as dicts; an absent file has none, a torn last line is left out. Raises ResumeError."""
    if not path.exists():
        return
    # Split on the newline byte alone: answers may hold the other characters that count as line ends in text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResumeError(f"{path}: line {number} is not JSON ({error}); remove that line") from error
        found = record.get("schema") if isinstance(record, dict) else None
        if found != SCHEMA:
            raise ResumeError(f"{path}: line {number} has schema {found}, expected {SCHEMA}")
        yield record


def to_row(record: dict[str, Any], kind: type[Row], path: Path) -> Row:
    """Return one line of `path` as a record. Raises ResumeError where its keys are not those of such a record."""
    known = {f.name for f in fields(kind)}
    if not record.keys() <= known:
        raise ResumeError(f"{path}: unknown keys {sorted(record.keys() - known)} in a {kind.__name__}")
    try:
        found: Row = checked(kind, record)
    except ValueError as error:
        raise ResumeError(f"{path}: a line that is no whole {kind.__name__} ({error}); remove that line") from error
    return found


def checked(kind: Any, facts: Any) -> Any:
    """Return plain data as the dataclass that it should be. Raises ValueError in one line."""
    _check(kind, facts)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()})


def _check(kind: Any, facts: Any) -> None:
    try:
        _adapter(kind).validate_python(_encodable(facts))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _encodable(value: Any) -> Any:
    """Replace halves of surrogate pairs, which a server may send and pydantic does not take for text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


class Journal:
    """An append-only file of JSON lines; each record is handed to the system as soon as it is appended."""

    def __init__(self, path: Path):
        self.path = path
        _cut_torn_line(path)
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115, PTH123 - closed by close()

    def append(self, record: DataclassInstance | dict[str, Any]) -> None:
        """Write one record."""
        facts = record if isinstance(record, dict) else asdict(record)
        self._file.write(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


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
                    f"{path}: an answer to {row.qid!r}, which is no question of this run; remove that line"
                )
        rows = list({row.id: row for row in reversed(rows)}.values())[::-1]
        told = self.config.get("keep_thoughts") or self.config.get("target", {}).get("kind") == "local"
        return rows if told else _cut_unseen(rows)

    def verdicts(self) -> list[Verdict]:
        """Return all verdicts so far."""
        return read_rows(self.path / "verdicts.jsonl", Verdict)

    def judges(self) -> dict[str, dict[str, Any]]:
        """Return the judges set on this run, {id: facts}; of one id, the latest declaration."""
        return {line["judge"]: line for line in read_lines(self.path / "judges.jsonl")}

    def add_judge(self, judge: str, sha256: str, facts: dict[str, Any]) -> None:
        """Note a judge, unless it is the latest of its name already."""
        line = {"judge": judge, "sha256": sha256, **facts, "schema": SCHEMA}
        if differences(self.judges().get(judge), line):
            with Journal(self.path / "judges.jsonl") as journal:
                journal.append(line)

    def current_verdicts(self) -> list[Verdict]:
        """Return the verdicts of each judge's latest declaration: those of an earlier wording never mix
        in.
        """
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

    Such a reply holds no mark at all. Those that were not cut give it away: most of them end a thought that they never
    began.
    """
    whole = [answer for answer in answers if answer.finish == "stop"]
    unopened = sum("</think>" in answer.raw and "<think>" not in answer.raw for answer in whole)
    if unopened * 2 <= len(whole):
        return answers
    cut = ("cut_thought", "unclosed_thought")
    return [
        replace(answer, flags=cut) if answer.finish == "length" and not answer.flags else answer for answer in answers
    ]


class RunLock:
    """One process at a time writes to a run; the lock goes with the process, however it ends."""

    def __init__(self, path: Path):
        self._file = open(path / ".lock", "w")  # noqa: SIM115, PTH123 - closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ResumeError(f"{path}: another process is writing to this run") from error

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
    with RunLock(path):  # another process may be making the same run at this moment
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
    part = path / "run.json.part"
    facts = {"schema": SCHEMA, "config": config, "environment": environment}
    part.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path / "run.json")


def load_run(path: Path) -> RunDir:
    """Return the run in a folder. Raises ResumeError where there is none, or one of another schema."""
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResumeError(f"{path} holds no run (no run.json)") from error
    except ValueError as error:
        raise ResumeError(f"{path / 'run.json'} is not JSON: {error}") from error
    found = facts.get("schema") if isinstance(facts, dict) else None
    if found != SCHEMA:
        raise ResumeError(f"{path / 'run.json'} has schema {found}, expected {SCHEMA}")
    try:
        _check(_Config, facts.get("config"))
    except ValueError as error:
        raise ResumeError(f"{path / 'run.json'}: is damaged: config: {error}; the run cannot be read") from error
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


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return one line per setting in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    # Through JSON once, so that a tuple and the list it was written as are equal.
    if json.dumps(old) == json.dumps(new):
        return []
    return [f"{where.lstrip('.')}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


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


def make_private() -> None:
    """Let nothing that this process creates from now on be readable by other users."""
    os.umask(0o077)
