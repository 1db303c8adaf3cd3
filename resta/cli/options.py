"""Options that commands which ask models share, and what they mean; imports of what they lead to wait until then."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from resta.redeval.profiles import PROFILES, Questions

if TYPE_CHECKING:
    from resta.redeval.progress import RunOptions, Tally
    from resta.redeval.targets import Target

Function = TypeVar("Function", bound=Callable[..., Any])


class WithDefault(click.Group):
    """A group whose first word may be left out: `resta verify MODEL` means `resta verify run MODEL`.

    So its help is that of `run`, and the other commands beside it.
    """

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say how it is called without the word, and how with another one."""
        formatter.write_usage(ctx.command_path, " ".join(self.commands["run"].collect_usage_pieces(ctx)))
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, and the options of `run`."""
        self.format_commands(ctx, formatter)
        self.commands["run"].format_options(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before anything that is neither a command nor the group's own help."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def together(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Return a decorator that adds options in the order in which they are given."""

    def add(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def template_args(given: Iterable[str]) -> dict[str, Any]:
    """Return {name: value} of NAME=VALUE, values read as JSON where they are. Raises click.BadParameter."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"expected NAME=VALUE, found {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


BANK_FILES = together(
    click.option(
        "--bank-dir",
        "bank_dirs",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Folder with published banks; also $RESTA_BANKS.",
    ),
    click.option("--download", is_flag=True, help="Allow fetching a bank, pinned by commit and SHA-256."),
)
TEMPLATE_ARGS = click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="NAME=VALUE",
    callback=lambda context, option, given: template_args(given),
    help="Argument of the model's chat template, such as enable_thinking=false; may be given again.",
)
CHAT_TEMPLATE = click.option(
    "--chat-template",
    metavar="NAME|FILE",
    help="Chat template for a model that has none: a Jinja file, or a name that `resta sft` knows, such as chatml.",
)

QUESTIONS = together(
    click.option(
        "--bank",
        "banks",
        multiple=True,
        metavar="NAME|PATH",
        help="Question bank; may be given again. [default: smoke, smoke-safe]",
    ),
    click.option(
        "--safe-bank",
        "safe_banks",
        multiple=True,
        metavar="NAME|PATH",
        help="Bank of questions that are safe to answer (over-refusal).",
    ),
    BANK_FILES,
    click.option(
        "--template",
        "templates",
        multiple=True,
        metavar="NAME|PATH",
        help="Prompt template; may be given again. [default: standard, cot, suffix, cou]",
    ),
    click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        help="quick: two banks x two templates; standard: three x three; full: four x four. Each with a bank of safe "
        "questions. --bank, --safe-bank and --template replace its own.",
    ),
    click.option(
        "--protocol",
        type=click.Choice(["resta", "red-instruct"]),
        default="resta",
        show_default=True,
        help="Fixed procedure, or the published script's with its quirks.",
    ),
    click.option(
        "--duplicates",
        type=click.Choice(["once", "published"]),
        help="Ask repeated questions once, or as often as published. [default: the protocol's]",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Questions per bank."),
    click.option(
        "--without",
        multiple=True,
        metavar="RUN",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Leave out the questions that this Red-Eval run asked; may be given again.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Answers per question; needs a temperature.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Sample at this temperature. [default: the protocol's: greedy, or the model's own]",
    ),
    click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), default=1.0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        help="Limit per answer. [default: 512, or 500 for red-instruct]",
    ),
    TEMPLATE_ARGS,
    click.option("--keep-thoughts", is_flag=True, help="Show judges the model's thoughts, too."),
)

WHERE = together(
    click.option(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible server (.../v1) that serves MODEL; key in $RESTA_API_KEY.",
    ),
    click.option("--base", metavar="MODEL", help="For an adapter: its base model."),
    click.option("--files", metavar="DIR", help="For a recipe: folder of config and tokenizer."),
    CHAT_TEMPLATE,
)

JUDGES = together(
    click.option(
        "--judge",
        "judges",
        multiple=True,
        metavar="NAME[=MODEL[@URL]]",
        help="Judge (built-in name or YAML file), its model and that model's server; may be given again. "
        "[default: refusal-strings]",
    ),
    click.option("--judge-device", default="auto", show_default=True, help="Device of local judges, as --device."),
    click.option("--allow-self-judge", is_flag=True, help="Let the model under test judge itself."),
)

HOW = together(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cuda, mps, cpu, auto (one of them), or all: layers over every GPU.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Most prompts at once. A setting of the run, since answers may differ with it. [default: 64]",
    ),
)

SERVERS = together(
    click.option(
        "--connections",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Requests at once to a server.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0),
        default=5,
        show_default=True,
        help="Per request to a server, with growing pauses.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.IntRange(min=1),
        default=600,
        show_default=True,
        help="Seconds per request to a server.",
    ),
    click.option(
        "--max-failures",
        type=click.IntRange(min=1),
        default=20,
        show_default=True,
        help="Questions in a row that may fail before asking ends; single ones count as unanswered.",
    ),
)


# -- what the options mean -----------------------------------------------------------------------------------


def questions_of(given: Mapping[str, Any]) -> Questions:
    """Return what is asked, as the options say."""
    return Questions(**{each.name: given[each.name] for each in fields(Questions) if each.name in given})


def target_of(model: str, given: Mapping[str, Any]) -> Target:
    """Return the model that is named, reached as the options say. Raises RequestError."""
    from resta.redeval.targets import parse_target

    return parse_target(
        model,
        given["base_url"],
        base=given["base"],
        files=given["files"],
        chat_template=given["chat_template"],
        device=given["device"],
        dtype=given["dtype"],
        batch_rows=given["batch_size"],
    )


@contextlib.contextmanager
def watched() -> Iterator[RunOptions]:
    """Yield options of a run that is watched by a progress bar on stderr with the running ASR."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from resta.redeval.progress import RunOptions

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[asr]}"),
    )
    # The bar takes hold of stdout and shows on stderr what is printed there: right on one terminal, but what goes to
    # a file or a pipe must arrive there.
    shared = sys.stdout.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=shared) as bars:
        tasks: dict[str, Any] = {}

        def watch(tally: Tally) -> None:
            if tally.phase not in tasks:
                tasks[tally.phase] = bars.add_task(tally.phase, total=tally.total, asr="")
            asr = "" if tally.asr is None else f"ASR so far {100 * tally.asr:.1f} %"
            bars.update(tasks[tally.phase], completed=tally.done, asr=asr)

        def note(line: str) -> None:
            bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield RunOptions(watch=watch, note=note)


@contextlib.contextmanager
def run_options(given: Mapping[str, Any]) -> Iterator[RunOptions]:
    """Yield options of a run that is watched, and carried out as the command line says."""
    with watched() as options:
        yield replace(
            options,
            connections=given["connections"],
            retries=given["retries"],
            timeout_s=given["timeout_s"],
            max_failures=given["max_failures"],
            judge_device=given["judge_device"],
            reader_device=given.get("device", "auto"),
        )
