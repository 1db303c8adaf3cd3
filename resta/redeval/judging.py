"""The second phase of a run: every judge over every answer that it has yet to see.

A local judge is loaded once and freed before the next, unless whoever judges several runs keeps it. Judges that
generate go through the engine, those that read one token's probabilities locally, classifiers through their own head;
each verdict is kept as it comes.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from resta.errors import RequestError, UnansweredError
from resta.journal import Journal
from resta.redeval.control import OWN, ControlSet, Known, control_languages, known_answers, read_control, record_of
from resta.redeval.judges import (
    Chat,
    Classifier,
    Digits,
    Judge,
    Tokens,
    classifier_verdict,
    judge_messages,
    judge_requests,
    not_whole,
    verdict_of,
    verdict_without_model,
)
from resta.redeval.language import cut_to_tokens
from resta.redeval.messages import NoReply, Outcome, Reply, Request
from resta.redeval.models import (
    LocalModel,
    LocalSpec,
    Prompt,
    TextClassifier,
    classify,
    clip_text,
    fingerprint,
    load_classifier,
    load_local,
    pick_device,
    read_tokenizer,
    token_id,
)
from resta.redeval.progress import RunOptions, Tally, count, engine_limits, note_failure, say_failures
from resta.redeval.questions import Question
from resta.redeval.records import Answer, Judgement, RunDir, Tested
from resta.redeval.targets import Target, parse_target, same_model

Pairs = Sequence[tuple[Question, Answer]]
Keep = Callable[[Question, Judgement], None]
Fail = Callable[[NoReply], None]
Clip = Callable[[str], tuple[str, bool]]  # text -> what of it is shown, and whether that is all
Loaded = TypeVar("Loaded")
CHUNK = 256  # answers per pass of a judge that reads one token: verdicts are kept after each


def judge_target(judge: Judge, device: str = "auto") -> Target:
    """Return the model that carries a judge out. Raises RequestError."""
    assert judge.model is not None
    if judge.base_url is not None:
        return Target(name=judge.model, base_url=judge.base_url, key_variable=judge.key_variable)
    return parse_target(judge.model, None, base=judge.spec.adapter_base, device=device)


def check_judges(judges: Sequence[Judge], target: Target | None, *, allow_self: bool) -> list[Judge]:
    """Return the judges with their local models' fingerprints. Raises RequestError for a judge of itself."""
    checked = []
    for judge in judges:
        if judge.model is not None:
            model = judge_target(judge)
            if target is not None and same_model(target, model) and not allow_self:
                raise RequestError(
                    f"judge {judge.id} is the model under test, which would grade itself; choose another, or "
                    "allow it with --allow-self-judge"
                )
            if model.local is not None:
                judge = replace(judge, fingerprint=fingerprint(model.local))
        checked.append(judge)
    if len({judge.id for judge in checked}) < len(checked):
        raise RequestError(f"two judges share a name: {', '.join(judge.id for judge in checked)}")
    return checked


def make_ready(judges: Sequence[Judge], run: RunDir | None, device: str) -> None:
    """Find out, before an answer is paid for, whether the judges that will be needed can judge at all.

    A server must answer, and take such a judge; a local model's tokenizer must be there and fit. `run` is None where
    answers are still to come. Raises UnansweredError, RequestError.
    """
    for judge in judges:
        if judge.model is not None and (run is None or pending(run, judge) or untested(run, judge)):
            try:
                try_out(judge, judge_target(judge, device))
            except UnansweredError as error:
                raise UnansweredError(
                    f"judge {judge.id}: {error}. Start it, or leave it out for now and judge the answers later "
                    "(resta redeval judge RUN --judge ...)"
                ) from error


def try_out(judge: Judge, target: Target) -> None:
    """Find out whether a judge's server answers, or its local tokenizer fits. Raises UnansweredError, RequestError."""
    if target.local is None:
        from resta.redeval import engine

        engine.open_model(target, judge.decoding, judge.rendering, raw=judge.is_raw)
        return
    pick_device(target.local.device)
    tokenizer = read_tokenizer(target.local)
    if isinstance(judge.spec.render, Chat) and not tokenizer.chat_template:
        raise RequestError(f"judge {judge.id}: {judge.model} has no chat template, and this judge is asked through one")
    if isinstance(judge.spec.read, Tokens | Digits):
        candidate_tokens(judge, tokenizer)


