"""`resta merge`: flags or a recipe file in, one library call, a summary out."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from resta.checkpoint import following_links
from resta.cli.output import output
from resta.engine import Result, carry_out, input_folders
from resta.errors import RequestError
from resta.forecast import plan_warnings
from resta.manifest import change_warning, describe_terms, judge, result_warnings, total_change
from resta.output import check_place, check_space, check_vacant
from resta.page import printable, printable_lines
from resta.plan import Plan, make_plan
from resta.recipe import Recipe, dump_recipe, load_recipe, mergekit_note
from resta.shorthand import Roles, Shorthand, to_recipe
from resta.show import digest_line, merge_progress, print_plan, print_result

EPILOG = """\b
Examples:
  resta merge ./tuned --aligned org/starling --base org/vicuna --scale 0.5 -o ./restored
  resta merge ./tuned --aligned ./starling --base ./vicuna --scale 0.5 --dare-density 0.7 -o ./restored
  resta merge ./lora --aligned ./starling --base ./vicuna --tuned-from base --scale 0.5 -o ./restored
  resta merge recipe.yaml -o ./restored --dry-run
"""


@click.command(epilog=EPILOG, short_help="Add a safety vector to a fine-tuned model.")
@click.argument("tuned_or_recipe", metavar="TUNED|RECIPE.yaml")
@click.option("--aligned", metavar="MODEL", help="Safety-aligned model: directory, adapter or org/name@revision.")
@click.option("--base", metavar="MODEL", help="What is subtracted from it: the model before alignment.")
@click.option("--unaligned", metavar="MODEL", help="Subtracted instead of --base: a deliberately unaligned twin.")
@click.option("--scale", type=float, help="Strength of the safety vector. Required; there is no safe default.")
@click.option(
    "--dare-density", type=float, metavar="D", help="Share of delta entries that DARE keeps (the paper: 0.7)."
)
@click.option(
    "--dare-on",
    type=click.Choice(["tuned", "safety"]),
    default="tuned",
    show_default=True,
    help="The delta that DARE thins out: of the fine-tune (RESTA_d) or the safety vector.",
)
@click.option(
    "--dare-rescale",
    type=click.Choice(["inverse_density", "l1_norm"]),
    default="inverse_density",
    show_default=True,
    help="How DARE scales up what it keeps: as in the paper, or as mergekit does.",
)
@click.option("--tuned-from", metavar="base|aligned|MODEL", help="Model the fine-tune began from [default: base].")
@click.option("--recorded-base", multiple=True, metavar="NAME", help="Confirm the base that an adapter records.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of DARE and of stochastic rounding.")
@click.option(
    "--dtype",
    type=click.Choice(["same", "float64", "float32", "bfloat16", "float16"]),
    default="same",
    show_default=True,
    help="Dtype of the result.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="How values are rounded to the dtype.",
)
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Least share of the parameters that each term must reach [default: 0.95].",
)
@click.option(
    "--allow-config",
    multiple=True,
    metavar="KEY",
    help="Allow configs to differ in this, such as rope_theta.",
)
@click.option("--shard-size", default="5GB", show_default=True, help="Most tensor bytes per file.")
@output(type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output, once the new one is complete.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: processors, at most 8].")
@click.option("--digests", is_flag=True, help="Record the SHA-256 of every input and output file.")
@click.option("--follow-links", is_flag=True, help="Trust links that lead out of a model's directory.")
@click.option("--dry-run", is_flag=True, help="Print the plan and every refusal; write nothing.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def command(ctx: click.Context, /, tuned_or_recipe: str, out: Path, **options: Any) -> None:
    """Add a safety vector to a fine-tuned model.

    \b
    restored = tuned + SCALE * (aligned - base)                           RESTA
    restored = base + dare(tuned - base) + SCALE * (aligned - base)       RESTA_d, with --dare-density

    Models stream from disk to disk: memory stays small whatever their size. A merge that was killed continues
    when the same command is run again. OUT appears when it is complete.
    """
    overwrite, workers, digests = options.pop("overwrite"), options.pop("workers"), options.pop("digests")
    dry_run, quiet, as_json = options.pop("dry_run"), options.pop("quiet"), options.pop("as_json")
    ctx.with_resource(following_links(trusted=options.pop("follow_links")))
    recipe = _recipe(ctx, tuned_or_recipe, options)
    if is_recipe(tuned_or_recipe) and not (quiet or as_json) and (note := mergekit_note(Path(tuned_or_recipe))):
        click.echo(f"note: {printable(note)}", err=True)
    plan = make_plan(recipe)
    if dry_run:
        _dry_run(plan, out, overwrite=overwrite, as_json=as_json)
        return
    if not quiet:
        for caution in plan_warnings(plan):
            click.echo(f"warning: {printable(caution)}", err=True)
    began = time.perf_counter()
    with merge_progress(plan, shown=sys.stderr.isatty() and not (quiet or as_json)) as progress:
        result = carry_out(plan, out, workers=workers, overwrite=overwrite, progress=progress, digests=digests)
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps(_summary(result, seconds)))
    elif not quiet:
        print_result(result, seconds)
        if digests:
            click.echo(digest_line(result))
        click.echo(f"evaluate it:  resta redeval {printable(shlex.quote(str(result.out)))}")


def is_recipe(tuned_or_recipe: str) -> bool:
    """Whether the first argument names a recipe's file."""
    return tuned_or_recipe.endswith((".yaml", ".yml"))


