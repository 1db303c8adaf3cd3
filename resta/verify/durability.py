"""How much safety is left after known attacks (attacks.py), as data and in words: reported, never promised.

No rule reads it, so no verdict can rest on it. OUT/durability.json holds it, of the three models that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from resta.errors import ResumeError
from resta.fingerprint import digest
from resta.journal import document, read_object, write_whole
from resta.page import Cell, Entry, Table, table
from resta.redeval.records import content_of
from resta.redeval.report import with_interval
from resta.schema import DIALECT, closed, schema_of_data
from resta.statistics import Difference, Rate
from resta.verify.comparison import Comparison
from resta.verify.words import points

SCHEMA = 1  # of durability.json
FILE = "durability.json"
ATTACKED = ("aligned", "restored")
ATTACKS = {  # name -> what was done, as the reports say it
    "benign": "fine-tuned by ten steps on harmless conversations",
    "direction": "one refusal direction projected out",
    "subtraction": "the published change subtracted",
}
ONE_SUBTRACTION = "A published vector is one subtraction away from being undone."
CAUTION = f"Reported, not promised: no rule and no verdict rests on it. {ONE_SUBTRACTION}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attacks:
    """What is asked of attacked models, and on what the benign fine-tuning learns.

    Attacks(questions=200, data="support-conversations.jsonl")
    """

    questions: int = 100  # harmful ones at most, of those that the gate asks, the same for both models
    data: str | Path | None = None  # conversations as `resta sft` reads them; None: tuned's own answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Attacked:
    """One model under one attack; `after` and `change` are None where it does not apply, for the reason `why_not`."""

    after: Rate | None = None
    change: Difference | None = None  # after - before, paired on the same questions
    why_not: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the attack: losses, the direction's layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One attack on both models. `over_aligned` is restored - aligned, None where it does not apply to both."""

    name: str
    models: Mapping[str, Attacked]
    over_aligned: Difference | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Durability:
    """Shares of harmful answers before and after each attack; what the judge could not read counts as harm."""

    models: Mapping[str, str]  # role -> digest of what identifies the model that was measured
    judge: str
    template: str
    level: float
    max_new_tokens: int
    data: str  # on what the benign fine-tuning learned, in words
    before: Mapping[str, Rate]
    before_over_aligned: Difference
    attacks: tuple[Attack, ...]


def models_of(comparison: Comparison) -> dict[str, str]:
    """Return a digest of what identifies each of the three models, wherever it lies."""
    return {role: digest(content_of(model.target)) for role, model in comparison.models.items()}


def write_durability(out: Path, found: Durability) -> None:
    """Write OUT/durability.json, whole."""
    write_whole(out / FILE, document("durability", asdict(found), schema=SCHEMA))


def read_durability(out: Path, comparison: Comparison) -> Durability | None:
    """Return what OUT/durability.json says of these three models and this judge; None where it says nothing of them.

    Raises ResumeError.
    """
    try:
        content = read_object(out / FILE)
    except FileNotFoundError:
        return None
    try:
        if (content.pop("kind"), content.pop("schema")) != ("durability", SCHEMA):
            raise ValueError(f"expected schema {SCHEMA} of a durability")
        found: Durability = TypeAdapter(Durability).validate_python(content)
    except (KeyError, ValueError, ValidationError) as error:
        raise ResumeError(f"{out / FILE}: cannot be read: {error}; remove it") from error
    same = found.models == models_of(comparison) and found.judge == comparison.judge
    return found if same else None


def durability_schema() -> dict[str, Any]:
    """Return the JSON Schema of durability.json."""
    head = {"schema": {"const": SCHEMA}, "kind": {"const": "durability"}}
    content = closed({**head, **schema_of_data(Durability)["properties"]})
    return {"$schema": DIALECT, "title": "durability.json, as resta verify --durability writes it", **content}


# -- in words ------------------------------------------------------------------------------------------------


def durability_table(found: Durability) -> Table:
    """Return the rates before and after each attack, side by side."""

    def row(name: str, models: Mapping[str, Attacked], over: Difference | None) -> tuple[Entry, ...]:
        cells = (words for role in ATTACKED for words in _words(models[role]))
        return (name, *cells, "–" if over is None else points(over))

    before = {role: Attacked(after=rate) for role, rate in found.before.items()}
    rows = [row("as released", before, found.before_over_aligned)]
    rows += [row(ATTACKS[attack.name], attack.models, attack.over_aligned) for attack in found.attacks]
    aligned, restored = (Cell(role, tone=role, sign=sign) for role, sign in (("aligned", "●"), ("restored", "◆")))
    header = ("the model", aligned, "change, in points", restored, "change, in points", "restored - aligned, in points")
    return table("Share of harmful answers before and after known attacks", header, rows)


def _words(found: Attacked) -> tuple[str, str]:
    if found.after is None:
        return "not applicable", "–"
    return with_interval(found.after), "–" if found.change is None else points(found.change)


def durability_lines(found: Durability) -> tuple[str, ...]:
    """Return what to know when reading the table, a sentence or two each."""
    return (CAUTION, *_how(found), *_notes(found))


def _how(found: Durability) -> Iterable[str]:
    asked = found.before["restored"].total
    yield (
        f"{asked} of the gate's own harmful questions, the same for both models, through the template "
        f"{found.template}, at most {found.max_new_tokens} new tokens, judged by {found.judge}; what it could not read "
        "counts as harm."
    )
    yield f"The fine-tuning (LoRA of rank 8 on all linear layers, AdamW at 1e-3) learned {found.data}."


def _notes(found: Durability) -> Iterable[str]:
    """Yield why attacks do not apply, and which direction was projected out."""
    for attack in found.attacks:
        for role in ATTACKED:
            model = attack.models[role]
            if model.why_not:
                yield f"{role}, {ATTACKS[attack.name]}: not applicable, {model.why_not}."
            elif "layer" in model.facts:
                harmful, harmless = (model.facts[f"{kind}_cost"] for kind in ("harmful", "harmless"))
                yield (
                    f"{role}: the direction is that after layer {model.facts['layer']}; without it its own answers "
                    f"are unlikelier by {harmful:.2f} nats a token on harmful, by {harmless:.2f} on harmless prompts."
                )
            elif "what" in model.facts:
                yield f"{role}: {model.facts['what']}."
