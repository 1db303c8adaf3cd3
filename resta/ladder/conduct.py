"""`resta restore`: from a tuned model to a released one, by the cheapest remedy that is proved to work.

    OUT/                         the released model: there whole once its verdict is PASS, else not at all
    OUT.records/                 all else, private: questions and answers may be harmful
        request.json             models, policy, questions, tasks, judges: another request is refused
        questions/  spent.jsonl  which questions are for what, and what they were spent on (questions.py)
        references/              aligned and tuned on the choosing questions
        rungs/RUNG/              what was tried (rungs.py): a sweep with its reports
        costs.jsonl              answers and seconds of every rung, of every call
        candidate/               the chosen candidate while it is verified
        verify/                  the verdict and its report (proof.py)
        not-restored/            the best candidate, where there is no PASS
        story.html, story.json   what was broken, what was tried, what it cost, what came of it

The records lie beside OUT and not inside, for three reasons: OUT is what is published, and harmful answers must not be
published along with it; `resta audit` holds a merge's whole directory against its manifest, and would find every record
to be a foreign file; and a directory that appears by one rename is there whole or not at all. What was verified is
OUT, byte for byte: `candidate` takes its name, and its fingerprint stood in spent.jsonl before the first question.

Everything that was answered, learned or written is found again: a call that was killed anywhere is gone on with by the
same call, which takes the same path, since the path depends on the answers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from resta.errors import UnansweredError
from resta.journal import FolderLock, Journal, read_rows
from resta.ladder.patches import try_patch, try_patched_weights
from resta.ladder.proof import keep_best, prove, release
from resta.ladder.request import check_ladder, open_ladder, read_ladder
from resta.ladder.rungs import (
    FLOAT32,
    NOTHING,
    PATCH,
    PATCHED_WEIGHTS,
    RUNGS,
    STOCHASTIC,
    WEIGHTS,
    Attempt,
    Choices,
    Ladder,
    check_aligned,
    lost_by_rounding,
    measure_references,
    try_nothing,
    try_weights,
)
from resta.ladder.story import Cost, Restoration, sentence_of, write
from resta.redeval.progress import RunOptions, Tally
from resta.verify import Verdict
from resta.verify.budget import Exam
from resta.verify.policy import Policy


def restore(
    tuned: str | Path,
    *,
    aligned: str | Path | None = None,
    base: str | Path | None = None,
    task_prompts: str | Path | None = None,
    policy: str | Path | Policy | None = None,
    exam: Exam = Exam(),
    out: str | Path = "restored",
    choices: Choices = Choices(),
    options: RunOptions = RunOptions(),
) -> Restoration:
    """Give a fine-tuned model its safety back by the cheapest remedy that works, and prove it; write `out`.

        from resta.redeval import Questions
        from resta.verify import Exam

        exam = Exam(questions=Questions(profile="quick"))
        told = resta.restore("tuned", aligned="aligned", base="base", exam=exam, out="restored")
        print(told.sentence, told.model, told.exit_code)

    Half of the questions and of the tasks' documents is for choosing, half for the verdict, which is reached once. The
    same call goes on where an earlier one was.

    Args:
        tuned: the fine-tuned model: a directory, adapter or org/name@revision.
        aligned: the model that safety comes from.
        base: the model before alignment; without it there is no safety vector, and interpolation alone is searched.
        task_prompts: a file of the task's prompts, or of its training data, that a patch is held to; without it none is
            learned.
        policy: the rules that the released model must pass, or their file; by default those of `resta verify policy`.
        exam: what every model is asked, by whom it is judged, and which tasks it is given.
        out: the released model's folder to be; the records lie beside it, in `out`.records.
        choices: which rungs, unseen questions, limits of time and answers, and how models are loaded.
        options: how fast, on what device judges run, and what is called as it goes on.

    Raises:
        RequestError: the request cannot be carried out, or there is no safety in `aligned` to give back.
        UnansweredError: a limit was reached or questions got no answer; the same call goes on.
    """
    models = {"tuned": str(tuned), "aligned": _text(aligned), "base": _text(base)}
    prompts = None if task_prompts is None else Path(task_prompts)
    return carry_out(read_ladder(models, policy, exam, Path(out), choices, prompts), options)


def carry_out(ladder: Ladder, options: RunOptions) -> Restoration:
    """Do what `restore` does, for a request that was read already."""
    check_ladder(ladder)
    ladder.out.parent.mkdir(parents=True, exist_ok=True)
    ladder.records.mkdir(mode=0o700, exist_ok=True)  # what is written in it is private, and the model leaves it
    with FolderLock(ladder.records):
        open_ladder(ladder)
        return _restore(ladder, options)


def _text(name: str | Path | None) -> str | None:
    return None if name is None else str(name)


def _restore(ladder: Ladder, options: RunOptions) -> Restoration:
    meter = Meter(ladder, options)
    attempts = climb(ladder, meter)
    chosen = next((each for each in attempts if may_choose(ladder, each)), None)
    proof = None
    if chosen is not None:
        with meter.on("verifying") as watched:
            proof = prove(ladder, chosen, watched)
    passed = proof is not None and proof.verdict is Verdict.PASS
    if passed and proof is not None:
        release(ladder, proof)
    best = chosen or best_of(attempts)
    kept = None if passed else keep_best(ladder, best)
    told = Restoration(
        records=ladder.records,
        model=ladder.out if passed and proof is not None and proof.model is not None else None,
        kept=kept,
        attempts=tuple(attempts),
        chosen=chosen,
        proof=proof,
        costs=tuple(read_rows(ladder.records / "costs.jsonl", Cost)),
        sentence=sentence_of(ladder, best, proof),
    )
    write(told, ladder)
    return told


# -- climbing ------------------------------------------------------------------------------------------------


def climb(ladder: Ladder, meter: Meter) -> list[Attempt]:
    """Try one rung after the other until one would pass. Raises UnansweredError, RequestError."""
    with meter.on(NOTHING) as options:
        found = measure_references(ladder, options)
    attempts = [try_nothing(found)]
    if may_choose(ladder, attempts[0]):
        return attempts
    check_aligned(found, ladder)
    for rung in (each for each in RUNGS if each != NOTHING and _wanted(ladder, each)):
        if why := _no_use(ladder, rung, attempts):
            attempts.append(Attempt(rung=rung, said=f"not tried: {why}"))
            continue
        with meter.on(rung) as options:
            attempts.append(_try(ladder, rung, attempts, options))
        if may_choose(ladder, attempts[-1]):
            break
    return attempts


def _try(ladder: Ladder, rung: str, attempts: list[Attempt], options: RunOptions) -> Attempt:
    if rung == PATCH:
        return try_patch(ladder, options)
    if rung == PATCHED_WEIGHTS:
        return try_patched_weights(ladder, best_of(weights_of(attempts)), options)
    return try_weights(ladder, rung, options)


def _wanted(ladder: Ladder, rung: str) -> bool:
    return not ladder.choices.only or rung in ladder.choices.only


def may_choose(ladder: Ladder, attempt: Attempt) -> bool:
    """Whether a rung's candidate is likely enough to pass, and wanted."""
    return attempt.would_pass and _wanted(ladder, attempt.rung)


