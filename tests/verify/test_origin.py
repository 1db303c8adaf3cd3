from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from resta.auditing import check_weights
from resta.engine import merge
from resta.recipe import make_recipe
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision, Verdict
from resta.verify.gate import decide
from resta.verify.measurement import Measurement, note_manifest
from resta.verify.origin import published_change
from resta.verify.policy import Policy
from tests.builders import llama_tensors, nudged, save_model
from tests.verify.builders import by_name, manifest
from tests.verify.planted import exactly, measurements, planted


def made_by(facts: dict[str, Any], problem: str = "") -> Comparison:
    found = planted({"bank": exactly((2, 100, 2), 200)})
    restored = replace(found.models["restored"], manifest=facts, manifest_problem=problem)
    return replace(found, models={**found.models, "restored": restored})


def judged(facts: dict[str, Any], problem: str = "", rules: str = "{}") -> Decision:
    own = {"asr": {"max_upper": 0.1}, **yaml.safe_load(rules)}
    return decide(made_by(facts, problem), Policy.model_validate(own))


def test_a_merge_that_covers_the_model_and_kept_its_vector_holds() -> None:
    found = judged(manifest())
    assert found.verdict is Verdict.PASS
    rules = by_name(found.rules)
    assert {rules[f"provenance.{name}"].outcome for name in ("restored", "min_coverage", "min_kept")} == {"holds"}
    assert not any("Provenance unknown" in note for note in found.notes)


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        (manifest(not_covered=60), "provenance.min_coverage"),
        (manifest(kept=0.3), "provenance.min_kept"),
        (manifest(restored=False), "provenance.restored"),
    ],
)
def test_a_vector_that_is_not_in_the_model_fails_however_safe_it_looks(facts: dict[str, Any], rule: str) -> None:
    found = judged(facts)
    assert (found.verdict, by_name(found.rules)[rule].outcome) == (Verdict.FAIL, "fails")
    assert judged(facts, rules="provenance: {min_coverage: null, min_kept: null}").verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("facts", "problem", "says"),
    [
        ({}, "not checked", "no resta.json of a merge"),
        (manifest(), "tensor 'x': its checksum is 1", "not true to its weights (tensor 'x'"),
        ({"kind": "merge", "schema": 1, "tensors": {}}, "", "older version"),
    ],
)
def test_an_unknown_provenance_is_said_and_decides_nothing_unless_it_is_required(
    facts: dict[str, Any], problem: str, says: str
) -> None:
    found = judged(facts, problem)
    assert any(note.startswith("Provenance unknown: ") and says in note for note in found.notes)
    assert found.verdict is Verdict.PASS
    assert judged(facts, problem, "provenance: {required: true}").verdict is Verdict.INCONCLUSIVE


def test_a_manifest_is_true_to_the_weights_until_a_bit_of_them_changes(tmp_path: Path) -> None:
    start = llama_tensors(0)
    for seed, name in enumerate(("tuned", "aligned", "base"), 1):
        save_model(tmp_path / name, nudged(start, seed))
    models = {name: str(tmp_path / name) for name in ("tuned", "aligned", "base")}
    terms = [{"name": "safety", "delta": "aligned - base", "scale": 0.5}]
    out = tmp_path / "restored"
    merge(make_recipe({"models": models, "start": "tuned", "terms": terms}), out, workers=1)
    assert check_weights(out) == ()
    kept = tmp_path / "measurement"
    kept.mkdir()
    note_manifest(out / "resta.json", kept)
    assert json.loads((kept / "manifest-check.json").read_text()) == {"problem": ""}
    facts = json.loads((kept / "manifest.json").read_text())
    assert by_name(judged(facts).rules)["provenance.min_coverage"].outcome == "holds"

    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (kept / "manifest-check.json").unlink()
    note_manifest(out / "resta.json", kept)
    problem = json.loads((kept / "manifest-check.json").read_text())["problem"]
    assert "checksum" in problem
    assert any("not true to its weights" in note for note in judged(facts, problem).notes)


# -- which change was published ------------------------------------------------------------------------------

RESTA = {"delta": "aligned - base", "scale": 0.5, "name": "safety", "sparsify": None}
FINE_TUNE = {"delta": "tuned - base", "scale": 1.0, "name": None, "sparsify": None}


def pair(
    tuned: Path, facts: dict[str, Any], *, problem: str = "", prints: Any = None
) -> tuple[Measurement, Measurement]:
    """Return restored with this resta.json, and the tuned model."""
    found = measurements({"bank": exactly((0, 1, 0), 1)}, {}, {})
    config = {**found["tuned"].config, "target": {"name": str(tuned), "fingerprint": prints}}
    restored = replace(found["restored"], manifest=facts, manifest_problem=problem)
    return restored, replace(found["tuned"], config=config)


def merge_of(*terms: dict[str, Any], start: str = "tuned", size: int = 3, **recipe: Any) -> dict[str, Any]:
    source = {"source": "tuned", "files": {"model.safetensors": {"bytes": size}}}
    return {
        "kind": "merge",
        "equation": "an equation",
        "recipe": {"start": start, "terms": list(terms), "rules": [], **recipe},
        "inputs": {"tuned": source, "base": {"source": "base", "files": {}}},
        "safety": {"terms": [place for place, term in enumerate(terms) if term["name"] == "safety"]},
    }


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.safetensors").write_bytes(b"123")
    return tmp_path / "tuned"


@pytest.mark.parametrize(
    "facts",
    [
        merge_of(RESTA),
        merge_of(RESTA, rules=[{"match": "*", "scale_by": 0.5}]),
        merge_of(FINE_TUNE, RESTA, start="base"),
        {"kind": "patch", "patch": {"tuned": {"fingerprint": {"model": "digest"}}}},
    ],
    ids=["on tuned", "with rules", "rebuilding tuned", "a patch"],
)
def test_what_was_added_to_this_very_tuned_model_is_known_to_be_published(facts: dict[str, Any], tuned: Path) -> None:
    assert published_change(*pair(tuned, facts, prints={"model": "digest"})) == ""


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, "no resta.json that says what was added"),
        (merge_of({**RESTA, "name": None}), "names no safety vector"),
        (merge_of(RESTA, size=4), "is not added to the tuned model that is given"),
        (merge_of(RESTA, start="base"), "is not added to the tuned model that is given"),
        (merge_of({**FINE_TUNE, "scale": 0.9}, RESTA, start="base"), "is not added to the tuned model"),
        (merge_of({**FINE_TUNE, "sparsify": {"density": 0.5}}, RESTA, start="base"), "is not added to the tuned model"),
        (merge_of(FINE_TUNE, RESTA, start="base", rules=[{"match": "*"}]), "is not added to the tuned model"),
        (merge_of(FINE_TUNE, FINE_TUNE, RESTA, start="base"), "is not added to the tuned model"),
        ({"kind": "patch", "patch": {"tuned": {"fingerprint": {"model": "other"}}}}, "a patch on another model"),
    ],
)
def test_any_other_change_is_not(facts: dict[str, Any], why: str, tuned: Path) -> None:
    assert why in published_change(*pair(tuned, facts, prints={"model": "digest"}))


def test_a_file_that_is_not_true_to_the_weights_publishes_nothing(tuned: Path) -> None:
    assert "not shown to be true" in published_change(*pair(tuned, merge_of(RESTA), problem="not checked"))


def test_a_tuned_model_of_another_name_is_another(tuned: Path) -> None:
    other = tuned.rename(tuned.parent / "other")
    assert "is not added to the tuned model" in published_change(*pair(other, merge_of(RESTA)))