def _recipe(ctx: click.Context, tuned_or_recipe: str, options: dict[str, Any]) -> Recipe:
    if not is_recipe(tuned_or_recipe):
        return to_recipe(_shorthand(tuned_or_recipe, options))
    for name in options:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} changes the result: set it in {tuned_or_recipe}, which then records it")
    return load_recipe(Path(tuned_or_recipe))


def _shorthand(tuned: str, options: dict[str, Any]) -> Shorthand:
    roles = {name: options[name] for name in ("aligned", "base", "unaligned", "tuned_from", "recorded_base")}
    choices = {name: options[name] for name in ("seed", "allow_config")}
    if options["min_coverage"] is not None:
        choices["min_coverage"] = options["min_coverage"]
    output = {name: options[name] for name in ("dtype", "rounding", "shard_size")}
    return Shorthand(
        roles=Roles(tuned=tuned, **roles),
        choices={**choices, "output": {**output, "files_from": "tuned"}},
        **{name: options[name] for name in ("scale", "dare_density", "dare_on", "dare_rescale")},
    )


def _dry_run(plan: Plan, out: Path, *, overwrite: bool, as_json: bool) -> None:
    refusals = []
    free = 0
    try:
        check_place(out.absolute(), input_folders(plan))
        check_vacant(out.absolute(), overwrite=overwrite)
    except RequestError as error:
        refusals.append(str(error))
    try:
        free = check_space(out.absolute(), plan.bytes_written)
    except RequestError as error:
        refusals.append(str(error))
    if as_json:
        facts: dict[str, Any] = {"bytes_read": plan.bytes_read, "bytes_written": plan.bytes_written, "bytes_free": free}
        facts |= {"warnings": plan_warnings(plan)}
        facts |= {"coverage": [each.share for each in plan.coverage]}
        click.echo(json.dumps({"recipe": plan.recipe.model_dump(mode="json"), **facts, "refusals": refusals}))
    else:
        print_plan(plan, free)
        click.echo(printable_lines(dump_recipe(plan.recipe)), nl=False)
    if refusals:
        raise RequestError("; ".join(refusals))


def _summary(result: Result, seconds: float) -> dict[str, Any]:
    change, taken = total_change(result.tensors.values()), result.digests
    return {
        "out": str(result.out),
        "equation": result.plan.recipe.equation,
        "recipe_digest": result.plan.recipe.digest,
        "tensors": len(result.tensors),
        "bytes_written": result.plan.bytes_written,
        "seconds": round(seconds, 3),
        "change": asdict(change),
        "digests": {"files": len(taken.sha256), "core_s": taken.core_s, "after_s": taken.after_s} if taken else None,
        "left_out": result.plan.left_out,
        "warning": change_warning(change, result.plan.recipe.output.rounding),
        "warnings": result_warnings(result.plan, result.tensors),
        "terms": describe_terms(result.plan, result.tensors),
        "safety": asdict(judge(result.plan, result.tensors)),
    }
