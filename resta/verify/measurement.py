"""What was measured of one model: Red-Eval's records, utility documents, and where its weights come from.

A measurement is a folder, so that what was measured once serves many comparisons:

    M/redeval/               a Red-Eval run (resta/redeval/records.py)
    M/utility/               utility documents (resta/verify/documents.py); absent where none were measured
    M/manifest.json          the model's resta.json as it was; absent for a served model, or one without
    M/manifest-check.json    whether that of a merge is true to the model's weights
    M/model.json             when it was measured, and where the model lay (resta/verify/places.py)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resta.errors import RequestError, RestaError
from resta.journal import differences, to_json, write_whole
from resta.redeval.control import Control, controls_of
from resta.redeval.plan import plan_of
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, RunDir, load_run
from resta.verify.documents import Document, read_documents, read_facts
from resta.verify.places import read_place

ROLES = ("aligned", "tuned", "restored")
PLACES = "measurements.json"
UNCHECKED = "not checked"
HUMAN = "human-labels"  # the judge's name where the policy lets people's labels count


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One model's records. `planned` is all that was to be asked, {ask id: question}, in the order of asking."""

    path: Path
    config: Mapping[str, Any]
    planned: Mapping[str, Question]
    questions: Mapping[str, Question]
    answers: Mapping[str, Answer]
    verdicts: Mapping[str, Mapping[str, Judgement]]  # judge -> answer id -> verdict
    judges: Mapping[str, Mapping[str, Any]]
    controls: Mapping[str, tuple[Control, ...]]  # judge -> how it did on the answers that are known beforehand
    documents: tuple[Document, ...]
    utility: Mapping[str, Any]  # the suite's facts; empty where none was measured
    manifest: Mapping[str, Any]
    measured_at: str | None  # ISO 8601, UTC; None where it was not noted
    manifest_problem: str = UNCHECKED  # in what the manifest is not true to the weights; empty where it is

    @property
    def name(self) -> str:
        """Return the model as its user named it."""
        return str(self.config["target"]["name"])


def is_measurement(path: Path) -> bool:
    """Whether a folder is a measurement. One with a model in it is that model, whatever was measured into it once."""
    model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    return (path / "redeval" / "run.json").is_file() and not model


def read_measurement(path: Path) -> Measurement:
    """Return the measurement in a folder. Raises ResumeError where there is none."""
    run = load_run(path / "redeval")
    questions = run.questions()
    manifest = path / "manifest.json"
    return Measurement(
        path=path,
        config=run.config,
        planned={request.id: questions[request.facts["qid"]] for request in plan_of(run).requests},
        questions=questions,
        answers={answer.id: answer for answer in run.answers()},
        verdicts={**_verdicts(run), **_labels(run)},
        judges={**run.judges(), **({HUMAN: HUMAN_FACTS} if run.labels() else {})},
        controls=controls_of(run),
        documents=read_documents(path / "utility"),
        utility=read_facts(path / "utility"),
        manifest=json.loads(manifest.read_text()) if manifest.is_file() else {},
        measured_at=read_place(path).measured_at,
        manifest_problem=_manifest_problem(path),
    )


def note_manifest(source: Path, path: Path) -> None:
    """Keep a model's resta.json in its measurement, so that a report needs no model, and whether it is true.

    The weights are read for that once: a measurement is of one model.
    """
    data = source.read_bytes()
    kept, checked = path / "manifest.json", path / "manifest-check.json"
    if kept.is_file() and kept.read_bytes() == data and checked.is_file():
        return
    write_whole(kept, data)
    if json.loads(data).get("kind") != "merge":
        return
    from resta.auditing import check_weights

    try:
        problems = [f"{finding.what}: {finding.problem}" for finding in check_weights(source.parent)]
    except RestaError as error:
        problems = [str(error)]
    write_whole(checked, to_json({"problem": "; ".join(problems[:3])}) + "\n")


def _manifest_problem(path: Path) -> str:
    checked = path / "manifest-check.json"
    return str(json.loads(checked.read_text(encoding="utf-8"))["problem"]) if checked.is_file() else UNCHECKED


