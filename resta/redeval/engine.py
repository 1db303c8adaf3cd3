"""The one file that knows inspect-ai: our provider, running asks through it, and putting verdicts in its logs.

Inspect gives concurrency, retries, some forty providers and a log that `inspect view` browses. The truth stays in
records.py: an answer counts once it is in answers.jsonl, whatever the log says. Inspect's own `hf` provider is not
used: it loads the weights twice, doubles the BOS, samples by default and batches slowly.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resta.errors import RequestError, UnansweredError
from resta.fingerprint import sha256_text
from resta.redeval import targets
from resta.redeval.messages import (
    Decoding,
    Finish,
    Message,
    NoReply,
    Outcome,
    Rendering,
    Reply,
    Request,
    without_prompt,
)

try:
    import anyio
    from inspect_ai import Task, eval, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.log import (
        EvalLog,
        EvalMetric,
        EvalResults,
        EvalScore,
        list_eval_logs,
        read_eval_log,
        write_eval_log,
    )
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        Model,
        ModelAPI,
        ModelInfo,
        ModelOutput,
        ModelUsage,
        RetryDecision,
        get_model,
        modelapi,
        set_model_info,
    )
    from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
    from inspect_ai.solver import Generate, Solver, TaskState, solver
    from openai import APIConnectionError, APIStatusError, AsyncOpenAI, BadRequestError
except ImportError as error:
    raise RequestError("Red-Eval needs inspect-ai and openai: pip install 'resta[redeval]'") from error

from resta.redeval.models import Generation, LocalModel, LocalSpec, Prompt, load_local
from resta.redeval.thoughts import opened_by
from resta.redeval.wire import TOP_LOGPROBS, GarbledError, blocked, is_filter, read_body, request_body, seed_of

__all__ = [
    "Limits",
    "Scorer",
    "Task",
    "ask_all",
    "connect",
    "local_handle",
    "redeval_task",
    "score_logs",
    "task",
]

# The queue counts as settled after this long without a newcomer. A batch that starts too early is a small
# one, and costs as many steps as a full one.
IDLE_S = 0.1
LONGEST_PAUSE_S = 30 * 60.0
WINDOW = 1024  # asks in flight for a local model: enough to sort by length over most of a run
# Newer releases of Inspect serve a running evaluation on a port unless told not to; older ones know no such argument.
_NO_SERVERS: dict[str, Any] = {
    name: False for name in ("acp_server", "ctl_server") if name in inspect.signature(eval).parameters
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How hard to lean on an endpoint. Times in seconds; `retries` per request, with growing pauses."""

    connections: int = 16
    retries: int = 5
    timeout_s: int = 600
    requests_per_minute: float | None = None  # retries too
    max_failures: int = 20  # failed asks in a row after which a phase gives up: the endpoint is taken for dead


# -- the local provider --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Job:
    """One prompt waiting for its answer."""

    prompt: Prompt
    decoding: Decoding
    wake: anyio.Event = field(default_factory=anyio.Event)
    result: Generation | BaseException | None = None


