"""The command line: one file per command, imported only when it runs, so that `resta --help` is instant."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any

import click

from resta.errors import RestaError
from resta.version import VERSION

INTERRUPTED = 130  # what shells return for a program ended by Ctrl-C

# name -> (module that defines `command`, one line for `resta --help`)
COMMANDS = {
    "merge": ("resta.cli.merge", "Add a safety vector to a fine-tuned model, streaming, on disk."),
    "sft": ("resta.cli.sft", "Fine-tune a model on conversations: safety (Starling) or any other task."),
    "collect": ("resta.cli.collect", "Collect safe conversations from a well-aligned model, each judged."),
    "redeval": ("resta.cli.redeval", "Measure how often a model can be led to harm (Red-Eval)."),
    "verify": ("resta.cli.verify", "Say whether safety is back and at what cost: PASS or FAIL."),
    "sweep": ("resta.cli.sweep", "Find the scale that restores safety at the least cost."),
    "diff": ("resta.cli.diff", "Show how far two checkpoints are apart, by layer and by module."),
    "audit": ("resta.cli.audit", "Check a finished merge by computing it a second time."),
    "demo": ("resta.cli.demo", "Train three tiny models, give one its safety back, and measure it."),
    "schema": ("resta.cli.schema", "Print the JSON Schema of a merge recipe."),
    "completion": ("resta.cli.completion", "Print the completion script of a shell."),
}


class LazyGroup(click.Group):
    """A click group that knows its commands by name and imports one only when asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return command names in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return one command."""
        if name not in COMMANDS:
            return None
        # Imports make hundreds of thousands of objects that live until the end. Looking for garbage among them,
        # while they are made and again when the process ends, took a third of a second of every command.
        gc.disable()
        try:
            command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        finally:
            gc.enable()
        gc.freeze()
        ctx.call_on_close(gc.freeze)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an expected failure is one message on stderr and its class's exit code."""
        try:
            return super().invoke(ctx)
        except RestaError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; what writes a directory goes on when the same command is run again", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="resta")
def main() -> None:
    """Give a fine-tuned language model its safety back, and prove it.

    \b
    restored = tuned + scale * (aligned - base)          RESTA, arXiv 2402.11746
    """
