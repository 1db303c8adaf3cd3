"""Comparisons planted in memory, from who gave in where: no files, no models, hundreds of them in a test."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from resta.fingerprint import sha256_text
from resta.redeval.control import Control, Known, controls, known_answers, read_control, record_of
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, JudgementLabel
from resta.verify.coherence import Losses
from resta.verify.comparison import Comparison, compare
from resta.verify.decision import Decision
from resta.verify.documents import Document
from resta.verify.gate import decide
from resta.verify.measurement import ROLES, Measurement
from resta.verify.policy import Policy
from tests.verify.builders import JUDGE, VOCABULARY, WORDS, judge_facts

SALAD = "of the and to"  # how an answer begins whose losses are those of words in no order
Flags = np.ndarray  # (questions, templates, models), bool: who gave in, or refused, where


def at_rates(rates: Sequence[float], questions: int, templates: int = 1, *, seed: int = 0, icc: float = 0.3) -> Flags:
    """Return who gave in, each model at its own rate, answers to one question as alike as `icc` says."""
    rng = np.random.default_rng(seed)
    shape = (questions, templates, len(rates))
    shared = rng.random((questions, 1, 1))
    luck = np.where(rng.random(shape) < icc**0.5, shared, rng.random(shape))
    return np.asarray(luck < np.array(rates))


def exactly(counts: Sequence[int], questions: int, templates: int = 1) -> Flags:
    """Return who gave in: each model to its first so many questions, whatever the template."""
    flags = np.arange(questions)[:, np.newaxis] < np.array(counts)
    return np.repeat(flags[:, np.newaxis], templates, axis=1)


def planted(
    harm: Mapping[str, Flags],
    refusals: Mapping[str, Flags] | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
    *,
    category_of: Mapping[tuple[str, int], str] | None = None,
    level: float = 0.95,
) -> Comparison:
    """Return the comparison of banks of harmful and of safe questions and of tasks, (documents, models) scores each.

    The models answer in language, each question in its own words, and the judge knows harm; without `refusals` 120
    safe questions are answered.
    """
    measured = measurements(harm, refusals or {"everyday": exactly((0, 0, 0), 120)}, scores or {}, category_of)
    return compare(measured, level=level, losses=losses_of(measured))


def measurements(
    harm: Mapping[str, Flags],
    refusals: Mapping[str, Flags],
    scores: Mapping[str, np.ndarray],
    category_of: Mapping[tuple[str, int], str] | None = None,
) -> dict[str, Measurement]:
    """Return the measurements by role."""
    return {role: _measurement(i, harm, refusals, scores, category_of or {}) for i, role in enumerate(ROLES)}


def losses_of(models: Mapping[str, Measurement]) -> dict[str, Losses]:
    """Return losses as of language, but of answers that begin with SALAD as of words in no order."""
    found = {}
    for role, model in models.items():
        by = {key: 7.5 if answer.text.startswith(SALAD) else 1.0 for key, answer in model.answers.items()}
        found[role] = Losses(
            aligned="", answers="", vocabulary=VOCABULARY, by_answer=by, shuffled=dict.fromkeys(by, 7.0)
        )
    return found


def judge_says(label: Callable[[Known], JudgementLabel]) -> tuple[Control, ...]:
    """Return how a judge does that says this of the known answers."""
    said = [
        record_of(known, Judgement(answer_id=known.answer.id, judge=JUDGE, judge_sha256="0", label=label(known)), "")
        for known in known_answers(read_control("en"), "en", ("harm", "refusal"))
    ]
    return controls(said, ("harm", "refusal"), ("en",))


TRUTH: Mapping[str, JudgementLabel] = {"compliance": "harmful", "benign": "safe"}
KNOWS = judge_says(lambda known: TRUTH.get(known.kind, "refused"))


def gate(policy: Policy, *args: Mapping[str, Flags], **more: Mapping[str, np.ndarray]) -> Decision:
    """Return what a policy makes of what is planted."""
    return decide(planted(*args, level=policy.level, **more), policy)  # type: ignore[arg-type]


def _measurement(
    model: int,
    harm: Mapping[str, Flags],
    refusals: Mapping[str, Flags],
    scores: Mapping[str, np.ndarray],
    category_of: Mapping[tuple[str, int], str],
) -> Measurement:
    questions, answers, verdicts = {}, {}, {}
    for safe, banks in ((False, harm), (True, refusals)):
        for bank, flags in banks.items():
            for index, asks in enumerate(flags[..., model]):
                category = category_of.get((bank, index), "")
                question = Question(
                    bank=bank, category=category, subcategory="", index=index, text=f"{bank} {index}?", safe=safe
                )
                questions[question.qid] = question
                for template, hit in enumerate(asks):
                    key = f"{question.qid}|t{template}|0"
                    label: JudgementLabel = (
                        ("refused" if hit else "safe") if safe else ("harmful" if hit else "refused")
                    )
                    answers[key] = _answer(model, key, question.qid, f"t{template}", label)
                    verdicts[key] = Judgement(answer_id=key, judge=JUDGE, judge_sha256="0", label=label)
    documents = tuple(
        Document(task=task, doc_id=str(i), metric="acc", value=float(value))
        for task, values in scores.items()
        for i, value in enumerate(values[:, model])
    )
    config = {
        "target": {"kind": "local", "name": ROLES[model], "dtype": "float32"},
        "banks": [
            {"name": bank, "sha256": sha256_text(bank), "questions": len(flags), "safe": bank in refusals}
            for bank, flags in {**harm, **refusals}.items()
        ],
        "templates": [],
    }
    return Measurement(
        path=Path(ROLES[model]),
        config=config,
        planned={key: questions[answer.qid] for key, answer in answers.items()},
        questions=questions,
        answers=answers,
        verdicts={JUDGE: verdicts},
        judges={JUDGE: {**judge_facts(), "sha256": "0"}},
        controls={JUDGE: KNOWS},
        measured_at="2026-11-24T10:00:00+00:00",
        documents=documents,
        utility={"profile": "house"} if scores else {},
        manifest={},
    )


@functools.cache
def _answer(model: int, key: str, qid: str, template: str, label: str) -> Answer:
    """Return an answer in words of its own, the same in every draw."""
    text = " ".join([label, *random.Random(f"{model} {key}").choices(WORDS, k=7)])
    return Answer(
        id=key, qid=qid, template=template, epoch=0, prompt_sha256="0", raw=text, text=text, finish="stop",
        prompt_tokens=8, new_tokens=8,
    )  # fmt: skip
