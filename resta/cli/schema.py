"""`resta schema`: the JSON Schema of what users write, for editors, and of what commands write, for scripts."""

from __future__ import annotations

import importlib
import json

import click

# kind -> (module, what makes its schema), imported only when asked for
KINDS = {
    "recipe": ("resta.recipe", "schema"),
    "sft": ("resta.sft.recipe", "Recipe"),
    "collect": ("resta.sft.collect", "Collect"),
    "policy": ("resta.verify.policy", "Policy"),
    "judge": ("resta.redeval.judges", "JudgeSpec"),
    "verdict": ("resta.verify.written", "verdict_schema"),
    "durability": ("resta.verify.durability", "durability_schema"),
    "sweep": ("resta.sweep.written", "sweep_schema"),
}


@click.command(short_help="Print a JSON Schema.")
@click.argument("kind", type=click.Choice(list(KINDS)), default="recipe")
def command(kind: str) -> None:
    """Print the JSON Schema (2020-12) of what you write or of what a command writes.

    \b
    recipe    a merge recipe (the default)       verdict   verdict.json of resta verify
    sft       a recipe of resta sft              sweep     sweep.json of resta sweep
    collect   a recipe of resta collect
    policy    the limits of resta verify          durability durability.json of resta verify --durability
    judge     a judge of your own

    Editors that speak the YAML language server protocol take it from a file's first line:

    \b
      # yaml-language-server: $schema=schema.json
    """
    from resta.schema import schema_of

    module, name = KINDS[kind]
    found = getattr(importlib.import_module(module), name)
    click.echo(json.dumps(schema_of(found) if isinstance(found, type) else found(), indent=2))
