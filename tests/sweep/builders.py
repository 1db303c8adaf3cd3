"""Made-up measurements, in memory: who said what to how many questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing

from resta.cli import main
from resta.journal import read_rows
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, JudgementLabel
from resta.statistics import Rate
from resta.sweep.apply import Change
from resta.sweep.candidates import Candidate
from resta.sweep.choose import Point, Tried
from resta.verify.decision import Decision, Verdict
from resta.verify.measurement import Measurement

JUDGE = "judge"
SETTINGS = {"target": {"kind": "local", "name": "model", "dtype": "auto"}, "banks": [], "templates": []}
TEXTS: Mapping[str, str] = {"broken": "no " * 60}


def questions(harmful: int, safe: int) -> list[Question]:
    banks = [("harm", False, i) for i in range(harmful)] + [("fine", True, i) for i in range(safe)]
    return [
        Question(bank=bank, category="", subcategory="", index=i, safe=is_safe, text=f"{bank} {i}?")
        for bank, is_safe, i in banks
    ]


def measurement(asked: Sequence[Question], labels: Sequence[str], first: int | None = None) -> Measurement:
    """Return a measurement; `broken` is an answer that is no language and harmless; `first`: only every so many."""
    planned = {f"{question.qid}|standard|0": question for question in asked}
    there = {key: label for i, (key, label) in enumerate(zip(planned, labels, strict=True)) if i % (first or 1) == 0}
    answers, verdicts = {}, {}
    for key, label in there.items():
        text = TEXTS.get(label, "A whole answer in plain words, as it should be.")
        answers[key] = Answer(
            id=key, qid=planned[key].qid, template="standard", epoch=0, prompt_sha256="", raw=text, text=text,
            finish="stop",
        )  # fmt: skip
        said: JudgementLabel = "safe" if label == "broken" else label  # type: ignore[assignment]
        verdicts[key] = Judgement(answer_id=key, judge=JUDGE, judge_sha256="", label=said)
    facts: dict[str, Any] = {"sha256": "", "read": {"kind": "regex"}, "confirmed": True}
    return Measurement(
        path=Path(),
        config=SETTINGS,
        planned=planned,
        questions={question.qid: question for question in asked},
        answers=answers,
        verdicts={JUDGE: verdicts},
        judges={JUDGE: facts},
        documents=(),
        utility={},
        controls={},
        manifest={},
        measured_at=None,
    )


def rate(value: float) -> Rate:
    return Rate(hits=round(100 * value), total=100, value=value, low=value, high=value)


def tried(
    name: str, *, asr: float = 0.0, refusal: float = 0.0, utility: float = 1.0, change: float = 1.0,
    verdict: str | None = "PASS", baseline: bool = False, density: float | None = None, chance: float | None = None,
) -> Tried:  # fmt: skip
    """Return a measured candidate, "resta-0.5", or one that was given up (verdict None).

    One that passes would pass again, and no other, unless a `chance` says so.
    """
    method, scale = name.split("-")
    candidate = Candidate(method=method, scale=float(scale), baseline=baseline, density=density)  # type: ignore[arg-type]
    point = Point(name=candidate.name, asr=rate(asr), over_refusal=rate(refusal), utility=utility)
    done = Tried(
        candidate=candidate, equation="", change=Change(norm=change, tuned_norm=10.0, changed=1, entries=1), answered=8,
        planned=8, stopped=None, point=point, decision=None,
    )  # fmt: skip
    if verdict is None:
        return replace(done, point=None, stopped="asr.max_upper: 2 of the first 2 answers harmful", answered=2)
    chance = float(verdict == "PASS") if chance is None else chance
    return replace(
        done, chance=chance, decision=Decision(verdict=Verdict[verdict], summary="", rules=(), notes=(), guidance=())
    )


Trio = dict[str, Path]


def arguments(trio: dict[str, Path], bank: Path, policy: Path, **more: Any) -> list[str]:
    """Return the command line of a small grid; an option that is None is left out."""
    given = {
        "--aligned": trio["aligned"], "--base": trio["base"], "--scale": "0:1:0.5", "--interpolation-scale": "0.5",
        "--bank": bank, "--template": "standard", "--max-new-tokens": 9, "--device": "cpu", "--policy": policy,
    }  # fmt: skip
    given |= {"--" + key.replace("_", "-"): value for key, value in more.items()}
    words = [str(word) for key, value in given.items() if value is not None for word in (key, value)]
    return ["sweep", str(trio["tuned"]), "--no-utility", "--grid", *words]


def invoke(words: list[str], out: Path, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, [*words, "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return str(result.output)


def answers(folder: Path) -> list[Answer]:
    return read_rows(folder / "redeval" / "answers.jsonl", Answer)


def results(out: Path) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads((out / "sweep.json").read_text())["candidates"]}


def records(out: Path) -> dict[str, Any]:
    """Return all that was answered, decided and computed, by candidate."""
    return {
        folder.name: (
            sorted((a.id, a.raw) for a in answers(folder)),
            json.loads((folder / "change.json").read_text()),
        )
        for folder in (out / "candidates").iterdir()
    }
