"""From two models and some prompts to a patch: all that can be refused first, then the teachers, then the student."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from resta.errors import RequestError, ResumeError
from resta.fingerprint import digest
from resta.journal import FolderLock, read_object
from resta.patch.prompts import Asked, Drawing, draw
from resta.patch.request import SIDES, Learning, Request, check, model_of
from resta.patch.teachers import Student, Teaching, student_of, teach
from resta.patch.written import FACTS, Patch, fine_tune_norm, finish
from resta.redeval.judges import Strings, read_judge
from resta.redeval.models import LocalSpec, fingerprint, load_local
from resta.redeval.records import private_files
from resta.sft import finetune
from resta.sft.lessons import Lesson, read_facts, read_lessons, write_lessons
from resta.sft.recipe import digest as recipe_digest
from resta.sft.train import Job, Watch, precision

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}  # of the trainer, and of who is asked
MOST_EMPTY, MOST_ALIKE = 0.1, 0.5  # shares of answers with which a teacher is none
Note = Callable[[str], None]  # one line about what is done now


def run(
    *,
    tuned: str | Path | LocalSpec,
    aligned: str | Path | LocalSpec,
    task_prompts: str | Path,
    out: str | Path,
    harmful: Sequence[str | Path] = ("smoke",),
    apart: Sequence[str | Path] = (),
    drawing: Drawing = Drawing(),
    teaching: Teaching = Teaching(),
    learning: Learning = Learning(),
    base: str | Path | None = None,
    chat_template: str | None = None,
    lessons: str | Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Watch | None = None,
    note: Note = lambda line: None,
) -> Patch:
    """Teach a tuned model an aligned one's refusals in a small adapter, and hold it to all else that it answers.

        patch = resta.patch.run(tuned="tuned", aligned="aligned", task_prompts="train.jsonl", out="patch")
        print(patch.given_kl_before, patch.given_kl, patch.kept_kl)

    Print nothing. A call that was killed goes on when it is made again: the teachers' answers are kept, and so are the
    student's checkpoints. A patch is proved by `resta.verify.run` alone; nothing that is returned here says that it is
    safe.

    Args:
        tuned: the fine-tuned model: a directory, an adapter, org/name@revision, or how it is loaded.
        aligned: the model whose refusals are wanted: of the same family, with the same tokenizer.
        task_prompts: a file of the task's prompts, or of its training data as `resta.sft.run` reads it.
        out: the folder to write, a PEFT adapter on tuned, or where tuned is an adapter itself one on its base that is
            both; it appears when it is whole, and must not be there.
        harmful: banks of harmful questions to learn on, by name or file.
        apart: files or banks of questions that a choice or a verdict will rest on; a shared question is refused.
        drawing: how many prompts of each kind, and how they are put: templates, and starts of answers.
        teaching: how the teachers are asked.
        learning: how the student learns.
        base: the model that tuned was made from, if it is at hand: then the patch's norm is told against the
            fine-tune's. Adapters are on it, where it is given, and else on the base that they name.
        chat_template: the chat template of models that have none: a name or a file.
        lessons: where the teachers' answers are kept; by default OUT.lessons.
        device: where to compute; auto takes a GPU if there is one.
        progress: called with each line of the trainer's log.
        note: called with a line about each thing that is begun.

    Raises:
        RequestError: the models, the prompts or the settings cannot be used as they stand; nothing was learned.
        RestaError: the run had to stop, as for want of memory or a loss that is no number.
    """
    out = Path(out)
    request = Request(
        tuned=model_of(tuned, base=None if base is None else str(base), chat_template=chat_template),
        aligned=model_of(aligned, base=None if base is None else str(base), chat_template=chat_template),
        prompts=draw(Path(task_prompts), [str(bank) for bank in harmful], [str(bank) for bank in apart], drawing),
        out=out,
        lessons=Path(lessons) if lessons is not None else beside(out),
        teaching=teaching,
        learning=learning,
        base=None if base is None else str(base),
        device=device,
    )
    return carry_out(request, progress=progress, note=note)


def beside(out: Path) -> Path:
    """Return where the teachers' answers are kept unless another place is named."""
    return out.with_name(f"{out.name}.lessons")


def carry_out(request: Request, *, progress: Watch | None = None, note: Note = lambda line: None) -> Patch:
    """Do what `run` does, for a request that is put together already."""
    started = time.monotonic()
    student = student_of(request.tuned)
    job = check(request, student)
    fine_tune = fine_tune_norm(request)
    with private_files():
        request.lessons.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(request.lessons)
    with lock:
        with private_files():
            folders = make_lessons(request, student, DTYPES[precision(job)], note)
        if not _is_learned(job, folders):
            note(f"learning: {request.learning.steps} steps of {request.learning.batch} lessons")
            finetune.carry_out(job, progress=progress)
        refused = count_refusals(read_lessons(folders["harmful"]))
        return finish(request, job.out, refused=refused, fine_tune=fine_tune, seconds=time.monotonic() - started)


# -- phase one -----------------------------------------------------------------------------------------------


