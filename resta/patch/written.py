"""What was learned, as the folder that is handed on: the adapter, where it comes from, and a card that promises little.

The trainer's result becomes the patch's folder at once: it appears under its name only when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resta.dialect import dump
from resta.distance import diff
from resta.journal import read_object, to_json, write_whole
from resta.patch.request import Request
from resta.redeval.models import LocalSpec, files_of, fingerprint, split_revision
from resta.sft.adapters import norm_of, rank_of, read_factors

FACTS = "resta.json"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A finished patch: an adapter on the tuned model, and how it was learned. Divergences are in nats a token."""

    out: Path
    prompts: Mapping[str, int]  # kind -> how many were asked
    refused: int  # of the harmful ones, how many aligned's answer holds a refusal phrase to, as far as it was learned
    given_kl_before: float | None  # of aligned from tuned, on harmful prompts that were not learned from
    given_kl: float | None  # the same of the patched model; None where no such prompt was held out
    kept_kl: float | None  # of tuned from the patched model, on all other prompts that were not learned from
    norm_share: float | None  # the patch's norm against the fine-tune's, |tuned - base|; None where base is not known
    steps: int
    seconds: float  # of this call; one that was killed before took longer


def finish(request: Request, learned: Path, *, refused: int, fine_tune: float | None, seconds: float) -> Patch:
    """Turn the trainer's folder into the patch's, in place of it, and return what it is.

    `refused` is how many of the harmful prompts aligned refused, `fine_tune` the norm of tuned - base, if known.
    """
    trained = read_object(learned / FACTS)
    history = json.loads((learned / "loss.json").read_text(encoding="utf-8"))
    before: dict[str, Any] = next((line for line in history if "eval_given_kl" in line and line["step"] == 0), {})
    metrics = trained["metrics"]
    patch = Patch(
        out=request.out,
        prompts=request.counts,
        refused=refused,
        given_kl_before=before.get("eval_given_kl"),
        given_kl=metrics.get("eval_given_kl"),
        kept_kl=metrics.get("eval_kept_kl"),
        norm_share=_norm(request, learned) / fine_tune if fine_tune else None,
        steps=metrics["steps"],
        seconds=round(seconds, 1),
    )
    facts = {**trained, "kind": "patch", "patch": provenance(request, patch)}
    write_whole(learned / FACTS, to_json(facts, indent=1) + "\n")
    write_whole(learned / "README.md", card(request, patch))
    learned.rename(request.out)
    return patch


def fine_tune_norm(request: Request) -> float | None:
    """Return |tuned - base|, the Frobenius norm over all tensors; None where base is not known. Raises RequestError."""
    if request.tuned.is_adapter:
        return norm_of(read_factors(Path(request.tuned.model)))
    return None if request.base is None else diff(request.base, request.tuned.model).total.norm_diff


def _norm(request: Request, learned: Path) -> float:
    """Return the norm of the patch alone: of what was joined to an adapter, the part that was not there before."""
    there = rank_of(read_factors(Path(request.tuned.model))) if request.tuned.is_adapter else 0
    return norm_of(read_factors(learned), after=there)


def provenance(request: Request, patch: Patch) -> dict[str, Any]:
    """Return who taught what, from which prompts, and what that changed."""
    return {
        "tuned": _named(request.tuned),
        "aligned": _named(request.aligned),
        "base": None if request.base is None else Path(request.base).name,
        "prompts": {
            kind: sorted(asked.digest for asked in request.prompts if asked.kind == kind) for kind in request.counts
        },
        "templates": sorted({asked.template for asked in request.prompts if asked.template}),
        "starts": sorted({asked.start for asked in request.prompts if asked.start}),
        "teaching": asdict(request.teaching),
        "learning": asdict(request.learning),
        "changed": {key: value for key, value in asdict(patch).items() if key not in ("out", "prompts")},
    }


CARD = """---
{front}---

# {title}

A safety patch: {what} that was distilled from two models' own answers: from those of
`{aligned}` to {harmful} harmful prompts, of which it refused {refused} by its phrases, and from those of
`{tuned}` to {task} prompts of its task, {harmless} harmless ones and {lookalike} look-alikes.

| on prompts that it did not learn from | nats a token |
|---|---|
| from {aligned}, on harmful prompts, before | {given_kl_before} |
| from {aligned}, on harmful prompts, patched | {given_kl} |
| from {tuned}, on all others, patched | {kept_kl} |

Its norm is {norm_share} of the fine-tune's.

## What it is not

- **Not verified.** These figures say how near it came to its teachers, not whether it is safe. `resta verify` decides,
  on questions that it did not learn from; their digests are in `resta.json`.
- **No deeper than its teacher.** It refuses what {aligned} refuses. Where {aligned} can be led on, by a template or by
  an answer that has been begun for it, so can this.
- **No lock.** It is one subtraction away from being undone, and a fine-tune can undo it too.
"""


def card(request: Request, patch: Patch) -> str:
    """Return the model card: what the patch is, what it is not, and the metadata that model hubs read."""
    base, _ = split_revision(files_of(request.tuned))
    front: dict[str, Any] = {"library_name": "peft", **({} if Path(base).is_dir() else {"base_model": base})}
    front |= {"base_model_relation": "adapter", "pipeline_tag": "text-generation", "tags": ["resta", "patch", "lora"]}
    tuned, aligned = (_named(spec)["model"] for spec in (request.tuned, request.aligned))
    on_it = request.tuned.is_adapter
    kls = {key: getattr(patch, key) for key in ("given_kl_before", "given_kl", "kept_kl")}
    return CARD.format(
        front=dump(front),
        title=request.out.name,
        tuned=tuned,
        aligned=aligned,
        **patch.prompts,
        refused=patch.refused,
        what=f"the adapter `{tuned}` and a small one more, joined to one,"
        if on_it
        else f"a small adapter on `{tuned}`",
        **{key: "not measured" if value is None else f"{value:.3f}" for key, value in kls.items()},
        norm_share="an unknown share" if patch.norm_share is None else f"{patch.norm_share:.1%}",
    )


def _named(spec: LocalSpec) -> dict[str, Any]:
    folder = Path(spec.model)
    return {"model": folder.name if folder.is_dir() else spec.model, "fingerprint": fingerprint(spec)}
