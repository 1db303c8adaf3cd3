"""What a ladder came to, told from the start: what was broken, what was tried, what it cost, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resta.journal import document, write_whole
from resta.ladder.proof import Proof
from resta.ladder.questions import CALIBRATING, CHOOSING
from resta.ladder.rungs import NOTHING, RUNGS, Attempt, Ladder
from resta.page import Cell, Table, console, printable, render, table, to_terminal
from resta.recipe import dump_recipe
from resta.redeval.report import percent, redact, with_interval
from resta.sweep.forecast import NEED
from resta.verify import Verdict
from resta.verify.comparison import Example

SCHEMA = 1
NOT_RESTORED = 1  # the exit code where no candidate was worth verifying
TONES = {"PASS": ("good", "✓"), "FAIL": ("bad", "✗"), "INCONCLUSIVE": ("open", "?"), "INVALID": ("void", "!")}
SECTIONS = (
    ("broken", "What was broken", True),
    ("tried", "What was tried, and what it cost", True),
    ("answers", "Answers before and after", True),
    ("questions", "Which questions for what", False),
)
PAIRS = 6  # answers before and after that a page shows of each kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one call spent on a rung, or on verifying."""

    rung: str
    answers: int
    seconds: float
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What a ladder came to.

    `model` is the released model; None where there is none, since nothing had to be restored or nothing was. `kept` is
    the best candidate where there is no PASS, which is not safe by what was measured.
    """

    records: Path
    model: Path | None
    kept: Path | None
    attempts: tuple[Attempt, ...]
    chosen: Attempt | None
    proof: Proof | None
    costs: tuple[Cost, ...]
    sentence: str

    @property
    def verdict(self) -> Verdict | None:
        """Return the gate's verdict on the choice; None where nothing was worth verifying."""
        return self.proof.verdict if self.proof else None

    @property
    def exit_code(self) -> int:
        """Return what the command line exits with: the gate's own code, and 1 where nothing was worth verifying."""
        return int(self.verdict.value) if self.verdict else NOT_RESTORED

    @property
    def page(self) -> Path:
        """Return where the story is told."""
        return self.records / "story.html"


# -- in a sentence -------------------------------------------------------------------------------------------


def sentence_of(ladder: Ladder, best: Attempt, proof: Proof | None) -> str:
    """Return what came of it: `best` is the choice, or without a proof the candidate that came nearest."""
    if proof is None:
        return (
            f"Not restored: no candidate has a chance of {NEED:g} to pass. The nearest, "
            f"{best.candidate or 'none'} ({RUNGS[best.rung]}), has one of {best.chance or 0.0:.2f}."
        )
    fresh = f"{ladder.fresh} harmful questions that nothing was learned or chosen by"
    if proof.earlier:
        fresh += f" (verdict number {proof.earlier + 1} of this ladder, each on questions of its own)"
    if proof.verdict is not Verdict.PASS:
        return (
            f"Not restored: {best.candidate} ({RUNGS[best.rung]}) was expected to pass with a chance of "
            f"{best.chance:.2f}, and its verdict on {fresh} is {proof.decision.title}. {proof.decision.summary}"
        )
    if best.rung == NOTHING:
        return f"Nothing is to be restored: tuned passes as it is, on {fresh}. No model was written."
    return f"Restored by {best.candidate} ({RUNGS[best.rung]}): {proof.decision.title} on {fresh}."


# -- as tables -----------------------------------------------------------------------------------------------


def rungs_table(told: Restoration) -> Table:
    """Return a row for every rung that was looked at."""

    def row(each: Attempt) -> tuple[str | Cell, ...]:
        spent = [cost for cost in told.costs if cost.rung == each.rung]
        rates = (each.point.asr, each.point.over_refusal) if each.point else (None, None)
        utility = each.point.utility if each.point else None
        return (
            each.rung,
            each.candidate or "–",
            *(with_interval(rate) if rate else "–" for rate in rates),
            "–" if utility is None else f"{utility:.3f}",
            "–" if each.chance is None else f"{each.chance:.2f}",
            str(sum(cost.answers for cost in spent)),
            f"{sum(cost.seconds for cost in spent):.0f} s",
            Cell("chosen", tone="good", sign="✓") if each is told.chosen else "",
        )

    header = ("rung", "best candidate", "ASR", "over-refusal", "utility", "chance", "answers", "time", "")
    return table("What was tried, on the choosing questions", header, map(row, told.attempts))


def pairs_of(told: Restoration, *, include_text: bool) -> list[tuple[str, Table]]:
    """Return answers before and after, side by side, by what became of them."""
    if told.proof is None or told.chosen is None or told.chosen.rung == NOTHING:
        return []
    kinds = {
        "made safe": "Harmful before, no longer after",
        "still harmful": "Harmful before and after",
        "newly harmful": "Harmful only after",
        "needlessly refused": "Safe questions that are refused after",
    }
    found = []
    for kind, title in kinds.items():
        examples = [each for each in told.proof.comparison.examples if each.kind == kind]
        if examples:
            rows = (_pair(each, include_text=include_text) for each in examples[:PAIRS])
            found.append((f"{title} ({len(examples)})", table(title, ("question", "before", "after"), rows)))
    return found


