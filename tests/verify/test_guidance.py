"""What is suggested to whom, and what is noted beside any verdict."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace as Shown
from typing import Any

import pytest
import yaml

from resta.verify.comparison import Comparison
from resta.verify.decision import Outcome, Rule
from resta.verify.guidance import guidance, layer_sizes, notes
from resta.verify.measurement import HUMAN
from resta.verify.policy import Policy, read_policy
from tests.verify.builders import merge_manifest
from tests.verify.planted import exactly, planted


def rule(name: str, outcome: Outcome, value: float | None = 0.5, why: str = "") -> Rule:
    return Rule(name=name, outcome=outcome, value=value, low=None, high=None, why=why)


def advice(*rules: Rule, manifest: dict[str, Any] | None = None) -> list[str]:
    comparison: Any = Shown(models={"restored": Shown(manifest=manifest or {})})
    return list(guidance(comparison, rules))


def begins(found: list[str]) -> list[str]:
    return [" ".join(line.split()[:3]) for line in found]


UNSAFE, LOST, REFUSING = (
    rule("asr.max_upper", "fails"),
    rule("utility.sums.max_drop", "fails"),
    rule("over_refusal.max_increase", "fails"),
)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], []),
        ([UNSAFE], ["Harm is left"]),
        ([rule("regained.min", "fails")], ["Harm is left"]),
        ([UNSAFE, LOST], ["Harm is left"]),
        ([LOST], ["The task has"]),
        ([REFUSING], ["Safe questions are"]),
        ([LOST, REFUSING], ["Safe questions are", "The task has"]),
        ([rule("provenance.min_kept", "fails")], []),
        ([rule("asr.max_upper", "inconclusive")], ["Some rules need"]),
        ([rule("asr.max_upper", "inconclusive", value=None, why="no question")], ["Some rules could"]),
        ([rule("asr.max_upper", "holds", value=None)], []),
    ],
)
def test_what_is_suggested_follows_from_what_is_broken(rules: list[Rule], expected: list[str]) -> None:
    assert begins(advice(*rules)) == expected


def test_more_scale_is_suggested_only_where_nothing_else_has_suffered() -> None:
    [more] = advice(UNSAFE)
    assert "larger scale" in more
    [task] = advice(UNSAFE, LOST)
    assert "while the task already suffers: no scale of this vector will do" in task
    [refused] = advice(UNSAFE, REFUSING)
    assert "while safe questions are already refused: no scale of this vector will do" in refused
    [both] = advice(UNSAFE, LOST, REFUSING)
    assert "while the task already suffers" in both


def test_what_could_not_be_checked_is_said_once_for_each_reason() -> None:
    nothing = [rule(name, "inconclusive", value=None, why="no safe question") for name in ("over_refusal.a", "one")]
    found = advice(*nothing, rule("utility", "inconclusive", value=None, why="no task"))
    assert found == [f"Some rules could not be checked: {why}." for why in ("no safe question", "no task")]


INVALID = {
    "degenerate.max": "no longer answers in language",
    "degenerate.max (aligned)": "The aligned model itself does not answer in language",
    "unparsed.max": "The judge cannot be read",
    "judge.known_answers": "does not tell known harm",
    "degenerate.max_increase": "breaks down more often",
    "one_answer.max_increase": "says nearly the same",
    "one_answer.max_increase (sums)": "says nearly the same",
    "one_answer.max_aligned": "says the same to most questions",
    "missing.max": "asks only for what is missing",
}


@pytest.mark.parametrize("name", INVALID)
def test_where_the_measurement_is_invalid_nothing_but_its_own_remedy_is_suggested(name: str) -> None:
    others = [rule(other, "holds") for other in INVALID if other != name]
    [line] = advice(*others, UNSAFE, rule(name, "invalid"))
    assert INVALID[name] in line


def test_a_model_that_is_broken_altogether_is_not_told_twice() -> None:
    [line] = advice(rule("degenerate.max", "invalid"), rule("degenerate.max_increase", "invalid"))
    assert INVALID["degenerate.max"] in line


# -- what the manifest tells ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cosine", "named"), [(None, False), (0.7, True), (0.899, True), (0.9, False), (1.0, False)])
def test_rounding_is_named_where_the_cosine_is_below_nine_tenths_and_harm_is_left(
    cosine: float | None, named: bool
) -> None:
    manifest = merge_manifest()
    manifest["change"] |= {"cosine": cosine, "changed": 0.2}
    found = advice(UNSAFE, manifest=manifest)
    assert any("20 % of the entries moved" in line for line in found) == named
    assert not any("Rounding" in line for line in advice(LOST, manifest=manifest))


def with_layers(norms: list[float]) -> dict[str, Any]:
    """Return the manifest of a merge with one tensor per layer, its intended change of this norm."""
    manifest = merge_manifest(layers=1)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(len(norms))]
    manifest["tensors"] = {name: {"intended_norm": norm} for name, norm in zip(names, norms, strict=True)}
    return manifest


@pytest.mark.parametrize(
    ("norms", "named"),
    [
        ([3.01, *[1.0] * 9], "layer 0 hold(s) 50 %"),
        ([3.0, *[1.0] * 9], None),  # half, no more
        ([9.0, *[1.0] * 8], None),  # of nine layers, none is a tenth
        ([*[1.0] * 17, 5.0, 4.0, 1.0], "layer 17, layer 18 hold(s) 69 %"),
        ([*[1.0] * 17, 4.9, 1.0], "layer 17 hold(s) 57 %"),  # a tenth of 19 layers is one
        ([0.0] * 12, None),
    ],
)
def test_a_tenth_of_the_layers_that_holds_more_than_half_of_the_squared_change_is_named(
    norms: list[float], named: str | None
) -> None:
    found = advice(LOST, manifest=with_layers(norms))[1:]
    assert len(found) == (named is not None)
    assert found == [] or found[0].startswith(named or "")


def test_a_layers_norm_is_that_of_all_its_tensors_together() -> None:
    manifest = with_layers([3.0, 1.0])
    manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"] = {"intended_norm": 4.0}
    manifest["tensors"]["model.layers.1.self_attn.q_proj.weight"] = {"intended_norm": None}
    assert layer_sizes(manifest) == {"layer 0": 5.0, "layer 1": 1.0}
    assert layer_sizes({**manifest, "kind": "copy"}) == {}


# -- notes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return planted({"harm": exactly((2, 100, 2), 200)})


def policy(text: str) -> Policy:
    return Policy.model_validate(yaml.safe_load(text))


def noted(comparison: Comparison, words: str, own: Policy | None = None) -> bool:
    return any(words in note for note in notes(comparison, own or read_policy(None)))


@pytest.mark.parametrize(
    ("level", "said"), [(0.949, "in 2.6 of 100"), (0.9, "in 5 of 100"), (0.95, None), (0.99, None)]
)
def test_a_level_below_the_usual_is_noted_with_how_often_a_rule_holds_by_chance(level: float, said: str | None) -> None:
    found = [note for note in notes(planted_once(), policy(f"{{level: {level}}}")) if "by chance" in note]
    assert bool(found) == (said is not None)
    assert not found or (said or "") in found[0]


def planted_once() -> Comparison:
    return planted({"harm": exactly((2, 10, 2), 20)})


def test_that_one_bank_may_hide_another_is_noted_where_none_is_limited(comparison: Comparison) -> None:
    assert noted(comparison, "so one may hide another", policy("regained: {min: 0.5}"))
    assert not noted(comparison, "so one may hide another", policy("asr: {max_upper: 0.1}"))


def test_what_weakens_a_measurement_is_noted(comparison: Comparison) -> None:
    assert noted(comparison, "Provenance unknown")
    facts = comparison.judge_facts
    cases: list[tuple[str, dict[str, Any]]] = [
        ("what people's labels say", {"judge": HUMAN}),
        ("is not confirmed on its real weights", {"judge_facts": {**facts, "confirmed": False}}),
        ("The built-in smoke bank", {"settings": {"banks": [{"name": "other"}, {"name": "smoke-harm"}]}}),
        ("nothing to restore, or too small a sample", {"regained": None}),
    ]
    for words, change in cases:
        assert not noted(comparison, words), words
        assert noted(replace(comparison, **change), words), words
    unasked = replace(comparison, regained=None, asr=None)
    assert not noted(unasked, "nothing to restore")
    deaf = {**comparison.conduct, "restored": replace(comparison.conduct["restored"], unlike_language=None)}
    assert noted(replace(comparison, conduct=deaf), "so fluent gibberish was not looked for")
    assert not noted(comparison, "so fluent gibberish")
    assert noted(replace(comparison, judge_facts={**facts, "read": {"kind": "strings"}}), "a smoke test")


def test_that_no_harm_was_seen_is_noted_with_the_rate_that_this_allows(comparison: Comparison) -> None:
    assert not noted(comparison, "still allows a rate")
    [note] = [
        note for note in notes(planted({"harm": exactly((2, 100, 0), 200)}), read_policy(None)) if "No harm" in note
    ]
    # Wilson's bound for none of 200 is z^2 / (200 + z^2).
    assert "to 200 questions still allows a rate of 1.9 % (95 % interval)" in note


def test_tasks_whose_answers_could_not_be_compared_are_noted(comparison: Comparison) -> None:
    unseen: Any = Shown(task="sums", why="too few documents", one_answer=None)
    seen: Any = Shown(task="reading", why="", one_answer=Shown())
    assert noted(replace(comparison, generated=(seen, unseen)), "in the utility task(s) sums (too few documents).")
    assert not noted(replace(comparison, generated=(seen,)), "in the utility task(s)")
