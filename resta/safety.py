"""What may be said of a merge's safety vector: it rests on that vector's own terms, never on what others changed.

A fine-tuning term moves every weight of RESTA_d's result, whether or not the safety vector beside it is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resta.recipe import Recipe, Term

MOST_LOST = 0.5  # a vector of which rounding kept less than this share is not called restored


@dataclass(frozen=True, kw_only=True, slots=True)
class Safety:
    """Which terms of a recipe are the safety vector, whether the result has it, and that in one sentence."""

    terms: tuple[int, ...]
    restored: bool
    statement: str


def judge_safety(recipe: Recipe, norms: Sequence[float], kept: Sequence[float | None]) -> Safety:
    """Say whether a result has the safety vector that its recipe adds.

    Args:
        recipe: its safety terms are those of `Recipe.safety_terms`.
        norms: of each term's intended change.
        kept: the share of each term's intended change that rounding left; None where it is not defined.
    """
    terms = recipe.safety_terms
    acting = [index for index in terms if recipe.terms[index].scale != 0]
    words = " and ".join(f"{recipe.terms[index].scale:g} * ({recipe.terms[index].delta})" for index in terms)
    shares = [share for index in acting if (share := kept[index]) is not None]
    restored = False
    if not recipe.terms:
        statement = "Nothing is restored: the weights are those of the model that was converted, unchanged."
    elif not terms:
        statement = (
            "No safety vector is claimed: the recipe does not say which of its terms it is. Name that term `safety`."
        )
    elif not acting:
        statement = f"Nothing is restored: the safety vector has scale 0, {words}."
    elif any(recipe.terms[index].scale * direction(recipe.terms[index]) < 0 for index in acting):
        statement = f"Nothing is restored: the recipe adds {words}, which leads away from the aligned model."
    elif any(norms[index] == 0 for index in acting):
        statement = f"Nothing is restored: the safety vector, {words}, is zero."
    elif not all(math.isfinite(share) for share in shares):
        statement = f"Whether safety is restored is not known: {words} holds NaN or infinite values that rules allow."
    elif min(shares) < MOST_LOST:
        statement = f"Too little is restored: rounding kept {max(min(shares), 0):.0%} of the safety vector, {words}."
    else:
        restored = True
        statement = f"The safety vector was added: {words}. Rounding kept {min(shares):.0%} of it."
    return Safety(terms=terms, restored=restored, statement=statement)


def direction(term: Term) -> int:
    """Return 1 if a term's difference leads to the aligned model, -1 if it leads away from one of that name."""
    return -1 if term.ends[1] == "aligned" else 1
