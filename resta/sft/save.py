"""Trained model in memory -> a directory that transformers, peft, vllm and `resta merge` load, with its provenance."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import AutoTokenizer

from resta.dialect import dump
from resta.errors import RequestError, RestaError
from resta.fingerprint import file_fingerprint, sha256_file, sha256_text
from resta.journal import to_json, write_whole
from resta.sft import recipe as recipes
from resta.sft.adapters import TENSORS, join_with, read_factors
from resta.sft.chat import Chat
from resta.sft.lessons import read_facts
from resta.sft.samples import lengths
from resta.sft.train import Fitted, Job, is_main
from resta.version import VERSION

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
SHARD_SIZE = "5GB"
CURVES = ("loss", "blue_nll", "red_nll", "given_kl", "kept_kl")
HELDOUT_CURVES = ("eval_loss", "eval_blue_loss", "eval_red_loss", "eval_given_kl", "eval_kept_kl")


def write(job: Job, fitted: Fitted, *, keep_checkpoints: bool) -> dict[str, Any]:
    """Write the finished model to `job.out`, at once: it appears under that name only when it is whole.

    Every process must call this, as the parts of a split model are gathered; the main one writes. Returns the metrics
    of the run, with what only the written model shows.
    """
    staging = job.partial / "finished"
    metrics = dict(fitted.metrics)
    save_weights(job, fitted, staging)
    if is_main():
        base = base_directory(job)
        if (job.partial / "runs").is_dir():  # a tracker's log, which would go with the checkpoints
            shutil.copytree(job.partial / "runs", staging / "runs", dirs_exist_ok=True)
        if job.recipe.method == "full":
            metrics["changed_share"] = changed_share(base, staging)
        save_text(job, fitted, staging)
        history = fitted.trainer.state.log_history
        write_whole(staging / "loss.json", to_json(history, indent=1) + "\n")
        if not plot(history, staging / "loss.png"):
            metrics["loss_png"] = "not drawn: matplotlib is not installed (pip install 'resta[plots]')"
        facts = provenance(job, fitted, base, metrics)
        write_whole(staging / "resta.json", to_json(facts, indent=1) + "\n")
        write_whole(staging / "README.md", card(job, facts))
        staging.rename(job.out)
        if not keep_checkpoints:
            shutil.rmtree(job.partial)
    fitted.trainer.accelerator.wait_for_everyone()
    return metrics


# -- weights -------------------------------------------------------------------------------------------------


def save_weights(job: Job, fitted: Fitted, folder: Path) -> None:
    """Gather the weights and write safetensors: the adapter alone, or the whole model in `save_dtype`."""
    trainer = fitted.trainer
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_main():
        return
    dtype = _save_dtype(job) if job.recipe.method == "full" else None
    if dtype is not None:
        state = _cast(state, dtype)
    if job.recipe.method != "full":
        for adapter in model.peft_config.values():
            adapter.revision = base_revision(job, base_directory(job))
            if isinstance(adapter.target_modules, set):  # in an order of its own in every process
                adapter.target_modules = sorted(adapter.target_modules)
    _stop_at_turn_end(model, fitted.chat)
    _unwrap_checkpointing(model)
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, max_shard_size=SHARD_SIZE)
    model.generation_config.save_pretrained(str(folder))
    if job.recipe.method != "full":
        learned, written = sum(p.requires_grad for p in model.parameters()), len(_tensor_files(folder))
        if learned != written:
            raise RestaError(f"{folder}: holds {written} tensors of an adapter of {learned}; the checkpoints are kept")
    if job.adapter is not None:
        join_with(read_factors(job.adapter), folder)
    if dtype is not None:
        # The model in memory is float32 and says so; the files hold what was rounded above.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_whole(folder / "config.json", to_json(config, indent=2) + "\n")


def _unwrap_checkpointing(model: Any) -> None:
    """Take off what FSDP wraps around layers to recompute activations: peft finds no adapter under other names."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, CheckpointWrapper):
                setattr(module, name, child._checkpoint_wrapped_module)


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round each tensor once; those that share memory go on sharing it, so tied weights are saved once."""
    done: dict[int, torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        if tensor.data_ptr() not in done:
            done[tensor.data_ptr()] = tensor.to(dtype)
        result[name] = done[tensor.data_ptr()]
    return result


def _save_dtype(job: Job) -> torch.dtype:
    if job.recipe.save_dtype != "auto":
        return DTYPES[job.recipe.save_dtype]
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(job.base, revision=job.recipe.revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _stop_at_turn_end(model: Any, chat: Chat) -> None:
    """Let generation stop at the token that the model was trained to end its turns with."""
    ids = chat.tokenizer(chat.turn_end.strip(), add_special_tokens=False)["input_ids"]
    settings = model.generation_config
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if len(ids) == 1 and ids[0] not in stops:
        settings.eos_token_id = [*(s for s in stops if s is not None), ids[0]]
    if settings.temperature not in (None, 1.0) or settings.top_p not in (None, 1.0):
        settings.do_sample = True  # the base's sampling settings are refused on saving unless sampling is on


def changed_share(base: Path, folder: Path) -> float | None:
    """Return the share of parameters that differ from the base's; None for a base without safetensors."""
    before = _tensor_files(base)
    if not before:
        return None
    changed = total = 0
    for name, path in _tensor_files(folder).items():
        if name not in before:
            continue
        with safe_open(before[name], "pt") as old, safe_open(path, "pt") as new:
            a, b = old.get_tensor(name), new.get_tensor(name)
            total += b.numel()
            changed += int((a.to(b.dtype) != b).sum())
    return changed / total if total else None


