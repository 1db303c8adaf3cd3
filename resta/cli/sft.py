"""`resta sft`: flags -> one library call."""

from __future__ import annotations

from pathlib import Path

import click

from resta.cli.output import output
from resta.errors import RequestError


@click.command("sft")
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@output(type=click.Path(path_type=Path), help="The directory that will hold the finished model.")
@click.option("--preview", is_flag=True, help="Show samples with the trained tokens marked, and counts; train nothing.")
@click.option(
    "--samples", type=click.IntRange(0), default=2, show_default=True, help="How many samples --preview shows."
)
@click.option("--dry-run", is_flag=True, help="Print the launch line and the memory each GPU needs; train nothing.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change one recipe setting.")
@click.option("--keep-checkpoints", is_flag=True, help="Keep OUT.partial with its checkpoints after success.")
def command(
    recipe: Path,
    out: Path | None,
    preview: bool,
    samples: int,
    dry_run: bool,
    device: str,
    assignments: tuple[str, ...],
    keep_checkpoints: bool,
) -> None:
    """Fine-tune a model on conversations, as RECIPE (a YAML file) says: LoRA, QLoRA or full.

    \b
    resta sft recipe.yaml --preview      what is trained on, and what is left out
    resta sft recipe.yaml --dry-run      the launch line and a memory estimate
    resta sft recipe.yaml -o DIR         train; DIR appears when it is complete

    A run that was killed continues from its last checkpoint when the same command is run again.
    """
    from resta.sft import recipe as recipes

    if preview and dry_run:
        raise RequestError("--preview and --dry-run show different things; give one of them")
    checked = recipes.load(recipes.Recipe, recipe, assignments)
    try:
        from resta.sft import finetune, memory, show, train
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise RequestError(f"resta sft needs {library}; install what it uses with: pip install 'resta[sft]'") from None
    words = [str(recipe), *(word for assignment in assignments for word in ("--set", assignment))]
    words += [] if device == "auto" else ["--device", device]
    job = train.Job(recipe=checked, root=recipe.parent, out=out or Path("out"), device=device, words=tuple(words))
    if preview:
        chat = train.load_chat(job)
        show.preview(chat, *train.load_data(job, chat), samples)
    elif dry_run:
        click.echo(f"{train.launch_line(job)}\n\n{memory.table(job, memory.estimate(job))}")
    elif out is None:
        raise RequestError("-o DIR is needed to train; --preview and --dry-run need none")
    else:
        trained = finetune.carry_out(job, keep_checkpoints=keep_checkpoints, progress=show.logged)
        if train.is_main():
            show.finished(trained)
