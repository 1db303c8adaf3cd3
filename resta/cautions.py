"""What whoever merges should know before anything is written: choices that are allowed, and seldom meant.

They follow from the recipe, the configs and the templates alone, so that an audit finds the same.
"""

from __future__ import annotations

import re

from resta.checkpoint import Weights, read_json
from resta.compatibility import differences, unknowns
from resta.plan import Plan
from resta.recipe import Term
from resta.safety import direction

LARGE_SCALE = 2.0  # published scales run from 0.1 to 1.0
ALIGNED_WORDS = re.compile(r"instruct|chat|aligned|safe|starling|dpo|rlhf|(?<![a-z])it(?![a-z])", re.IGNORECASE)


def cautions(plan: Plan) -> list[str]:
    """Return each caution about a plan in a sentence; none about a conversion."""
    recipe, found = plan.recipe, []
    if not recipe.terms:
        return []
    for index, term in enumerate(recipe.terms):
        found += _of_scale(term, safety=index in recipe.safety_terms)
        if index in recipe.safety_terms and term.scale != 0 and (sign := swapped(plan, term)):
            found.append(sign)
    start = plan.weights[recipe.start]
    for name, model in plan.weights.items():
        if not (model.config and start.config):
            missing = name if start.config else recipe.start
            found.append(f"{missing} has no config.json: whether {name} and {recipe.start} are alike was not checked")
            continue
        found += [
            f"config.json of {name} has {key} {theirs!r}, that of {recipe.start} {mine!r}; the recipe allows it"
            for key, mine, theirs in differences(start.config, model.config)
        ]
        if left := unknowns(start.config, model.config):
            found.append(
                f"only one of the configs of {recipe.start} and {name} names {', '.join(left)}; whether the other's "
                "default is the same was not checked"
            )
    return found


def name_cautions(plan: Plan) -> list[str]:
    """Return what the names of folders and repositories hint at; they are printed, and recorded nowhere."""
    found = []
    for index in plan.recipe.safety_terms:
        to, from_ = (plan.weights[end].located for end in plan.recipe.terms[index].ends)
        names = [(located.hub_id or located.folder.name).rpartition("/")[2] for located in (to, from_)]
        if ALIGNED_WORDS.search(names[1]) and not ALIGNED_WORDS.search(names[0]):
            found.append(
                f"base and aligned may be swapped: {names[1]} is subtracted from {names[0]}, and by its name it is the "
                "aligned one"
            )
    return found


def swapped(plan: Plan, term: Term) -> str | None:
    """Say so if the model that is subtracted looks like the aligned one: it alone has a chat template."""
    to, from_ = (plan.weights[end] for end in term.ends)
    if _chats(from_) and not _chats(to) and term.scale > 0:
        return (
            f"base and aligned may be swapped: in {term.delta}, only {term.ends[1]}, which is subtracted, has a chat "
            "template"
        )
    return None


def _of_scale(term: Term, *, safety: bool) -> list[str]:
    if term.scale == 0:
        return [f"{term.label} ({term.delta}) has scale 0" + (": nothing is restored" if safety else "")]
    found = []
    if safety and term.scale * direction(term) < 0 and term.scale > 0:
        found.append(f"{term.label} ({term.delta}) leads away from aligned: are its two models swapped?")
    if term.scale < 0:
        to, from_ = term.ends
        found.append(f"{term.label}: scale {term.scale:g} is negative: it takes away what {to} has beyond {from_}")
    if abs(term.scale) > LARGE_SCALE:
        found.append(f"{term.label}: scale {term.scale:g} is far beyond the published ones, which run from 0.1 to 1.0")
    return found


def _chats(weights: Weights) -> bool:
    """Whether a model's own files hold a chat template."""
    for folder in weights.tokenizer_folders:
        config = folder / "tokenizer_config.json"
        if (folder / "chat_template.jinja").is_file() or (config.is_file() and read_json(config).get("chat_template")):
            return True
    return False
