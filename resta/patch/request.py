"""What a patch is made from, checked before a model is loaded, and as the recipe that the trainer takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resta import strict
from resta.errors import RequestError, ResumeError
from resta.patch.prompts import KINDS, Asked
from resta.patch.teachers import Student, Teaching
from resta.quantized import nf4
from resta.redeval.models import LocalSpec, check_contexts, files_of, read_tokenizer, split_revision
from resta.redeval.questions import shown
from resta.redeval.targets import parse_target
from resta.sft.adapters import read_factors
from resta.sft.chat import control_token
from resta.sft.lessons import ROWS
from resta.sft.recipe import Recipe
from resta.sft.train import Job, build_config, load_chat, world_size

SIDES = ("harmful", "keep")
HELD_OUT = 0.1  # share of the lessons that are not learned from, but show how near the student came to its teachers
FEWEST_TO_HOLD_OUT = 8  # lessons of a side: of fewer none can be spared
AT_ONCE = (3, 2, 1)  # lessons in memory together: the largest that divides a step; more take more memory, no less time
REMEDY = "a patch needs the weights of both models in this process: name a folder or a Hub id"


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How the student learns. `keep_weight` (lambda) weighs what is to stay against what is to be given back."""

    keep_weight: float = 1.0
    rank: int = 8
    steps: int = 60
    learning_rate: float = 1e-3
    batch: int = 12  # lessons a step, half of them harmful
    four_bit: bool = False  # whether both models are loaded in 4 bits, where memory is short
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A patch that is asked for."""

    tuned: LocalSpec
    aligned: LocalSpec
    prompts: tuple[Asked, ...]
    out: Path
    lessons: Path  # the teachers' answers, kept: the next patch from the same prompts need not ask again
    teaching: Teaching = field(default_factory=Teaching)
    learning: Learning = field(default_factory=Learning)
    base: str | None = None  # what tuned was made from, to tell the patch's norm against the fine-tune's
    device: str = "auto"

    def of_side(self, side: str) -> tuple[Asked, ...]:
        """Return the prompts of one teacher: "harmful" is aligned's, "keep" all that tuned answers."""
        return tuple(asked for asked in self.prompts if (asked.kind == "harmful") == (side == "harmful"))

    def teacher(self, side: str) -> LocalSpec:
        """Return who answers them."""
        return self.aligned if side == "harmful" else self.tuned

    @property
    def counts(self) -> dict[str, int]:
        """Return how many prompts of each kind there are."""
        found = Counter(asked.kind for asked in self.prompts)
        return {kind: found[kind] for kind in KINDS}


def model_of(name: str | Path | LocalSpec, **settings: Any) -> LocalSpec:
    """Return a model whose weights are needed. Raises RequestError for one that is served, or an unwritten merge."""
    if isinstance(name, LocalSpec):
        spec = name
    elif str(name).startswith(("http://", "https://")):
        raise RequestError(f"{name}: is a server's address; {REMEDY}")
    else:
        target = parse_target(name, **settings)
        if target.local is None:
            raise RequestError(f"{name}: is a served model; {REMEDY}")
        spec = target.local
    if spec.is_recipe:
        raise RequestError(f"{spec.model}: is a merge that is not written yet; write it with `resta merge` first")
    return spec


