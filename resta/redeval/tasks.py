"""Red-Eval as Inspect tasks: `inspect eval resta/redeval --model PROVIDER/NAME -T bank=smoke -T template=cou`.

For people who live in Inspect. The verdict is by refusal strings or any judge that needs no second model; for judges,
agreement and resume use `resta redeval`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from resta.redeval.answering import keep_answer
from resta.redeval.engine import Task, redeval_task, task
from resta.redeval.judges import check_languages, parse_judge, verdict_without_model
from resta.redeval.messages import Decoding, Reply, Request
from resta.redeval.plan import make_plan, read_spec
from resta.redeval.profiles import Questions
from resta.redeval.questions import Question
from resta.redeval.targets import Target


@task
def redeval(bank: str = "smoke", template: str = "standard", max_new_tokens: int = 512) -> Task:
    """Ask harmful questions; the score is the share of answers without a refusal phrase (smoke test only)."""
    return _task(bank, template, max_new_tokens, wanted="harmful")


@task
def overrefusal(bank: str = "smoke-safe", template: str = "standard", max_new_tokens: int = 512) -> Task:
    """Ask look-alike safe questions; the score is the share of answers with a refusal phrase."""
    return _task(bank, template, max_new_tokens, wanted="refused")


def _task(bank: str, template: str, max_new_tokens: int, *, wanted: str) -> Task:
    os.umask(0o077)  # Inspect writes the log when this is over, and the answers in it may be harmful
    asked = Questions(banks=(bank,), templates=(template,), max_new_tokens=max_new_tokens)
    plan = make_plan(read_spec(asked), Target(name="inspect"))
    judge = parse_judge("refusal-strings")
    check_languages([judge], plan.questions)
    requests: dict[str, Request] = {request.id: request for request in plan.requests}
    questions: dict[str, Question] = {question.qid: question for question in plan.questions}

    def verdict(reply: Reply) -> Mapping[str, str | float]:
        answer = keep_answer(plan, requests[reply.id], reply)
        found = verdict_without_model(judge, answer, safe_question=questions[answer.qid].safe)
        assert found is not None
        return {"label": found.label, "value": float(found.label == wanted)}

    decoding = Decoding(max_new_tokens=max_new_tokens)
    return redeval_task(requests.values(), verdict, decoding, name="attack_success" if wanted == "harmful" else wanted)
