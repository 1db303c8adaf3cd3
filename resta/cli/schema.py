"""`resta schema`: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json

import click

from resta.recipe import schema


@click.command(short_help="Print the JSON Schema of a merge recipe.")
def command() -> None:
    """Print the JSON Schema of a merge recipe.

    Editors that speak the YAML language server protocol take it from a recipe's first line:

    \b
      # yaml-language-server: $schema=schema.json
    """
    click.echo(json.dumps(schema(), indent=2))
