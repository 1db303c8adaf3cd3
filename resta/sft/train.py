"""Recipe -> trained model in memory: build the configurations of trl, peft and transformers, call them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# The trainer's library reports to its makers on start-up; fine-tuning for safety is nobody else's business.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from resta.errors import RequestError, RestaError, ResumeError
from resta.fingerprint import digest, sha256_file
from resta.hub import refuse_pytorch
from resta.journal import differences, read_object, to_json, write_whole
from resta.out_of_memory import is_out_of_memory
from resta.quantized import nf4
from resta.sft import recipe as recipes
from resta.sft.adapters import TENSORS, carry, read_factors
from resta.sft.chat import Chat, open_chat
from resta.sft.data import Loaded, Mixture, mix
from resta.sft.distil import CollateLessons, DistilTrainer, lesson_columns, prepare_lessons
from resta.sft.lessons import read_facts
from resta.sft.objective import BlueRedTrainer, CollateWithSide
from resta.sft.recipe import Recipe
from resta.sft.samples import Prepared, columns, prepare
from resta.strict import did_you_mean

# peft asks transformers a question under its old name, which a user can do nothing about.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

LOSS_KEYS = ("loss", "eval_loss", "eval_blue_loss", "eval_red_loss")
DEEPSPEED_NUMBERS = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request: a checked recipe, the folder its relative paths start at, and where the result goes."""

    recipe: Recipe
    root: Path
    out: Path
    device: str = "auto"  # "auto", "cpu" or "cuda"
    # The words after `resta sft` that ask for this job again.
    words: tuple[str, ...] = ("RECIPE",)

    @property
    def partial(self) -> Path:
        """Where checkpoints live until the result is whole; `out` itself only ever holds a finished model."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def base(self) -> str:
        """The base as libraries load it: a Hub id, or the absolute path of a local folder."""
        local = (self.root / self.recipe.base).expanduser()
        return str(local.resolve()) if local.is_dir() else self.recipe.base

    @property
    def adapter(self) -> Path | None:
        """The adapter that the base carries, if any."""
        return None if self.recipe.adapter is None else (self.root / self.recipe.adapter).expanduser().resolve()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: what was logged at a step, of how many."""

    step: int
    steps: int
    logged: Mapping[str, float]  # loss, learning_rate, grad_norm, or eval_loss: nats per trained token


Watch = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished training run, still in memory."""

    trainer: SFTTrainer
    chat: Chat
    mixture: Mixture
    prepared: Prepared
    metrics: dict[str, Any]


# -- preparation ---------------------------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu(job: Job) -> bool:
    """Whether the run computes on the CPU. Raises RequestError for a GPU that is not there."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch sees no CUDA device here; use --device cpu, or a CUDA build of torch")
    return job.device == "cpu" or not torch.cuda.is_available()


def load_chat(job: Job) -> Chat:
    """Load the base's tokenizer, fit it with the template. Raises RequestError."""
    refuse_pytorch(job.base, job.recipe.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.base, revision=job.recipe.revision)
    except Exception as error:  # which class differs by version and cause
        raise RequestError(f"base {job.recipe.base!r}: its tokenizer cannot be loaded: {error}") from error
    return open_chat(
        tokenizer,
        template=job.recipe.chat_template,
        root=job.root,
        pad_token=job.recipe.pad_token,
        system_turn=job.recipe.system_turn,
    )


def load_data(job: Job, chat: Chat) -> tuple[Mixture, Prepared]:
    """Read, mix and encode the recipe's data. Raises RequestError."""
    mixture = mix(job.recipe, job.root)
    if job.recipe.objective.kind == "distil":
        return mixture, prepare_lessons(mixture, job.recipe, job.root)
    return mixture, prepare(mixture, chat, job.recipe)


def precision(job: Job) -> str:
    """Return "bf16", "fp16" or "float32": what the recipe says, or the best that this device computes in."""
    if job.recipe.train.precision != "auto":
        return job.recipe.train.precision
    if on_cpu(job):
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def accumulation(recipe: Recipe, processes: int) -> int:
    """Return the micro-batches per step that give the recipe's global batch on this many processes."""
    at_once = recipe.train.per_device_batch * processes
    if recipe.train.global_batch % at_once:
        raise RequestError(
            f"train.global_batch {recipe.train.global_batch} is not a multiple of per_device_batch "
            f"{recipe.train.per_device_batch} x {processes} processes; change one of the three"
        )
    return recipe.train.global_batch // at_once


def launch_line(job: Job) -> str:
    """Return the command that starts this job on the devices its recipe asks for."""
    run = shlex.join(["resta", "sft", *job.words, "-o", str(job.out)])
    if job.recipe.parallel.processes == 1:
        return run
    return f"torchrun --nproc-per-node {job.recipe.parallel.processes} -m {run}"