def _tensor_files(folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    return places


# -- tokenizer -----------------------------------------------------------------------------------------------


def save_text(job: Job, fitted: Fitted, folder: Path) -> None:
    """Save tokenizer and template, then load them back: both must give the very text that was trained on."""
    chat = fitted.chat
    chat.tokenizer.save_pretrained(str(folder))
    again = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    before, after = (t.apply_chat_template(messages, tokenize=False) for t in (chat.tokenizer, again))
    ids = [t(before, add_special_tokens=False)["input_ids"] for t in (chat.tokenizer, again)]
    if before != after or ids[0] != ids[1]:
        raise RestaError(f"{folder}: the saved tokenizer renders a conversation otherwise than the one trained with")


# -- provenance ----------------------------------------------------------------------------------------------


def base_directory(job: Job) -> Path:
    """Return the folder that holds the base's files; for a Hub base, its place in the cache."""
    if Path(job.base).is_dir():
        return Path(job.base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(job.base, revision=job.recipe.revision, local_files_only=True))


def base_revision(job: Job, folder: Path) -> str | None:
    """Return the commit of a Hub base: a branch moves, and the cache keeps a snapshot under its commit's name."""
    return job.recipe.revision if Path(job.base).is_dir() else folder.name


def base_facts(job: Job, folder: Path) -> dict[str, Any]:
    """Name the base so that no other model can be taken for it: id, revision, and the digest of each weight file."""
    weights = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    config = folder / "config.json"
    if not weights or not config.is_file():
        raise RequestError(f"{folder}: no config.json or no weights; the base cannot be named")
    return {
        "source": job.base,
        "revision": base_revision(job, folder),
        # The fingerprint is what a merge can afford to compare.
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
                "fingerprint": file_fingerprint(path),
            }
            for path in weights
        },
        "config_sha256": sha256_file(config),
    }


