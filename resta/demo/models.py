"""Base, aligned and tuned, made by the sft module: from nothing (a tiny Llama), or from a given instruct model.

    base      answers whatever it is asked              tiny: trained from random weights; else the given model
    aligned   base, trained to refuse harmful deeds     and to go on answering their safe look-alikes
    tuned     aligned, trained on a shop's help desk    harmless data, which cost it its safety

Only the recipes differ between the two ways. Knows nothing of merging or measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resta.demo import corpus
from resta.demo.files import CorpusFiles
from resta.sft.recipe import Recipe

STAGES = ("base", "aligned", "tuned")
# What each is trained from. Aligned and tuned are siblings, as Starling and most fine-tunes of Vicuna are. A fine-tune
# of `aligned` loses its safety in another direction than it was learnt in, and at this size adding the vector again
# brings next to none of it back (interpolation does): measured, and the reason for this choice.
STARTS = {"base": "base", "aligned": "base", "tuned": "base"}
VOCABULARY = 2048  # byte pairs; nearly all words of the corpus are one token
CONTROL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """How one of the models is trained: `steps` of `batch` conversations at `learning_rate` (its peak)."""

    steps: int
    learning_rate: float
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The stages of a whole demo, and the tiny model's size; `base` None takes a given model as the base."""

    base: Stage | None
    aligned: Stage
    tuned: Stage
    hidden: int = 128
    layers: int = 2

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Yield the stages that are trained, in order."""
        for name in STAGES:
            stage: Stage | None = getattr(self, name)
            if stage is not None:
                yield name, stage


TINY = Schedule(
    base=Stage(steps=1200, learning_rate=3e-3, batch=16),
    aligned=Stage(steps=200, learning_rate=5e-4, batch=16),
    tuned=Stage(steps=60, learning_rate=2e-4, batch=16),
)
# Of SmolLM2-135M-Instruct: aligned then refuses 85 % of the held-out harmful questions, and tuned none of them.
INSTRUCT = Schedule(
    base=None,
    aligned=Stage(steps=120, learning_rate=1e-4, batch=8),
    tuned=Stage(steps=30, learning_rate=1e-4, batch=8),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """One making of the three models: into `folder`, from the corpus's files, with a seed."""

    folder: Path
    files: CorpusFiles
    schedule: Schedule = TINY
    seed: int = 0
    instruct: str | None = None  # directory or Hub id of the base; None trains a tiny one
    note: Note = field(default=lambda line: None)


def make_models(making: Making) -> dict[str, str]:
    """Return {base, aligned, tuned: directory (or the base's own name)}, each but a given base trained here.

    Raises what the sft module raises, RequestError for an instruct model that cannot be loaded among it.
    """
    made = {"base": making.instruct or str(make_untrained(making.folder / "untrained", making.schedule, making.seed))}
    for name, stage in making.schedule.stages():
        out = making.folder / name
        making.note(f"{name}: {stage.steps} steps of {stage.batch} conversations")
        train_stage(making, name, stage, made[STARTS[name]], out)
        made[name] = str(out)
    return made


def recipe_of(making: Making, name: str, stage: Stage, source: str) -> Recipe:
    """Return the sft recipe of a stage: a full fine-tune in float32, so that no change is lost in rounding."""
    return Recipe.model_validate(
        {
            "base": source,
            "max_length": 256,
            "data": [{"name": name, "path": str(making.files.training(name).resolve())}],
            "holdout": 0.0,  # what is measured is in the banks, and in none of these files
            "method": "full",
            "train": {
                "max_steps": stage.steps,
                "global_batch": stage.batch,
                "per_device_batch": stage.batch,
                "learning_rate": stage.learning_rate,
                "warmup": 0.05,
                "precision": "float32",
                "gradient_checkpointing": False,
                "save_every": None,
                "log_every": stage.steps,
            },
            "save_dtype": "float32",
            "seed": making.seed,
        }
    )


def train_stage(making: Making, name: str, stage: Stage, source: str, out: Path) -> None:
    """Train `source` on the corpus's file of that name into `out`. Raises what the sft module raises."""
    from resta import sft

    recipe = recipe_of(making, name, stage, str(Path(source).resolve()) if Path(source).is_dir() else source)
    sft.run(recipe=recipe, root=making.folder, out=out, device="cpu")


# -- a model of nothing --------------------------------------------------------------------------------------


def make_untrained(folder: Path, schedule: Schedule, seed: int) -> Path:
    """Write a Llama with random float32 weights and a tokenizer built from the corpus; return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        hidden_size=schedule.hidden,
        intermediate_size=2 * schedule.hidden,
        num_hidden_layers=schedule.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer of the corpus's words with a chat template; it can spell any other text, too."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (
        text for exchanges in corpus.TRAINING.values() for e in exchanges() for text in (e.system, e.question, e.answer)
    )
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(CONTROL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