def build_config(job: Job, *, evaluates: bool) -> SFTConfig:
    """Translate the recipe into the trainer's own configuration. Raises RequestError."""
    options = _schedule_options(job) | _saving_options(job, evaluates=evaluates) | _device_options(job)
    options |= {"report_to": "none", "disable_tqdm": True} | job.recipe.trainer
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    for key in job.recipe.trainer:
        if key not in known:
            raise RequestError(f"trainer.{key} is not an option of trl's SFTConfig{did_you_mean(key, sorted(known))}")
    try:
        return SFTConfig(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise RequestError(f"the trainer refuses these settings: {error}") from error


def _schedule_options(job: Job) -> dict[str, Any]:
    train = job.recipe.train
    return {
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.per_device_batch,
        "per_device_eval_batch_size": train.per_device_batch,
        "gradient_accumulation_steps": accumulation(job.recipe, world_size()),
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": job.recipe.seed,
        "data_seed": job.recipe.seed,
        "max_length": job.recipe.max_length,
        "packing": train.packing,
        "eval_packing": False,
        # Samples arrive as tokens and labels, never longer than max_length: only packing is left for the
        # trainer to do.
        "dataset_kwargs": None if train.packing else {"skip_prepare_dataset": True},
        "remove_unused_columns": job.recipe.objective.kind == "blue",
    }


def _saving_options(job: Job, *, evaluates: bool) -> dict[str, Any]:
    train = job.recipe.train
    options: dict[str, Any] = {
        "output_dir": str(job.partial),
        "logging_steps": train.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if train.save_every else "no",
        "save_steps": train.save_every or 500,
        "save_total_limit": train.keep_checkpoints,
        "eval_strategy": "steps" if evaluates and train.eval_every else "no",
        "eval_steps": train.eval_every,
    }
    if train.early_stop_patience is not None:
        best = "eval_blue_loss" if job.recipe.objective.kind == "blue_red" else "eval_loss"
        options |= {"load_best_model_at_end": True, "metric_for_best_model": best, "greater_is_better": False}
    return options


def _device_options(job: Job) -> dict[str, Any]:
    recipe, cpu = job.recipe, on_cpu(job)
    optimizer = recipe.train.optimizer
    if optimizer == "adamw":
        optimizer = "adamw_torch" if cpu else "adamw_torch_fused"
    options: dict[str, Any] = {
        "use_cpu": cpu,
        "optim": optimizer,
        "bf16": precision(job) == "bf16",
        "fp16": precision(job) == "fp16",
        "activation_checkpointing": recipe.train.gradient_checkpointing,
        "dataloader_pin_memory": not cpu,
    }
    return options | (split_options(recipe) if world_size() > 1 else {})


def split_options(recipe: Recipe) -> dict[str, Any]:
    """Return the trainer's options for a model that is split over processes."""
    if recipe.parallel.strategy == "fsdp":
        # FSDP recomputes activations itself; both at once would do it twice.
        checkpointing = {"activation_checkpointing": recipe.train.gradient_checkpointing}
        return {
            "fsdp": True,
            "activation_checkpointing": False,
            "fsdp_config": checkpointing | recipe.parallel.fsdp,
        }
    if recipe.parallel.deepspeed is not None:
        # What DeepSpeed is not told it decides itself: without a clipping norm, for example, it does not clip.
        said = dict.fromkeys(DEEPSPEED_NUMBERS, "auto") | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
        return {"deepspeed": said | recipe.parallel.deepspeed}
    return {}


# -- model ---------------------------------------------------------------------------------------------------


def load_model(job: Job, chat: Chat) -> Any:
    """Load the base for training. Raises RequestError.

    A full fine-tune keeps float32 weights whatever it computes in: in bfloat16 a small learning rate would leave many
    parameters exactly where they were. A frozen base under an adapter is kept in the precision it computes in.
    """
    computes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision(job)]
    dtype = torch.float32 if job.recipe.method == "full" else computes
    try:
        model = AutoModelForCausalLM.from_pretrained(
            job.base,
            revision=job.recipe.revision,
            dtype=dtype,
            attn_implementation=_attention(job),
            quantization_config=nf4(computes) if job.recipe.method == "qlora" else None,
        )
    except (RequestError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the library's failures here have no common class
        raise RequestError(f"base {job.recipe.base!r} cannot be loaded: {error}") from error
    rows = int(model.get_input_embeddings().num_embeddings)  # the weight itself may be split over processes
    if len(chat.tokenizer) > rows:
        raise RequestError(
            f"base {job.recipe.base!r}: its tokenizer has {len(chat.tokenizer)} tokens and its embedding "
            f"{rows} rows; "
            "they belong to different models, or tokens were added without resizing: use the model's own "
            "tokenizer"
        )
    if job.adapter is not None:
        carry(model, read_factors(job.adapter), str(job.adapter))
    return model


def _attention(job: Job) -> str | None:
    wanted = job.recipe.train.attention
    if wanted != "auto":
        return wanted
    halves = precision(job) in {"bf16", "fp16"}
    return "flash_attention_2" if halves and not on_cpu(job) and is_flash_attn_2_available() else None


def build_adapter(job: Job) -> LoraConfig | None:
    """Return the peft configuration, naming the base and revision that the adapter belongs to; None for `full`."""
    if job.recipe.method == "full":
        return None
    lora = job.recipe.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=job.base,
        revision=job.recipe.revision,
    )


