"""Learning from lessons: a student is moved towards the distributions of its teachers, token by token.

    L = sum over given tokens KL(teacher || student) / number of given tokens
      + keep_weight * sum over kept tokens KL(teacher || student) / number of kept tokens

Given lessons (`side: blue`) show what is to be learned, kept ones (`side: keep`) what is to stay as it is. Numbers are
counted over the whole optimiser step, all micro-batches and processes, so how a step is split never changes it.

Of a teacher only its k likeliest tokens and the mass of the rest are known. With the rest taken as one token, KL is

    sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)

which is never more than the KL over the whole vocabulary (merging outcomes loses information), and equal to it where
k is the whole vocabulary. A teacher of whom only the answer is known has all its mass on one token, k = 1: then KL is
the negative log-likelihood, and this is plain fine-tuning on its answers. In nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from resta.errors import RequestError
from resta.sft.chat import Encoded
from resta.sft.data import Conversation, Counts, Mixture
from resta.sft.lessons import Lesson, read_lessons
from resta.sft.objective import MixedOrder
from resta.sft.recipe import Recipe
from resta.sft.samples import Prepared, Sample

LEAST = 1e-7  # a rest of the teacher's probability below this is float32's own error, and counts as none


def divergence(
    logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """Return KL(teacher || student) of each token, (tokens,), float32, in nats.

    Args:
        logits: the student's, (tokens, vocabulary).
        top_ids: the teacher's k likeliest tokens, (tokens, k), int64; all different within a row.
        top_logprobs: the teacher's log-probabilities of them, (tokens, k); where -inf, top_ids holds no token.
        rest: log of the teacher's probability of all others, (tokens,); -inf for none.
    """
    student = torch.log_softmax(logits.float(), dim=-1).gather(1, top_ids)
    held = top_logprobs > -torch.inf
    known = (top_logprobs.exp() * (top_logprobs.masked_fill(~held, 0.0) - student)).sum(1)
    mass = rest.exp()
    others = log1m_exp(torch.logsumexp(student.masked_fill(~held, -torch.inf), dim=1))
    has_rest = mass > LEAST
    # Both sides of a where() are differentiated, so what is not wanted must be finite too.
    safe_rest = torch.where(has_rest, rest, torch.zeros_like(rest))
    safe_others = torch.where(has_rest, others, torch.zeros_like(others))
    return known + torch.where(has_rest, mass * (safe_rest - safe_others), torch.zeros_like(mass))


def log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0, exactly rounded enough at both ends (Maechler 2012); x is kept below -1e-7."""
    x = x.clamp(max=-LEAST)
    near = x > -math.log(2)
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


# -- lessons as samples --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught(Sample):
    """A sample with its teacher's distributions."""

    lesson: Lesson


def prepare_lessons(mixture: Mixture, recipe: Recipe, root: Path) -> Prepared:
    """Return the mixture's conversations as the lessons that they come from: the very tokens that the teacher saw.

    Raises RequestError: a source is not the rows of a folder of lessons, or a lesson does not fit `max_length`.
    """
    known: dict[tuple[str, str], Lesson] = {}
    for source in recipe.data:
        if source.path is None:
            raise RequestError(f"data source {source.name!r}: lessons are local files, made by: resta patch")
        for lesson in read_lessons((root / source.path).expanduser().parent):
            known[source.name, _key(lesson.messages)] = lesson

    def taught(conversations: Sequence[Conversation]) -> tuple[Taught, ...]:
        samples = []
        for conversation in conversations:
            lesson = known[conversation.source, _key(conversation.messages)]
            if len(lesson.ids) > recipe.max_length:
                raise RequestError(
                    f"{conversation.where}: {len(lesson.ids)} tokens, more than `max_length: {recipe.max_length}`; "
                    "raise it: a lesson is never cut"
                )
            trained = np.arange(len(lesson.ids)) >= lesson.prompt_tokens
            encoded = Encoded(ids=lesson.ids, trained=trained)
            samples.append(Taught(encoded=encoded, conversation=conversation, lesson=lesson))
        return tuple(samples)

    train, heldout = taught(mixture.train), taught(mixture.heldout)
    if len({sample.conversation.side for sample in train}) < 2:
        raise RequestError(
            "lessons of one side alone are left to learn from; give more of the other, or lower `holdout`"
        )
    return Prepared(train=train, heldout=heldout, dropped=Counts(), cut=Counts())


def _key(messages: Sequence[dict[str, str]]) -> str:
    return "\0".join(f"{message['role']}\0{message['content']}" for message in messages)


