"""What is minimised, as equations over per-token losses, and the smallest trainer that can minimise the second one.

    blue        L = L_blue
    blue_red    L = L_blue - lambda2 * L_red

    L_blue         = sum of NLL over blue tokens / number of blue tokens
    token   L_red  = sum of NLL * [NLL <= cutoff] over red tokens / number of red tokens
    sample  L_red  = sum of m * [m <= cutoff] over red samples / number of red samples,  m = mean NLL of the sample

Numbers are counted over the whole optimiser step, all micro-batches and processes, so how a step is split never changes
it. The indicator has no gradient. Source: Bhardwaj and Poria, arXiv 2308.09662; the trainer of blue_red was never
released, lambda2 = 0.1 and the cutoff of 1.0 come from a single secondary text, and which of the two scopes was used is
not known: hence both. By the authors' own table blue is the safer model (attack success rate on DangerousQA, standard /
CoT / CoU: blue .015 / .485 / .765, blue_red .050 / .570 / .855).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from resta.sft.recipe import Objective


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over some samples; they add up over micro-batches and processes. All are scalars."""

    blue: torch.Tensor  # NLL of blue tokens
    blue_tokens: torch.Tensor
    red: torch.Tensor  # NLL of red tokens, cutoff or not
    red_tokens: torch.Tensor
    ascent: torch.Tensor  # numerator of L_red: what is left of the red NLL below the cutoff
    red_units: torch.Tensor  # denominator of L_red: red tokens or red samples
    red_off: torch.Tensor  # units above the cutoff

    def stacked(self) -> torch.Tensor:
        """Return the sums as one detached tensor, (7,), in the order of the fields."""
        values = (
            self.blue,
            self.blue_tokens,
            self.red,
            self.red_tokens,
            self.ascent,
            self.red_units,
            self.red_off,
        )
        return torch.stack([v.detach().double() for v in values])


def sums(nll: torch.Tensor, mask: torch.Tensor, red: torch.Tensor, objective: Objective) -> Sums:
    """Return the sums of one batch from per-token NLL (batch, tokens), its mask, and the side of
    each sample (batch,).
    """
    on_blue = mask & ~red[:, None]
    on_red = mask & red[:, None]
    if objective.red_threshold_scope == "token":
        values, counted = nll[on_red], torch.ones_like(nll[on_red], dtype=torch.bool)
    else:
        tokens = on_red.sum(1)
        counted = tokens > 0
        values = (nll * on_red).sum(1)[counted] / tokens[counted]
        counted = counted[counted]
    keep = values.detach() <= objective.red_cutoff
    return Sums(
        blue=nll[on_blue].sum(),
        blue_tokens=on_blue.sum(),
        red=nll[on_red].sum(),
        red_tokens=on_red.sum(),
        ascent=(values * keep).sum(),
        red_units=counted.sum(),
        red_off=(~keep).sum(),
    )


def step_loss(batch: Sums, blue_tokens: torch.Tensor, red_units: torch.Tensor, lambda2: float) -> torch.Tensor:
    """Return a micro-batch's part of the step's loss; the parts of a step add up to L."""
    return batch.blue / blue_tokens.clamp(min=1) - lambda2 * batch.ascent / red_units.clamp(min=1)


class MixedOrder(Sampler[int]):
    """Each epoch: blue and red shuffled apart and then interleaved evenly, `red_per_blue` red samples per blue one.

    Red samples are repeated, in a new order each time, where there are too few of them for the ratio.
    """

    def __init__(self, red: list[bool], red_per_blue: float, seed: int):
        self.sides = ([i for i, r in enumerate(red) if not r], [i for i, r in enumerate(red) if r])
        self.reds = max(1, round(red_per_blue * len(self.sides[0])))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is produced next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sides[0]) + self.reds

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        blue, red = self.sides

        def shuffled(items: list[int]) -> list[int]:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        blues = shuffled(blue)
        reds: list[int] = []
        while len(reds) < self.reds:
            reds += shuffled(red)
        places = [((i + 0.5) / len(blues), 0, index) for i, index in enumerate(blues)]
        places += [((i + 0.5) / self.reds, 1, index) for i, index in enumerate(reds[: self.reds])]
        return iter([index for _, _, index in sorted(places)])


@dataclass
class CollateWithSide:
    """Pad as the trainer does, and carry each sample's side as a field of the batch."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels, (batch, tokens), and red, (batch,)."""
        batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=self.pad_token_id)(examples)
        batch["red"] = torch.tensor([example["red"] for example in examples])
        return batch


class BlueRedTrainer(SFTTrainer):  # type: ignore[misc]  # an untyped base
    """The supervised trainer with L_blue - lambda2 * L_red as its loss, and the parts of it in the log."""

    loss_is_scaled_for_ga = True  # the loss is divided by counts of the whole step

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective: Objective = objective
        self.seen = torch.zeros(7, dtype=torch.float64)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixedOrder:
        red = list((train_dataset or self.train_dataset)["red"])
        return MixedOrder(red, self.objective.red_per_blue, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one step, and count what the loss is divided by over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            mask, red = batch["labels"][:, 1:].ne(-100).cpu(), batch["red"].cpu()
            counts[0] += mask[~red].sum()
            per_sample = mask[red].sum(1)
            counts[1] += (per_sample > 0).sum() if self.objective.red_threshold_scope == "sample" else per_sample.sum()
        counts = counts.float().to(device)
        self.step_counts = self.accelerator.reduce(counts, "sum") if self.accelerator.num_processes > 1 else counts
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch: L in training, the plain mean NLL in evaluation."""
        red = inputs.pop("red")
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        batch = sums(-outputs.log_probs.float(), outputs.label_mask, red, self.objective)
        self.seen += batch.stacked().cpu()
        blue_tokens, red_units = self.step_counts
        # Processes' gradients are averaged; the counts are already those of all of them.
        return step_loss(batch, blue_tokens, red_units, self.objective.lambda2) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses, and the share of red that is past the cutoff, to each training line of the log."""
        if "loss" in logs:
            seen = self.seen
            if self.accelerator.num_processes > 1:
                seen = self.accelerator.reduce(seen.to(self.accelerator.device), "sum").cpu()
            blue, blue_tokens, red, red_tokens, _, units, off = seen.tolist()
            logs["blue_nll"] = blue / max(blue_tokens, 1.0)
            logs["red_nll"] = red / max(red_tokens, 1.0)
            logs["red_above_cutoff"] = off / max(units, 1.0)
            self.seen = torch.zeros_like(self.seen)
        super().log(logs, start_time)
