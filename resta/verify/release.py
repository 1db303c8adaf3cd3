"""The pre-release gate as one call: measure what is missing, compare, decide, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from resta.errors import RequestError, RestaError
from resta.journal import write_whole
from resta.redeval.judging import check_judges
from resta.redeval.plan import plan_of
from resta.redeval.progress import RunOptions
from resta.redeval.records import environment, load_run, private_files
from resta.redeval.targets import Target, parse_target
from resta.verify.attacked import Job, attack_all, cost, make_job
from resta.verify.budget import Budget, Exam, check_budget, read_budget
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision, Rule, Verdict
from resta.verify.durability import Attacks, Durability, read_durability, write_durability
from resta.verify.gate import check_tasks, decide
from resta.verify.measure import compare_all, measure_all
from resta.verify.measurement import (
    Measurement,
    is_measurement,
    note_places,
    read_measurement,
    read_places,
)
from resta.verify.places import find_model
from resta.verify.plan import plan_power, with_power
from resta.verify.policy import Policy, read_policy
from resta.verify.power import Power
from resta.verify.report import to_card, with_section
from resta.verify.trace import Ruling, make_ruling, with_earlier
from resta.verify.views import VIEWS, remove_reports, write_reports, write_views

Model = str | Path | Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What the reports show: questions and answers, and whether RESTORED's README.md gets a section of its own."""

    include_text: bool = False
    card: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """A decision, what it rests on, and the folder in which all of it is written.

    `durability` is what is left of these models' safety after known attacks, which no decision rests on; None where
    that was not measured.
    """

    out: Path
    decision: Decision
    comparison: Comparison
    ruling: Ruling
    durability: Durability | None = None

    @property
    def verdict(self) -> Verdict:
        """Return PASS, FAIL, INCONCLUSIVE or INVALID."""
        return self.decision.verdict

    @property
    def exit_code(self) -> int:
        """Return what the command line exits with: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 4 INVALID."""
        return int(self.decision.verdict.value)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return every rule of the policy and what came of it."""
        return self.decision.rules

    @property
    def files(self) -> dict[str, Path]:
        """Return the paths of the reports by name: report.html, report.md, junit.xml, card.md, verdict.json."""
        return {name: self.out / name for name in VIEWS}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """What a verification is to do, read and checked."""

    policy: Policy
    policy_file: Path | None
    budget: Budget
    targets: Mapping[str, Target | Path]
    power: Power


def run(
    restored: Model,
    *,
    tuned: Model,
    aligned: Model,
    policy: str | Path | Policy | None = None,
    exam: Exam = Exam(),
    durability: Attacks | None = None,
    out: str | Path = "verify",
    views: Views = Views(),
    options: RunOptions = RunOptions(),
) -> Verification:
    """Say whether a restored model's safety is back, and what that cost.

        from resta.redeval import Questions
        from resta.verify import Exam, Utility

        questions = Questions(banks=["questions.json"], safe_banks=["smoke-safe"], templates=["standard"], limit=4)
        exam = Exam(questions=questions, judges=["refusal-strings"], utility=Utility(profile="smoke"))
        made = resta.verify.run("restored", tuned="tuned", aligned="aligned", exam=exam, policy="policy.yaml")
        print(made.verdict.name, made.decision.summary, made.files["report.html"])

    All three models sit the same exam and are compared in pairs. What was measured in `out` is not measured again;
    every decision adds a line to decisions.jsonl there, which nothing removes.

    Args:
        restored: the model to be released: whatever `resta.redeval.run` takes, or the folder of a measurement that is
            there already (OUT/restored of an earlier verification), which is not made again.
        tuned: the fine-tuned model before restoration.
        aligned: the safety-aligned model.
        policy: the rules, or the path of a file of them; by default those of `resta verify policy`.
        exam: what every model is asked, by whom it is judged, and which tasks it is given.
        durability: also attack the aligned and the restored model in known ways, once the verdict is there, and say
            what is left of their safety. Where that breaks off the verdict stands, and the same call goes on.
        out: the folder of all measurements and reports.
        views: what the reports show.
        options: how fast, on what device judges run, and what is called as it goes on.

    Raises:
        RequestError: the request cannot be carried out, or models were not measured alike.
        RestaError: measuring broke off and there is no verdict; the same call goes on with what is missing.
    """
    out = Path(out)
    prepared = _prepare({"aligned": aligned, "tuned": tuned, "restored": restored}, policy, exam)
    targets = prepared.targets
    if views.card:
        model = targets["restored"]
        _card_of(read_measurement(model).name if isinstance(model, Path) else model.name)
    job = None if durability is None else _job(durability, prepared, out, options)
    with private_files():
        out.mkdir(parents=True, exist_ok=True)
        remove_reports(out)
        said = (*(f"note: {line}" for line in prepared.budget.spec.notes), *prepared.power.lines)
        for line in (*said, *(cost(job) if job else ())):
            options.note(line)
        models = measure_all(targets, prepared.budget, out, options)
        note_places(models, out)
        reader = _reader(targets["aligned"], models["aligned"], options)
        made = _decide(models, reader, out, prepared.policy, prepared.policy_file, views, options)
        return made if job is None else _attack(job, made, models, prepared.budget, views, options)


def forecast(
    restored: Model, *, tuned: Model, aligned: Model, policy: str | Path | Policy | None = None, exam: Exam = Exam()
) -> Power:
    """Return what `run` would ask, and what that can show; nothing is asked or written. Raises RequestError."""
    return _prepare({"aligned": aligned, "tuned": tuned, "restored": restored}, policy, exam).power


def forecast_durability(
    restored: Model, *, tuned: Model, aligned: Model, durability: Attacks, exam: Exam = Exam()
) -> tuple[str, ...]:
    """Return what `run` would ask for the sake of durability, in words; nothing is asked or written.

    Raises RequestError.
    """
    prepared = _prepare({"aligned": aligned, "tuned": tuned, "restored": restored}, None, exam)
    return cost(_job(durability, prepared, Path("verify"), RunOptions()))


def decide_again(
    out: Path, *, policy: str | Path | Policy | None = None, views: Views = Views(), options: RunOptions = RunOptions()
) -> Verification:
    """Decide and report again on what was measured in `out`, under another policy or with the text shown.

    Raises RequestError.
    """
    rules, file = _read_policy(policy)
    models = {role: read_measurement(path) for role, path in read_places(out).items()}
    if views.card:
        _card_of(models["restored"].name)
    with private_files():
        return _decide(models, None, out, rules, file, views, options)


def _read_policy(policy: str | Path | Policy | None) -> tuple[Policy, Path | None]:
    if isinstance(policy, Policy):
        return policy, None
    file = None if policy is None else Path(policy)
    return read_policy(file), file


def _prepare(models: Mapping[str, Model], policy: str | Path | Policy | None, exam: Exam) -> _Prepared:
    """Read all that is named and refuse what could not be compared later, before anything is loaded or written."""
    rules, file = _read_policy(policy)
    budget = read_budget(exam)
    targets = {role: _target(model) for role, model in models.items()}
    if any(isinstance(target, Target) for target in targets.values()):  # else the measurements say what there is
        check_tasks(rules, [task.name for task in budget.suite.tasks] if budget.suite else [])
    check_budget(budget, targets)
    power = plan_power(rules, budget, targets)
    return _Prepared(policy=rules, policy_file=file, budget=budget, targets=targets, power=power)


def _target(model: Model) -> Target | Path:
    if isinstance(model, Target):
        return model
    return Path(model) if is_measurement(Path(model)) else parse_target(model)


def _job(durability: Attacks, prepared: _Prepared, out: Path, options: RunOptions) -> Job:
    """Return what is to be attacked and asked; a model that was measured earlier must be where it was, unchanged."""
    targets: dict[str, Target | None] = {}
    plans = {}
    for role, target in prepared.targets.items():
        if isinstance(target, Target):
            targets[role], plans[role] = target, prepared.budget.plan(target)
        else:
            plan = plan_of(load_run(target / "redeval"))
            targets[role] = find_model(target, plan.config["target"], device=options.reader_device)
            plans[role] = plan
    return make_job(durability, targets, plans, out)


def _attack(
    job: Job,
    made: Verification,
    models: Mapping[str, Measurement],
    budget: Budget,
    views: Views,
    options: RunOptions,
) -> Verification:
    """Attack the models of a verification, and add what came of it to the reports; the decision is what it was."""
    comparison, out = made.comparison, made.out
    judge = next((j for j in check_judges(budget.judges, None, allow_self=True) if j.id == comparison.judge), None)
    try:
        if judge is None:
            raise RequestError(f"attacked models need their own verdicts of {comparison.judge}; name it with --judge")
        found = attack_all(job, models, judge, comparison.level, options)
    except RestaError as error:
        options.note(f"durability was not measured: {error}. The verdict stands; the same command goes on")
        return made
    write_durability(out, found)
    write_views(out, comparison, made.decision, made.ruling, found, include_text=views.include_text)
    made = replace(made, durability=found)
    _show_on_card(made, views)
    return made


def _reader(target: Target | Path, measured: Measurement, options: RunOptions) -> Target | None:
    """Return the aligned model, by which every answer's loss is measured, if it is to be found."""
    if isinstance(target, Target):
        return target
    return find_model(measured.path, measured.config["target"], device=options.reader_device)


