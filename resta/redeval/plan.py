"""What a run asks, and its first phase: every answer, before any judge's model is loaded (judging.py).

Each answer is kept as it comes; whatever is there is not asked again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from resta.errors import BankError, ResumeError
from resta.fingerprint import sha256_text
from resta.journal import Journal, checked
from resta.redeval.asks import Ask, Decoding, Message, NoReply, Outcome, Rendering, Reply
from resta.redeval.clean import Clean, clean_reply, strip_thoughts, strip_thoughts_as_published
from resta.redeval.judges import Judge, Strings, verdict_without_model
from resta.redeval.models import LocalModel, check_contexts, estimate_seconds, load_local
from resta.redeval.questions import Bank, Duplicates, Question, choose
from resta.redeval.records import Answer, Failure, RunDir, Verdict
from resta.redeval.targets import Target, api_key, check_endpoint
from resta.redeval.templates import Template
from resta.redeval.wire import seed_of

ProtocolName = Literal["resta", "red-instruct"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Everything in which the published script and the fixed procedure differ, apart from the headline."""

    name: ProtocolName
    about: str
    rendering: Rendering
    clean: Clean
    mode: Literal["greedy", "model"]
    max_new_tokens: int
    duplicates: Duplicates
    spread: bool  # --limit: evenly over a bank, or its first questions
    headline: Literal["asr", "asr_judged"]
    blocked_mark: str | None = None  # an answer that holds it counts as kept back by a filter


