"""Mixture -> token samples: encode each conversation once, count what is cut or left out, and measure the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from resta.errors import RequestError
from resta.sft.chat import Chat, Encoded, control_token, encode
from resta.sft.data import Conversation, Counts, Mixture
from resta.sft.recipe import Recipe

NO_TRAINED_TOKEN = "no trained token within max_length"
CONTROL_TOKEN = "the text spells out a control token"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation as it will be trained on."""

    encoded: Encoded
    conversation: Conversation

    @property
    def red(self) -> bool:
        """Whether the objective moves away from this sample."""
        return self.conversation.side == "red"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All samples of a run, in their seeded order, and what became of the conversations that are not among them."""

    train: tuple[Sample, ...]
    heldout: tuple[Sample, ...]
    dropped: Counts
    cut: Counts


def prepare(mixture: Mixture, chat: Chat, recipe: Recipe) -> Prepared:
    """Encode a mixture. Raises RequestError, naming file, line and fix."""
    dropped, cut = Counts(), Counts()
    done: dict[int, Sample | None] = {}

    def samples(conversations: tuple[Conversation, ...]) -> tuple[Sample, ...]:
        result = []
        for conversation in conversations:
            key = id(conversation)  # a repeated conversation is the same object: encoded, and counted, once
            if key not in done:
                done[key] = _sample(conversation, chat, recipe, dropped, cut)
            sample = done[key]
            if sample is not None:
                result.append(sample)
        return tuple(result)

    train, heldout = samples(mixture.train), samples(mixture.heldout)
    if dropped.total() > recipe.max_dropped * len(done) or not train:
        worst = max(dropped.counts, key=lambda reason: dropped.counts[reason])
        fix = "raise `max_length`" if worst == NO_TRAINED_TOKEN else "clean the data"
        raise RequestError(
            f"{dropped.total()} of {len(done)} conversations cannot be trained on, more than `max_dropped: "
            f"{recipe.max_dropped}`; most often: {worst} (first at {dropped.first[worst]}); {fix} or raise it"
        )
    if recipe.objective.kind == "blue_red" and len({sample.red for sample in train}) < 2:
        missing = "blue" if train[0].red else "red"
        raise RequestError(f"no {missing} conversation is left to train on; give more of them, or lower `holdout`")
    if recipe.train.early_stop_patience is not None and all(sample.red for sample in heldout):
        raise RequestError(
            "early stopping watches the loss on held-out safe conversations, and none is held out; raise `holdout`"
        )
    return Prepared(train=train, heldout=heldout, dropped=dropped, cut=cut)


def _sample(conversation: Conversation, chat: Chat, recipe: Recipe, dropped: Counts, cut: Counts) -> Sample | None:
    token = control_token(chat, conversation.messages)
    if token is not None:
        if recipe.bad_rows == "refuse":
            raise RequestError(
                f"{conversation.where}: the text spells out the control token {token!r}, which would be "
                "read as one; "
                "mend the row, or set `bad_rows: drop`"
            )
        dropped.add(CONTROL_TOKEN, conversation.where)
        return None
    try:
        encoded = encode(chat, conversation.messages, recipe.max_length)
    except RequestError as error:
        raise RequestError(f"{conversation.where}: {error}") from None
    if encoded is None:
        dropped.add(NO_TRAINED_TOKEN, conversation.where)
        return None
    if encoded.cut is not None:
        cut.add(encoded.cut, conversation.where)
    return Sample(encoded=encoded, conversation=conversation)


def columns(samples: tuple[Sample, ...], *, with_side: bool) -> dict[str, list[Any]]:
    """Return samples as the trainer's columns: input_ids, labels (-100 = not trained), and red."""
    table: dict[str, list[Any]] = {
        "input_ids": [s.encoded.ids for s in samples],
        "labels": [np.where(s.encoded.trained, s.encoded.ids, -100) for s in samples],
    }
    if with_side:
        table["red"] = [s.red for s in samples]
    return table


def lengths(samples: tuple[Sample, ...]) -> dict[str, int]:
    """Return how long samples are: all tokens, trained tokens, and quantiles of a sample's length."""
    if not samples:
        return {"samples": 0, "tokens": 0, "trained_tokens": 0}
    sizes = np.array([len(s.encoded.ids) for s in samples])
    quantiles = {f"p{q}": int(np.percentile(sizes, q)) for q in (5, 50, 95)}
    return {
        "samples": len(samples),
        "tokens": int(sizes.sum()),
        "trained_tokens": int(sum(s.encoded.trained.sum() for s in samples)),
        "shortest": int(sizes.min()),
        **quantiles,
        "longest": int(sizes.max()),
    }


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Conversations that were dropped, changed or cut, for one reason."""

    what: str  # such as "dropped from NAME" or "cut to max_length"
    why: str
    count: int
    first: str  # where the first of them is


def left_out(mixture: Mixture, prepared: Prepared) -> tuple[LeftOut, ...]:
    """Return what is not trained on as it was written."""
    counted = [
        (f"{what} from {loaded.source.name}", counts)
        for loaded in mixture.sources
        for what, counts in (("dropped", loaded.dropped), ("changed", loaded.changed))
    ]
    counted += [("dropped when encoding", prepared.dropped), ("cut to max_length", prepared.cut)]
    return tuple(
        LeftOut(what=what, why=why, count=count, first=counts.first[why])
        for what, counts in counted
        for why, count in counts.counts.items()
    )
