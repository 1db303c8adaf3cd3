"""`resta completion`: what a shell needs to complete resta's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, /, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(resta completion bash)"                  in ~/.bashrc
    zsh:   eval "$(resta completion zsh)"                   in ~/.zshrc
    fish:  resta completion fish | source                   in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "resta", "_RESTA_COMPLETE").source())