def note_judges(run: RunDir, judges: Sequence[Judge]) -> None:
    """Put the judges' declarations into a run, so that its folder alone says who judged."""
    for judge in judges:
        facts = judge.spec.model_dump(mode="json", exclude={"model"})
        own = {"model": judge.model, "made_for": judge.spec.model, "base_url": judge.base_url}
        run.add_judge(judge.id, judge.sha256, {**own, **facts})


def pending(run: RunDir, judge: Judge) -> list[tuple[Question, Answer]]:
    """Return the answers that a judge has yet to judge, on the kinds of questions that it measures.

    One that was judged as it came, and turned out to be a thought cut off, is among them.
    """
    answers, questions = run.answers(), run.questions()
    done = {each.answer_id: each.label for each in run.verdicts_on(answers) if each.judge_sha256 == judge.sha256}
    pairs = [
        (questions[answer.qid], answer)
        for answer in answers
        if answer.id not in done or ("cut_thought" in answer.flags and done[answer.id] != "unanswered")
    ]
    return [(q, answer) for q, answer in pairs if judge.measures(safe_question=q.safe)]


def untested(run: RunDir, judge: Judge, sitting: str | None = None) -> list[Known]:
    """Return the known answers that a judge has yet to be tested on, in the languages of the run's questions.

    A served judge that is to judge in a sitting is tested in it; `sitting` is None where it has nothing to judge.
    """
    return left_to_test(judge, run.questions().values(), run.control(), sitting)


def left_to_test(
    judge: Judge, questions: Iterable[Question], rows: Iterable[Tested], sitting: str | None
) -> list[Known]:
    """Return the known answers that a judge has yet to be tested on, after `rows`, for questions in these languages.

    Of a served judge only the rows of this sitting count (None: of all): who answers at its address may have changed.
    """
    sha256, anywhen = judge.sha256, sitting is None or judge.base_url is None
    rows = [row for row in rows if row.judge_sha256 == sha256 and (anywhen or row.sitting == sitting)]
    done = {(row.answer_id, row.sha256) for row in rows}
    sets = control_sets(judge, questions).items()
    known = [each for language, found in sets for each in known_answers(found, language, judge.spec.measures)]
    return [each for each in known if (each.answer.id, each.sha256) not in done]


def control_sets(judge: Judge, questions: Iterable[Question]) -> dict[str, ControlSet]:
    """Return the known answers for a judge of answers to these questions, by language, or its own."""
    own = judge.spec.control
    return {OWN: own} if own else {language: read_control(language) for language in control_languages(questions)}


def adopt_control(run: RunDir, other: RunDir) -> None:
    """Take over what judges made of the known answers in another run, so that they are not asked again."""
    there = set(run.control())
    with Journal(run.path / "control.jsonl") as journal:
        for row in other.control():
            if row not in there:
                journal.append(row)


