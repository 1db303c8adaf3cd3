"""`resta demo`: a merge from nothing, on this machine, in seconds."""

from __future__ import annotations

import time
from pathlib import Path

import click

from resta.demo import make_checkpoints
from resta.engine import carry_out
from resta.plan import make_plan
from resta.recipe import dump_recipe, make_recipe
from resta.report import print_result


@click.command(short_help="Make three small checkpoints and merge them.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("resta-demo"))
def command(folder: Path) -> None:
    """Make three small checkpoints in FOLDER and merge them.

    Their weights are random: this shows the arithmetic, the report and the files, not safety.
    """
    models = make_checkpoints(folder)
    recipe = make_recipe(
        {
            "models": {name: str(path.resolve()) for name, path in models.items()},
            "start": "tuned",
            "terms": [{"name": "safety", "delta": "aligned - base", "scale": 0.5}],
        }
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    began = time.perf_counter()
    result = carry_out(make_plan(recipe), folder / "restored")
    print_result(result, time.perf_counter() - began)
    click.echo(f"again:        resta merge {folder / 'recipe.yaml'} -o {folder / 'restored-again'}")
