"""`resta patch`: flags -> one library call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resta.cli.options import BANK_FILES, CHAT_TEMPLATE, TEMPLATE_ARGS, together
from resta.cli.output import output
from resta.errors import RequestError

if TYPE_CHECKING:
    from resta.patch.request import Request

EPILOG = """\b
Examples:
  resta patch ./tuned --aligned org/aligned --task-prompts train.jsonl --harmful dangerousqa -o ./patch
  resta patch ./tuned --aligned org/aligned --task-prompts train.jsonl --harmful dangerousqa --dry-run
"""

MODELS = together(
    click.argument("tuned"),
    click.option("--aligned", required=True, help="The model whose refusals are wanted: of the same family as TUNED."),
    click.option(
        "--base",
        metavar="MODEL",
        help="What TUNED was made from: its norm is compared with that change's. Adapters are on it. [default: what "
        "they name]",
    ),
    CHAT_TEMPLATE,
)

PROMPTS = together(
    click.option(
        "--task-prompts",
        required=True,
        type=click.Path(path_type=Path),
        help="What the fine-tune is for: a file of prompts (.txt, .json, .jsonl, .parquet), or its training data.",
    ),
    click.option(
        "--harmful",
        multiple=True,
        metavar="NAME|PATH",
        default=("smoke",),
        show_default=True,
        help="Bank of harmful questions to learn on; may be given again.",
    ),
    click.option(
        "--apart",
        multiple=True,
        metavar="NAME|PATH",
        help="Bank that a choice or a verdict will rest on: a question shared with it is refused; may be given again.",
    ),
    BANK_FILES,
    click.option(
        "--harmful-count", type=click.IntRange(1), default=64, show_default=True, help="Harmful prompts, at most."
    ),
    click.option(
        "--keep-count",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Prompts each of the task, harmless and look-alike, at most.",
    ),
    click.option(
        "--template",
        "templates",
        multiple=True,
        metavar="NAME|PATH",
        help="Put every second harmful prompt in an attack template; given again, in this and the others by turns.",
    ),
    click.option(
        "--starts/--no-starts",
        default=True,
        show_default=True,
        help="Begin every second answer as one that goes along ('Sure, here is'), to learn to turn back.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
)

TEACHING = together(
    click.option("--tokens", type=click.IntRange(1), default=24, show_default=True, help="Tokens of each answer."),
    click.option(
        "--thought-tokens",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Leave out up to N tokens that a model thinks before each answer; needs --no-starts.",
    ),
    click.option(
        "--top", type=click.IntRange(1), default=64, show_default=True, help="Likeliest tokens kept at each place."
    ),
    click.option("--whole-vocabulary", is_flag=True, help="Keep all of them."),
    click.option(
        "--other-tokenizer",
        is_flag=True,
        help="Let ALIGNED have other tokens: the words of its answers are learned, and not what it held likely.",
    ),
    TEMPLATE_ARGS,
    click.option(
        "--lessons", type=click.Path(path_type=Path), help="Where the models' answers are kept. [default: OUT.lessons]"
    ),
)

LEARNING = together(
    click.option(
        "--lambda",
        "keep_weight",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="What is to stay, weighed against what is to be given back.",
    ),
    click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Rank of the adapter."),
    click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Steps of 12 answers."),
    click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True),
    click.option("--four-bit", is_flag=True, help="Load both models in 4 bits; needs the extra qlora."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
)


@click.command("patch", epilog=EPILOG)
@MODELS
@PROMPTS
@TEACHING
@LEARNING
@output(
    type=click.Path(path_type=Path), help="The directory that will hold the patch, a PEFT adapter on TUNED or its base."
)
@click.option(
    "--dry-run", is_flag=True, help="Check all that can be without weights, and estimate memory; ask nothing."
)
def command(out: Path | None, dry_run: bool, **given: Any) -> None:
    """Teach TUNED an aligned model's refusals in a small adapter, and hold it to all else that it answers.

    For a model whose safety no merge brings back. ALIGNED answers harmful prompts, TUNED those of its task and
    harmless ones; the adapter learns from both, token by token. No labels and no harmful answers are needed.

    A patch is proved by `resta verify` alone; its training loss says nothing about safety. A run that was killed goes
    on when the same command is run again.
    """
    if out is None and not dry_run:
        raise RequestError("-o DIR is needed to learn a patch; --dry-run does without")
    try:
        from resta.patch import learn
        from resta.patch.request import check
        from resta.patch.teachers import student_of
        from resta.sft import memory, show
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise RequestError(
            f"resta patch needs {library}; install what it uses with: pip install 'resta[sft]'"
        ) from None
    request = request_of(out or Path("patch"), given)
    if dry_run:
        job = check(request, student_of(request.tuned))
        click.echo("\n".join([*learn.describe(request), "", str(memory.table(job, memory.estimate(job)))]))
        return
    patch = learn.carry_out(request, progress=show.logged, note=lambda line: click.echo(line, err=True))
    click.echo("\n".join(learn.summary(request, patch)))


def request_of(out: Path, given: Mapping[str, Any]) -> Request:
    """Return what the flags ask for, its prompts read. Raises RequestError."""
    from resta.patch.learn import beside
    from resta.patch.prompts import STARTS, Drawing, draw
    from resta.patch.request import Learning, Request, model_of
    from resta.patch.teachers import Teaching

    on = {"base": given["base"], "chat_template": given["chat_template"]}
    drawing = Drawing(
        starts=STARTS if given["starts"] else (),
        **{key: given[key] for key in ("harmful_count", "keep_count", "templates", "bank_dirs", "download", "seed")},
    )
    return Request(
        **{role: model_of(given[role], **on) for role in ("tuned", "aligned")},
        prompts=draw(given["task_prompts"], given["harmful"], given["apart"], drawing),
        out=out,
        lessons=given["lessons"] or beside(out),
        teaching=Teaching(
            tokens=given["tokens"],
            thought_tokens=given["thought_tokens"],
            top=None if given["whole_vocabulary"] else given["top"],
            other_tokenizer=given["other_tokenizer"],
            template_args=given["template_args"],
        ),
        learning=Learning(**{each.name: given[each.name] for each in fields(Learning) if each.name in given}),
        base=given["base"],
        device=given["device"],
    )
