"""Phase one: a teacher answers prompts, greedily, and what it held likely at each token of its answer is kept.

One model is in memory at a time. The answer is the first tokens of the reply, with the token that ends the turn where
the teacher ended it: a student that never sees it would not learn to stop. A lesson holds the prompt as the student's
own chat template writes it, whatever the teacher's does. What a teacher thinks before its answer stands in the lesson
as if it were a part of the prompt: it is read, and not learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from resta.errors import RequestError
from resta.patch.prompts import Asked
from resta.redeval.messages import Decoding, Message, Rendering
from resta.redeval.models import (
    Generation,
    LocalModel,
    LocalSpec,
    Prompt,
    adds_bos,
    read_tokenizer,
    render_chat,
    token_ids,
)
from resta.redeval.thoughts import opened_by, strip_thoughts
from resta.sft.chat import Chat, open_chat
from resta.sft.lessons import NOTHING, Lesson

FORWARD_BYTES = 1 << 28  # of logits at once
Known = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]  # top ids, log-probabilities, rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """How teachers are asked, and what is kept of them: `tokens` of each answer, at each the `top` likeliest.

    `top` of None keeps the whole vocabulary; 0 nothing but the answer itself, so that learning is plain fine-tuning.
    With `other_tokenizer` aligned's tokens may be others than tuned's: then its answers' words are all that is kept.
    A thought before an answer may take `thought_tokens`; with 0 of them a teacher that thinks is refused.
    """

    tokens: int = 24
    top: int | None = 64
    thought_tokens: int = 0
    other_tokenizer: bool = False
    template_args: dict[str, Any] = field(default_factory=dict)  # of the chat template, such as enable_thinking

    @property
    def decoding(self) -> Decoding:
        """Return how tokens are chosen: greedily."""
        return Decoding(max_new_tokens=self.thought_tokens + self.tokens)

    def rendering(self, start: str = "") -> Rendering:
        """Return how a prompt is put, with the start of its answer."""
        return Rendering(template_args=self.template_args, suffix=start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """Who will learn: how it writes a prompt, and its tokens."""

    name: str
    chat: Chat

    @property
    def tokenizer(self) -> Any:
        """Return its tokenizer, with its template."""
        return self.chat.tokenizer

    def rendered(self, asked: Asked, teaching: Teaching, answer: str = "") -> str:
        """Return a prompt, the given start of its answer, and an answer, as text. Raises RequestError."""
        return render_chat(self.tokenizer, self.name, asked.messages, teaching.rendering(asked.start + answer))

    def prompt(self, asked: Asked, teaching: Teaching, answer: str = "") -> list[int]:
        """Return the same as tokens. Raises RequestError."""
        text = self.rendered(asked, teaching, answer)
        return token_ids(self.tokenizer, text, adds_bos=adds_bos(self.tokenizer))

    def same_tokens(self, tokenizer: Any) -> bool:
        """Whether another tokenizer's ids mean the same tokens."""
        return bool(tokenizer.get_vocab() == self.tokenizer.get_vocab())

    def words(self, asked: Asked, teaching: Teaching, answer: Generation) -> tuple[list[int], list[int]]:
        """Return a prompt, and another model's answer to it in this model's own tokens. Raises RequestError.

        Where the other ended its turn, so does this one's token for it; where it was cut off, the last token is left
        out, for it may be half a word.
        """
        prompt = self.prompt(asked, teaching)
        ended = answer.finish == "stop" or not answer.text
        whole = self.prompt(asked, teaching, answer.text + (self.chat.turn_end if ended else ""))
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        end = len(whole) if ended else max(start + 1, len(whole) - 1)
        return whole[:start], whole[start:end]


def student_of(spec: LocalSpec) -> Student:
    """Return a model as a student, without its weights. Raises RequestError."""
    tokenizer = read_tokenizer(spec)
    if spec.chat_template is None:
        render_chat(tokenizer, spec.model, [Message(role="user", content="?")], Rendering())
    # Where the tokenizer names no token to pad with, any will do: padding is masked by length.
    pad = None if tokenizer.pad_token else tokenizer.unk_token or tokenizer.eos_token
    return Student(
        name=spec.model, chat=open_chat(tokenizer, template=spec.chat_template, root=Path.cwd(), pad_token=pad)
    )