class MicroBatcher:
    """Gathers prompts that wait at the same time and runs them in batches, longest first.

    Whoever finds nobody leading leads: waits until the queue settles, runs batches until its own answer is there, and
    hands over to the next in the queue. So there is no background task to start, stop or leak.

    A batch runs in the event loop's own thread and holds the loop up: every other ask is waiting for this model anyway,
    and in a worker thread the same batch took a fifth longer on two CPU cores. The price is that a first Ctrl-C waits
    for the batch to end; a second one does not.
    """

    def __init__(self, local: LocalModel, *, whole_sequence: bool = False):
        self._local = local
        self._whole_sequence = whole_sequence
        self._waiting: list[Job] = []
        self._leader: Job | None = None

    async def submit(self, prompt: Prompt, decoding: Decoding) -> Generation:
        """Return the answer to one prompt; raises what its batch raised."""
        job = Job(prompt, decoding)
        self._waiting.append(job)
        try:
            if self._leader is not None:
                await job.wake.wait()
            if job.result is None:
                self._leader = job
                await self._lead(job)
        finally:  # also when this ask is cancelled: nobody may wait for a leader that is gone
            if job in self._waiting:
                self._waiting.remove(job)
            if self._leader is job:
                self._leader = self._waiting[0] if self._waiting else None
                if self._leader is not None:
                    self._leader.wake.set()
        if isinstance(job.result, BaseException):
            raise job.result
        assert job.result is not None
        return job.result

    async def _lead(self, own: Job) -> None:
        while own.result is None:
            await self._settle()
            same = [job for job in self._waiting if job.decoding == self._waiting[0].decoding]
            batch = [same[i] for i in self._local.take([job.prompt for job in same], same[0].decoding)]
            results = self._run(batch)
            for job, result in zip(batch, results, strict=True):
                job.result = result
                if job in self._waiting:
                    self._waiting.remove(job)
                job.wake.set()

    async def _settle(self) -> None:
        """Wait until no prompt has come for a while and every answer that is there has been passed on."""
        waiting = -1
        while waiting != len(self._waiting):
            waiting = len(self._waiting)
            await anyio.sleep(IDLE_S)
            await anyio.wait_all_tasks_blocked()

    def _run(self, batch: Sequence[Job]) -> Sequence[Generation | BaseException]:
        prompts = [job.prompt for job in batch]
        try:
            return self._local.answer(prompts, batch[0].decoding, whole_sequence=self._whole_sequence)
        except Exception as error:
            return [error] * len(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model already in memory and how to prompt it; the provider's arguments must be JSON, so it goes by key."""

    local: LocalModel
    rendering: Rendering
    raw: bool
    decoding: Decoding | None


_LOADED: dict[str, Loaded] = {}


@modelapi(name="resta")
class RestaAPI(ModelAPI):
    """Inspect's provider `resta/PATH`: a local model through our own batcher; greedy, exactly one BOS.

    From Inspect's own command line: `--model resta/PATH -M device=cuda -M dtype=bfloat16 -M base=...`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        loaded: str | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if loaded is not None:
            self._it = _LOADED[loaded]
        else:
            local = load_local(LocalSpec(model=model_name, **model_args))
            self._it = Loaded(local=local, rendering=Rendering(), raw=False, decoding=None)
        self._asked: Counter[str] = Counter()
        # Unless it is told, Inspect looks the model up by constructing this class once more: the weights
        # twice.
        set_model_info(f"resta/{model_name}", ModelInfo(context_length=self._it.local.context))
        self._batcher = MicroBatcher(self._it.local, whole_sequence=self._it.rendering.whole_sequence)

    def forget(self) -> None:
        """Let go of the model; this handle answers no more."""
        del self._it, self._batcher

    def max_connections(self) -> int:
        """Return how many asks may be in flight: many, for the batcher sorts them by length."""
        return WINDOW

    def connection_key(self) -> str:
        """Return a key of this one model: two local models never share a pool."""
        return f"resta-{id(self._it.local)}"

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation; `usage` is always set, or Inspect would fetch a tokenizer to count with."""
        local = self._it.local
        messages = _messages(input)
        key = _key(input)
        if self._it.decoding is None:  # asked by Inspect itself, whose epochs repeat a question: each is another draw
            self._asked[key] += 1
            key = f"{key}|{self._asked[key]}"
        if self._it.raw:
            prompt = local.raw_prompt(key, messages[0].content)
        else:
            prompt = local.chat_prompt(key, messages, self._it.rendering)
        decoding = self._it.decoding or _decoding(config)
        local.check_length(prompt, decoding)
        said = await self._batcher.submit(prompt, decoding)
        reply = Reply(
            id=key,
            text=said.text,
            finish="stop" if said.finish == "stop" else "length",
            opened=opened_by(prompt.text),
            prompt_tokens=said.prompt_tokens,
            new_tokens=said.new_tokens,
            rows=said.rows,
        )
        return _output(self.model_name, reply)


def _decoding(config: GenerateConfig) -> Decoding:
    """Return what Inspect's own options ask for; greedy unless a temperature is given."""
    if not config.temperature:
        return Decoding(max_new_tokens=config.max_tokens or 512)
    return Decoding(
        max_new_tokens=config.max_tokens or 512,
        mode="sample",
        temperature=config.temperature,
        top_p=config.top_p or 1.0,
        seed=config.seed or 0,
    )


def _messages(input: Sequence[ChatMessage]) -> tuple[Message, ...]:
    return tuple(Message(role=message.role, content=message.text) for message in input)


def _key(input: Sequence[ChatMessage]) -> str:
    """Return the id of the ask, which rides along with its first message; of another's prompt, its digest."""
    return str((input[0].metadata or {}).get("ask") or sha256_text(repr(_messages(input))))


def _output(model: str, reply: Reply) -> ModelOutput:
    """Return a reply as Inspect logs it; `usage` is always set, or Inspect would fetch a tokenizer to count with."""
    stops: dict[Finish, Any] = {"stop": "stop", "length": "max_tokens", "content_filter": "content_filter"}
    said: Any = reply.text
    if reply.thought:
        said = [ContentReasoning(reasoning=reply.thought), ContentText(text=reply.text)]
    message = ChatMessageAssistant(content=said, source="generate", model=model)
    prompt_tokens, new_tokens = reply.prompt_tokens or 0, reply.new_tokens or 0
    return ModelOutput(
        model=model,
        choices=[ChatCompletionChoice(message=message, stop_reason=stops[reply.finish])],
        usage=ModelUsage(input_tokens=prompt_tokens, output_tokens=new_tokens, total_tokens=prompt_tokens + new_tokens),
        metadata={"opened": reply.opened, "rows": reply.rows},
    )


# -- the served provider -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """How a served model is asked: what goes into every request's body."""

    name: str
    decoding: Decoding
    raw: bool
    template_args: Mapping[str, Any]
    requests_per_minute: float | None = None


class StatusError(Exception):
    """A server's refusal in its own words, but for the prompt: Inspect traces errors outside the run's folder."""

    def __init__(self, status: int, said: str, wait_s: float | None = None):
        super().__init__(said)
        self.status = status
        self.wait_s = wait_s  # after which the server wants to be asked again, if it says so


_SERVED: dict[str, Served] = {}
_NUMBERS = itertools.count()
_NEXT_START: dict[str, float] = {}  # of a model with a limit of requests per minute, by its connection key


@modelapi(name="resta-served")
class ServedAPI(ModelAPI):
    """Inspect's provider of OpenAI-compatible servers, asked and read by the same rules as batch files (wire.py).

    Inspect's own drops thoughts, takes a filter's reasons for the model's words, and tries nothing torn again.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        served: str = "",
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._it = _SERVED.pop(served)
        self.replies: dict[str, Reply] = {}  # whole, for whoever asked to take away
        self._limit = "max_tokens"
        # Inspect retries and minds the time; a second layer inside the client would multiply the tries.
        self._client = AsyncOpenAI(api_key=api_key, base_url=base_url, max_retries=0, timeout=None)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    def connection_key(self) -> str:
        """Return a key of this one server and model."""
        return f"{self.base_url} {self._it.name}"

    def should_retry(self, ex: BaseException) -> bool | RetryDecision:
        """Whether another try may fare better: the server is busy or broken, or its response came in pieces."""
        if isinstance(ex, StatusError):
            if ex.status == 429:
                return RetryDecision.rate_limit()
            return ex.status in (408, 409) or ex.status >= 500
        return isinstance(ex, APIConnectionError | GarbledError)

    def retry_wait(self) -> Callable[[Any], float]:
        """Return what tells the pause before another try."""
        return _pause

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation. Raises StatusError, GarbledError and openai's errors of connection."""
        if self._it.requests_per_minute is not None:
            await _wait_for_turn(self.connection_key(), 60 / self._it.requests_per_minute)
        request = Request(id=_key(input), messages=_messages(input), raw=self._it.raw)
        prompts = [message.content for message in request.messages]
        try:
            reply = read_body(request, await self._post(request))
        except APIStatusError as error:
            if not is_filter(f"{error} {error.body}", prompts):
                said, wait_s = without_prompt(str(error), prompts), _seconds(error.response.headers.get("retry-after"))
                raise StatusError(error.status_code, said, wait_s) from None
            reply = blocked(request)
        self.replies[request.id] = reply
        return _output(self.model_name, reply)

    async def _post(self, request: Request) -> object:
        body = request_body(request, self._it.name, self._it.decoding, self._it.template_args)
        body[self._limit] = body.pop("max_tokens")
        try:
            service: Any = self._client.completions if request.raw else self._client.chat.completions
            shown = {"prompt": body["prompt"]} if request.raw else {"messages": body["messages"]}
            response = await service.with_raw_response.create(model=self._it.name, **shown, extra_body=body)
        except BadRequestError as error:
            if self._limit == "max_tokens" and "max_completion_tokens" in f"{error} {error.body}":
                self._limit = "max_completion_tokens"  # as OpenAI's reasoning models call it
                return await self._post(request)
            raise
        try:
            return json.loads(response.text)
        except ValueError:
            raise GarbledError(f"not JSON, {len(response.text)} characters long") from None


def _pause(state: Any) -> float:
    """Return the seconds before the next try: as many as the server says, else about 3, 6, 12 and so on."""
    error = state.outcome.exception()
    if isinstance(error, StatusError) and error.wait_s is not None:
        return error.wait_s
    tries: int = state.attempt_number
    return min(3.0 * 2.0 ** (tries - 1) + random.uniform(0, 3), LONGEST_PAUSE_S)


def _seconds(header: str | None) -> float | None:
    """Return the seconds in a Retry-After header, if it is a number; a server may ask for a minute and no more."""
    try:
        return min(max(float(header or ""), 0.0), 60.0)
    except ValueError:
        return None


async def _wait_for_turn(key: str, every_s: float) -> None:
    """Sleep until the next request to a model may start: starts are evenly spaced over all that ask it."""
    now = time.monotonic()
    start = max(now, _NEXT_START.get(key, now))
    _NEXT_START[key] = start + every_s
    await anyio.sleep(start - now)


# -- handles: what asks are sent to --------------------------------------------------------------------------


def open_model(
    who: targets.Target | LocalModel,
    decoding: Decoding,
    rendering: Rendering,
    *,
    raw: bool = False,
    limits: Limits | None = None,
) -> Model:
    """Return a handle to a model that is loaded already, or to a served one that answers and takes our key.

    `raw` sends the first message's text as it stands, without a chat template. Raises RequestError, UnansweredError.
    """
    if isinstance(who, LocalModel):
        return local_handle(who, decoding, rendering=rendering, raw=raw)
    if who.base_url is not None:
        targets.check_endpoint(who.base_url, who.key_variable)
    elif raw:
        raise RequestError(
            f"{who.name}: its prompt is sent as plain text, which Inspect's providers do not take; serve it "
            "(NAME=MODEL@http://HOST/v1) or run it locally"
        )
    return connect(
        who.name,
        base_url=who.base_url,
        api_key=targets.api_key(who.key_variable),
        decoding=decoding,
        raw=raw,
        template_args=rendering.template_args,
        limits=limits,
    )


def local_handle(
    local: LocalModel, decoding: Decoding, *, rendering: Rendering | None = None, raw: bool = False
) -> Model:
    """Return a handle to a model already in memory."""
    key = str(len(_LOADED))
    _LOADED[key] = Loaded(local=local, rendering=rendering or Rendering(), raw=raw, decoding=decoding)
    # Said outright: Inspect would otherwise begin with 20 at once and feel its way up, in small batches.
    config = GenerateConfig(max_connections=WINDOW)
    return get_model(f"resta/{Path(local.name).name}", config=config, memoize=False, loaded=key)


def release(handle: Model) -> None:
    """Forget a local model, so that its memory can be used by the next one."""
    api = handle.api
    for key in [key for key, loaded in _LOADED.items() if getattr(api, "_it", None) is loaded]:
        del _LOADED[key]
    if hasattr(api, "forget"):
        api.forget()


def connect(
    name: str,
    *,
    base_url: str | None,
    api_key: str | None,
    decoding: Decoding,
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> Model:
    """Return a handle to a served model: OpenAI-compatible at `base_url`, else Inspect's own PROVIDER/NAME.

    Raises RequestError where the provider is unknown, or lacks a key or a package.
    """
    limits = limits or Limits()
    # The time of a try begins before it waits for its turn, and so many may wait at once.
    waits_s = 60 * limits.connections / limits.requests_per_minute if limits.requests_per_minute else 0
    config = GenerateConfig(
        max_tokens=decoding.max_new_tokens,
        temperature=_temperature(decoding),
        top_p=decoding.top_p if decoding.mode == "sample" and decoding.top_p < 1 else None,
        seed=decoding.seed if decoding.mode == "sample" else None,
        logprobs=True if decoding.logprobs else None,
        top_logprobs=TOP_LOGPROBS if decoding.logprobs else None,
        extra_body={"chat_template_kwargs": dict(template_args)} if template_args else None,
        max_retries=limits.retries,
        attempt_timeout=limits.timeout_s + math.ceil(waits_s),
        max_connections=limits.connections,
    )
    try:
        if base_url is None:
            return get_model(name, config=config, memoize=False)
        key = str(next(_NUMBERS))  # the provider's arguments must be JSON
        _SERVED[key] = Served(
            name=name,
            decoding=decoding,
            raw=raw,
            template_args=template_args or {},
            requests_per_minute=limits.requests_per_minute,
        )
        set_model_info(f"resta-served/{name}", ModelInfo())  # or Inspect would look the name up elsewhere
        return get_model(
            f"resta-served/{name}",
            config=config,
            base_url=base_url,
            api_key=api_key or "none",
            memoize=False,
            served=key,
        )
    except Exception as error:  # each provider has its own kinds
        raise RequestError(f"{name}: cannot be reached through inspect-ai: {error}") from error


def _temperature(decoding: Decoding) -> float | None:
    return {"greedy": 0.0, "sample": decoding.temperature, "model": None}[decoding.mode]


# -- running -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Phase:
    """What becomes of each ask. One that fails is handed on as such; too many in a row end the phase."""

    hand_on: Callable[[Outcome], None]
    in_flight: int
    max_failures: int
    in_a_row: int = 0
    gave_up: str = ""  # the last reason

    def take(self, outcome: Outcome) -> None:
        """Hand an outcome on. Raises UnansweredError where it is one failure too many."""
        self.hand_on(outcome)
        if isinstance(outcome, Reply):
            self.in_a_row = 0
        elif not outcome.own:
            self.in_a_row += 1
            if self.in_a_row >= self.max_failures:
                self.gave_up = outcome.reason
                raise UnansweredError(outcome.reason)


def ask_all(
    handle: Model,
    requests: Sequence[Request],
    hand_on: Callable[[Outcome], None],
    *,
    log_dir: Path | None,
    title: str,
    limits: Limits | None = None,
) -> None:
    """Send every ask once and hand what comes of it on as it comes; without `log_dir` no file holds what was said.

    Raises UnansweredError after `limits.max_failures` in a row; those that were not asked then get no outcome.
    """
    limits = limits or Limits()
    phase = _Phase(hand_on, in_flight=_in_flight(handle, limits), max_failures=limits.max_failures)
    with tempfile.TemporaryDirectory() as nowhere:  # Inspect cannot do without a log, but without what was said in it
        log = _evaluate(handle, requests, phase, log_dir or Path(nowhere), logged=log_dir is not None, title=title)
    if phase.gave_up:
        raise UnansweredError(
            f"{title}: gave up after {phase.in_a_row} failures in a row, as many as are allowed; the last was: "
            f"{phase.gave_up}"
        )
    if log.status != "success":
        raise UnansweredError(f"{title}: {log.error.message if log.error else log.status}")


def _evaluate(
    handle: Model, requests: Sequence[Request], phase: _Phase, log_dir: Path, *, logged: bool, title: str
) -> EvalLog:
    """Run the asks as an evaluation of Inspect's. Raises KeyboardInterrupt where it was stopped."""
    dataset = MemoryDataset([_sample(request) for request in requests])
    try:
        logs = eval(
            Task(dataset=dataset, solver=_answering(phase), name=title),
            model=handle,
            display="none",
            log_dir=str(log_dir),
            log_format="eval",
            log_realtime=False,  # its buffer is a second copy of the answers, outside the run's folder
            log_samples=logged,
            log_model_api=False,
            log_level="error",
            score=False,
            fail_on_error=True,
            max_samples=phase.in_flight,
            **_NO_SERVERS,
        )
    finally:
        _make_private(log_dir)
    if not logs or logs[0].status == "cancelled":  # Inspect takes a Ctrl-C for itself and returns
        raise KeyboardInterrupt
    return logs[0]


def _in_flight(handle: Model, limits: Limits) -> int:
    return WINDOW if hasattr(handle.api, "forget") else limits.connections


def _sample(request: Request) -> Sample:
    first, *rest = [_message(message) for message in request.messages]
    first.metadata = {"ask": request.id}
    return Sample(id=request.id, input=[first, *rest], metadata=dict(request.facts))


def _message(message: Message) -> ChatMessage:
    if message.role == "system":
        return ChatMessageSystem(content=message.content)
    if message.role == "assistant":
        return ChatMessageAssistant(content=message.content)
    return ChatMessageUser(content=message.content)


@solver
def _answering(phase: _Phase) -> Solver:
    """Ask once, pass on at once what comes of it; a failure ends its own sample, with the reason in its output.

    Inspect's own errors hold the whole request, and its trace, which lies outside the run's folder, holds errors: what
    goes on from here is the reason alone, without the prompt.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output, outcome = await _asked(str(state.sample_id), state.messages)
        if isinstance(outcome, Reply):
            state.messages.append(state.output.message)
        phase.take(outcome)
        return state

    return solve


async def _asked(ask_id: str, messages: list[ChatMessage]) -> tuple[ModelOutput, Outcome]:
    """Return what comes of one ask, as Inspect logs it and as we take it."""
    model, prompts = get_model(), [message.text for message in messages]
    seed = model.config.seed
    try:
        config = GenerateConfig() if seed is None else GenerateConfig(seed=seed_of(seed, ask_id))
        output = await model.generate(messages, config=config)
        replies: dict[str, Reply] = getattr(model.api, "replies", {})  # ServedAPI's, which are whole
        return output, replies.pop(ask_id, None) or _reply(ask_id, output)
    except Exception as error:  # each provider has its own kinds
        kind, said = _why(error)
        if is_filter(said, prompts):
            return ModelOutput(error="blocked by a filter"), Reply(id=ask_id, text="", finish="content_filter")
        reason = f"{kind}: {without_prompt(said, prompts)}"
        own = isinstance(error, RequestError)  # a local model's context: those too long come first, and in a row
        return ModelOutput(error=reason), NoReply(id=ask_id, reason=reason, own=own)


def _why(error: Exception) -> tuple[str, str]:
    """Return an error's kind and what it says, from within those that Inspect and its retries wrap around it."""
    last = getattr(error, "last_attempt", None)
    inner: BaseException = (last.exception() if last is not None else None) or error
    return type(inner).__name__, str(getattr(inner, "provider_message", None) or inner)


def _reply(ask_id: str, output: ModelOutput) -> Reply:
    finishes: dict[str, Finish] = {
        "max_tokens": "length",
        "model_length": "length",
        "content_filter": "content_filter",
    }
    if not output.choices:
        raise UnansweredError("the server sent no choices")
    if output.stop_reason == "model_length" and output.usage is None:
        # Inspect turns the server's refusal of an over-long prompt into an answer that holds the error's
        # text.
        raise UnansweredError(f"the prompt does not fit the model: {output.completion}")
    choice = output.choices[0]
    top = []
    for token in choice.logprobs.content if choice.logprobs else []:
        alternatives = {item.token: item.logprob for item in token.top_logprobs or []}
        top.append({token.token: token.logprob, **alternatives})
    finish = finishes.get(output.stop_reason, "stop")
    details = choice.stop_details
    # A filter's error becomes an output as well; its text is not what the model said.
    error = output.usage is None or (details is not None and details.explanation == output.completion)
    content = [] if isinstance(choice.message.content, str) else choice.message.content
    thoughts = [part.reasoning for part in content if isinstance(part, ContentReasoning)]
    return Reply(
        id=ask_id,
        text="" if finish == "content_filter" and error else output.completion,
        thought="\n".join(thought for thought in thoughts if thought),
        opened=str((output.metadata or {}).get("opened", "")),
        rows=(output.metadata or {}).get("rows"),
        finish=finish,
        prompt_tokens=output.usage.input_tokens if output.usage else None,
        new_tokens=output.usage.output_tokens if output.usage else None,
        top=tuple(top),
    )


def _make_private(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chmod(path, 0o700 if path.is_dir() else 0o600)  # noqa: PTH101


# -- verdicts in the logs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedScore:
    """One judge's word on one answer, as the log shows it."""

    judge: str
    label: str
    explanation: str


def score_logs(
    log_dir: Path, scores: Mapping[str, Sequence[LoggedScore]], rates: Mapping[str, Mapping[str, float]]
) -> None:
    """Write verdicts ({answer id: scores}) and each judge's rates into the answers' logs; a view, not the truth.

    A log cut short by a kill may be unreadable to Inspect; it is left as it is.
    """
    for info in list_eval_logs(str(log_dir)):
        try:
            log = read_eval_log(info)
        except Exception:  # the log of a killed process; its answers are in the records all the same
            continue
        if log.status == "started":  # cut short as well; whole samples in it stay as they are
            continue
        samples = log.samples or []
        for sample in samples:
            found = scores.get(str(sample.id), ())
            sample.scores = {s.judge: Score(value=s.label, explanation=s.explanation) for s in found}
        judged = [
            EvalScore(
                name=judge,
                scorer=judge,
                scored_samples=sum(judge in (sample.scores or {}) for sample in samples),
                metrics={name: EvalMetric(name=name, value=value) for name, value in values.items()},
            )
            for judge, values in rates.items()
        ]
        log.results = log.results or EvalResults(total_samples=len(samples), completed_samples=len(samples))
        log.results.scores = judged
        write_eval_log(log, info.name)
    _make_private(log_dir)


# -- tasks ---------------------------------------------------------------------------------------------------


def redeval_task(
    requests: Iterable[Request],
    verdict: Callable[[Reply], Mapping[str, str | float]],
    decoding: Decoding,
    *,
    name: str,
) -> Task:
    """Return an Inspect task whose score needs no model: verdict(reply) -> {value, label}."""

    @scorer(metrics=[mean()], name=name)
    def by_verdict() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            reply = _reply(str(state.sample_id), state.output)
            found = verdict(reply)
            return Score(value=found["value"], answer=str(found["label"]))

        return score

    return Task(
        dataset=MemoryDataset([_sample(request) for request in requests]),
        scorer=by_verdict(),
        config=GenerateConfig(max_tokens=decoding.max_new_tokens, temperature=_temperature(decoding)),
    )