def recipe_of(request: Request, student: Student) -> Recipe:
    """Return the recipe of `resta sft` that learns the patch from the lessons. Raises RequestError."""
    learning, teaching = request.learning, request.teaching
    name, revision = split_revision(files_of(request.tuned))
    # An answer in the student's own words may take more tokens than its teacher's.
    room = teaching.tokens * (4 if teaching.other_tokenizer else 1)
    longest = max(len(student.prompt(asked, teaching)) for asked in request.prompts) + teaching.thought_tokens + room
    held_out = HELD_OUT if min(len(request.of_side(side)) for side in SIDES) >= FEWEST_TO_HOLD_OUT else 0.0
    train = {
        "max_steps": learning.steps,
        "global_batch": learning.batch,
        "per_device_batch": next(n for n in AT_ONCE if learning.batch % n == 0),
        "learning_rate": learning.learning_rate,
        "schedule": "cosine",
        "warmup": 3.0,
        "gradient_checkpointing": False,
        "save_every": 10,
        "log_every": 1,
    }
    return strict.check(
        Recipe,
        {
            "base": str(Path(name).resolve()) if Path(name).is_dir() else name,
            "revision": None if Path(name).is_dir() else revision,
            "adapter": str(Path(request.tuned.model).resolve()) if request.tuned.is_adapter else None,
            "chat_template": request.tuned.chat_template,
            "pad_token": student.tokenizer.pad_token,
            "max_length": max(8, longest),
            "data": [
                {"name": side, "path": str((request.lessons / side / ROWS).resolve()), "side": trained}
                for side, trained in zip(SIDES, ("blue", "keep"), strict=True)
            ],
            "bad_rows": "drop",  # a teacher may say nothing to a few prompts
            "holdout": held_out,
            "method": "qlora" if learning.four_bit else "lora",
            "lora": {"rank": learning.rank, "alpha": 2.0 * learning.rank},
            "objective": {"kind": "distil", "keep_weight": learning.keep_weight},
            "train": train,
            # At its start the student is tuned: that tells how far apart the teachers are.
            "trainer": {"eval_on_start": True} if held_out else {},
            "seed": learning.seed,
        },
    )


def check(request: Request, student: Student) -> Job:
    """Return the fine-tuning that learns the patch, with all refused that can be before a model is loaded.

    It writes beside `out`, which appears when everything is whole. Raises RequestError, ResumeError.
    """
    if request.out.exists():
        raise ResumeError(f"{request.out} already exists; choose another --output, or remove it")
    if request.tuned.is_adapter:
        read_factors(Path(request.tuned.model))
    if world_size() > 1:
        raise RequestError("resta patch runs as one process; start it without torchrun")
    if min(request.teaching.tokens - 1, request.teaching.thought_tokens, request.teaching.top or 0) < 0 or (
        request.learning.batch < 2
    ):
        raise RequestError(
            "expected tokens of at least 1, thought_tokens and top of at least 0 and a batch of at least 2"
        )
    if request.teaching.thought_tokens and (request.teaching.other_tokenizer or any(a.start for a in request.prompts)):
        raise RequestError(
            "thoughts are left out of answers that begin by themselves, in tokens of tuned's own: give thought_tokens "
            "without starts of answers (--no-starts) and without --other-tokenizer"
        )
    if request.learning.four_bit:
        nf4(None)
    _check_tokenizers(request, student)
    _check_words(request.prompts, student)
    for side in SIDES:
        if not request.of_side(side):
            raise RequestError(f"no prompts to learn from on the side {side!r}; both need some")
        asks = [(f"{asked.kind} {i}", asked.messages) for i, asked in enumerate(request.of_side(side))]
        check_contexts(request.teacher(side), asks, request.teaching.rendering(), request.teaching.decoding)
    out = request.out.with_name(f"{request.out.name}.learned")
    job = Job(recipe=recipe_of(request, student), root=Path.cwd(), out=out, device=request.device)
    load_chat(job)
    build_config(job, evaluates=bool(job.recipe.holdout))
    return job


def _check_words(prompts: Iterable[Asked], student: Student) -> None:
    """Refuse a prompt that spells out a control token, as text does that is in a chat template already."""
    for asked in prompts:
        token = control_token(student.chat, [{"role": each.role, "content": each.content} for each in asked.messages])
        if token is not None:
            raise RequestError(
                f"a {asked.kind} prompt spells out the control token {token!r}, which would be read as one; give the "
                f"prompts as they are asked, without the chat template: {shown(asked.text)}"
            )


def _check_tokenizers(request: Request, student: Student) -> None:
    """Refuse a teacher that does not speak the student's tokens: its distributions would be over other words."""
    tokenizer = read_tokenizer(request.aligned)
    if request.teaching.other_tokenizer or student.same_tokens(tokenizer):
        return
    theirs, ours = tokenizer.get_vocab(), student.tokenizer.get_vocab()
    differ = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    raise RequestError(
        f"{request.aligned.model} and {request.tuned.model} have different tokenizers ({len(differ)} tokens, such as "
        f"{differ[0]!r}): what one holds likely says nothing about the other's tokens. Name an aligned model of the "
        "same family; or learn the words of its answers alone, with --other-tokenizer"
    )
