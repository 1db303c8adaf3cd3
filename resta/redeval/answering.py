"""The first phase of a run: every answer, before any judge's model is loaded (judging.py).

Each answer is kept as it comes; whatever is there is not asked again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence

from resta.fingerprint import sha256_text
from resta.journal import Journal
from resta.redeval.judges import Judge, Strings, verdict_without_model
from resta.redeval.messages import NoReply, Outcome, Reply, Request
from resta.redeval.models import LocalModel, check_contexts, estimate_seconds, load_local
from resta.redeval.plan import RunPlan
from resta.redeval.progress import RunOptions, Tally, count, engine_limits, note_failure, say_failures
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, RunDir
from resta.redeval.targets import Target
from resta.redeval.thoughts import clean_reply
from resta.redeval.wire import seed_of


def keep_answer(plan: RunPlan, request: Request, reply: Reply) -> Answer:
    """Return the record of a reply: thoughts stripped as the protocol says, the raw text beside it."""
    said, cleaned = clean_reply(reply, plan.protocol.clean, keep=plan.config["keep_thoughts"])
    seeded = plan.decoding.mode == "sample" and plan.config["target"]["kind"] != "local"
    mark = plan.protocol.blocked_mark
    return Answer(
        id=request.id,
        qid=request.facts["qid"],
        template=request.facts["template"],
        epoch=int(request.facts["epoch"]),
        prompt_sha256=sha256_text(request.messages[0].content),
        raw=said,
        text=cleaned.text,
        finish="content_filter" if mark and mark in reply.text else reply.finish,
        flags=cleaned.flags,
        seed=seed_of(plan.decoding.seed, request.id) if seeded else None,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        rows=reply.rows,
    )


def missing_requests(run: RunDir, plan: RunPlan) -> list[Request]:
    """Return the asks without an answer yet, those last that have failed before: the others may fare better."""
    there = {answer.id for answer in run.answers()}
    failed = {failure.ask_id for failure in run.failures()}
    return sorted(
        (request for request in plan.requests if request.id not in there), key=lambda request: request.id in failed
    )


def answer_phase(
    run: RunDir,
    plan: RunPlan,
    target: Target,
    options: RunOptions,
    *,
    judges: Sequence[Judge] = (),
    local: LocalModel | None = None,
) -> None:
    """Ask all that is missing; judges that need no model judge each answer at once.

    An ask that fails is noted and asked again next time. Raises UnansweredError where too many fail in a row. A local
    target that is not handed over loaded, as `local`, is loaded here and freed before this returns.
    """
    requests = missing_requests(run, plan)
    if not requests:
        return
    from resta.redeval import engine

    local = local or ready_target(target, plan)
    _say_how_long(plan, requests, local, options)
    limits = engine_limits(options)
    handle = engine.open_model(local or target, plan.decoding, plan.protocol.rendering, limits=limits)
    by_id = {request.id: request for request in requests}
    questions = {question.qid: question for question in plan.questions}
    tally = Tally(phase="answers", total=len(plan.requests), done=len(plan.requests) - len(requests))
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
            options.watch(tally)

        options.watch(tally)
        try:
            engine.ask_all(handle, requests, keep, log_dir=run.log_dir("answers"), title="answers", limits=limits)
        finally:
            engine.release(handle)
            say_failures(tally, options)
    del handle, local
    gc.collect()


def _at_once(judges: Sequence[Judge], answer: Answer, question: Question) -> Iterable[Judgement]:
    """Yield the verdicts of the judges that need no model."""
    for judge in judges:
        if isinstance(judge.spec.read, Strings) and judge.measures(safe_question=question.safe):
            verdict = verdict_without_model(judge, answer, safe_question=question.safe)
            assert verdict is not None
            yield verdict


def _say_how_long(plan: RunPlan, requests: Sequence[Request], local: LocalModel | None, options: RunOptions) -> None:
    prompts, most = len(requests), f"at most {plan.decoding.max_new_tokens} new tokens each"
    if local is None:
        options.note(
            f"{prompts} requests, {most}; how long they take is up to the server, and the bar will tell after the "
            "first ones"
        )
    else:
        lengths = [len(request.messages[0].content) for request in requests]
        seconds = estimate_seconds(local, lengths, plan.decoding)
        options.note(
            f"{prompts} prompts, {most}, {local.device}: at most about {minutes(seconds)} if every answer runs to "
            "the limit"
        )


def ready_target(target: Target, plan: RunPlan) -> LocalModel | None:
    """Return a local target, loaded and tried on one prompt; of any other, see that it is there and takes our key.

    Nothing is written or paid for. Raises RequestError, UnansweredError.
    """
    check_fits(target, plan, some=True)
    if target.local is not None:
        local = load_local(target.local)
        local.check_template(plan.protocol.rendering)
        return local
    from resta.redeval import engine

    engine.open_model(target, plan.decoding, plan.protocol.rendering)
    return None


def check_fits(target: Target, plan: RunPlan, *, some: bool = False) -> None:
    """Refuse a plan of which a prompt and its answer do not fit a local model's context; no weights are read.

    With `some` it is enough that one of them fits. A served model's context is not known. Raises RequestError.
    """
    if target.local is not None:
        requests = ((request.id, request.messages) for request in plan.requests)
        check_contexts(target.local, requests, plan.protocol.rendering, plan.decoding, some=some)


def minutes(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
