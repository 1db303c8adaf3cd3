"""What a run asks: the questions through every template, and the configuration whose digest names the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resta.errors import RequestError, ResumeError
from resta.journal import checked
from resta.redeval.messages import Decoding, Message, Rendering, Request
from resta.redeval.profiles import Questions
from resta.redeval.protocol import PROTOCOLS, Protocol
from resta.redeval.questions import Bank, Question, choose, read_bank, without
from resta.redeval.records import RunDir, load_run
from resta.redeval.targets import Target
from resta.redeval.templates import Template, read_template


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What is asked of any model: banks and templates as they were read, and how, as it was said."""

    banks: tuple[Bank, ...]
    templates: tuple[Template, ...]
    asked: Questions

    @property
    def notes(self) -> list[str]:
        """Return what is not asked as it stands in its file, a line each."""
        found = [
            f"{bank.left_out} questions of {bank.name} are marked as unsafe and left out of --safe-bank"
            for bank in self.banks
            if bank.left_out
        ]
        once = (self.asked.duplicates or PROTOCOLS[self.asked.protocol].duplicates) == "once"
        treated = "asked once" if once else "asked as often as published"
        return found + [
            f"{len(bank.repeats)} questions of {bank.name} repeat an earlier one; {treated}"
            for bank in self.banks
            if bank.repeats
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """All that will be asked, and the configuration whose digest names the run."""

    config: dict[str, Any]
    protocol: Protocol
    decoding: Decoding
    questions: tuple[Question, ...]
    requests: tuple[Request, ...]


def read_spec(questions: Questions) -> RunSpec:
    """Return what is named, read. Raises RequestError, ResumeError."""
    names = questions.named()
    banks = [
        read_bank(str(name), bank_dirs=questions.bank_dirs, download=questions.download, safe=safe)
        for found, safe in ((names.banks, None), (names.safe_banks, True))
        for name in found
    ]
    asked = {question.text for run in questions.without for question in load_run(Path(run)).questions().values()}
    return RunSpec(
        banks=tuple(without(bank, asked) for bank in banks) if asked else tuple(banks),
        templates=tuple(read_template(str(name)) for name in names.templates),
        asked=questions,
    )


def make_plan(spec: RunSpec, target: Target) -> RunPlan:
    """Return the plan of a run. Raises RequestError where two banks or templates share a name, and for bad numbers."""
    asked, protocol = spec.asked, PROTOCOLS[spec.asked.protocol]
    protocol = replace(protocol, rendering=replace(protocol.rendering, template_args=dict(asked.template_args)))
    for what, names in (
        ("banks", [bank.name for bank in spec.banks]),
        ("templates", [template.name for template in spec.templates]),
    ):
        if len(set(names)) < len(names):
            raise RequestError(f"two {what} share a name ({', '.join(names)}); rename a file")
    decoding = _decoding(asked, protocol)
    if asked.epochs > 1 and decoding.mode == "greedy":
        raise RequestError(f"--epochs {asked.epochs} would repeat one greedy answer; give a --temperature")
    if asked.top_p < 1 and decoding.mode != "sample":
        raise RequestError(f"--top-p {asked.top_p} would change nothing without a --temperature above 0; give one")
    duplicates = asked.duplicates or protocol.duplicates
    questions = tuple(
        question
        for bank in spec.banks
        for question in choose(bank, duplicates=duplicates, limit=asked.limit, spread=protocol.spread)
    )
    config = {
        "protocol": protocol.name,
        "target": target.facts,
        "banks": [_bank_facts(bank) for bank in spec.banks],
        "templates": [_template_facts(template) for template in spec.templates],
        "duplicates": duplicates,
        "limit": asked.limit,
        "epochs": asked.epochs,
        "decoding": asdict(decoding),
        "rendering": asdict(protocol.rendering),
        "keep_thoughts": asked.keep_thoughts,
    }
    return RunPlan(
        config=config,
        protocol=protocol,
        decoding=decoding,
        questions=questions,
        requests=tuple(requests_of(questions, spec.templates, asked.epochs)),
    )


def plan_of(run: RunDir) -> RunPlan:
    """Return the plan that a run's folder was made by; it needs neither banks nor templates nor the model."""
    config = run.config
    try:
        templates = [checked(Template, facts) for facts in config["templates"]]
        decoding = checked(Decoding, config["decoding"])
        rendering = checked(Rendering, config["rendering"])
    except ValueError as error:
        raise ResumeError(f"{run.path / 'run.json'}: is damaged: {error}; the run cannot be read") from error
    questions = tuple(run.questions().values())
    return RunPlan(
        config=config,
        protocol=replace(PROTOCOLS[config["protocol"]], rendering=rendering),
        decoding=decoding,
        questions=questions,
        requests=tuple(requests_of(questions, templates, config["epochs"])),
    )


def requests_of(questions: Iterable[Question], templates: Sequence[Template], epochs: int) -> Iterable[Request]:
    """Yield one ask per question, template and epoch; ids are `qid | template | epoch`."""
    for question in questions:
        for template in templates:
            for epoch in range(epochs):
                yield Request(
                    id=f"{question.qid}|{template.name}|{epoch}",
                    messages=(Message(role="user", content=template.fill(question.text)),),
                    facts={
                        "bank": question.bank,
                        "category": question.category,
                        "template": template.name,
                        "qid": question.qid,
                        "epoch": str(epoch),
                    },
                )


def _decoding(asked: Questions, protocol: Protocol) -> Decoding:
    base = Decoding(
        max_new_tokens=asked.max_new_tokens or protocol.max_new_tokens,
        mode=protocol.mode,
        seed=asked.seed,
    )
    if asked.temperature is None:
        return base
    if asked.temperature == 0:
        return replace(base, mode="greedy")
    return replace(base, mode="sample", temperature=asked.temperature, top_p=asked.top_p)


def _bank_facts(bank: Bank) -> dict[str, Any]:
    return {
        "name": bank.name,
        "sha256": bank.sha256,
        "published": bank.published,
        "questions": len(bank.questions),
        "safe": all(question.safe for question in bank.questions),
    }


def _template_facts(template: Template) -> dict[str, Any]:
    # The text itself goes along, so that a run's folder alone says what was asked.
    return asdict(template)
