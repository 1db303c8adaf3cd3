"""`resta collect`: flags -> one library call."""

from __future__ import annotations

from pathlib import Path

import click

from resta.cli.output import output


@click.command("collect")
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@output(required=True, type=click.Path(path_type=Path), help="The JSON file to write.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change one recipe setting.")
def command(recipe: Path, out: Path, assignments: tuple[str, ...]) -> None:
    """Collect safe conversations from the model that RECIPE (a YAML file) names, in HarmfulQA's schema.

    \b
    Every answer is read by a judge before it is kept. Run the same command again after a stop: it continues.
    The result is data for `resta sft`: {name: collected, path: OUT}.
    """
    from resta.sft import collect
    from resta.sft import recipe as recipes

    checked = recipes.load(collect.Collect, recipe, assignments)
    facts = collect.collect(checked, recipe.parent, out)
    click.echo(f"{out}: {facts['conversations']} conversations on {facts['rows']} of {facts['questions']} questions")
    for reason, count in facts["dropped"].items():
        click.echo(f"dropped: {count} x {reason}")