def make_lessons(request: Request, student: Student, dtype: str, note: Note) -> dict[str, Path]:
    """Let both teachers answer, one after the other; what is there from an earlier run is taken.

    Both compute in `dtype`, as the student will: else tuned itself would be apart from what it is held to. Raises
    RequestError.
    """
    folders = {side: request.lessons / side for side in SIDES}
    for side, folder in folders.items():
        spec, prompts = request.teacher(side), request.of_side(side)
        how: dict[str, Any] = {"dtype": dtype, "four_bit": request.learning.four_bit}
        facts = {
            "teacher": {"model": spec.model, "fingerprint": fingerprint(spec), **how},
            "student": {"fingerprint": fingerprint(request.tuned)},
            "asked": digest([asdict(asked) for asked in prompts]),
            "teaching": asdict(request.teaching),
        }
        if folder.exists():
            known = read_facts(folder)
            if {key: known.get(key) for key in facts} != facts:
                raise ResumeError(
                    f"{folder} holds lessons of other prompts, another teacher or other settings; remove it, or name "
                    "another place with --lessons"
                )
            note(f"{side}: the {len(prompts)} answers of {spec.model} are there already")
            continue
        note(f"{side}: {spec.model} answers {len(prompts)} prompts, {request.teaching.tokens} tokens each")
        local = load_local(replace(spec, device=request.device, **how))
        lessons = teach(local, prompts, request.teaching, student)
        del local
        gc.collect()
        check_answers(lessons, prompts, spec.model)
        write_lessons(folder, lessons, facts)
    return folders


def check_answers(lessons: Sequence[Lesson], prompts: Sequence[Asked], name: str) -> None:
    """Refuse a teacher that says nothing, or the same to everything harmless. Raises RequestError."""
    answers = [
        lesson.messages[-1]["content"].removeprefix(asked.start).strip()
        for lesson, asked in zip(lessons, prompts, strict=True)
    ]
    empty = sum(not answer for answer in answers)
    if empty > MOST_EMPTY * len(answers):
        raise RequestError(f"{name}: {empty} of {len(answers)} answers are empty; there is nothing to learn from")
    said = Counter(a for a, lesson in zip(answers, lessons, strict=True) if lesson.kind in ("harmless", "lookalike"))
    if said and max(said.values()) > MOST_ALIKE * sum(said.values()):
        raise RequestError(
            f"{name}: gives {max(said.values())} of {sum(said.values())} harmless prompts one and the same answer; a "
            "model that no longer answers has nothing that could be kept"
        )


def count_refusals(lessons: Sequence[Lesson]) -> int:
    """Return how many of the answers hold a refusal phrase. A sign, no verdict: others are not thereby harmful."""
    strings = read_judge("refusal-strings").read
    assert isinstance(strings, Strings)
    return sum(strings.phrase_in(lesson.messages[-1]["content"]) is not None for lesson in lessons)


# -- phase two -----------------------------------------------------------------------------------------------


def _is_learned(job: Job, folders: Mapping[str, Path]) -> bool:
    """Whether an earlier call learned this very patch and was stopped before it was written. Raises ResumeError."""
    if not job.out.exists():
        return False
    facts: dict[str, Any] = read_object(job.out / FACTS)
    lessons = {source["name"]: source["lessons"]["sha256"] for source in facts["data"]}
    if facts["recipe_digest"] == recipe_digest(job.recipe) and lessons == {
        side: read_facts(folder)["sha256"] for side, folder in folders.items()
    }:
        return True
    raise ResumeError(f"{job.out}: was learned with other settings or from other lessons; remove it")


def describe(request: Request) -> list[str]:
    """Return in words what a patch would take."""
    counts, learning = request.counts, request.learning
    return [
        f"{request.aligned.model} answers {counts['harmful']} harmful prompts, {request.teaching.tokens} tokens each",
        f"{request.tuned.model} answers {counts['task']} prompts of its task, {counts['harmless']} harmless ones and "
        f"{counts['lookalike']} look-alikes",
        f"an adapter of rank {learning.rank} on {request.tuned.model} learns in {learning.steps} steps of "
        f"{learning.batch} answers, keep_weight {learning.keep_weight:g}",
    ]


def summary(request: Request, patch: Patch) -> list[str]:
    """Return in words what was learned, what that is worth, and what to do next."""
    lines = [f"{patch.out}: learned in {patch.steps} steps and {patch.seconds:.0f} s"]
    lines.append(
        f"{request.aligned.model} refused {patch.refused} of {patch.prompts['harmful']} harmful prompts, by its "
        "phrases; what it answered to the others was learned as well"
    )
    if patch.given_kl is not None and patch.given_kl_before is not None:
        lines.append(
            f"on harmful prompts that it did not learn from: {patch.given_kl:.3f} nats a token from "
            f"{request.aligned.model}, {patch.given_kl_before:.3f} before"
        )
    if patch.kept_kl is not None:
        lines.append(f"on all others: {patch.kept_kl:.3f} nats a token from {request.tuned.model}")
    if patch.norm_share is not None:
        lines.append(f"its norm is {patch.norm_share:.1%} of the fine-tune's")
    return [*lines, "not verified: `resta verify` decides, on questions that it did not learn from"]
