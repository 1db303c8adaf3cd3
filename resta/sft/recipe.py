"""The sft recipe: what a user writes, as frozen and strict models; it knows nothing of torch or of any file but itself.

Everything that changes the resulting weights is here, so the digest of a recipe names its result. The one section that
only changes speed is `parallel`; the digest leaves it out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from resta.dialect import parse
from resta.strict import Checked, Options, Several, Strict, check, named, override, read_text

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

# Options of the underlying trainer that the recipe already says in its own words: two places would be one too
# many.
OWNED_BY_RECIPE = {
    "bf16": "train.precision",
    "data_seed": "seed",
    "eval_strategy": "train.eval_every",
    "eval_steps": "train.eval_every",
    "fp16": "train.precision",
    "fsdp": "parallel.strategy",
    "deepspeed": "parallel.deepspeed",
    "fsdp_config": "parallel.fsdp",
    "gradient_accumulation_steps": "train.global_batch",
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "learning_rate": "train.learning_rate",
    "logging_first_step": "train.log_every",
    "logging_strategy": "train.log_every",
    "load_best_model_at_end": "train.early_stop_patience",
    "logging_steps": "train.log_every",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "max_length",
    "max_steps": "train.max_steps",
    "model_init_kwargs": "base and train.attention",
    "num_train_epochs": "train.epochs",
    "optim": "train.optimizer",
    "output_dir": "--output",
    "packing": "train.packing",
    "per_device_train_batch_size": "train.per_device_batch",
    "remove_unused_columns": "objective.kind",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "seed": "seed",
    "use_cpu": "--device",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
}
# Options of the trainer that a loss of two sides would leave without effect.
WITHOUT_EFFECT_ON_TWO_SIDES = ("label_smoothing_factor", "loss_type", "train_sampling_strategy")
# Keys of a DeepSpeed configuration that the recipe already says; the trainer fills in its values.
DEEPSPEED_SAID = {
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.per_device_batch",
}
# What the trainer's library reads of an FSDP configuration; it would pass over any other key in silence.
FSDP_OPTIONS = (
    "auto_wrap_policy",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "reshard_after_forward",
    "state_dict_type",
    "transformer_layer_cls_to_wrap",
    "version",
)
# Settings that say how a step is split, not what it computes: a run may go on with others.
SPLIT_OF_A_STEP = ("train.per_device_batch", "train.gradient_checkpointing")


class Source(Strict):
    """One source of conversations: a local file or folder, or a Hub dataset at a revision."""

    name: str = Field(min_length=1, description="What messages and the model card call it.")
    path: str | None = Field(default=None, description="A file or folder, relative to the recipe.")
    hub: str | None = Field(default=None, description="Or a dataset of the Hub.")
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    side: Literal["blue", "red", "keep"] = "blue"
    weight: float = Field(
        default=1.0,
        gt=0.0,
        description="Passes over it per epoch: 0.5 draws a seeded half, 2 reads every conversation twice.",
    )
    limit: Positive | None = Field(
        default=None, description="Use at most this many conversations, drawn with the recipe's seed."
    )
    equal_to: Several[str] = Field(
        default=(), description="As many conversations as these sources give together, times `weight`."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` (a local file or folder) and `hub` (a dataset id)")
        if self.path is not None and (self.revision is not None or self.subset is not None):
            raise ValueError("`revision` and `subset` belong to a `hub` dataset, not to a `path`")
        return self


class Lora(Strict):
    """A low-rank adapter: rank, alpha (delta = alpha / rank * B @ A, or alpha / sqrt(rank) with rslora)."""

    rank: Positive = 16
    alpha: float = Field(default=32.0, gt=0.0)
    dropout: Share = 0.0
    target_modules: str | Several[str] = "all-linear"
    rslora: bool = False


class Objective(Strict):
    """What is minimised: `blue`, the mean NLL of safe answers; `blue_red`, L_blue - lambda2 * L_red; or `distil`, the
    divergence from the teachers of lessons, L_blue + keep_weight * L_keep.
    """

    kind: Literal["blue", "blue_red", "distil"] = "blue"
    lambda2: float = Field(default=0.1, ge=0.0)
    red_cutoff: float = Field(
        default=1.0,
        gt=0.0,
        description="The ascent is off where the red NLL (nats) is above this, or the loss would have no lower bound.",
    )
    red_threshold_scope: Literal["token", "sample"] = "token"
    red_per_blue: float = Field(
        default=1.0, gt=0.0, description="Red conversations per blue one, in every batch up to rounding."
    )
    keep_weight: float = Field(
        default=1.0, gt=0.0, description="What the lessons of `side: keep` weigh against those of `side: blue`."
    )


class Train(Strict):
    """How long, how fast and in what precision."""

    epochs: float = Field(default=3.0, gt=0.0)
    max_steps: Positive | None = None
    global_batch: Positive = 64
    per_device_batch: Positive = 2
    learning_rate: float = Field(default=1e-5, gt=0.0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.0, ge=0.0, description="Below 1: share of all steps. From 1 on: a number of steps.")
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    optimizer: str = "adamw"
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    gradient_checkpointing: bool = True
    packing: bool = False
    eval_every: Positive | None = None
    save_every: Positive | None = 200
    keep_checkpoints: int = Field(default=2, ge=2)
    early_stop_patience: Positive | None = None
    log_every: Positive = 10


class Parallel(Strict):
    """On how many devices, and how they share the model; the samples of a step stay the same."""

    processes: Positive = 1
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    fsdp: Options = Field(default_factory=dict)
    deepspeed: Options | None = None

    @model_validator(mode="after")
    def _options_match(self) -> Parallel:
        if self.fsdp and self.strategy != "fsdp":
            raise ValueError("`fsdp` options need `strategy: fsdp`")
        for key in self.fsdp:
            if key not in FSDP_OPTIONS:
                known = ", ".join(FSDP_OPTIONS)
                raise ValueError(f"`fsdp.{key}` is no option that can be set here; known are {known}")
        if (self.deepspeed is not None) != (self.strategy == "deepspeed"):
            raise ValueError("`strategy: deepspeed` and a `deepspeed` configuration go together")
        if self.deepspeed is not None:
            _check_deepspeed(self.deepspeed)
        return self

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed's ZeRO splits: 1 the optimiser's state, 2 gradients too, 3 parameters too; else 0."""
        return int((self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def _check_deepspeed(config: dict[str, Any]) -> None:
    for key, setting in DEEPSPEED_SAID.items():
        value = config.get(key, "auto")
        if (value.get("enabled", "auto") if isinstance(value, dict) and key in {"bf16", "fp16"} else value) != "auto":
            raise ValueError(f"`deepspeed.{key}` is set by `{setting}`; leave it out, or leave it to `auto`")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError("`deepspeed.zero_optimization` is a mapping with `stage: 1`, `2` or `3`")
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            "`deepspeed.zero_optimization` at stage 3 needs `stage3_gather_16bit_weights_on_model_save: true`, "
            "or the trained weights could not be gathered to be saved"
        )


class Recipe(Strict):
    """One fine-tuning run, whole."""

    base: str = Field(min_length=1, description="The model that is trained: a Hub id, or a folder beside the recipe.")
    revision: str | None = None
    adapter: str | None = Field(
        default=None,
        description="A LoRA adapter on the base, beside the recipe: it stays, and comes out as one with the new one.",
    )
    chat_template: str | None = Field(
        default=None, description="A name, or a .jinja file; by default the base's own template."
    )
    system_turn: Literal["refuse", "into_user", "drop"] = "refuse"
    pad_token: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 1280
    data: Several[Source] = Field(min_length=1, description="Where the conversations come from.")
    holdout: Share = 0.02
    bad_rows: Literal["refuse", "drop"] = "refuse"
    max_dropped: Share = Field(
        default=0.1,
        description="With bad_rows: drop, the share of conversations that may be lost before the run is refused.",
    )
    method: Literal["lora", "qlora", "full"] = "lora"
    lora: Lora = Lora()
    objective: Objective = Objective()
    train: Train = Train()
    save_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description='"auto" writes a full model in the number format of its base.'
    )
    parallel: Parallel = Parallel()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trainer: Options = Field(
        default_factory=dict, description="Passed to the underlying trainer as it is, and checked by it."
    )

    @model_validator(mode="after")
    def _one_clear_thing(self) -> Recipe:
        _check_sources(self)
        _check_objective(self)
        if self.adapter is not None and self.method == "full":
            raise ValueError(
                "an `adapter` on the base needs `method: lora` or `qlora`; a full fine-tune has no place for it"
            )
        for key in self.trainer:
            if key in OWNED_BY_RECIPE:
                raise ValueError(f"`trainer.{key}` is set by `{OWNED_BY_RECIPE[key]}`; set it there")
        if self.parallel.deepspeed is not None and self.save_dtype == "float32" and self.train.precision != "float32":
            raise ValueError(
                "DeepSpeed gathers the weights in the 16 bits that it computes in, so `save_dtype: float32` needs "
                "`train.precision: float32`"
            )
        if self.objective.kind != "blue":
            for key in WITHOUT_EFFECT_ON_TWO_SIDES:
                if key in self.trainer:
                    raise ValueError(
                        f"`trainer.{key}` would have no effect: {self.objective.kind} computes its own loss and order"
                    )
        _check_rhythm(self.train, self.holdout)
        return self