def lesson_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return samples as the trainer's columns: input_ids, labels (-100 = prompt), keep, and the teacher's three."""
    taught = [sample for sample in samples if isinstance(sample, Taught)]
    assert len(taught) == len(samples)
    return {
        "input_ids": [s.encoded.ids for s in taught],
        "labels": [np.where(s.encoded.trained, s.encoded.ids, -100) for s in taught],
        "keep": [s.conversation.side == "keep" for s in taught],
        "top_ids": [s.lesson.top_ids for s in taught],
        "top_logprobs": [s.lesson.top_logprobs for s in taught],
        "rest": [s.lesson.rest for s in taught],
    }


@dataclass
class CollateLessons:
    """Pad as the trainer does, and the teacher's distributions beside: to the longest answer of the batch."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels, (batch, tokens); keep, (batch,); of the teachers top_ids and
        top_logprobs, (batch, answer tokens, k), and rest, (batch, answer tokens).
        """
        teacher = ("top_ids", "top_logprobs", "rest", "keep")
        plain = [{key: value for key, value in example.items() if key not in teacher} for example in examples]
        batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=self.pad_token_id)(plain)
        batch["keep"] = torch.tensor([bool(example["keep"]) for example in examples])
        longest = max(len(example["rest"]) for example in examples)
        shape = (len(examples), longest, max(len(example["top_ids"][0]) for example in examples))
        ids, logprobs = torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf)
        rest = torch.full(shape[:2], -torch.inf)
        for row, example in enumerate(examples):
            size, width = len(example["rest"]), len(example["top_ids"][0])
            ids[row, :size, :width] = torch.as_tensor(np.asarray(example["top_ids"]), dtype=torch.long)
            logprobs[row, :size, :width] = torch.as_tensor(np.asarray(example["top_logprobs"]), dtype=torch.float32)
            rest[row, :size] = torch.as_tensor(np.asarray(example["rest"]), dtype=torch.float32)
        return batch | {"top_ids": ids, "top_logprobs": logprobs, "rest": rest}


# -- the trainer ---------------------------------------------------------------------------------------------


class DistilTrainer(SFTTrainer):  # type: ignore[misc]  # an untyped base
    """The supervised trainer with this module's L as its loss, and both parts of it in the log."""

    loss_is_scaled_for_ga = True  # the loss is divided by counts of the whole step

    def __init__(self, *args: Any, keep_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keep_weight = keep_weight
        # Sums over given and kept lessons and their tokens, apart for training and for evaluation.
        self.seen = {"": torch.zeros(4, dtype=torch.float64), "eval_": torch.zeros(4, dtype=torch.float64)}

    def _get_train_sampler(self, train_dataset: Any = None) -> MixedOrder:
        kept = list((train_dataset or self.train_dataset)["keep"])
        return MixedOrder(kept, 1.0, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one step, and count the tokens of both sides over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum((_counts(batch) for batch in batches), torch.zeros(2)).to(device)
        self.step_counts = self.accelerator.reduce(counts, "sum") if self.accelerator.num_processes > 1 else counts
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's part of L in training; in evaluation L of the batch."""
        counts = _counts(inputs).to(inputs["labels"].device)
        keep, labels = inputs.pop("keep"), inputs.pop("labels")
        top_ids, top_logprobs, rest = inputs.pop("top_ids"), inputs.pop("top_logprobs"), inputs.pop("rest")
        trained = labels[:, 1:].ne(-100)
        places = trained.any(0).nonzero().squeeze(1)  # elsewhere nothing is learned, and no head is computed
        outputs = model(**inputs, use_cache=False, logits_to_keep=places)
        logits = outputs.logits if outputs.logits.shape[1] == len(places) else outputs.logits[:, places]
        trained = trained[:, places]
        answered = torch.arange(rest.shape[1], device=rest.device) < trained.sum(1, keepdim=True)
        values = divergence(logits[trained], top_ids[answered], top_logprobs[answered], rest[answered])
        kept = keep[:, None].expand_as(trained)[trained]
        given_sum, kept_sum = values[~kept].sum(), values[kept].sum()
        sums = torch.stack([given_sum.detach(), kept_sum.detach()]).double().cpu()
        self.seen["" if model.training else "eval_"] += torch.cat([sums, counts.double().cpu()])
        if model.training:
            counts = self.step_counts
        given_tokens, kept_tokens = counts.clamp(min=1)
        loss = given_sum / given_tokens + self.keep_weight * kept_sum / kept_tokens
        if model.training:  # processes' gradients are averaged; the counts are already those of all of them
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean divergence of each side, in nats a token, to each line of the log.

        A side of which nothing was seen has no mean. Of held-out lessons the loss is that of all of them together, and
        not the mean over batches, which may hold more of one side than of the other.
        """
        for prefix in [prefix for prefix in self.seen if f"{prefix}loss" in logs]:
            seen = self.seen[prefix]
            if self.accelerator.num_processes > 1:
                seen = self.accelerator.reduce(seen.to(self.accelerator.device), "sum").cpu()
            given, kept, given_tokens, kept_tokens = seen.tolist()
            self.seen[prefix] = torch.zeros_like(self.seen[prefix])
            sides = {"given_kl": (given, given_tokens, 1.0), "kept_kl": (kept, kept_tokens, self.keep_weight)}
            logs.update({f"{prefix}{key}": total / tokens for key, (total, tokens, _) in sides.items() if tokens})
            if prefix:
                logs["eval_loss"] = sum(weight * total / tokens for total, tokens, weight in sides.values() if tokens)
        super().log(logs, start_time)


def _counts(batch: dict[str, Any]) -> torch.Tensor:
    """Return the trained tokens of both sides, (2,), float32: given, kept."""
    tokens = batch["labels"][:, 1:].ne(-100).sum(1).float()
    keep = batch["keep"]
    return torch.stack([tokens[~keep].sum(), tokens[keep].sum()]).cpu()