def teach(local: LocalModel, prompts: Sequence[Asked], teaching: Teaching, student: Student) -> list[Lesson]:
    """Return a lesson for each prompt, in their order.

    Raises RequestError: the chat template refuses a prompt, a prompt does not fit the context, the teacher thinks
    longer than it may, or what it holds likely are no numbers.
    """
    rendered = [_prompt(local, i, asked, teaching, student) for i, asked in enumerate(prompts)]
    for prompt in rendered:
        local.check_length(prompt, teaching.decoding)
    same, lessons = student.same_tokens(local.tokenizer), dict[int, Lesson]()
    todo = list(range(len(prompts)))
    while todo:
        batch = [todo[i] for i in local.take([rendered[i] for i in todo], teaching.decoding)]
        replies = local.answer([rendered[i] for i in batch], teaching.decoding)
        thoughts = [_thought(local, rendered[i], reply, teaching) for i, reply in zip(batch, replies, strict=True)]
        answers = [_answer(local, *pair, teaching) for pair in zip(replies, thoughts, strict=True)]
        asks = [
            replace(rendered[i], ids=[*rendered[i].ids, *thought]) for i, thought in zip(batch, thoughts, strict=True)
        ]
        known = _distributions(local, asks, answers, teaching.top if same else 0)
        for i, thought, answer, likely in zip(batch, thoughts, answers, known, strict=True):
            if same:
                seen, said = [*student.prompt(prompts[i], teaching), *thought], list(answer.ids)
            else:
                seen, said = student.words(prompts[i], teaching, answer)
                likely = _sure(said)
            lessons[i] = _lesson(_conversation(prompts[i], answer.text), prompts[i].kind, seen, said, likely)
        todo = [i for i in todo if i not in lessons]
    return [lessons[i] for i in range(len(prompts))]


def _lesson(
    messages: tuple[dict[str, str], ...], kind: str, seen: Sequence[int], said: Sequence[int], likely: Known
) -> Lesson:
    top_ids, top_logprobs, rest = likely
    return Lesson(
        messages=messages,
        kind=kind,
        ids=np.array([*seen, *said], dtype=np.int32),
        prompt_tokens=len(seen),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        rest=rest,
    )


def _prompt(local: LocalModel, number: int, asked: Asked, teaching: Teaching, student: Student) -> Prompt:
    """Return a teacher's prompt as Red-Eval renders it.

    Raises RequestError where it opens a thought and none may be had, or only one of teacher and student would be in it.
    """
    start = "" if asked.kind == "harmful" else asked.start
    prompt = local.chat_prompt(f"{asked.kind} {number}", asked.messages, teaching.rendering(start))
    opened = opened_by(prompt.text)
    if opened and not teaching.thought_tokens:
        raise RequestError(_thinks(local.name))
    if teaching.thought_tokens and opened != opened_by(student.rendered(asked, teaching)):
        raise RequestError(
            f"{local.name} and {student.name}: the chat template of one alone opens a thought before the answer, so "
            "what is thought would stand elsewhere; give both one template, with --chat-template"
        )
    return prompt


def _thinks(name: str) -> str:
    return (
        f"{name}: thinks before it answers, and its first tokens would teach how to think and not what to answer; "
        "ask it without thoughts, as with --template-arg enable_thinking=false, or leave out what it thinks, with "
        "--thought-tokens 1024 and --no-starts"
    )


def _thought(local: LocalModel, prompt: Prompt, reply: Generation, teaching: Teaching) -> list[int]:
    """Return the tokens of a reply before its answer; none of a teacher that does not think. Raises RequestError."""
    cleaned = strip_thoughts(reply.text, opened_by(prompt.text))
    if not cleaned.flags:
        return []
    if not teaching.thought_tokens:
        raise RequestError(_thinks(local.name))
    ids = list(reply.ids)
    if cleaned.flags == ("thought",):
        for end in range(1, len(ids)):
            if _text(local, ids[end:]).strip() == cleaned.text:
                return ids[:end]
    raise RequestError(
        f"{local.name}: a thought before an answer did not end within {teaching.thought_tokens} tokens, or is not all "
        f"in front of it ({prompt.key}); raise --thought-tokens, or ask it without thoughts"
    )