def note_places(models: Mapping[str, Measurement], out: Path) -> None:
    """Note in OUT where each role's measurement lies: in OUT itself, which may be moved, or elsewhere."""
    found = {role: model.path.resolve() for role, model in models.items()}
    home = out.resolve()
    places = {role: str(path.relative_to(home) if home in path.parents else path) for role, path in found.items()}
    write_whole(out / PLACES, to_json(places, indent=2) + "\n")


def read_places(out: Path) -> dict[str, Path]:
    """Return where each role's measurement lies. Raises RequestError where OUT holds no comparison."""
    path = out / PLACES
    if not path.is_file():
        raise RequestError(f"{out} holds no finished measurements (no {PLACES}); run `resta verify` to the end first")
    return {role: out / place for role, place in json.loads(path.read_text(encoding="utf-8")).items()}


def _verdicts(run: RunDir) -> dict[str, dict[str, Judgement]]:
    found: dict[str, dict[str, Judgement]] = {}
    for verdict in run.current_verdicts():
        found.setdefault(verdict.judge, {})[verdict.answer_id] = verdict
    return found


HUMAN_FACTS: Mapping[str, Any] = {
    "sha256": HUMAN,
    "about": "people's labels, imported into the run",
    "measures": ["harm"],
    "read": {"kind": "human"},
}


def _labels(run: RunDir) -> dict[str, dict[str, Judgement]]:
    """Return people's labels as the verdicts of a judge; empty where there are none."""
    found = {
        label.answer_id: Judgement(
            answer_id=label.answer_id,
            judge=HUMAN,
            judge_sha256=HUMAN,
            label="harmful" if label.harmful else "safe",
        )
        for label in run.labels()
    }
    return {HUMAN: found} if found else {}


def comparable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must share to be compared: all of a run's configuration but which model it was of."""
    target = config["target"]
    return {
        **{key: value for key, value in config.items() if key != "target"},
        "backend": {"kind": target["kind"], "dtype": target.get("dtype"), "batch_rows": target.get("batch_rows")},
    }


def check_comparable(models: Mapping[str, Measurement], judges: Iterable[str]) -> None:
    """Refuse measurements made under different conditions, naming them. Raises RequestError."""
    first = models[ROLES[0]]
    for role in ROLES[1:]:
        other = models[role]
        found = [
            *differences(comparable_settings(first.config), comparable_settings(other.config), "redeval"),
            *differences(dict(first.utility), dict(other.utility), "utility"),
        ]
        for judge in judges:
            found += differences(first.judges[judge]["sha256"], other.judges[judge]["sha256"], f"judge {judge}")
        if found:
            lines = "; ".join(found[:6])
            raise RequestError(
                f"{ROLES[0]} ({first.path}) and {role} ({other.path}) were not measured alike: {lines}. "
                "Measure both again with the same settings"
            )


def pick_judges(models: Mapping[str, Measurement], named: str | None) -> tuple[str, str | None]:
    """Return whose verdicts count on harmful and on safe questions. Raises RequestError where that is not clear.

    Refusal strings never decide on harm beside a real judge, and people's labels only where they are named.
    On safe questions the same judge decides if it looks at them, else refusal strings do if they were set on
    the answers, else nobody.
    """
    common = set.intersection(*(set(model.judges) for model in models.values())) - ({HUMAN} - {named})
    facts = models[ROLES[0]].judges
    strings = {judge for judge in common if facts[judge]["read"]["kind"] == "strings"}
    if named is not None and named not in common:
        raise RequestError(f"the policy's judge {named!r} has not judged all models; those that have: {_list(common)}")
    candidates = [named] if named is not None else sorted(common - strings or common)
    if len(candidates) != 1:
        raise RequestError(
            f"judges of all models: {_list(common)}; exactly one must count: name it as `judge:` in the policy"
            if common
            else "no judge has judged all models; judge them with the same one (resta redeval judge)"
        )
    [harm] = candidates
    safe = [judge for judge in (harm, *sorted(strings - {harm})) if _looks_at_safe(models, judge)]
    return harm, safe[0] if safe else None


def _looks_at_safe(models: Mapping[str, Measurement], judge: str) -> bool:
    return all(
        any(question.safe for request, question in model.planned.items() if request in model.verdicts.get(judge, {}))
        for model in models.values()
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
