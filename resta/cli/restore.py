"""`resta restore`: from a tuned model to a released one, by the cheapest remedy that is proved to work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resta.cli.options import CHAT_TEMPLATE, HOW, JUDGES, QUESTIONS, SERVERS, run_options, together
from resta.cli.output import output
from resta.cli.verify import POLICY, UTILITY, exam_of

if TYPE_CHECKING:
    from resta.ladder import Choices
    from resta.ladder.rungs import Ladder

EPILOG = """\b
Examples:
  resta restore ./tuned --aligned ./aligned --base ./base --task-prompts train.jsonl --profile quick -o ./restored
  resta restore ./tuned --aligned ./aligned --task-prompts train.jsonl --bank questions.json --dry-run -o ./restored
  resta restore ./tuned --aligned ./aligned --base ./base --only weights --profile quick -o ./restored
"""

MODELS = together(
    click.argument("tuned"),
    click.option("--aligned", metavar="MODEL", help="Safety-aligned model: directory, adapter or org/name@revision."),
    click.option("--base", metavar="MODEL", help="The model before alignment; without it there is no safety vector."),
    click.option(
        "--task-prompts",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="What a patch is held to: a file of prompts, or the training data. Without it none is learned.",
    ),
    click.option("--tuned-from", metavar="base|aligned|MODEL", help="Model the fine-tune began from [default: base]."),
    click.option("--recorded-base", multiple=True, metavar="NAME", help="Confirm the base that an adapter records."),
    click.option(
        "--allow-config", multiple=True, metavar="KEY", help="Allow configs to differ in this, such as rope_theta."
    ),
)

LADDER = together(
    click.option(
        "--only",
        multiple=True,
        metavar="RUNG",
        help="Only this rung; may be given again. One of nothing, weights, stochastic, float32, "
        "patch, patched-weights. [default: all]",
    ),
    click.option("--max-minutes", type=click.FloatRange(min=0, min_open=True), help="Stop after so long."),
    click.option("--budget-answers", type=click.IntRange(min=1), help="Stop after so many answers."),
    click.option(
        "--unseen-bank",
        "unseen",
        multiple=True,
        metavar="NAME|PATH",
        help="Harmful questions to verify on, where those that were drawn are spent; may be given again.",
    ),
    click.option(
        "--unseen-safe-bank",
        "unseen_safe",
        multiple=True,
        metavar="NAME|PATH",
        help="Safe questions beside them; may be given again.",
    ),
    click.option(
        "--harmful",
        metavar="NAME|PATH",
        help="Bank that a patch learns from. [default: a part of --bank, which nothing else is asked from]",
    ),
    click.option("--dry-run", is_flag=True, help="Say what each rung takes; load, ask and write nothing."),
    click.option("--include-text", is_flag=True, help="Show questions and answers on the page."),
)


@click.command(epilog=EPILOG)
@MODELS
@LADDER
@POLICY
@QUESTIONS
@UTILITY
@JUDGES
@HOW
@SERVERS
@CHAT_TEMPLATE
@output(
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("restored"),
    show_default=True,
    help="The released model to be; the records lie beside it, in OUT.records.",
)
def command(tuned: str, out: Path, **given: Any) -> None:
    """Give TUNED its safety back by the cheapest remedy that works, and prove it.

    \b
    nothing      TUNED as it is
    weights      RESTA, interpolation towards ALIGNED, both together, by the sweep's search
    stochastic   the same, rounded at random, where rounding is what was lost
    float32      the same, not rounded, where rounding is what was lost
    patch        a small adapter that learned from ALIGNED's refusals
    patched-weights   the same on the best weight arithmetic

    Each rung is measured on one half of the questions and left for the next one unless it would pass on the other half
    with a probability of 0.9 or more. The other half is asked once, of what was chosen: OUT is written if the verdict
    is PASS. The same command goes on where it was stopped. Exit codes are those of `resta verify`; 1 also means that
    nothing was worth verifying, and the best candidate is kept under OUT.records/not-restored.
    """
    from resta.ladder.conduct import carry_out
    from resta.ladder.request import read_ladder
    from resta.ladder.story import show

    models = {"tuned": tuned, "aligned": given["aligned"], "base": given["base"]}
    exam = exam_of({**given, "tokenizer": None})
    ladder = read_ladder(models, given["policy_path"], exam, out, _choices(given), given["task_prompts"])
    if given["dry_run"]:
        _say_costs(ladder)
        return
    with run_options(given) as options:
        told = carry_out(ladder, options)
    show(told)
    sys.exit(told.exit_code)


def _say_costs(ladder: Ladder) -> None:
    """Print what every rung takes, if it can be carried out at all. Raises RequestError."""
    from resta.ladder.costs import costs_table, expected_costs
    from resta.ladder.request import check_ladder
    from resta.page import console, to_terminal

    check_ladder(ladder)
    console(width=None if sys.stdout.isatty() else 160).print(to_terminal(costs_table(expected_costs(ladder))))


def _choices(given: dict[str, Any]) -> Choices:
    from resta.ladder import Choices

    named = ("only", "harmful", "max_minutes", "budget_answers", "unseen", "unseen_safe", "include_text", "seed")
    return Choices(
        **{name: given[name] for name in named},
        settings={
            "device": given["device"],
            "dtype": given["dtype"],
            "chat_template": given["chat_template"],
            "batch_rows": given["batch_size"],
        },
        family={name: given[name] for name in ("tuned_from", "recorded_base", "allow_config")},
    )
