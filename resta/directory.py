"""The files of an output beside its weights: what a merge adds to them, and an audit expects to find.

Nothing in here depends on when, how fast or by how many workers a merge was made, so that the same merge gives the same
directory. This module knows nothing of how tensors come to be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resta.digests import Digests
from resta.hub import INDEX
from resta.manifest import TensorFacts, describe, render_card
from resta.output import MARK
from resta.plan import Plan

CARD = "README.md"
HASHED, NOT_HASHED = "sha256 of every input and output file", "not hashed"


def small_files(plan: Plan, facts: Mapping[str, TensorFacts], digests: Digests | None) -> dict[str, bytes]:
    """Return the files beside the weights by name: copied ones, index, card, and last the manifest.

    Args:
        plan: what was carried out, with the digests of its inputs if they were taken.
        facts: what was done to every tensor.
        digests: of the weight files; without them the manifest says that they were not hashed.
    """
    texts = {file.name: file.content for file in plan.auxiliary_files}
    if len(plan.headers) > 1:
        weight_map = {step.name: step.slot.file for step in plan.steps}
        total = sum(step.slot.spec.nbytes for step in plan.steps)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX] = json.dumps(index, indent=2).encode() + b"\n"
    texts[CARD] = render_card(plan, facts).encode()
    manifest = describe(plan, facts)
    manifest["digests"] = HASHED if digests else NOT_HASHED
    manifest["outputs"] = _describe_outputs(plan, texts, digests)
    manifest["tensors"] = manifest.pop("tensors")  # the longest part comes last
    texts[MARK] = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return texts


def with_digests(plan: Plan, digests: Digests) -> Plan:
    """Return a plan whose inputs' identities hold the digests that were taken of their content."""
    weights = {}
    for name, model in plan.weights.items():
        files = {
            path: replace(identity, sha256=digests.sha256[path], sha256_from="content")
            if path in digests.sha256
            else identity
            for path, identity in model.files.items()
        }
        weights[name] = replace(model, files=files)
    return replace(plan, weights=weights)


def weight_bytes(plan: Plan) -> dict[str, int]:
    """Return the size of every weight file of an output."""
    sizes = {name: len(head) for name, head in plan.headers.items()}
    for step in plan.steps:
        sizes[step.slot.file] += step.slot.spec.nbytes
    return sizes


def _describe_outputs(plan: Plan, texts: Mapping[str, bytes], digests: Digests | None) -> dict[str, Any]:
    """Return size and digest of every file of the output but the manifest itself; those of weights if taken."""
    weights = {
        name: {"bytes": size, "sha256": digests.sha256[name] if digests else None}
        for name, size in weight_bytes(plan).items()
    }
    small = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in texts.items()
    }
    return dict(sorted((weights | small).items()))