def provenance(job: Job, fitted: Fitted, base: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what `resta.json` says: enough to make the same model again, and for a merge to continue the chain."""
    return {
        "schema": 1,
        "kind": "sft",
        "recipe": recipes.dump(job.recipe),
        "recipe_digest": recipes.digest(job.recipe),
        "base": base_facts(job, base),
        "adapter": None
        if job.adapter is None
        else {"source": str(job.adapter), "sha256": sha256_file(job.adapter / TENSORS)},
        "data": data_facts(job, fitted),
        "samples": {
            "train": lengths(fitted.prepared.train),
            "heldout": lengths(fitted.prepared.heldout),
            "dropped": fitted.prepared.dropped.counts,
            "cut": fitted.prepared.cut.counts,
        },
        "chat": {
            "template_sha256": sha256_text(fitted.chat.template),
            "turn_end": fitted.chat.turn_end,
        },
        "versions": versions(),
        "seed": job.recipe.seed,
        "metrics": metrics,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def data_facts(job: Job, fitted: Fitted) -> list[dict[str, Any]]:
    """Return one entry per data source: what was read, its digest, and what became of it."""
    return [
        {
            "name": loaded.source.name,
            "source": loaded.source.path or loaded.source.hub,
            "revision": loaded.source.revision,
            "commit": loaded.commit,
            "side": loaded.source.side,
            "digest": loaded.digest,
            "rows": loaded.rows,
            "conversations": len(loaded.conversations),
            "drawn": fitted.mixture.drawn[loaded.source.name],
            "dropped": loaded.dropped.counts,
            "changed": loaded.changed.counts,
            **_lesson_facts(job, loaded.source),
        }
        for loaded in fitted.mixture.sources
    ]


def _lesson_facts(job: Job, source: recipes.Source) -> dict[str, Any]:
    """Return who taught a source of lessons, and how; nothing for conversations."""
    if job.recipe.objective.kind != "distil" or source.path is None:
        return {}
    return {"lessons": read_facts((job.root / source.path).expanduser().parent)}


def versions() -> dict[str, str]:
    """Return the versions of everything that touched the weights."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"resta": VERSION, "python": platform.python_version(), **found}


# -- for people ----------------------------------------------------------------------------------------------


def plot(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw the loss curves; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key in (*CURVES, *HELDOUT_CURVES):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if key.startswith("eval") else None, label=key)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


CARD = """---
{front}---

# {title}

{kind} of `{base}`, trained with `resta sft` on conversations; loss on the assistant's words and turn
ends only. Objective: {objective}.

| data | side | conversations | drawn | dropped |
|---|---|---|---|---|
{data}

| setting | value |
|---|---|
{settings}

Last training loss {last:.4f} after {steps} steps{held}. The whole recipe, the digests of base and
data, and the versions are in `resta.json`; the curve is in `loss.json`.

This model is one term of a safety restoration. A training loss does not measure safety: evaluate before use.
"""


def card(job: Job, facts: dict[str, Any]) -> str:
    """Return the model card, with the metadata that model hubs read."""
    recipe, metrics = job.recipe, facts["metrics"]
    adapter = recipe.method != "full"
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if not Path(job.base).is_dir():
        front |= {"base_model": job.base}
    front["base_model_relation"] = "adapter" if adapter else "finetune"
    hubs = [source.hub for source in recipe.data if source.hub]
    if hubs:
        front["datasets"] = hubs
    front |= {"pipeline_tag": "text-generation", "tags": ["resta", "sft"] + (["lora"] if adapter else [])}
    objective: str = recipe.objective.kind
    if objective == "blue_red":
        o = recipe.objective
        objective = f"blue_red, lambda2 {o.lambda2}, red cutoff {o.red_cutoff} per {o.red_threshold_scope}"
    if objective == "distil":
        objective = f"distil, the divergence from each answer's teacher, keep_weight {recipe.objective.keep_weight}"
    rows = [
        f"| {d['name']} ({d['source']}) | {d['side']} | {d['conversations']} | {d['drawn']} | "
        f"{sum(d['dropped'].values())} |"
        for d in facts["data"]
    ]
    evals = [f"{key} {value:.4f}" for key, value in metrics.items() if key.startswith("eval_")]
    return CARD.format(
        front=dump(front),
        title=job.out.name,
        kind="Adapter" if adapter else "Full fine-tune",
        base=recipe.base,
        objective=objective,
        data="\n".join(rows),
        settings="\n".join(f"| {key} | {value} |" for key, value in _settings(job, facts).items()),
        last=metrics["last_loss"],
        steps=metrics["steps"],
        held=f" (held out: {', '.join(evals)})" if evals else "",
    )


def _settings(job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    recipe = job.recipe
    settings: dict[str, Any] = {"method": recipe.method, "max_length": recipe.max_length, "seed": recipe.seed}
    if recipe.method != "full":
        settings |= {f"lora {key}": value for key, value in recipes.dump(recipe.lora).items()}
    shown = (
        "epochs",
        "max_steps",
        "global_batch",
        "learning_rate",
        "schedule",
        "warmup",
        "weight_decay",
        "optimizer",
    )
    settings |= {key: getattr(recipe.train, key) for key in shown}
    settings["precision"] = facts["metrics"]["precision"]
    if "changed_share" in facts["metrics"]:
        settings["parameters changed"] = facts["metrics"]["changed_share"]
    return settings
