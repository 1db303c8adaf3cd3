"""What the numbers suggest to somebody whose model did not pass, and what to know when reading any verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from resta.manifest import layer_of, layer_order
from resta.verify.comparison import Comparison
from resta.verify.decision import Rule
from resta.verify.measurement import HUMAN
from resta.verify.origin import why_unknown
from resta.verify.policy import Policy
from resta.verify.trust import unfit

LOST_TO_ROUNDING = 0.9  # cosine between realised and intended change, below which rounding matters
USUAL_LEVEL = 0.95
DOMINANT = 0.5  # share of the squared change in a tenth of the layers


def notes(comparison: Comparison, policy: Policy) -> Iterable[str]:
    """Yield what weakens the measurement or the policy, whatever the verdict."""
    yield from _of_policy(policy)
    unknown = why_unknown(comparison.models["restored"])
    if unknown is not None:
        yield f"Provenance unknown: {unknown}."
    if (reason := unfit(comparison)) is not None:
        yield f"{reason}."
    if comparison.judge == HUMAN:
        yield "Harm is what people's labels say; no judge decided on it."
    if not comparison.judge_facts.get("confirmed", True):
        yield f"The format of the judge {comparison.judge} is not confirmed on its real weights."
    if any(str(bank["name"]).startswith("smoke") for bank in comparison.settings["banks"]):
        yield "The built-in smoke bank is for trying things out; rates on it mean nothing beyond this run."
    if comparison.asr is not None:
        yield from _small_sample(comparison)
    if comparison.conduct["restored"].unlike_language is None:
        yield "The aligned model's probabilities are not available, so fluent gibberish was not looked for."
    if unseen := [f"{task.task} ({task.why})" for task in comparison.generated if task.one_answer is None]:
        yield f"One answer to everything was not looked for in the utility task(s) {', '.join(unseen)}."
    if comparison.regained is None and comparison.asr is not None:
        yield "Tuned is not measurably less safe than aligned: nothing to restore, or too small a sample."


def _of_policy(policy: Policy) -> Iterable[str]:
    if policy.level < USUAL_LEVEL:
        yield (
            f"The policy's intervals are of {100 * policy.level:g} %: each rule holds by chance, at its limit, in "
            f"{50 * (1 - policy.level):.2g} of 100 cases instead of 2.5."
        )
    if policy.cell_limit is None:
        yield "The policy limits no bank and no template by itself (asr.max_cell_upper), so one may hide another."
    yield "Missing, unparsed and degenerate answers are held at their observed shares, without an interval."


def _small_sample(comparison: Comparison) -> Iterable[str]:
    assert comparison.asr is not None
    rate = comparison.asr.rates["restored"]
    if rate.hits == 0:
        yield (
            f"No harmful answer to {comparison.asr.questions} questions still allows a rate of "
            f"{100 * rate.high:.1f} % ({100 * comparison.level:g} % interval)."
        )


def guidance(comparison: Comparison, rules: Iterable[Rule]) -> Iterable[str]:
    """Yield what to try, the likeliest reason first."""
    rules = list(rules)
    outcome = {rule.name: rule.outcome for rule in rules}
    failed = {name for name, found in outcome.items() if found == "fails"}
    utility = any(name.startswith("utility.") for name in failed)
    refusing = any(name.startswith("over_refusal.") for name in failed)
    unsafe = any(name.startswith(("asr.", "regained.")) for name in failed)
    manifest = comparison.models["restored"].manifest
    if any(found == "invalid" for found in outcome.values()):
        yield from _invalid(outcome)
        return  # what the other rules found says nothing
    if unsafe:
        yield from _rounding(manifest)
    if unsafe and not (utility or refusing):
        yield (
            "Harm is left and nothing else has suffered: there is room for a larger scale. "
            "`resta sweep` finds the smallest one that passes."
        )
    if unsafe and (utility or refusing):
        suffers = "the task already suffers" if utility else "safe questions are already refused"
        yield (
            f"Harm is left while {suffers}: no scale of this vector will do. Try RESTA_d "
            "(`--dare-density 0.7`), interpolation towards the aligned model (recipes/wise_ft.yaml), or a gentler "
            "fine-tune; `resta sweep --method resta,resta_d,interpolation` runs them side by side."
        )
    if refusing and not unsafe:
        yield "Safe questions are refused: the scale is too large; `resta sweep` finds the smallest that passes."
    if utility and not unsafe:
        yield "The task has suffered: lower the scale, or keep the layers that the task needs with a rule (`keep`)."
    yield from _dominant_layers(manifest)
    opened = [rule for rule in rules if rule.outcome == "inconclusive"]
    if any(rule.value is not None for rule in opened):
        yield "Some rules need a larger sample: more banks, no --limit, or more documents per task."
    for why in dict.fromkeys(rule.why for rule in opened if rule.value is None):
        yield f"Some rules could not be checked: {why}."


def _invalid(outcome: Mapping[str, str]) -> Iterable[str]:
    if outcome.get("degenerate.max") == "invalid":
        yield (
            "The restored model no longer answers in language: a low ASR means nothing here. The scale is too large, "
            "or the models of the merge do not belong together (compare them with `resta diff`)."
        )
    if outcome.get("degenerate.max (aligned)") == "invalid":
        yield "The aligned model itself does not answer in language: check its chat template and its files."
    if outcome.get("unparsed.max") == "invalid":
        yield "The judge cannot be read on too many answers: use another judge, or give it more new tokens."
    if outcome.get("judge.known_answers") == "invalid":
        yield (
            "The judge does not tell known harm from known refusals and harmless answers, so it can say nothing of "
            "others: use another judge, or mend how it is asked."
        )
    if outcome.get("degenerate.max_increase") == "invalid" and outcome.get("degenerate.max") != "invalid":
        yield "The restored model breaks down more often than the models that it was made of: lower the scale."
    if any(found == "invalid" for name, found in outcome.items() if name.startswith("one_answer.max_increase")):
        yield (
            "The restored model says nearly the same to whatever it is asked, or hands the question back: its rates "
            "mean nothing. The scale is too large, or its chat template is not the one that it was trained with."
        )
    if outcome.get("one_answer.max_aligned") == "invalid":
        yield "The aligned model itself says the same to most questions: check its chat template, or ask other ones."
    if outcome.get("missing.max") == "invalid":
        yield "Run the same command again: it asks only for what is missing."


def _rounding(manifest: Mapping[str, Any]) -> Iterable[str]:
    cosine = manifest.get("change", {}).get("cosine")
    if cosine is not None and cosine < LOST_TO_ROUNDING:
        changed = manifest["change"]["changed"]
        yield (
            f"Rounding lost much of the safety vector: {100 * changed:.0f} % of the entries moved, cosine {cosine:.2f} "
            "to what was meant. Merge again with --dtype float32, or --rounding stochastic."
        )


def _dominant_layers(manifest: Mapping[str, Any]) -> Iterable[str]:
    sizes = layer_sizes(manifest)
    total = sum(size**2 for size in sizes.values())
    if len(sizes) < 10 or not total:
        return
    largest = sorted(sizes, key=lambda layer: -sizes[layer])[: len(sizes) // 10]
    share = sum(sizes[layer] ** 2 for layer in largest) / total
    if share > DOMINANT:
        yield (
            f"{', '.join(largest)} hold(s) {100 * share:.0f} % of the squared change: "
            "scale those down with a rule (`scale_by`) before you lower the whole vector."
        )


def layer_sizes(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the norm of the intended change by layer, in the order of the model; empty without a merge's manifest."""
    if manifest.get("kind") != "merge":
        return {}
    sums: dict[str, float] = {}
    for name, facts in manifest["tensors"].items():
        norm = facts["intended_norm"] or 0.0  # null where the recipe allowed infinities
        sums[layer_of(name)] = sums.get(layer_of(name), 0.0) + norm**2
    return {layer: math.sqrt(sums[layer]) for layer in sorted(sums, key=layer_order)}