# -- training ------------------------------------------------------------------------------------------------


class StopOnNaN(TrainerCallback):  # type: ignore[misc]  # an untyped base
    """End a run whose loss or gradient is no longer a number, before it overwrites good checkpoints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Check every logged loss, and the gradient's norm where no loss scaler takes care of it."""
        for key in LOSS_KEYS if args.fp16 else (*LOSS_KEYS, "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(float(value)):
                raise RestaError(
                    f"step {state.global_step}: {key} is {value}; lower train.learning_rate, add "
                    "train.warmup, or use "
                    "precision bf16 or float32 instead of fp16"
                )


class Report(TrainerCallback):  # type: ignore[misc]  # an untyped base
    """Tell whoever watches what is logged; one process does."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Pass on what is a number."""
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if state.is_world_process_zero:
            self.watch(Progress(step=state.global_step, steps=state.max_steps, logged=numbers))


def build_trainer(
    job: Job, config: SFTConfig, model: Any, chat: Chat, prepared: Prepared, watch: Watch | None = None
) -> SFTTrainer:
    """Return the trainer, ready to run, which prints nothing. Raises RequestError."""
    callbacks: list[TrainerCallback] = [StopOnNaN(), *([Report(watch)] if watch else [])]
    if job.recipe.train.early_stop_patience is not None:
        callbacks.append(EarlyStoppingCallback(job.recipe.train.early_stop_patience))
    arguments: dict[str, Any] = {
        "model": model,
        "args": config,
        "processing_class": chat.tokenizer,
        "peft_config": build_adapter(job),
        "callbacks": callbacks,
    }
    try:
        trainer = _trainer_of(job, arguments, prepared)
    except (ValueError, ImportError) as error:
        raise RequestError(f"the trainer refuses these settings: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_of(job: Job, arguments: dict[str, Any], prepared: Prepared) -> SFTTrainer:
    """Return trl's trainer for one loss, or ours for two."""
    objective, held = job.recipe.objective, prepared.heldout
    pad = arguments["processing_class"].pad_token_id
    table = lesson_columns if objective.kind == "distil" else partial(columns, with_side=objective.kind == "blue_red")
    arguments |= {"train_dataset": Dataset.from_dict(table(prepared.train))}
    if objective.kind != "blue_red":
        arguments |= {"eval_dataset": Dataset.from_dict(table(held)) if held else None}
    if objective.kind == "blue":
        return SFTTrainer(**arguments)
    if objective.kind == "distil":
        lessons = CollateLessons(pad_token_id=pad)
        return DistilTrainer(**arguments, data_collator=lessons, keep_weight=objective.keep_weight)
    sides = {"blue": tuple(s for s in held if not s.red), "red": tuple(s for s in held if s.red)}
    evals = {name: Dataset.from_dict(table(s)) for name, s in sides.items() if s}
    collator = CollateWithSide(pad_token_id=pad)
    return BlueRedTrainer(**arguments, eval_dataset=evals or None, data_collator=collator, objective=objective)


@contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory failure into a `RestaError` that says which settings to lower, best first."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        train = recipe.train
        advice = []
        if train.per_device_batch > 1:
            advice.append(f"train.per_device_batch (now {train.per_device_batch}; the global batch stays the same)")
        if not train.gradient_checkpointing:
            advice.append("train.gradient_checkpointing: true")
        advice.append(f"max_length (now {recipe.max_length})")
        if recipe.method == "full":
            advice.append("method: lora, or parallel.strategy: fsdp on more GPUs")
        elif recipe.method == "lora":
            advice.append("method: qlora")
        raise RestaError(
            f"out of memory. Lower or set, in this order: {'; '.join(advice)}. `--dry-run` estimates the need. "
            f"With other {' or '.join(recipes.SPLIT_OF_A_STEP)} the run continues from its last checkpoint. "
            f"({str(error).splitlines()[0]})"
        ) from error


def newest_checkpoint(partial: Path, processes: int) -> Path | None:
    """Return the newest checkpoint that was written whole, or None.

    The trainer writes trainer_state.json last, so one that a kill tore has none, or one that does not parse.
    """
    found = []
    for path in partial.glob("checkpoint-*"):
        try:
            step = int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        states = [path / "rng_state.pth"] if processes == 1 else [path / f"rng_state_{i}.pth" for i in range(processes)]
        if all(state.is_file() for state in states):
            found.append((step, path))
    return max(found)[1] if found else None


def open_partial(job: Job, mixture: Mixture) -> Path | None:
    """Claim the working folder, or go on in it; return the checkpoint to start from, if any.

    Raises ResumeError for a folder that is not a run's, or holds checkpoints of another recipe or other data.
    """
    if is_main():  # the other processes see the same folder, and end with the main one if it refuses
        identity = {
            "recipe": recipes.dump(job.recipe),
            "base": job.base,
            "adapter": None if job.adapter is None else sha256_file(job.adapter / TENSORS),
            "data": {loaded.source.name: _digest(job, loaded) for loaded in mixture.sources},
            "processes": world_size(),
        }
        record = job.partial / "run.json"
        if job.partial.exists():
            _check_same_run(record, identity)
        job.partial.mkdir(parents=True, exist_ok=True)
        write_whole(record, to_json(identity, indent=1) + "\n")
    return newest_checkpoint(job.partial, world_size())


def _digest(job: Job, loaded: Loaded) -> str:
    """Return what names a source's content; of lessons, whose rows are only their words, with the distributions."""
    if job.recipe.objective.kind != "distil" or loaded.source.path is None:
        return loaded.digest
    return digest(read_facts((job.root / loaded.source.path).expanduser().parent))


def _check_same_run(record: Path, now: dict[str, Any]) -> None:
    try:
        before = read_object(record)
    except (OSError, ResumeError) as error:
        raise ResumeError(f"{record} cannot be read ({error}); remove {record.parent} and start anew") from None
    if not any(record.parent.glob("checkpoint-*")):
        return  # nothing to go on from, as after a first step that ran out of memory
    changed = differences(before["recipe"], now["recipe"])
    changed = [line for line in changed if not line.startswith(("parallel.", *recipes.SPLIT_OF_A_STEP))]
    if changed:
        raise ResumeError(
            f"the recipe changed since {record.parent} was begun: {'; '.join(changed)}. "
            "Undo the change, or remove the folder"
        )
    for key in ("base", "adapter", "data", "processes"):
        if before.get(key) != now[key]:
            found = "; ".join(differences(before.get(key), now[key], key))
            raise ResumeError(f"the {key} changed since {record.parent} was begun: {found}")


def check_launch(job: Job) -> None:
    """Refuse a recipe whose model is to be split, with only one process or no GPU to split it over."""
    strategy = job.recipe.parallel.strategy
    if strategy == "ddp":
        return
    if on_cpu(job):
        # The library underneath would quietly keep a whole copy in every process.
        raise RequestError(f"parallel.strategy: {strategy} splits a model over GPUs only; on a CPU use strategy: ddp")
    if world_size() == 1:
        raise RequestError(
            f"parallel.strategy: {strategy} splits the model over processes, and one was started; launch "
            "it with: " + launch_line(job)
        )


def _strategy(trainer: SFTTrainer) -> str | None:
    """Return how the trainer really split the work, by its own account."""
    if trainer.is_fsdp_enabled:
        return "fsdp"
    if trainer.is_deepspeed_enabled:
        return "deepspeed"
    return "ddp" if world_size() > 1 else None


def train(job: Job, watch: Watch | None = None) -> Fitted:
    """Train as the recipe says, from the newest whole checkpoint of a run that was stopped.

    Raises every error of this module.
    """
    if job.out.exists():
        raise RequestError(f"{job.out} already exists; choose another --output, or remove it")
    check_launch(job)
    if job.adapter is not None:
        read_factors(job.adapter)
    chat = load_chat(job)
    mixture, prepared = load_data(job, chat)
    # Before the model: what splits it must know of the processes when it is loaded, and a refusal leaves nothing.
    config = build_config(job, evaluates=bool(prepared.heldout))
    checkpoint = open_partial(job, mixture)
    started = time.monotonic()
    with memory_advice(job.recipe):
        model = load_model(job, chat)
        trainer = build_trainer(job, config, model, chat, prepared, watch)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        final = trainer.evaluate() if prepared.heldout else {}
    # Read from the log, which a resumed run continues; the trainer's own mean covers only the last process's
    # steps.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    metrics = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **{key: value for key, value in final.items() if key.startswith("eval_") and key.endswith(("loss", "_kl"))},
        "resumed_from_step": int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None,
        "runtime_s": round(time.monotonic() - started, 2),
        "precision": precision(job),
        "processes": world_size(),
        "strategy": _strategy(trainer),
    }
    return Fitted(trainer=trainer, chat=chat, mixture=mixture, prepared=prepared, metrics=metrics)
