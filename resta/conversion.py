"""A model's PyTorch files as safetensors: a merge that adds nothing to what it starts from.

So it has the merge's journal, resume, digests, manifest and rename, and an audit makes the same plan again. Each tensor
keeps its dtype and its bytes, and the config is copied as it is, so that transformers reads the result as it read the
files. One tensor may be left out: an output layer that the config ties to the embeddings and that is stored as the
same bytes, which safetensors have no way to share.
"""

from __future__ import annotations

from pathlib import Path

from resta.auxiliary import read_auxiliary_files
from resta.checkpoint import SINGLE, Operand, Weights, read_weights
from resta.engine import Progress, Result, carry_out
from resta.errors import RequestError
from resta.header import Spec
from resta.hub import INDEX, locate
from resta.plan import Plan, Slot, Step, place
from resta.pytorch import PYTORCH
from resta.recipe import Recipe, parse_size
from resta.strict import check
from resta.tied import shared_output

MODEL = "model"  # what the recipe of a conversion calls it
RESERVED = "__metadata__"  # the key of a safetensors header that is no tensor's


def convert(
    model: str | Path,
    out: str | Path,
    *,
    shard_size: str | int = "5GB",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    digests: bool = False,
) -> Result:
    """Write the directory `out`: a model's PyTorch files, `pytorch_model*.bin`, as safetensors. Nothing in them is run.

        resta.convert("vicuna", "vicuna-safetensors")

    Args:
        model: a directory, or `org/name@revision` on the Hub, from which this alone fetches PyTorch files.
        out: the directory to be; it appears when it is complete. A killed conversion goes on when called again.
        shard_size: most tensor bytes per file.
        workers: threads; by default the processors that this process may use, at most 8.
        overwrite: replace an earlier output of resta.
        progress: called from the workers, one at a time.
        digests: record the SHA-256 of every input and output file; see `resta.merge`.

    Raises:
        RequestError: a file is no zip archive of torch.save, holds anything but plain tensors, or contradicts itself;
            or the output may not be written. Nothing was.
        RestaError: reading or writing failed; the work done is kept for the next attempt.
    """
    plan = plan_conversion(conversion_recipe(str(model), shard_size))
    return carry_out(plan, Path(out), workers=workers, overwrite=overwrite, progress=progress, digests=digests)


def conversion_recipe(model: str, shard_size: str | int = "5GB") -> Recipe:
    """Return the recipe of a conversion. Raises RequestError: the size is none."""
    try:
        size = parse_size(shard_size)
    except ValueError as error:
        raise RequestError(f"--shard-size: {error}") from error
    if not isinstance(size, int) or size <= 0:
        raise RequestError(f"--shard-size: expected a size like 5GB, found {shard_size!r}")
    return check(Recipe, {"models": {MODEL: model}, "start": MODEL, "terms": [], "output": {"shard_size": size}})


def plan_conversion(recipe: Recipe) -> Plan:
    """Return the plan of a conversion. Raises RequestError: see `convert`."""
    located = locate(recipe.models[recipe.start].source, pytorch=True)
    there = [name for name in (SINGLE, INDEX) if (located.folder / name).exists()]
    if there:
        raise RequestError(f"{located.folder}: has {there[0]}, which every command reads: there is nothing to convert")
    weights = read_weights(located, format=PYTORCH)
    _check_names(weights)
    shared = shared_output(weights)
    drafts = [
        _draft(name, operand, recipe.start)
        for name, operand in weights.tensors.items()
        if name not in (shared or ())[1:]
    ]
    headers, steps = place(drafts, recipe.output.shard_size)
    files, left_out = read_auxiliary_files(weights)
    left_out = tuple(name for name in left_out if located.folder / name not in weights.files)
    if shared:
        left_out = (f"{shared[1]} (tied: the bytes of {shared[0]})", *left_out)
    return Plan(
        recipe=recipe,
        weights={recipe.start: weights},
        steps=steps,
        coverage=(),
        headers=headers,
        auxiliary_files=files,
        left_out=left_out,
    )


def _draft(name: str, operand: Operand, model: str) -> Step:
    """Return a tensor's step before it has its place: a copy, whatever its values are."""
    spec = Spec(dtype=operand.dtype, shape=operand.shape, start=0, nbytes=0)
    return Step(
        name=name,
        operands=(operand,),
        owners=(model,),
        terms=(),
        slot=Slot(file="", spec=spec),
        merged_count=0,
        rounding_key=None,
        allow_nonfinite=True,
    )


def _check_names(weights: Weights) -> None:
    """Refuse names of tensors that a safetensors header cannot hold. Raises RequestError."""
    folder = weights.located.folder
    for name in weights.tensors:
        try:
            name.encode("utf-8")
        except UnicodeError:
            raise RequestError(f"{folder}: the tensor's name {name!r} is not UTF-8") from None
        if name == RESERVED:
            raise RequestError(f"{folder}: a tensor is called {name}, a name that safetensors keep for facts")
    if not weights.tensors:
        raise RequestError(f"{folder}: its PyTorch files hold no tensor")