def _no_use(ladder: Ladder, rung: str, attempts: list[Attempt]) -> str | None:
    """Return why a rung cannot help or cannot be tried, None where it may."""
    if rung == WEIGHTS or (rung == PATCH and ladder.task_prompts is not None):
        return None
    if rung in (PATCH, PATCHED_WEIGHTS) and ladder.task_prompts is None:
        return "a patch needs --task-prompts, what it is held to"
    found = weights_of(attempts)
    if not found:
        return f"nothing is known of {WEIGHTS}, on which it rests; let it be tried, too"
    if rung == PATCHED_WEIGHTS:
        return None
    recipe = found[0].recipe
    assert recipe is not None
    if lost_by_rounding(recipe, ladder.records / "not-restored") is None:
        return f"rounding keeps the change of {found[0].candidate}"
    return None


def weights_of(attempts: list[Attempt]) -> list[Attempt]:
    """Return what weight arithmetic came to, however it was rounded."""
    return [each for each in attempts if each.rung in (WEIGHTS, STOCHASTIC, FLOAT32) and each.recipe is not None]


def best_of(attempts: list[Attempt]) -> Attempt:
    """Return the likeliest candidate that can be written, the later rung where chances are equal."""
    made = [each for each in attempts if each.recipe is not None] or attempts
    return max(reversed(made), key=lambda each: each.chance or 0.0)


# -- what it costs -------------------------------------------------------------------------------------------


class Meter:
    """Counts answers and seconds, keeps them by rung, and stops a call at its limits."""

    def __init__(self, ladder: Ladder, options: RunOptions):
        self._options, self._choices = options, ladder.choices
        self._path = ladder.records / "costs.jsonl"
        self._began = time.monotonic()
        self._answers = 0
        self._last: tuple[str, int] = ("", 0)  # phase, and how far it was

    @contextmanager
    def on(self, rung: str) -> Iterator[RunOptions]:
        """Yield the options under which a rung is carried out; what it cost is kept however it ends."""
        self._check(rung)
        began, answers = time.monotonic(), self._answers
        self._options.note(f"rung: {rung}")
        try:
            yield replace(self._options, watch=self._watch(rung))
        finally:
            spent = Cost(rung=rung, answers=self._answers - answers, seconds=round(time.monotonic() - began, 1))
            with Journal(self._path) as journal:
                journal.append(spent)

    def _watch(self, rung: str) -> Callable[[Tally], None]:
        def watch(tally: Tally) -> None:
            phase, done = self._last
            if tally.phase == "answers":
                self._answers += max(0, tally.done - done) if phase == "answers" and tally.done >= done else 0
            self._last = (tally.phase, tally.done)
            self._options.watch(tally)
            self._check(rung)

        return watch

    def _check(self, rung: str) -> None:
        minutes, most = self._choices.max_minutes, self._choices.budget_answers
        if minutes is not None and time.monotonic() - self._began > 60 * minutes:
            raise UnansweredError(f"--max-minutes {minutes:g} are over on the rung {rung}: {GO_ON}")
        if most is not None and self._answers >= most:
            raise UnansweredError(f"--budget-answers {most} are spent on the rung {rung}: {GO_ON}")


GO_ON = "nothing is decided yet. What was answered is kept, and the same command goes on"
