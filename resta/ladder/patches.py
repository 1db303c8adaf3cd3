"""The last rungs: a patch is learned, and its candidates are measured by the sweep like all others.

    R/rungs/patch/patch/               the adapter, as `resta patch` writes it, with the teachers' answers beside it
    R/rungs/patch/scales/              a sweep over how much of it is added
    R/rungs/patched-weights/start/     the best weight arithmetic, written, on which another patch is learned

It learns from the calibrating questions alone, and `resta.patch` refuses one that it shares with the others. trl and
peft are met here, and only where a patch is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from resta.engine import merge
from resta.errors import RequestError
from resta.ladder.questions import CALIBRATING, Part, keep
from resta.ladder.rungs import PATCH, PATCHED_WEIGHTS, Attempt, Ladder, attempt_of, sweep_rung
from resta.recipe import Model
from resta.redeval.models import LocalSpec
from resta.redeval.progress import RunOptions, Tally
from resta.sweep import Grid

SCALES = (0.5, 0.75, 1.0)  # of a patch on tuned: less of it may do


def wants_patch(ladder: Ladder) -> bool:
    """Whether a patch may be learned: there are task prompts, and its rungs are not left out."""
    only = ladder.choices.only
    return ladder.task_prompts is not None and (not only or bool({PATCH, PATCHED_WEIGHTS} & set(only)))


def check_patch(ladder: Ladder) -> None:
    """Refuse prompts and models that a patch cannot be learned from, before anything is loaded. Raises RequestError."""
    try:
        from resta.patch.learn import beside
        from resta.patch.prompts import Drawing, draw
        from resta.patch.request import Request, check
        from resta.patch.teachers import student_of
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise RequestError(f"a patch needs {library}: pip install 'resta[sft]', or leave out --task-prompts") from None
    assert ladder.task_prompts is not None
    with TemporaryDirectory() as folder:
        parts = {name: replace(part, folder=Path(folder) / name) for name, part in ladder.parts.items()}
        keep(Path(folder), parts)
        harmful, apart = _files(parts)
        prompts = draw(ladder.task_prompts, harmful, apart, ladder.choices.patch.get("drawing", Drawing()))
        tuned, aligned = (_spec(ladder, role) for role in ("tuned", "aligned"))
        out = Path(folder) / "patch"
        check(
            Request(tuned=tuned, aligned=aligned, prompts=prompts, out=out, lessons=beside(out)),
            student_of(tuned),
        )


def try_patch(ladder: Ladder, options: RunOptions) -> Attempt:
    """Learn a patch on tuned and find how much of it is enough. Raises UnansweredError, RestaError."""
    folder = ladder.records / "rungs" / PATCH
    patch = learn(ladder, _spec(ladder, "tuned"), folder / "patch", options)
    on = ladder.family.models["tuned"].on or "tuned"  # of an adapter, the patch is one with it, on its base
    family = replace(ladder.family, models={**ladder.family.models, "patch": Model(source=str(patch), on=on)})
    outcome = sweep_rung(ladder, family, Grid(scales=SCALES, methods=("patch",)), folder / "scales", options)
    return attempt_of(PATCH, outcome, family)


def try_patched_weights(ladder: Ladder, best: Attempt, options: RunOptions) -> Attempt:
    """Learn a patch on the best weight arithmetic, and add it. Raises UnansweredError, RestaError."""
    assert best.recipe is not None
    folder = ladder.records / "rungs" / PATCHED_WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    start = merge(best.recipe, folder / "start").out
    patch = learn(ladder, replace(_spec(ladder, "tuned"), model=str(start), base=None), folder / "patch", options)
    models = {
        **ladder.family.models,
        "weights": Model(source=str(start)),
        "patch": Model(source=str(patch), on="weights"),
    }
    family = replace(ladder.family, models=models, start="weights")
    outcome = sweep_rung(ladder, family, ONCE, folder / "scales", options, search=False)
    return attempt_of(PATCHED_WEIGHTS, outcome, family)


ONCE = Grid(scales=(1.0,), methods=("patch",), interpolation_scales=(), random_scales=())


def learn(ladder: Ladder, start: LocalSpec, out: Path, options: RunOptions) -> Path:
    """Learn a patch on a model, or find it; a killed one is gone on with. Raises RequestError, RestaError."""
    if out.is_dir():  # it appears when it is whole
        return out
    from resta import patch

    assert ladder.task_prompts is not None
    harmful, apart = _files(ladder.parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally(phase="learning", total=0)

    def progress(_: object) -> None:
        tally.done += 1
        options.watch(tally)

    device = start.device if start.device in ("cpu", "cuda") else "auto"
    patch.run(
        tuned=start,
        aligned=_spec(ladder, "aligned"),
        task_prompts=ladder.task_prompts,
        out=out,
        harmful=harmful,
        apart=apart,
        chat_template=start.chat_template,
        device=device,  # type: ignore[arg-type]  # one of three
        progress=progress,
        note=options.note,
        **ladder.choices.patch,
    )
    return out


def _spec(ladder: Ladder, role: str) -> LocalSpec:
    spec = ladder.target(role).local
    assert spec is not None
    return spec


def _files(parts: Mapping[str, Part]) -> tuple[list[str], list[str]]:
    """Return the banks to learn from, and those that must share nothing with them."""

    def files(names: Iterable[str]) -> list[str]:
        return [str(parts[name].path(bank)) for name in names for bank in parts[name].banks]

    return files([CALIBRATING]), files(name for name in parts if name != CALIBRATING)
