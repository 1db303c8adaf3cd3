"""`resta sft` as a library call: recipe -> a finished model in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers.utils import logging

from resta.sft import save
from resta.sft.recipe import Recipe, load
from resta.sft.samples import LeftOut, left_out
from resta.sft.train import Job, Watch, train
from resta.strict import check


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished model, and how its training went; losses are in nats per trained token."""

    out: Path  # loads in transformers, peft and vllm; its resta.json names base, data, recipe and versions
    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    heldout_losses: Mapping[str, float]  # eval_loss; eval_blue_loss and eval_red_loss; eval_given_kl and eval_kept_kl
    resumed_from_step: int | None  # None for a run that was not stopped
    runtime_s: float  # of this process; a run that was stopped took longer
    precision: str  # what was computed in: bf16, fp16 or float32
    processes: int
    strategy: str | None  # how several processes shared the model: ddp, fsdp or deepspeed
    changed_share: float | None  # of a full fine-tune's parameters, against the base's; None where not compared
    without: tuple[str, ...]  # what was not written, and why
    left_out: tuple[LeftOut, ...]  # what was not trained on as it was written, and why


def run(
    *,
    recipe: Recipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    root: Path | str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    keep_checkpoints: bool = False,
    progress: Watch | None = None,
) -> Trained:
    """Fine-tune a model on conversations and write it to a folder; print nothing.

    A run that was killed goes on from its last checkpoint when it is called again. Under torchrun every process calls
    this alike; the main one writes and reports.

        import resta
        trained = resta.sft.run(recipe="recipe.yaml", out="safety", progress=print)
        print(trained.last_loss, trained.heldout_losses)

    Args:
        recipe: a file, the recipe itself, or its settings as plain data.
        out: the folder to write; it appears when it is whole, and must not be there.
        root: the folder that the recipe's relative paths start from; by default a file's own, else the current one.
        device: where to compute; auto takes a GPU if there is one.
        keep_checkpoints: whether the working folder, OUT.partial, stays after success.
        progress: called with each line of the log.

    Raises:
        RequestError: the recipe, its data, its base or the device cannot be used as they stand; nothing was trained.
        RestaError: the run had to stop, as for want of memory or a loss that is no number.
    """
    if isinstance(recipe, Path | str):
        root, recipe = root if root is not None else Path(recipe).parent, load(Recipe, Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = check(Recipe, dict(recipe))
    job = Job(recipe=recipe, root=Path(root if root is not None else "."), out=Path(out), device=device)
    return carry_out(job, keep_checkpoints=keep_checkpoints, progress=progress)


def carry_out(job: Job, *, keep_checkpoints: bool = False, progress: Watch | None = None) -> Trained:
    """Do what `run` does, for a request that is put together already."""
    with _quiet():
        fitted = train(job, progress)
        metrics = save.write(job, fitted, keep_checkpoints=keep_checkpoints)
    return Trained(
        out=job.out,
        **{key: metrics[key] for key in ("steps", "epochs", "first_loss", "last_loss", "resumed_from_step")},
        **{key: metrics[key] for key in ("runtime_s", "precision", "processes", "strategy")},
        heldout_losses={key: value for key, value in metrics.items() if key.startswith("eval_")},
        changed_share=metrics.get("changed_share"),
        without=tuple(f"{key}: {metrics[key]}" for key in ("loss_png",) if key in metrics),
        left_out=left_out(fitted.mixture, fitted.prepared),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars of both libraries off the terminal, which belongs to whoever calls."""
    bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars[0]:
            logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
