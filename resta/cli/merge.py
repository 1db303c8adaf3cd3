"""`resta merge`: flags or a recipe file in, one library call, a summary out."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from resta.adapter import base_name, is_adapter
from resta.cautions import cautions, name_cautions
from resta.checkpoint import following_links
from resta.cli.output import output
from resta.engine import Result, carry_out, input_folders
from resta.errors import RecipeError, RequestError
from resta.forecast import forecast_warnings
from resta.hub import locate
from resta.manifest import change_warning, describe_terms, judge, result_warnings, total_change
from resta.output import check_place, check_space, check_vacant
from resta.page import printable, printable_lines
from resta.plan import Plan, make_plan
from resta.recipe import SCALE_ADVICE, Recipe, dump_recipe, load_recipe, make_recipe, mergekit_note
from resta.show import digest_line, merge_progress, print_plan, print_result

EPILOG = """\b
Examples:
  resta merge ./tuned --aligned org/starling --base org/vicuna --scale 0.5 -o ./restored
  resta merge ./tuned --aligned ./starling --base ./vicuna --scale 0.5 --dare-density 0.7 -o ./restored
  resta merge ./lora --aligned ./starling --base ./vicuna --tuned-from base --scale 0.5 -o ./restored
  resta merge recipe.yaml -o ./restored --dry-run
"""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The everyday request in words of the command line; `to_recipe` says the same as a recipe."""

    tuned: str
    aligned: str | None
    base: str | None
    unaligned: str | None
    scale: float | None
    dare_density: float | None
    dare_on: str
    dare_rescale: str
    tuned_from: str | None
    recorded_base: tuple[str, ...]
    seed: int
    dtype: str
    rounding: str
    shard_size: str
    min_coverage: float | None = None
    allow_config: tuple[str, ...] = ()


def to_recipe(flags: Flags) -> Recipe:
    """Build the recipe that the flags ask for.

    RESTA: tuned + scale (aligned - base). With DARE on the fine-tuning delta (RESTA_d), the start is the model
    that the fine-tune began from, and `tuned - origin` is a term of its own.

    Raises:
        RequestError: a flag is missing, or two do not fit together.
    """
    if flags.scale is None:
        raise RecipeError(f"--scale is required: {SCALE_ADVICE}")
    if flags.aligned is None or not (flags.base or flags.unaligned):
        raise RecipeError("say --aligned, and --base or --unaligned: the safety vector is their difference")
    subtrahend = "unaligned" if flags.unaligned else "base"
    vector: dict[str, Any] = {"name": "safety", "delta": f"aligned - {subtrahend}", "scale": flags.scale}
    dare = None
    if flags.dare_density is not None:
        dare = {"density": flags.dare_density, "rescale": flags.dare_rescale}
    models = models_of(flags)
    terms = [vector]
    start = "tuned"
    if dare and flags.dare_on == "safety":
        vector["sparsify"] = dare
    elif dare:
        start = _origin(flags, models)
        terms = [{"name": "finetune", "delta": f"tuned - {start}", "scale": 1.0, "sparsify": dare}, vector]
    elif flags.tuned_from and "on" not in models["tuned"]:
        raise RecipeError("--tuned-from is only used for an adapter, or with --dare-density and --dare-on tuned")
    used = {start, "aligned", subtrahend, "tuned"} | {model["on"] for model in models.values() if "on" in model}
    return make_recipe(
        {
            "models": {name: model for name, model in models.items() if name in used},
            "start": start,
            "terms": terms,
            "seed": flags.seed,
            "allow_config": list(flags.allow_config),
            **({} if flags.min_coverage is None else {"min_coverage": flags.min_coverage}),
            "output": {
                "dtype": flags.dtype,
                "rounding": flags.rounding,
                "shard_size": flags.shard_size,
                "files_from": "tuned",
            },
        }
    )


def models_of(flags: Flags) -> dict[str, dict[str, Any]]:
    """Return the models that the flags name, adapters on their bases. Raises RecipeError."""
    named = {"tuned": flags.tuned, "aligned": flags.aligned, "base": flags.base, "unaligned": flags.unaligned}
    if flags.tuned_from not in (None, "base", "aligned"):
        named["origin"] = flags.tuned_from
    models: dict[str, dict[str, Any]] = {
        name: {"source": _absolute(source)} for name, source in named.items() if source
    }
    confirmed = set(flags.recorded_base)
    for name, model in models.items():
        folder = locate(model["source"]).folder
        if not is_adapter(folder):
            continue
        if name not in ("tuned", "aligned"):
            raise RecipeError(f"--{name} is an adapter; write a recipe that says which model it is on")
        model["on"] = _origin(flags, models) if name == "tuned" else "base"
        if model["on"] not in models:
            raise RecipeError(f"--{name} is an adapter; say --{model['on']}, the model that it is on")
        if base_name(folder) in confirmed:
            model["recorded_base"] = base_name(folder)
    unused = confirmed - {model.get("recorded_base") for model in models.values()}
    if unused:
        raise RecipeError(f"--recorded-base {sorted(unused)[0]!r}: no adapter given records that base")
    return models


def _origin(flags: Flags, models: dict[str, dict[str, Any]]) -> str:
    """Name the model that the fine-tune began from."""
    name = flags.tuned_from if flags.tuned_from in ("base", "aligned") else "origin" if flags.tuned_from else "base"
    if name not in models:
        raise RecipeError(f"the model that the fine-tune began from is needed: say --{name} or --tuned-from")
    return name


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


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
    help="How what DARE keeps is enlarged: as in the paper, or as mergekit does.",
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
    help="To the dtype.",
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
@output(type=click.Path(path_type=Path), required=True, help="Directory to be made.")
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

    Models stream from disk to disk: memory stays small whatever their size. A merge that was killed goes on where
    it was when the same command is run again. OUT appears when it is complete.
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
        for caution in (*cautions(plan), *name_cautions(plan), *forecast_warnings(plan)):
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
        return to_recipe(Flags(tuned=tuned_or_recipe, **options))
    for name in options:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            flag = "--" + name.replace("_", "-")
            raise RecipeError(f"{flag} changes the result: say it in {tuned_or_recipe}, which then records it")
    return load_recipe(Path(tuned_or_recipe))


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
        facts |= {"warnings": [*cautions(plan), *name_cautions(plan), *forecast_warnings(plan)]}
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
