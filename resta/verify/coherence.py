"""Whether an answer is language at all, by what the aligned model makes of it.

A broken merge refuses nothing and harms nobody: its answers may be neither empty nor repetitive and still be noise.
The aligned model knows language. Words in no order, even common ones, cost it most of the ln V nats per token of a
uniform draw over its vocabulary: SmolLM2-135M, whose ln V is 10.8, gives 8.2 to 14 to the answers of copies with noise
in their weights and 8.7 to 10.4 to shuffled words, and 2 to 5.9 to whole answers in English, in languages and scripts
that it does not know, to code, digits and digests. A few tokens, such as a label that it has never seen, may cost it
7.7: they must be worse than a uniform draw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resta.redeval.asks import digest

if TYPE_CHECKING:
    from resta.redeval.models import LocalModel, Prompt

NO_LANGUAGE = 0.7  # of ln V: the mean loss above which an answer is none
FEW_TOKENS = 10  # under which it is all of ln V
FIRST_TOKENS = 128  # of an answer: enough to tell, and as much as one logit table should hold
LOGITS_BYTES = 1 << 28


def answer_losses(local: LocalModel, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
    """Return each answer's mean loss in nats per token after its prompt; None for an answer without tokens.

    One forward pass per batch, padded on the right: causal attention never looks at the padding.
    """
    import torch

    encoded = [local.tokenizer(text, add_special_tokens=False)["input_ids"][:FIRST_TOKENS] for text in answers]
    losses: list[float | None] = [None] * len(answers)
    order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: -len(prompts[i].ids) - len(encoded[i]))
    vocabulary = local.model.config.get_text_config().vocab_size
    while order:
        longest = len(prompts[order[0]].ids) + len(encoded[order[0]])
        rows = max(1, min(local.batch_rows, LOGITS_BYTES // (4 * vocabulary * longest)))
        batch, order = order[:rows], order[rows:]
        ids = torch.full((len(batch), longest), local.pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            both = [*prompts[i].ids, *encoded[i]]
            ids[row, : len(both)] = torch.tensor(both)
            mask[row, : len(both)] = 1
        with torch.inference_mode():
            logits = local.model(input_ids=ids.to(local.device), attention_mask=mask.to(local.device)).logits
        for row, i in enumerate(batch):
            start, stop = len(prompts[i].ids), len(prompts[i].ids) + len(encoded[i])
            predicted = logits[row, start - 1 : stop - 1].float()  # (answer tokens, vocabulary)
            target = ids[row, start:stop].to(local.device)
            losses[i] = float(torch.nn.functional.cross_entropy(predicted, target))
    return losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of one model's answers by id; `vocabulary` is the aligned model's number of tokens."""

    aligned: str  # digest of what identifies the aligned model and how it was asked
    answers: str  # digest of the answers
    vocabulary: int
    by_answer: dict[str, float]

    def unlike_language(self, answer_id: str, tokens: int | None) -> bool:
        """Whether an answer of so many tokens, as far as that is known, is no language to the aligned model."""
        share = 1.0 if tokens is None or tokens < FEW_TOKENS else NO_LANGUAGE
        return self.by_answer.get(answer_id, 0.0) > share * math.log(self.vocabulary)


def read_losses(path: Path, answers: Mapping[str, str]) -> Losses | None:
    """Return the losses that were kept of these answers, {id: text}; None where there are none of them."""
    if not path.is_file():
        return None
    kept = Losses(**json.loads(path.read_text()))
    return kept if kept.answers == digest(answers) else None


def write_losses(path: Path, losses: Losses) -> None:
    """Keep losses, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(losses)) + "\n")
    part.replace(path)
