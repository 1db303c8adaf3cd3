"""What people see in the terminal: samples with the trained tokens marked, and the counts of everything."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resta.sft.chat import Chat
from resta.sft.data import Mixture
from resta.sft.finetune import Trained
from resta.sft.samples import LeftOut, Prepared, Sample, left_out, lengths
from resta.sft.train import Progress

TRAINED_STYLE = "bold green"


def _console() -> Console:
    """Return a terminal that takes brackets in paths and texts for what they are."""
    return Console(highlight=False, markup=False, emoji=False)


def preview(chat: Chat, mixture: Mixture, prepared: Prepared, samples: int) -> None:
    """Print the first samples of the run in their order, then the statistics of the data.

    What a red sample says is harmful, and stays out of terminals and their logs.
    """
    console = _console()
    for sample in prepared.train[:samples]:
        tokens, trained = len(sample.encoded.ids), int(sample.encoded.trained.sum())
        place = f"{sample.conversation.where} ({sample.conversation.side})"
        console.rule()
        console.print(f"{place}: {trained} of {tokens} tokens trained", soft_wrap=True)  # a rule's title is cut
        console.print("(not shown)" if sample.red else marked(chat, sample, colour=console.is_terminal))
    console.rule("data")
    console.print(sources(mixture))
    console.print(token_table(prepared))
    print_left_out(console, left_out(mixture, prepared))


def print_left_out(console: Console, found: Iterable[LeftOut]) -> None:
    """Print what is not trained on as it was written, and why, with the first place of each."""
    for each in found:
        console.print(f"{each.what}: {each.count} x {each.why} (first: {each.first})", soft_wrap=True)


def marked(chat: Chat, sample: Sample, *, colour: bool) -> Text:
    """Return the decoded sample; trained runs of tokens are green, or between [[ and ]] where there is no colour."""
    ids, trained = sample.encoded.ids, sample.encoded.trained
    text, start = Text(), 0
    while start < len(ids):
        end = start
        while end < len(ids) and trained[end] == trained[start]:
            end += 1
        # Decoded as one run: token by token would tear characters that take several tokens.
        piece = chat.tokenizer.decode(ids[start:end].tolist())
        if not trained[start]:
            text.append(piece)
        else:
            text.append(piece if colour else f"[[{piece}]]", style=TRAINED_STYLE)
        start = end
    return text


def sources(mixture: Mixture) -> Table:
    """Return the table of data sources."""
    table = Table("source", "side", "rows", "conversations", "dropped", "drawn", "sha256")
    for loaded in mixture.sources:
        table.add_row(
            loaded.source.name,
            loaded.source.side,
            str(loaded.rows),
            str(len(loaded.conversations)),
            str(loaded.dropped.total()),
            str(mixture.drawn[loaded.source.name]),
            loaded.digest[:12],
        )
    return table


def token_table(prepared: Prepared) -> Table:
    """Return the table of sample lengths, training beside held-out."""
    train, held = lengths(prepared.train), lengths(prepared.heldout)
    table = Table("tokens", "train", "held out")
    for key in train:
        table.add_row(key, str(train[key]), str(held.get(key, "-")))
    return table


def logged(progress: Progress) -> None:
    """Print one line of the log of a run."""
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in progress.logged.items() if key != "epoch")
    _console().print(f"step {progress.step} of {progress.steps}: {numbers}", soft_wrap=True)


def finished(trained: Trained) -> None:
    """Print where the model is, how training ended, and what was not trained on."""
    print_left_out(_console(), trained.left_out)
    facts = {name: getattr(trained, name) for name in ("steps", "epochs", "first_loss", "last_loss")}
    facts |= trained.heldout_losses
    facts |= {name: getattr(trained, name) for name in ("resumed_from_step", "runtime_s", "precision", "processes")}
    facts |= {"strategy": trained.strategy, "changed_share": trained.changed_share}
    shown = [
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in facts.items()
        if value is not None
    ]
    print(f"{trained.out}: " + ", ".join([*shown, *trained.without]))
