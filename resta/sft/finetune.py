"""What the command can do, one function each: preview, dry run, run."""

from __future__ import annotations

from resta.sft import memory, output, show
from resta.sft.train import Job, is_main, launch_line, load_chat, load_data, train

__all__ = ["Job", "dry_run", "preview", "run"]


def preview(job: Job, samples: int) -> None:
    """Print samples with the trained tokens marked, token statistics, and what is left out and why."""
    chat = load_chat(job)
    mixture, prepared = load_data(job, chat)
    show.preview(chat, mixture, prepared, samples)


def dry_run(job: Job) -> None:
    """Print the launch line, the memory each device needs, and an estimate of the speed; load no weights."""
    estimate = memory.estimate(job)
    print(launch_line(job))
    print()
    print(memory.table(job, estimate))


def run(job: Job, *, keep_checkpoints: bool = False) -> None:
    """Train, and write the finished model to `job.out`."""
    trained = train(job)
    output.write(job, trained, keep_checkpoints=keep_checkpoints)
    if is_main():
        show.finished(job, trained)