def judge_phase(run: RunDir, judge: Judge, options: RunOptions) -> None:
    """Judge every answer that this judge has yet to see, after those that are known beforehand.

    Where it fails, the answer stays without a verdict. Raises UnansweredError where too many fail in a row, or where a
    served judge says nothing of a known answer: then nobody knows whether it can judge. Verdicts so far are kept.
    """
    answers = pending(run, judge)
    known = {each.answer.id: each for each in untested(run, judge, options.sitting if answers else None)}
    first = [(each.question, each.answer) for each in known.values()]
    if not first and not answers:
        return
    tally = Tally(phase=f"judge {judge.id}", total=len(first) + len(answers))
    options.watch(tally)
    with Journal(run.path / "verdicts.jsonl") as journal, Journal(run.path / "control.jsonl") as control:

        def keep(question: Question, verdict: Judgement) -> None:
            if verdict.answer_id in known:
                control.append(record_of(known[verdict.answer_id], verdict, options.sitting))
            else:
                journal.append(verdict)
                count(tally, verdict, question)
            tally.done += 1
            options.watch(tally)

        def fail(outcome: NoReply) -> None:
            note_failure(run, tally, outcome, judge.id)

        try:
            log_dir = run.log_dir(f"judge-{judge.sha256[:12]}") if judge.model is not None else None
            job = Job(judge=judge, pairs=first + answers, keep=keep, fail=fail)
            if first and judge.base_url is not None:
                put_to(replace(job, pairs=first), options, log_dir)
                if tally.failed:
                    raise UnansweredError(
                        f"judge {judge.id} gave no verdict on {tally.failed} of {len(first)} known answers "
                        f"({tally.first_failure}): whether it can judge is not known, and it is shown no other"
                    )
                job = replace(job, pairs=answers)
            put_to(job, options, log_dir)
        finally:
            say_failures(tally, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one judge is to judge, and where its verdicts and its failures go.

    `whole`: an answer that it can read in part only is unparsed, where a verdict on all of the answer is needed.
    """

    judge: Judge
    pairs: Pairs
    keep: Keep
    fail: Fail
    whole: bool = False


def put_to(job: Job, options: RunOptions, log_dir: Path | None) -> None:
    """Put answers to a judge and hand its verdicts on as they come; without `log_dir` no file holds what was said.

    Raises UnansweredError where too many fail in a row.
    """
    judge, to_ask = job.judge, []
    for question, answer in job.pairs:
        verdict = verdict_without_model(judge, answer, safe_question=question.safe)
        if verdict is None:
            to_ask.append((question, answer))
        else:
            job.keep(question, verdict)
    if not to_ask:
        return
    job = replace(job, pairs=to_ask)
    target = judge_target(judge, options.judge_device)
    if target.local is None:
        _ask_engine(job, options, None, log_dir)
    else:
        _ask_local(job, target.local, options, log_dir)
        gc.collect()  # of a model in this process, what refers to itself


def _ask_local(job: Job, spec: LocalSpec, options: RunOptions, log_dir: Path | None) -> None:
    read = job.judge.spec.read
    if isinstance(read, Classifier):
        _classify(job, _loaded(spec, load_classifier, options))
        return
    local = _loaded(spec, load_local, options)
    job = _without_special(job, local)
    if isinstance(read, Tokens | Digits):
        _read_next_token(job, local)
    else:
        _ask_engine(job, options, local, log_dir)


def _without_special(job: Job, local: LocalModel) -> Job:
    """Break up the spellings of a local judge's special tokens, so that no question can fake a turn; see clip_for."""
    return replace(job, pairs=[(replace(q, text=local.without_special(q.text)), answer) for q, answer in job.pairs])


def _loaded(spec: LocalSpec, load: Callable[[LocalSpec], Loaded], options: RunOptions) -> Loaded:
    """Return a judge's model: one that is kept between runs, or loaded and, where models are kept, kept."""
    kept = options.kept_judges
    if kept is None:
        return load(spec)
    if spec not in kept:
        kept[spec] = load(spec)
    found: Loaded = kept[spec]
    return found


# -- through the engine --------------------------------------------------------------------------------------


def _ask_engine(job: Job, options: RunOptions, local: LocalModel | None, log_dir: Path | None) -> None:
    from resta.redeval import engine

    judge = job.judge
    requests = _shown(job, job.pairs, clip_for(judge, job.pairs, local))
    if not requests:
        return
    collect = collector(judge, requests, job.keep)
    limits = engine_limits(options)
    handle = engine.open_model(
        local or judge_target(judge), judge.decoding, judge.rendering, raw=judge.is_raw, limits=limits
    )

    def hand_on(outcome: Outcome) -> None:
        if isinstance(outcome, NoReply):
            job.fail(outcome)
        else:
            collect(outcome)

    try:
        engine.ask_all(
            handle,
            [request for _, request in requests],
            hand_on,
            log_dir=log_dir,
            title=f"judge {judge.id}",
            limits=limits,
        )
    finally:
        engine.release(handle)


def collector(
    judge: Judge, requests: Sequence[tuple[tuple[Question, Answer], Request]], keep: Keep
) -> Callable[[Reply], None]:
    """Return what takes replies in any order and keeps a verdict once all policies of an answer have theirs."""
    owners = {request.id: pair for pair, request in requests}
    wanted: dict[str, list[str]] = defaultdict(list)
    for (_, answer), request in requests:
        wanted[answer.id].append(request.id)
    replies: dict[str, Reply] = {}

    def collect(reply: Reply) -> None:
        replies[reply.id] = reply
        question, answer = owners[reply.id]
        ids = wanted[answer.id]
        if all(key in replies for key in ids):
            keep(question, verdict_of(judge, answer, [replies.pop(key) for key in ids]))

    return collect


def _shown(job: Job, pairs: Pairs, clip: Clip) -> list[tuple[tuple[Question, Answer], Request]]:
    """Return what is asked about each answer. One that must be read whole and cannot be gets its verdict here."""
    found = []
    for question, answer in pairs:
        text, whole = clip(answer.text)
        if job.whole and not whole:
            job.keep(question, not_whole(job.judge, answer))
        else:
            found += [((question, answer), each) for each in judge_requests(job.judge, question.text, answer.id, text)]
    return found


def clip_for(judge: Judge, pairs: Pairs, local: LocalModel | None) -> Clip:
    """Return what clips an answer, and never the judge's own words, to the judge's limit and context.

    For a local judge the spellings of its special tokens are broken up first, so that no answer can fake a turn.
    """
    tokens = judge.spec.clip_tokens
    if local is None:
        return lambda text: _clipped(text, cut_to_tokens(text, tokens))
    longest = max((question.text for question, _ in pairs), key=len)
    bare = _prompt(
        judge,
        local,
        "",
        judge_messages(judge.spec, longest, "", max(judge.spec.policies.values(), default="", key=len)),
    )
    if longest not in bare.text:
        raise RequestError(f"judge {judge.id}: the chat template of {local.name} leaves the question out")
    room = local.context - judge.spec.max_new_tokens - len(bare.ids) - 16  # joins may cost a few tokens
    if room < 1:
        raise RequestError(f"judge {judge.id}: its own prompt leaves no room for an answer in {local.context} tokens")

    def clip(text: str) -> tuple[str, bool]:
        plain = local.without_special(text)
        return _clipped(plain, local.clip(plain, min(tokens, room)))

    return clip


def _clipped(text: str, part: str) -> tuple[str, bool]:
    return part, part == text


def _prompt(judge: Judge, local: LocalModel, key: str, messages: Any) -> Prompt:
    if judge.is_raw:
        return local.raw_prompt(key, messages[0].content + judge.rendering.suffix)
    return local.chat_prompt(key, messages, judge.rendering)


# -- one forward pass ----------------------------------------------------------------------------------------


def _read_next_token(job: Job, local: LocalModel) -> None:
    judge, clip = job.judge, clip_for(job.judge, job.pairs, local)
    tokens = candidate_tokens(judge, local.tokenizer)
    for start in range(0, len(job.pairs), CHUNK):
        requests = _shown(job, job.pairs[start : start + CHUNK], clip)
        prompts = [_prompt(judge, local, request.id, request.messages) for _, request in requests]
        collect = collector(judge, requests, job.keep)
        for (_, request), row in zip(requests, local.next_token_logprobs(prompts), strict=True):
            top = {text: float(row[token]) for text, token in tokens.items()}
            collect(Reply(id=request.id, text="", finish="stop", top=(top,), new_tokens=0))


def candidate_tokens(judge: Judge, tokenizer: Any) -> dict[str, int]:
    """Return {spelling: token id} of all that the judge may say, with and without a space before it.

    Raises RequestError where one of them is not a single token of this judge's vocabulary.
    """
    read = judge.spec.read
    if isinstance(read, Tokens):
        words = [*read.positive, *read.negative]
    else:
        assert isinstance(read, Digits)
        words = [str(digit) for digit in range(read.lowest, read.highest + 1)]
    tokens: dict[str, int] = {}
    for word in words:
        found = {text: token_id(tokenizer, text) for text in (word, f" {word}")}
        known = {text: token for text, token in found.items() if token is not None}
        if not known:
            raise RequestError(f"judge {judge.id}: {word!r} is not a single token of {judge.model}")
        # Some tokenizers give both spellings one id; its probability must count once.
        tokens.update({text: token for text, token in known.items() if token not in tokens.values()})
    return tokens


def _classify(job: Job, classifier: TextClassifier) -> None:
    judge, read = job.judge, job.judge.spec.read
    assert isinstance(read, Classifier)
    limit = judge.spec.clip_tokens
    shown = _shown(job, job.pairs, lambda text: _clipped(text, clip_text(classifier.tokenizer, text, limit)))
    texts = [request.messages[0].content for _, request in shown]
    for i, shares in classify(classifier, texts, multi_label=read.multi_label):
        unknown = [name for name in read.positive if name not in shares]
        if unknown:
            raise RequestError(f"judge {judge.id}: no label {', '.join(unknown)} among {', '.join(shares)}")
        question, answer = shown[i][0]
        job.keep(question, classifier_verdict(judge, answer, shares))
