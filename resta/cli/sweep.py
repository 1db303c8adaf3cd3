"""`resta sweep`: try scales, densities and methods on one loaded model, and choose by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resta.cli.options import CHAT_TEMPLATE, HOW, JUDGES, QUESTIONS, SERVERS, run_options, together
from resta.cli.output import output
from resta.cli.verify import POLICY, UTILITY, exam_of
from resta.errors import NO, RequestError

if TYPE_CHECKING:
    from resta.sweep.candidates import Family, Grid

EPILOG = """\b
Examples:
  resta sweep ./tuned --aligned ./aligned --base ./base --scale 0:1:0.1 -o sweep
  resta sweep ./tuned --aligned ./aligned --base ./base --scale 0.3,0.5 --method resta,interpolation -o sweep
  resta sweep ./tuned --aligned ./aligned --base ./base --scale 0:1:0.1 --group attention,mlp -o sweep
  resta sweep recipe.yaml --scale 0:1:0.25 --bank dangerousqa --limit 50 --policy policy.yaml -o sweep
"""

MODELS = together(
    click.argument("tuned_or_recipe", metavar="TUNED|RECIPE.yaml"),
    click.option("--aligned", metavar="MODEL", help="Safety-aligned model: directory, adapter or org/name@revision."),
    click.option("--base", metavar="MODEL", help="What is subtracted from it: the model before alignment."),
    click.option("--unaligned", metavar="MODEL", help="Subtracted instead of --base: a deliberately unaligned twin."),
    click.option("--tuned-from", metavar="base|aligned|MODEL", help="Model the fine-tune began from [default: base]."),
    click.option("--recorded-base", multiple=True, metavar="NAME", help="Confirm the base that an adapter records."),
    click.option(
        "--dare-rescale",
        type=click.Choice(["inverse_density", "l1_norm"]),
        default="inverse_density",
        show_default=True,
        help="How DARE scales up what it keeps.",
    ),
    click.option(
        "--output-dtype",
        type=click.Choice(["same", "float64", "float32", "bfloat16", "float16"]),
        default="same",
        show_default=True,
        help="Dtype that candidates are rounded to, as merges would be.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        default="nearest",
        show_default=True,
        help="How values are rounded to that dtype.",
    ),
    click.option(
        "--min-coverage",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Least share of the parameters that each term must reach [default: 0.95].",
    ),
    click.option(
        "--allow-config", multiple=True, metavar="KEY", help="Allow configs to differ in this, such as rope_theta."
    ),
)

GRID = together(
    click.option("--scale", required=True, metavar="RANGE", help="FROM:TO:STEP, TO included, or a list: 0.2,0.5."),
    click.option("--density", metavar="RANGE", help="Share of entries that DARE keeps, for resta_d (the paper: 0.7)."),
    click.option(
        "--method",
        metavar="NAMES",
        help="A list of resta, resta_d, interpolation, both. [default: resta, or the recipe's own]",
    ),
    click.option(
        "--group",
        "groups",
        metavar="NAMES",
        help="Also try scales of their own for these groups of tensors: a list of attention, mlp, embeddings.",
    ),
    click.option(
        "--search/--grid",
        "search",
        default=True,
        show_default=True,
        help="Bisect the scales, asking more questions only where it is close; or ask every candidate everything.",
    ),
    click.option(
        "--fresh",
        type=click.IntRange(min=1),
        metavar="N",
        help="Harmful questions that `resta verify` will ask of the choice. [default: as many as it takes]",
    ),
    click.option(
        "--interpolation-scale",
        "--wise-scale",
        "interpolation_scale",
        metavar="RANGE",
        help="Scales of interpolation, which is always run at the choice's norm. [default with --grid: 0.1:0.9:0.1]",
    ),
    click.option(
        "--random-scale",
        metavar="RANGE",
        help="Scales of the random control, which is always run at the choice's norm. [default with --grid: --scale]",
    ),
    click.option(
        "--choose",
        "rule",
        type=click.Choice(["smallest-passing", "best-on-front"]),
        default="smallest-passing",
        show_default=True,
        help="Of those that would pass on fresh questions: the smallest change, or the least ASR + over-refusal + "
        "utility lost.",
    ),
)

PLACE = together(
    CHAT_TEMPLATE,
    click.option("--ray", "ray_address", metavar="local|auto|ADDRESS", help="Measure candidates on a Ray cluster."),
    click.option("--ray-workers", type=click.IntRange(min=1), help="Models loaded at once. [default: one per GPU]"),
    output(type=click.Path(file_okay=False, path_type=Path), required=True, help="The sweep's folder."),
)


@click.command(epilog=EPILOG)
@MODELS
@GRID
@POLICY
@QUESTIONS
@UTILITY
@JUDGES
@HOW
@SERVERS
@PLACE
@click.pass_context
def command(ctx: click.Context, /, tuned_or_recipe: str, out: Path, **given: Any) -> None:
    """Find the scale (and density) that restores safety at the least cost.

    \b
    resta     tuned + SCALE * (aligned - base)
    resta_d   base + dare(tuned - base, DENSITY) + SCALE * (aligned - base)
    interpolation   tuned + SCALE * (aligned - tuned)
    both      tuned + SCALE * (aligned - base) + SCALE * (aligned - tuned)

    Each candidate is computed from the checkpoints into one loaded model and asked more and more questions until it is
    clear whether the scale is too small. The smallest that would pass the policy on fresh questions with a probability
    of 0.9 or more is chosen, by a smooth curve through all scales. Interpolation and a random vector of the same norm
    are run beside it. Writes a table, a page, a plot and OUT/chosen.yaml for `resta merge` and `resta verify --from`.
    The same command continues where it stopped; more scales or methods may be added. Exit code 1: no candidate would
    pass.
    """
    from resta.sweep.conduct import run
    from resta.sweep.report import print_outcome

    request = _request(ctx, tuned_or_recipe, given)
    with run_options(given) as options:
        outcome = run(out=out, options=options, **request)
    print_outcome(outcome, out)
    if outcome.choice.name is None:
        ctx.exit(NO)


# -- from options to a sweep ---------------------------------------------------------------------------------


def _request(ctx: click.Context, tuned_or_recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the sweep that the options ask for, as `resta.sweep.run` takes it. Raises RequestError."""
    from functools import partial

    from resta.sweep.measure import in_this_process
    from resta.sweep.ray import on_cluster

    is_recipe = tuned_or_recipe.endswith((".yaml", ".yml"))
    family = _own_family(ctx, Path(tuned_or_recipe)) if is_recipe else _family(tuned_or_recipe, given)
    address, workers = given["ray_address"], given["ray_workers"]
    return {
        "family": family,
        "grid": _grid(given, is_recipe=is_recipe),
        "exam": exam_of({**given, "tokenizer": None}),
        "policy": given["policy_path"],
        "rule": given["rule"],
        "search": given["search"],
        "fresh": given["fresh"],
        "settings": {
            "device": given["device"],
            "dtype": given["dtype"],
            "chat_template": given["chat_template"],
            "batch_rows": given["batch_size"],
        },
        "verify": _verify_options(ctx, family),
        "place": in_this_process if address is None else partial(on_cluster, address=address, workers=workers),
    }


