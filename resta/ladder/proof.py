"""The verdict on what a ladder chose, on questions that nothing was learned or chosen by, and the release.

The verifying questions are spent once: on one model, whose fingerprint is on the disk before the first is asked. A run
that was killed goes on with that model; any other is refused. What was answered is digested along with the verdict, so
that a record which was changed later does not pass for what was measured.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from resta.engine import merge
from resta.errors import ResumeError
from resta.files import fsync_folder
from resta.fingerprint import digest, sha256_file
from resta.journal import read_rows
from resta.ladder.questions import VERIFYING, Spent, add, spend
from resta.ladder.rungs import NOTHING, Attempt, Ladder
from resta.redeval.models import fingerprint
from resta.redeval.progress import RunOptions
from resta.redeval.records import utc_now
from resta.redeval.targets import Target, parse_target
from resta.verify import Verdict
from resta.verify import run as verify
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision
from resta.verify.gate import decide
from resta.verify.measure import compare_all
from resta.verify.measurement import read_measurement, read_places

KEPT = ("answers.jsonl", "verdicts.jsonl", "documents.jsonl", "run.json", "questions.jsonl")  # that a verdict rests on


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What the gate said of a ladder's choice, and where its report lies."""

    folder: Path
    model: Path | None  # the written candidate; None where the choice is tuned itself
    decision: Decision
    comparison: Comparison
    earlier: int  # verdicts that this ladder had before, on other questions

    @property
    def verdict(self) -> Verdict:
        """Return PASS, FAIL, INCONCLUSIVE or INVALID."""
        return self.decision.verdict


def prove(ladder: Ladder, choice: Attempt, options: RunOptions) -> Proof:
    """Verify the choice, or go on where its verification was left, or find its verdict.

    Raises ResumeError: the questions are spent on another model, or the records are not those of the verdict.
    """
    model = None if choice.rung == NOTHING else write_candidate(ladder, choice)
    target = ladder.target("tuned") if model is None else parse_target(str(model), None, **ladder.choices.settings)
    part, records = ladder.parts[ladder.verifying], ladder.records
    folder = records / ("verify" if ladder.verifying == VERIFYING else f"verify-{ladder.verifying}")
    assert target.local is not None
    now = Spent(
        questions=part.sha256,
        model=digest(fingerprint(target.local)),
        candidate=f"{choice.rung}: {choice.candidate}",
        at=utc_now(),
    )
    lines = read_rows(records / "spent.jsonl", Spent)
    if model == ladder.out and all(line.model != now.model for line in lines):
        raise ResumeError(
            f"{ladder.out} is not the model that was verified (no line of {records / 'spent.jsonl'} is of its "
            "fingerprint): it was changed, or put there by somebody else. Move it away, or choose another -o"
        )
    closed = spend(records / "spent.jsonl", now, folder)
    if closed is None:
        comparison, decision = _verify(ladder, target, folder, options)
        add(records / "spent.jsonl", replace(now, at=utc_now(), verdict=decision.verdict.name, records=kept(folder)))
    else:
        if closed.records != kept(folder):
            raise ResumeError(
                f"{folder}: the records are not those that the verdict of {closed.at} rests on: they were changed "
                "since, and say nothing now. Restore them from a copy, or verify on unseen questions (--unseen-bank)"
            )
        comparison, decision = _read(ladder, folder, options)
    earlier = sum(line.verdict is not None and line.questions != now.questions for line in lines)
    return Proof(folder=folder, model=model, decision=decision, comparison=comparison, earlier=earlier)


def _verify(ladder: Ladder, target: Target, folder: Path, options: RunOptions) -> tuple[Comparison, Decision]:
    made = verify(
        target,
        tuned=ladder.target("tuned"),
        aligned=ladder.target("aligned"),
        policy=ladder.policy,
        exam=ladder.exams[ladder.verifying],
        out=folder,
        options=options,
    )
    return made.comparison, made.decision


def _read(ladder: Ladder, folder: Path, options: RunOptions) -> tuple[Comparison, Decision]:
    """Return what a finished verification came to; nothing is asked or written."""
    models = {role: read_measurement(path) for role, path in read_places(folder).items()}
    comparison = compare_all(models, None, folder, ladder.policy, options)
    return comparison, decide(comparison, ladder.policy)


def kept(folder: Path) -> str:
    """Return the digest of everything that a verdict rests on: questions, answers, verdicts, documents, losses."""
    files = sorted(path for path in folder.rglob("*") if path.name in KEPT or path.parent.name == "coherence")
    return digest({str(path.relative_to(folder)): sha256_file(path) for path in files})


# -- the model -----------------------------------------------------------------------------------------------


def write_candidate(ladder: Ladder, choice: Attempt) -> Path:
    """Write the choice's weights, or find them where they were released. Raises RestaError as `resta.merge` does."""
    assert choice.recipe is not None
    if ladder.out.exists():
        return ladder.out
    return merge(choice.recipe, ladder.records / "candidate", overwrite=True).out


def release(ladder: Ladder, proof: Proof) -> None:
    """Put the verified model in its place, by one rename; where it is there already, it was found to be the one."""
    if proof.model is not None and proof.model != ladder.out:
        os.rename(proof.model, ladder.out)  # noqa: PTH104 - never replaces a directory that holds anything
        fsync_folder(ladder.out.parent)


def keep_best(ladder: Ladder, best: Attempt) -> Path | None:
    """Keep the best candidate of a ladder without a PASS under not-restored; None where nothing was written."""
    if best.recipe is None:
        return None
    folder = ladder.records / "not-restored"
    merge(best.recipe, folder, overwrite=True)
    shutil.rmtree(ladder.records / "candidate", ignore_errors=True)
    return folder
