"""`resta convert`: a model's PyTorch files in, safetensors out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from resta.checkpoint import following_links
from resta.cli.output import output
from resta.conversion import conversion_recipe, plan_conversion
from resta.engine import Result, carry_out, input_folders
from resta.output import check_place, check_space, check_vacant
from resta.page import printable
from resta.plan import Plan
from resta.show import digest_line, merge_progress, print_conversion

EPILOG = """\b
Examples:
  resta convert ./vicuna -o ./vicuna-safetensors
  resta convert org/name@revision -o ./name
"""


@click.command(epilog=EPILOG, short_help="Turn a model's PyTorch files into safetensors.")
@click.argument("model")
@output(type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--shard-size", default="5GB", show_default=True, help="Most tensor bytes per file.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output, once the new one is complete.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: processors, at most 8].")
@click.option("--digests", is_flag=True, help="Record the SHA-256 of every input and output file.")
@click.option("--follow-links", is_flag=True, help="Trust links that lead out of the model's directory.")
@click.option("--dry-run", is_flag=True, help="Read the files and say what would be written; write nothing.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def command(ctx: click.Context, /, model: str, out: Path, shard_size: str, **options: Any) -> None:
    """Write MODEL's PyTorch files (pytorch_model*.bin) as safetensors, every tensor with the bytes that it has.

    MODEL is a directory, or org/name@revision on the Hub, from which no other command fetches such files. They are
    pickles, which can run code when they are loaded; here they are only read, and what holds more than plain tensors is
    refused. A conversion that was killed continues when the same command is run again. OUT appears when it is complete.
    """
    ctx.with_resource(following_links(trusted=options["follow_links"]))
    quiet, as_json = options["quiet"], options["as_json"]
    plan = plan_conversion(conversion_recipe(model, shard_size))
    if options["dry_run"]:
        check_place(out.absolute(), input_folders(plan))
        check_vacant(out.absolute(), overwrite=options["overwrite"])
        check_space(out.absolute(), plan.bytes_written)
        click.echo(json.dumps(_facts(plan)) if as_json else _sentence(plan, out))
        return
    began = time.perf_counter()
    with merge_progress(plan, shown=sys.stderr.isatty() and not (quiet or as_json)) as progress:
        chosen = {name: options[name] for name in ("workers", "overwrite", "digests")}
        result = carry_out(plan, out, progress=progress, **chosen)
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps(_summary(result, seconds)))
    elif not quiet:
        print_conversion(result, seconds)
        if options["digests"]:
            click.echo(digest_line(result))


def _sentence(plan: Plan, out: Path) -> str:
    return (
        f"{len(plan.steps)} tensors of {len(plan.files)} files would be written to {printable(out)}: "
        f"{plan.bytes_written:,} bytes in {len(plan.headers)} files of weights"
    )


def _facts(plan: Plan) -> dict[str, Any]:
    return {"tensors": len(plan.steps), "bytes_written": plan.bytes_written, "left_out": plan.left_out}


def _summary(result: Result, seconds: float) -> dict[str, Any]:
    taken = result.digests
    return {
        "out": str(result.out),
        **_facts(result.plan),
        "seconds": round(seconds, 3),
        "digests": {"files": len(taken.sha256), "core_s": taken.core_s, "after_s": taken.after_s} if taken else None,
    }
