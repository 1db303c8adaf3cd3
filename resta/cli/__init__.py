"""The command line: one file per command, imported only when it runs, so that `resta --help` is instant."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from typing import Any

import click

from resta.errors import EXIT_CODES, FAILED, INTERRUPTED, RestaError
from resta.page import printable_lines
from resta.version import VERSION

# name -> (module that defines `command`, one line for `resta --help`)
COMMANDS = {
    "restore": ("resta.cli.restore", "Give a model its safety back, by what works, and prove it."),
    "merge": ("resta.cli.merge", "Add a safety vector to a fine-tuned model, streaming, on disk."),
    "convert": ("resta.cli.convert", "Turn a model's PyTorch files into safetensors, running nothing in them."),
    "sft": ("resta.cli.sft", "Fine-tune a model on conversations: safety (Starling) or any other task."),
    "collect": ("resta.cli.collect", "Collect safe conversations from a well-aligned model, each judged."),
    "patch": ("resta.cli.patch", "Teach a tuned model an aligned one's refusals, where no merge gives them back."),
    "redeval": ("resta.cli.redeval", "Measure how often a model can be led to harm (Red-Eval)."),
    "verify": ("resta.cli.verify", "Say whether safety is back and at what cost: PASS or FAIL."),
    "sweep": ("resta.cli.sweep", "Find the scale that restores safety at the least cost."),
    "diff": ("resta.cli.diff", "Show how far two checkpoints are apart, by layer and by module."),
    "audit": ("resta.cli.audit", "Check a finished merge by computing it a second time."),
    "demo": ("resta.cli.demo", "Train three tiny models, give one its safety back, and measure it."),
    "schema": ("resta.cli.schema", "Print the JSON Schema of a file that you write, or that a command writes."),
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
        """Run a command; an expected failure is one message on stderr and its class's exit code.

        No failure ends with 1, which says that the answer is no; those that nobody foresaw neither.
        """
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except RestaError as error:
            click.echo(f"error: {printable_lines(error)}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; a command that writes a directory continues when it is run again", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever read the output has gone; what is still buffered must not raise again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        except OSError as error:
            click.echo(f"error: {printable_lines(error)}", err=True)
            sys.exit(FAILED)
        except Exception:
            traceback.print_exc()
            click.echo("error: this is a bug in resta, or in a file that it read; please report it", err=True)
            sys.exit(FAILED)


EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {words}" for code, words in EXIT_CODES.items())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(VERSION, prog_name="resta")
def main() -> None:
    """Give a fine-tuned language model its safety back, and prove it.

    \b
    restored = tuned + scale * (aligned - base)          RESTA, arXiv 2402.11746
    """
