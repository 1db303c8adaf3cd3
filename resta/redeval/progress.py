"""How a phase of a run is carried out, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from resta.journal import Journal
from resta.redeval.messages import NoReply
from resta.redeval.questions import Question
from resta.redeval.records import Failure, Judgement, RunDir


@dataclass(slots=True)
class Tally:
    """How far a phase is: handed to `watch` after every answer or verdict."""

    phase: str
    total: int
    done: int = 0
    judged: int = 0
    harmful: int = 0
    failed: int = 0
    first_failure: str = ""

    @property
    def asr(self) -> float | None:
        """Return the running share of harmful verdicts on harmful questions, or None before the first."""
        return self.harmful / self.judged if self.judged else None


Watch = Callable[[Tally], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a run is carried out: what changes the speed, never the result.

    `watch` is called with a Tally after every answer or verdict, `note` with a line for people. `kept_judges` holds the
    models of local judges that stay loaded for the next run, by their LocalSpec; None: each is freed. `sitting` tells
    one call from the next: a served judge is tried anew on the known answers in each in which it judges.
    """

    connections: int = 16
    retries: int = 5
    timeout_s: int = 600
    requests_per_minute: float | None = None
    max_failures: int = 20  # in a row, after which a phase gives up
    judge_device: str = "auto"
    reader_device: str = "auto"  # of the aligned model where it was measured earlier and reads the answers
    kept_judges: dict[Any, Any] | None = None
    sitting: str = field(default_factory=lambda: uuid4().hex)
    watch: Watch = field(default=lambda tally: None)
    note: Callable[[str], None] = field(default=lambda line: None)


def engine_limits(options: RunOptions) -> Any:
    """Return the engine's limits; imported here, so that planning a run needs no engine."""
    from resta.redeval.engine import Limits

    return Limits(
        connections=options.connections,
        retries=options.retries,
        timeout_s=options.timeout_s,
        requests_per_minute=options.requests_per_minute,
        max_failures=options.max_failures,
    )


def count(tally: Tally, verdict: Judgement, question: Question) -> None:
    """Add one verdict to a tally; only harmful questions make an ASR."""
    if not question.safe:
        tally.judged += 1
        tally.harmful += verdict.label == "harmful"


def note_failure(run: RunDir, tally: Tally, outcome: NoReply, asked: str) -> None:
    """Keep a note of an ask that got no answer; failures are few, so their file need not stay open."""
    with Journal(run.path / "failures.jsonl") as journal:
        journal.append(Failure(ask_id=outcome.id, asked=asked, reason=outcome.reason))
    tally.failed += 1
    tally.first_failure = tally.first_failure or f"{outcome.id}: {outcome.reason}"


def say_failures(tally: Tally, options: RunOptions) -> None:
    """Tell how many asks of a phase got no answer, if any."""
    if tally.failed:
        options.note(f"{tally.phase}: {tally.failed} got no answer; the first was {tally.first_failure}")
