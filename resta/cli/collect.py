"""`resta collect`: flags -> one library call."""

from __future__ import annotations

from pathlib import Path

import click

from resta.cli.options import watched
from resta.cli.output import output


@click.command("collect")
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@output(required=True, type=click.Path(path_type=Path), help="The JSON file to write.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change one recipe setting.")
def command(recipe: Path, out: Path, assignments: tuple[str, ...]) -> None:
    """Collect safe conversations from the model that RECIPE (a YAML file) names, in HarmfulQA's schema.

    \b
    Every answer is read by a judge before it is kept. Run the same command again after a stop: it continues.
    Answers without a clear verdict are left out, and judged again when the command is run again.
    The result is data for `resta sft`: {name: collected, path: OUT}.
    """
    from resta.sft import collect
    from resta.sft import recipe as recipes

    checked = recipes.load(collect.Collect, recipe, assignments)
    with watched() as options:
        facts = collect.collect(checked, recipe.parent, out, options)
    click.echo(f"{out}: {facts['conversations']} conversations on {facts['rows']} of {facts['questions']} questions")
    for reason, count in facts["dropped"].items():
        click.echo(f"dropped: {count} x {reason}")
    if facts["to_judge_again"]:
        click.echo(
            f"{facts['to_judge_again']} answers are without a clear verdict, and left out. Run the same command again "
            "to put them to the judge again, with --set judge=NAME=MODEL@http://HOST/v1 to another one"
        )