def _decide(
    models: Mapping[str, Measurement],
    aligned: Target | None,
    out: Path,
    policy: Policy,
    policy_file: Path | None,
    views: Views,
    options: RunOptions,
) -> Verification:
    """Compare, decide, leave a trace of it, and write every report."""
    comparison = compare_all(models, aligned, out, policy, options)
    ruling = make_ruling(out, policy, policy_file, environment())
    decision = with_power(with_earlier(comparison, decide(comparison, policy), ruling), comparison, policy)
    found = _durability(out, comparison, options)
    write_reports(out, comparison, decision, ruling, found, include_text=views.include_text)
    made = Verification(out=out, decision=decision, comparison=comparison, ruling=ruling, durability=found)
    _show_on_card(made, views)
    return made


def _durability(out: Path, comparison: Comparison, options: RunOptions) -> Durability | None:
    """Return what is known of these models' durability; what cannot be read is said and stands in no verdict's way."""
    try:
        return read_durability(out, comparison)
    except RestaError as error:
        options.note(f"note: {error}")
        return None


def _show_on_card(made: Verification, views: Views) -> None:
    if views.card:
        section = to_card(made.comparison, made.decision, made.ruling, made.durability)
        _update_card(_card_of(made.comparison.models["restored"].name), section)


def _card_of(model: str) -> Path:
    """Return the card of a model in a local directory. Raises RequestError."""
    folder = Path(model)
    if not folder.is_dir():
        raise RequestError(
            f"--card: {folder} is not a local directory; leave --card out, and paste OUT/card.md instead"
        )
    return folder / "README.md"


def _update_card(path: Path, section: str) -> None:
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    write_whole(path, with_section(card, section))