def _grid(given: Mapping[str, Any], *, is_recipe: bool) -> Grid:
    from resta.sweep.candidates import CHOICES, Grid, check_density, parse_numbers

    named = _names(given["method"] or ("recipe" if is_recipe else "resta"))
    names = tuple("interpolation" if name == "wise" else name for name in named)  # what it was called
    known = (*CHOICES, "recipe") if is_recipe else CHOICES
    for name in names:
        if name not in known or names.count(name) > 1:
            raise RequestError(f"--method {given['method']}: expected some of {', '.join(known)}, each once")
    densities = parse_numbers(given["density"], "--density") if given["density"] else ()
    check_density(densities)
    towards, random = given["interpolation_scale"], given["random_scale"]
    return Grid(
        scales=parse_numbers(given["scale"], "--scale"),
        methods=names,  # type: ignore[arg-type]  # checked above
        densities=densities,
        interpolation_scales=parse_numbers(towards, "--interpolation-scale") if towards else None,
        random_scales=parse_numbers(random, "--random-scale") if random else None,
    )


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _family(tuned: str, given: Mapping[str, Any]) -> Family:
    """Return what the flags name."""
    from resta.recipe import OutputChoices
    from resta.sweep.conduct import make_family

    if given["aligned"] is None:
        raise RequestError("give --aligned: the model that safety comes from, and that all others are compared with")
    return make_family(
        tuned=tuned,
        **{role: given[role] for role in ("aligned", "base", "unaligned", "tuned_from", "recorded_base")},
        output=OutputChoices(dtype=given["output_dtype"], rounding=given["rounding"], files_from="tuned"),
        rescale=given["dare_rescale"],
        groups=_names(given["groups"]),
        **_choices(given),
    )


def _choices(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the flags say of every candidate's recipe, by the names that it has there."""
    least = {} if given["min_coverage"] is None else {"min_coverage": given["min_coverage"]}
    return {"seed": given["seed"], "allow_config": given["allow_config"], **least}


def _own_family(ctx: click.Context, path: Path) -> Family:
    """Return what the user's recipe names; nothing that it says may be said by a flag, too."""
    from resta.recipe import load_recipe
    from resta.sweep.candidates import family_of

    for name in (
        *("aligned", "base", "unaligned", "tuned_from", "recorded_base"),
        *("dare_rescale", "output_dtype", "rounding", "min_coverage", "allow_config"),
    ):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise RequestError(f"--{name.replace('_', '-')} changes the candidates: set it in {path}")
    return replace(family_of(load_recipe(path)), groups=_names(ctx.params["groups"]))


def _verify_options(ctx: click.Context, family: Family) -> dict[str, Any]:
    """Return the options of `resta verify` that ask as this sweep did, by parameter; paths are absolute."""
    from resta.cli.verify import run
    from resta.sweep.settings import models_of

    own: dict[str, Any] = models_of(family)
    # --base is said of the safety vector here, and of adapters there.
    known = {parameter.name for parameter in run.params} - {"restored", "out", "include_text", "card", "base", *own}
    for parameter in ctx.command.params:
        name, value = parameter.name, ctx.params.get(parameter.name or "")
        given = ctx.get_parameter_source(name or "") is not click.core.ParameterSource.DEFAULT
        if name in known and given:
            own[name] = [_plain(each) for each in value] if isinstance(value, tuple) else _plain(value)
    return own


def _plain(value: Any) -> Any:
    """Return an option's value as YAML has it; what names a file or folder that is here is made absolute."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).exists()):
        return str(Path(value).absolute())
    return value