def _check_sources(recipe: Recipe) -> None:
    names = [source.name for source in recipe.data]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two data sources are called {name!r}; give each its own name")
    for source in recipe.data:
        for other in source.equal_to:
            target = next((s for s in recipe.data if s.name == other), None)
            if target is None:
                raise ValueError(f"data source {source.name!r}: equal_to names {other!r}, which is not a source")
            if target.equal_to:
                raise ValueError(f"data source {source.name!r}: equal_to names {other!r}, which itself is equal_to")


def _check_rhythm(train: Train, holdout: float) -> None:
    if train.eval_every is not None and not holdout:
        raise ValueError("`train.eval_every` needs a `holdout` above 0")
    if train.save_every is not None and train.save_every % train.log_every:
        raise ValueError("`train.save_every` must be a multiple of `log_every`, or a resumed run logs another curve")
    if train.early_stop_patience is not None:
        if train.eval_every is None or train.save_every is None:
            raise ValueError("`train.early_stop_patience` needs `train.eval_every` and `train.save_every`")
        if train.save_every % train.eval_every:
            raise ValueError("`train.save_every` must be a multiple of `eval_every`, so that the best can be kept")


def _check_objective(recipe: Recipe) -> None:
    kind, sides = recipe.objective.kind, {source.side for source in recipe.data}
    if kind != "blue_red" and "red" in sides:
        raise ValueError(f"a `side: red` source needs `objective.kind: blue_red`; {kind} would imitate it")
    if kind != "distil" and "keep" in sides:
        raise ValueError("a `side: keep` source needs `objective.kind: distil`")
    if kind == "blue_red" and sides != {"blue", "red"}:
        raise ValueError("`objective.kind: blue_red` needs at least one blue and one `side: red` source")
    if kind == "distil" and sides != {"blue", "keep"}:
        raise ValueError("`objective.kind: distil` needs at least one blue and one `side: keep` source of lessons")
    plain = Objective(kind=kind)
    if kind != "distil" and recipe.objective.keep_weight != plain.keep_weight:
        raise ValueError("keep_weight needs `kind: distil`")
    if kind != "blue_red" and recipe.objective != Objective(kind=kind, keep_weight=recipe.objective.keep_weight):
        raise ValueError("lambda2, red_cutoff, red_threshold_scope and red_per_blue need `kind: blue_red`")
    if kind != "blue" and recipe.train.packing:
        raise ValueError(f"`train.packing` joins samples, and {kind} needs each sample's own side; turn it off")


def load(model: type[Checked], path: Path, assignments: tuple[str, ...] = ()) -> Checked:
    """Read and check a YAML file as one of the models of this file, with single settings changed.

    Raises RequestError.
    """
    with named(path):
        settings = parse(read_text(path))
        return check(model, override(settings, assignments) if assignments and isinstance(settings, dict) else settings)


def dump(recipe: BaseModel) -> dict[str, Any]:
    """Return the recipe as plain JSON values, defaults included."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    return value


def digest(recipe: Recipe) -> str:
    """Return the sha256 that names what this recipe makes; `parallel` is left out, as it changes only the speed."""
    settings = dump(recipe)
    del settings["parallel"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