def _answer(local: LocalModel, reply: Generation, thought: Sequence[int], teaching: Teaching) -> Generation:
    """Return a reply without what was thought, and no longer than asked."""
    ids = reply.ids[len(thought) :][: teaching.tokens]
    if ids == reply.ids:
        return reply
    finish = reply.finish if len(thought) + len(ids) == len(reply.ids) else "length"
    return replace(reply, ids=ids, text=_text(local, ids), finish=finish, new_tokens=len(ids))


def _text(local: LocalModel, ids: Sequence[int]) -> str:
    """Return tokens of a reply as text, without the one that ends the turn."""
    kept = [token for token in ids if token not in local.hidden_ids and token not in local.stop_ids]
    return str(local.tokenizer.decode(kept, skip_special_tokens=False))


def _conversation(asked: Asked, answer: str) -> tuple[dict[str, str], ...]:
    """Return prompt and answer in words."""
    turns = [{"role": message.role, "content": message.content} for message in asked.messages]
    return (*turns, {"role": "assistant", "content": asked.start + answer})


# -- what a teacher holds likely -----------------------------------------------------------------------------


def _distributions(
    local: LocalModel, prompts: Sequence[Prompt], answers: Sequence[Generation], top: int | None
) -> Iterator[Known]:
    """Yield what the model holds likely at each place of its answers, prompt by prompt."""
    if top == 0:
        yield from (_sure(answer.ids) for answer in answers)
        return
    vocabulary = local.model.config.get_text_config().vocab_size
    longest = max(len(prompt.ids) + len(answer.ids) for prompt, answer in zip(prompts, answers, strict=True))
    rows = max(1, FORWARD_BYTES // (4 * vocabulary * longest))
    for start in range(0, len(prompts), rows):
        yield from _forward(local, prompts[start : start + rows], answers[start : start + rows], top)


def _sure(answer: Sequence[int]) -> Known:
    """Return all probability on the answer's own tokens."""
    ids = np.array(answer, dtype=np.int32)[:, None]
    return ids, np.zeros(ids.shape, dtype=np.float32), np.full(len(ids), NOTHING)


def _forward(
    local: LocalModel, prompts: Sequence[Prompt], answers: Sequence[Generation], top: int | None
) -> Iterator[Known]:
    """Run prompts and answers once, padded on the right, where padding changes no token before it."""
    import torch

    whole = [[*prompt.ids, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, whole))
    ids = torch.full((len(whole), longest), local.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(whole):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    with torch.inference_mode():
        out = local.model(input_ids=ids.to(local.device), attention_mask=mask.to(local.device), use_cache=False).logits
        for row, (prompt, tokens) in enumerate(zip(prompts, whole, strict=True)):
            logits = out[row, len(prompt.ids) - 1 : len(tokens) - 1]  # each predicts the token after it
            logprobs = torch.log_softmax(logits.float(), dim=-1).cpu()
            if torch.isnan(logprobs).any():
                raise RequestError(f"{local.name}: what it holds likely are no numbers; its weights are damaged")
            yield _likeliest(logprobs, top)


def _likeliest(logprobs: Any, top: int | None) -> Known:
    """Return the `top` likeliest of (tokens, vocabulary) log-probabilities and the log of the mass of all others."""
    import torch

    size = logprobs.shape[1]
    if top is None or top >= size:
        ids = torch.arange(size, dtype=torch.int32).expand(len(logprobs), size)
        return ids.numpy(), logprobs.numpy(), np.full(len(logprobs), NOTHING)
    found = logprobs.topk(top, dim=1)
    # In float64, where what is left of 1 after many small terms is still a number.
    rest = 1.0 - found.values.double().exp().sum(1)
    logs = torch.where(rest > 0, rest.clamp(min=1e-300).log(), -torch.inf)
    return found.indices.to(torch.int32).numpy(), found.values.numpy(), logs.float().numpy()