def _pair(example: Example, *, include_text: bool) -> tuple[str, ...]:
    answers = (
        f"{example.labels[role]}: {redact(example.texts[role], include_text=include_text)}"
        for role in ("tuned", "restored")
    )
    return (redact(example.question, include_text=include_text), *answers)


# -- written and printed -------------------------------------------------------------------------------------


def write(told: Restoration, ladder: Ladder) -> None:
    """Write story.html, and story.json for scripts."""
    write_whole(told.records / "story.json", document("restoration", _facts(told, ladder), schema=SCHEMA))
    write_whole(told.page, to_html(told, ladder))


def _facts(told: Restoration, ladder: Ladder) -> dict[str, Any]:
    return {
        "sentence": told.sentence,
        "verdict": told.verdict.name if told.verdict else None,
        "exit_code": told.exit_code,
        "model": str(told.model) if told.model else None,
        "kept": str(told.kept) if told.kept else None,
        "chosen": told.chosen.rung if told.chosen else None,
        "rungs": [
            asdict(each) | {"recipe": dump_recipe(each.recipe) if each.recipe else None} for each in told.attempts
        ],
        "costs": [asdict(cost) for cost in told.costs],
        "questions": {
            name: {"sha256": part.sha256, "questions": len(part.digests)} for name, part in ladder.parts.items()
        },
        "verified_on": ladder.verifying if told.proof else None,
    }


def to_html(told: Restoration, ladder: Ladder) -> str:
    """Return the page."""
    verdict = told.verdict.name if told.verdict else None
    tone, sign = TONES.get(verdict or "FAIL", TONES["FAIL"])
    return render(
        "ladder/page.html.jinja",
        title=f"{'Restored' if verdict == 'PASS' else 'Not restored'}: {ladder.target('tuned').name}",
        eyebrow="From a tuned model to a released one",
        name=ladder.target("tuned").name,
        tone=tone,
        sign=sign,
        answer_label="Outcome",
        badge=told.proof.decision.title if told.proof else "NOT RESTORED",
        sentence=told.sentence,
        tiles=(),
        notes=told.proof.decision.notes if told.proof else (),
        sections=SECTIONS,
        broken=broken_words(told),
        rungs=rungs_table(told),
        said=[(each.rung, each.said) for each in told.attempts],
        total=total_words(told),
        pairs=pairs_of(told, include_text=ladder.choices.include_text),
        include_text=ladder.choices.include_text,
        parts=parts_table(ladder, told),
        places=places(told),
        footer="Rates with 95 % intervals.",
    )


def broken_words(told: Restoration) -> str:
    """Return what tuned does as it is."""
    first = told.attempts[0]
    if first.point is None or first.point.asr is None:
        return first.said
    return f"tuned answers {percent(first.point.asr.value)} of the harmful questions. {first.said}"


def total_words(told: Restoration) -> str:
    """Return what all of it cost."""
    answers, seconds = sum(cost.answers for cost in told.costs), sum(cost.seconds for cost in told.costs)
    return f"{answers} answers in {seconds / 60:.1f} minutes, all calls together, verifying included."


def parts_table(ladder: Ladder, told: Restoration) -> Table:
    """Return how many questions there are for what, with the digest that names them."""
    uses = {CALIBRATING: "for a patch to learn from", CHOOSING: "to choose by"}
    rows = [
        (
            name,
            uses.get(name, "the verdict" if name == ladder.verifying and told.proof else "not asked by this call"),
            str(part.harmful_count),
            str(len(part.digests) - part.harmful_count),
            Cell(part.sha256, tone="code"),
        )
        for name, part in ladder.parts.items()
    ]
    return table("Parts share no question", ("part", "use", "harmful", "safe", "sha256"), rows)


def places(told: Restoration) -> list[tuple[str, Path]]:
    """Return what lies where."""
    found: Mapping[str, Path | None] = {
        "the released model": told.model,
        "the best candidate, not restored": told.kept,
        "the verdict": told.proof.folder / "report.html" if told.proof else None,
        "all records": told.records,
    }
    return [(what, path) for what, path in found.items() if path is not None]


def show(told: Restoration) -> None:
    """Print the table of rungs, the sentence, and what lies where."""
    terminal = console()
    terminal.print(to_terminal(rungs_table(told)))
    for each in told.attempts:
        terminal.print(printable(f"{each.rung}: {each.said}"))
    terminal.print(printable(total_words(told)))
    terminal.print(printable(told.sentence))
    for what, path in (*places(told), ("the story", told.page)):
        terminal.print(printable(f"{what}: {path}"), soft_wrap=True)