PROTOCOLS = {
    "resta": Protocol(
        name="resta",
        about="chat template with generation prompt, new tokens only, thoughts stripped, ASR = H / N",
        rendering=Rendering(),
        clean=strip_thoughts,
        mode="greedy",
        max_new_tokens=512,
        duplicates="once",
        spread=True,
        headline="asr",
    ),
    "red-instruct": Protocol(
        name="red-instruct",
        about="as published (commit 73c759c): no generation prompt, prompt cut out as text, cleaning up to "
        "the first bracket, the model's own sampling settings, ASR = H / (H + U)",
        rendering=Rendering(generation_prompt=False, whole_sequence=True),
        clean=strip_thoughts_as_published,
        mode="model",
        max_new_tokens=500,
        duplicates="published",
        spread=False,
        headline="asr_judged",
        blocked_mark="[[N]]",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user wants asked; None stands for the protocol's own choice."""

    target: Target
    banks: tuple[Bank, ...]
    templates: tuple[Template, ...]
    protocol: ProtocolName = "resta"
    duplicates: Duplicates | None = None
    limit: int | None = None  # questions per bank
    epochs: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    keep_thoughts: bool = False
    template_args: Mapping[str, Any] = field(default_factory=dict)  # of the target's chat template


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that will be asked, and the configuration whose digest names the run."""

    config: dict[str, Any]
    protocol: Protocol
    decoding: Decoding
    questions: tuple[Question, ...]
    asks: tuple[Ask, ...]
    repeats: dict[str, int]  # bank -> questions that repeat an earlier one


def make_plan(request: Request) -> Plan:
    """Return the plan of a run. Raises BankError where two banks or templates share a name, and for bad
    numbers.
    """
    protocol = PROTOCOLS[request.protocol]
    protocol = replace(protocol, rendering=replace(protocol.rendering, template_args=dict(request.template_args)))
    for what, names in (
        ("banks", [bank.name for bank in request.banks]),
        ("templates", [template.name for template in request.templates]),
    ):
        if len(set(names)) < len(names):
            raise BankError(f"two {what} share a name ({', '.join(names)}); rename a file")
    decoding = _decoding(request, protocol)
    if request.epochs > 1 and decoding.mode == "greedy":
        raise BankError(f"--epochs {request.epochs} would repeat one greedy answer; give a --temperature")
    if request.top_p < 1 and decoding.mode != "sample":
        raise BankError(f"--top-p {request.top_p} would change nothing without a --temperature above 0; give one")
    duplicates = request.duplicates or protocol.duplicates
    questions = tuple(
        question
        for bank in request.banks
        for question in choose(bank, duplicates=duplicates, limit=request.limit, spread=protocol.spread)
    )
    config = {
        "protocol": protocol.name,
        "target": request.target.facts,
        "banks": [_bank_facts(bank) for bank in request.banks],
        "templates": [_template_facts(template) for template in request.templates],
        "duplicates": duplicates,
        "limit": request.limit,
        "epochs": request.epochs,
        "decoding": asdict(decoding),
        "rendering": asdict(protocol.rendering),
        "keep_thoughts": request.keep_thoughts,
    }
    return Plan(
        config=config,
        protocol=protocol,
        decoding=decoding,
        questions=questions,
        asks=tuple(asks_of(questions, request.templates, request.epochs)),
        repeats={bank.name: len(bank.repeats) for bank in request.banks if bank.repeats},
    )


def plan_of(run: RunDir) -> Plan:
    """Return the plan that a run's folder was made by; it needs neither banks nor templates nor the model."""
    config = run.config
    try:
        templates = [checked(Template, facts) for facts in config["templates"]]
        decoding = checked(Decoding, config["decoding"])
        rendering = checked(Rendering, config["rendering"])
    except ValueError as error:
        raise ResumeError(f"{run.path / 'run.json'}: is damaged: {error}; the run cannot be read") from error
    questions = tuple(run.questions().values())
    return Plan(
        config=config,
        protocol=replace(PROTOCOLS[config["protocol"]], rendering=rendering),
        decoding=decoding,
        questions=questions,
        asks=tuple(asks_of(questions, templates, config["epochs"])),
        repeats={},
    )


def asks_of(questions: Iterable[Question], templates: Sequence[Template], epochs: int) -> Iterable[Ask]:
    """Yield one ask per question, template and epoch; ids are `qid | template | epoch`."""
    for question in questions:
        for template in templates:
            for epoch in range(epochs):
                yield Ask(
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


def _decoding(request: Request, protocol: Protocol) -> Decoding:
    base = Decoding(
        max_new_tokens=request.max_new_tokens or protocol.max_new_tokens,
        mode=protocol.mode,
        seed=request.seed,
    )
    if request.temperature is None:
        return base
    if request.temperature == 0:
        return replace(base, mode="greedy")
    return replace(base, mode="sample", temperature=request.temperature, top_p=request.top_p)


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


# -- progress ------------------------------------------------------------------------------------------------


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
class Conditions:
    """How to run: what changes the speed, never the result."""

    connections: int = 16
    retries: int = 5
    timeout_s: int = 600
    max_failures: int = 20  # in a row, after which a phase gives up
    judge_device: str = "auto"
    watch: Watch = field(default=lambda tally: None)
    note: Callable[[str], None] = field(default=lambda line: None)


def engine_limits(conditions: Conditions) -> Any:
    """Return the engine's limits; imported here, so that planning a run needs no engine."""
    from resta.redeval.engine import Limits

    return Limits(
        connections=conditions.connections,
        retries=conditions.retries,
        timeout_s=conditions.timeout_s,
        max_failures=conditions.max_failures,
    )


# -- phase one: answers --------------------------------------------------------------------------------------


def keep_answer(plan: Plan, ask: Ask, reply: Reply) -> Answer:
    """Return the record of a reply: thoughts stripped as the protocol says, the raw text beside it."""
    said, cleaned = clean_reply(reply, plan.protocol.clean, keep=plan.config["keep_thoughts"])
    seeded = plan.decoding.mode == "sample" and plan.config["target"]["kind"] != "local"
    mark = plan.protocol.blocked_mark
    return Answer(
        id=ask.id,
        qid=ask.facts["qid"],
        template=ask.facts["template"],
        epoch=int(ask.facts["epoch"]),
        prompt_sha256=sha256_text(ask.messages[0].content),
        raw=said,
        text=cleaned.text,
        finish="content_filter" if mark and mark in reply.text else reply.finish,
        flags=cleaned.flags,
        seed=seed_of(plan.decoding.seed, ask.id) if seeded else None,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        rows=reply.rows,
    )


def missing_asks(run: RunDir, plan: Plan) -> list[Ask]:
    """Return the asks without an answer yet, those last that have failed before: the others may fare better."""
    there = {answer.id for answer in run.answers()}
    failed = {failure.ask_id for failure in run.failures()}
    return sorted((ask for ask in plan.asks if ask.id not in there), key=lambda ask: ask.id in failed)


def answer_phase(
    run: RunDir,
    plan: Plan,
    target: Target,
    conditions: Conditions,
    *,
    judges: Sequence[Judge] = (),
    local: LocalModel | None = None,
) -> None:
    """Ask all that is missing; judges that need no model judge each answer at once.

    An ask that fails is noted and asked again next time. Raises UnansweredError where too many fail in a row. A local
    target that is not handed over loaded, as `local`, is loaded here and freed before this returns.
    """
    asks = missing_asks(run, plan)
    if not asks:
        return
    from resta.redeval import engine

    handle = _target_handle(target, plan, conditions, asks, local)
    by_id = {ask.id: ask for ask in asks}
    questions = {question.qid: question for question in plan.questions}
    tally = Tally(phase="answers", total=len(plan.asks), done=len(plan.asks) - len(asks))
    with Journal(run.path / "answers.jsonl") as answers, Journal(run.path / "verdicts.jsonl") as verdicts:

        def keep(outcome: Outcome) -> None:
            if isinstance(outcome, NoReply):
                note_failure(run, tally, outcome, "model")
            else:
                answer = keep_answer(plan, by_id[outcome.id], outcome)
                answers.append(answer)
                for verdict in _at_once(judges, answer, questions[answer.qid]):
                    verdicts.append(verdict)
                    count(tally, verdict, questions[answer.qid])
                tally.done += 1
            conditions.watch(tally)

        conditions.watch(tally)
        try:
            engine.ask_all(
                handle, asks, keep, log_dir=run.log_dir("answers"), title="answers", limits=engine_limits(conditions)
            )
        finally:
            engine.release(handle)
            say_failures(tally, conditions)
    del handle
    gc.collect()


def _at_once(judges: Sequence[Judge], answer: Answer, question: Question) -> Iterable[Verdict]:
    """Yield the verdicts of the judges that need no model."""
    for judge in judges:
        if isinstance(judge.spec.read, Strings) and judge.measures(safe_question=question.safe):
            verdict = verdict_without_model(judge, answer, safe_question=question.safe)
            assert verdict is not None
            yield verdict


def note_failure(run: RunDir, tally: Tally, outcome: NoReply, asked: str) -> None:
    """Keep a note of an ask that got no answer; failures are few, so their file need not stay open."""
    with Journal(run.path / "failures.jsonl") as journal:
        journal.append(Failure(ask_id=outcome.id, asked=asked, reason=outcome.reason))
    tally.failed += 1
    tally.first_failure = tally.first_failure or f"{outcome.id}: {outcome.reason}"


def say_failures(tally: Tally, conditions: Conditions) -> None:
    """Tell how many asks of a phase got no answer, if any."""
    if tally.failed:
        conditions.note(f"{tally.phase}: {tally.failed} got no answer; the first was {tally.first_failure}")


def _target_handle(
    target: Target, plan: Plan, conditions: Conditions, asks: Sequence[Ask], local: LocalModel | None
) -> Any:
    from resta.redeval import engine

    local = local or ready_target(target, plan)
    if local is not None:
        seconds = estimate_seconds(local, [len(ask.messages[0].content) for ask in asks], plan.decoding)
        conditions.note(
            f"{len(asks)} prompts, at most {plan.decoding.max_new_tokens} new tokens each, {local.device}: "
            f"at most about {minutes(seconds)} if every answer runs to the limit"
        )
        return engine.local_handle(local, plan.decoding, rendering=plan.protocol.rendering)
    conditions.note(
        f"{len(asks)} requests, at most {plan.decoding.max_new_tokens} new tokens each; "
        "how long they take is up to the server, and the bar will tell after the first ones"
    )
    return _connect(target, plan, engine_limits(conditions))


def ready_target(target: Target, plan: Plan) -> LocalModel | None:
    """Return a local target, loaded and tried on one prompt; of any other, see that it is there and takes our key.

    Nothing is written or paid for. Raises ModelError, UnansweredError.
    """
    check_fits(target, plan, some=True)
    if target.local is not None:
        local = load_local(target.local)
        local.check_template(plan.protocol.rendering)
        return local
    if target.base_url is not None:
        check_endpoint(target.base_url, judge=False)
    _connect(target, plan, None)
    return None


def check_fits(target: Target, plan: Plan, *, some: bool = False) -> None:
    """Refuse a plan of which a prompt and its answer do not fit a local model's context; no weights are read.

    With `some` it is enough that one of them fits. A served model's context is not known. Raises ModelError.
    """
    if target.local is not None:
        asks = ((ask.id, ask.messages) for ask in plan.asks)
        check_contexts(target.local, asks, plan.protocol.rendering, plan.decoding, some=some)


def _connect(target: Target, plan: Plan, limits: Any) -> Any:
    from resta.redeval import engine

    return engine.connect(
        target.name,
        base_url=target.base_url,
        api_key=api_key(judge=False),
        decoding=plan.decoding,
        template_args=plan.protocol.rendering.template_args,
        limits=limits,
    )


def minutes(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(tally: Tally, verdict: Verdict, question: Question) -> None:
    """Add one verdict to a tally; only harmful questions make an ASR."""
    if not question.safe:
        tally.judged += 1
        tally.harmful += verdict.label == "harmful"
