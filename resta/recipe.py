"""A recipe: the equation, its models and its choices, as strict YAML.

    out = start + sum_i scale_i * sparsify_i(to_i - from_i)

Whatever changes the bytes of the result is in here, so that a recipe's digest and its inputs name the result; whatever
only changes the speed is a flag. This module knows nothing of files other than the recipe's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from resta.compatibility import MEANING
from resta.dialect import dump, parse
from resta.errors import RequestError
from resta.mergekit import convert, is_mergekit
from resta.schema import schema_of
from resta.strict import Several, Strict, check, did_you_mean, named, read_text

_NAME = re.compile(r"[^\W\d][\w.]*")  # letters of any script
_DELTA = re.compile(rf"\s*({_NAME.pattern})\s+-\s+({_NAME.pattern})\s*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|[KMGTkmgt]i?[Bb])")
_UNITS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(value: object) -> object:
    """Turn "5GB" or "512MiB" into bytes; whole numbers pass."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        unit = match[2]
        return int(float(match[1]) * (1024 if "i" in unit else 1000) ** _UNITS[unit[0].upper()])
    if isinstance(value, str | bool):
        raise ValueError('expected a size like "5GB" or "512MiB"')
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_line(value: str) -> str:
    if not value:
        raise ValueError("expected one line of text")
    return _writable(value)


def _writable(value: str) -> str:
    if value and value.splitlines() != [value]:  # also the line breaks that only Unicode and YAML know
        raise ValueError("expected one line of text")
    try:
        value.encode("utf-8")
    except UnicodeError:
        raise ValueError("expected text, found half of a surrogate pair") from None
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Density = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, AfterValidator(_writable)]
Line = Annotated[str, AfterValidator(_one_line)]


SCALE_ADVICE = (
    "no value is safe everywhere; published ones run from 0.1 to 1.0 (RESTA: 0.5), so merge at a few scales and keep "
    "the smallest that restores refusals without costing the task"
)


NO_TERMS = "terms is empty; a merge adds at least one"


class Model(Strict):
    """A model: a directory or `org/name@revision`; a LoRA adapter also says which model it is `on`."""

    source: Line = Field(description="Directory (relative to the recipe) or Hub id, org/name@revision.")
    on: Line | None = Field(
        default=None, description="For a LoRA adapter: the name of the model that it is applied to."
    )
    recorded_base: Text | None = Field(
        default=None,
        description="Confirms the base that the adapter records under another name, or with other contents, "
        "than `on` has.",
    )
    strip_prefix: Line | None = Field(
        default=None, description="Prefix removed from tensor names, such as module. or _orig_mod."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"source": value}
        if isinstance(value, bool | int | float):
            raise ValueError("expected a directory or Hub id")
        return value

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.on is None and self.recorded_base is not None:
            raise ValueError("recorded_base is for a LoRA adapter, beside `on`")
        if self.on is not None and self.strip_prefix is not None:
            raise ValueError("strip_prefix is for a full model; an adapter's names follow those of its base")
        return self


class _Models(Strict):
    models: dict[str, Model]


class Sparsify(Strict):
    """DARE: drop entries of a delta at random and rescale the rest (arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    density: Density = Field(description="Share of entries kept; the paper's 1 - p.")
    rescale: Literal["inverse_density", "l1_norm"] = Field(
        default="inverse_density",
        description="inverse_density: divide by the density (the paper); l1_norm: match the L1 norm (mergekit).",
    )


class Term(Strict):
    """One term of the sum: scale * sparsify(to - from)."""

    delta: Line = Field(description='A difference of two models, "aligned - base".')
    scale: float = Field(description=SCALE_ADVICE)
    name: Line | None = Field(
        default=None, description="What rules call this term; `safety` says that it is the safety vector."
    )
    sparsify: Sparsify | None = None

    @model_validator(mode="after")
    def _check(self) -> Term:
        if _DELTA.fullmatch(self.delta) is None:
            raise ValueError(f'delta must be "name - name" with spaces around the minus, found {self.delta!r}')
        return self

    @property
    def label(self) -> str:
        """What messages call it: its name, else "term"."""
        return f"term {self.name}" if self.name else "term"

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the models `to` and `from`."""
        match = _DELTA.fullmatch(self.delta)
        assert match is not None
        return match[1], match[2]


class Rule(Strict):
    """What to do with the tensors whose name matches a glob; the first rule that matches a tensor decides alone."""

    match: Line | Several[Line] = Field(description="Glob, or list of globs, over tensor names.")
    keep: bool = Field(default=False, description="Copy the tensor of `start`, whatever the other models hold.")
    scale_by: float | dict[str, float] | None = Field(
        default=None, description="Multiplies every term's scale, or those of the named terms."
    )
    missing: Literal["skip"] | None = Field(
        default=None, description="skip: leave out the terms whose models lack the tensor."
    )
    stand_in: Line | None = Field(
        default=None, description="Tensor read in its place in models that lack it (tied embeddings)."
    )
    extra: Literal["ignore"] | None = Field(
        default=None, description="ignore: the tensor is in other models and not in `start`; leave it out."
    )
    rows: Literal["shared"] | None = Field(
        default=None,
        description="shared: apply terms to the first rows that all models have; keep the rest of `start`.",
    )
    nonfinite: Literal["allow"] | None = Field(default=None, description="allow: NaN and infinity may pass.")

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs as a tuple."""
        return (self.match,) if isinstance(self.match, str) else self.match

    @model_validator(mode="after")
    def _check(self) -> Rule:
        choices = (self.scale_by, self.missing, self.stand_in, self.extra, self.rows)
        if self.keep and any(choice is not None for choice in choices):
            raise ValueError("keep copies the tensor as it is; only nonfinite may stand beside it")
        if not self.keep and self.nonfinite is None and all(choice is None for choice in choices):
            raise ValueError("the rule does nothing; add keep, scale_by, missing, stand_in, extra, rows or nonfinite")
        return self


class OutputChoices(Strict):
    """How the result is stored."""

    dtype: Literal["same", "float64", "float32", "bfloat16", "float16"] = Field(
        default="same", description="same: each tensor keeps the dtype that it has in `start`."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="stochastic: unbiased rounding to bfloat16 or float16, drawn from the seed."
    )
    shard_size: Annotated[int, BeforeValidator(parse_size), Field(gt=0)] = Field(
        default=5_000_000_000, description='Most tensor bytes per file, like "5GB".'
    )
    files_from: Line | None = Field(
        default=None,
        description="Model whose config, tokenizer and templates the result gets; default: `tuned`, else `start`.",
    )


class Recipe(Strict):
    """out = start + sum_i scale_i * sparsify_i(to_i - from_i)."""

    models: dict[str, Model] = Field(min_length=1, description="Every model by name.")
    start: Line = Field(description="The model that the terms are added to.")
    terms: Several[Term] = Field(description="What is added, in order.")
    seed: Seed = Field(default=0, description="Seed of DARE's masks and of stochastic rounding.")
    tokenizers: Literal["same", "ignore"] = Field(
        default="same", description="same: refuse models whose tokenizers give a shared id different tokens."
    )
    min_coverage: Share = Field(
        default=0.95,
        description="Least share of the parameters that rules and missing tensors must leave to each term.",
    )
    allow_config: Several[Line] = Field(
        default=(), description="Settings of config.json in which the models may differ though weights depend on them."
    )
    output: OutputChoices = OutputChoices()
    rules: Several[Rule] = ()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not self.terms and self.models.keys() != {self.start}:  # of one model it may be a conversion's
            raise ValueError(NO_TERMS)
        for name in self.models:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"model name {name!r} must be letters, digits, _ and ., beginning with a letter")
        used = {self.start, *(end for term in self.terms for end in term.ends)}
        if self.output.files_from:
            used.add(self.output.files_from)
        used |= {model.on for name, model in self.models.items() if model.on and name in used}
        for name in sorted(used - self.models.keys()):
            raise ValueError(f"{name!r} is not among the models{did_you_mean(name, self.models)}")
        for name in self.models.keys() - used:
            raise ValueError(f"model {name!r} is never used; remove it or name it in a term")
        for key in self.allow_config:
            if key not in MEANING:
                hint = did_you_mean(key, MEANING) or f"; known: {', '.join(MEANING)}"
                raise ValueError(f"allow_config names {key!r}, which is not a setting that models must share{hint}")
        self._check_terms()
        return self

    def _check_terms(self) -> None:
        names = [term.name for term in self.terms if term.name]
        if len(set(names)) != len(names):
            raise ValueError("two terms have the same name")
        for rule in self.rules:
            for name in rule.scale_by if isinstance(rule.scale_by, dict) else ():
                if name not in names:
                    raise ValueError(f"scale_by names {name!r}, which is not a term's name{did_you_mean(name, names)}")

    def check_terms(self) -> None:
        """Raise RequestError where nothing is added: such a recipe is a conversion's, which no user writes."""
        if not self.terms:
            raise RequestError(NO_TERMS)

    @property
    def files_from(self) -> str:
        """Name of the model that config, tokenizer and templates come from."""
        return self.output.files_from or ("tuned" if "tuned" in self.models else self.start)

    @property
    def safety_terms(self) -> tuple[int, ...]:
        """Which terms are the safety vector, by index; none if the recipe does not tell.

        The term named `safety`. Without one, the terms that lead to a model which is neither `tuned`, nor the start,
        nor the one that the files come from: the others rebuild the fine-tune. If such terms lead to several models,
        nothing tells the safe one from the rest.
        """
        named = tuple(index for index, term in enumerate(self.terms) if term.name == "safety")
        mine = {"tuned", self.start, self.files_from}
        towards = {index: term.ends[0] for index, term in enumerate(self.terms) if term.ends[0] not in mine}
        return named or (tuple(towards) if len(set(towards.values())) == 1 else ())

    @property
    def digest(self) -> str:
        """SHA-256 of everything but where the models lie; which models they were, an output's manifest says.

        Nor does it hold what an adapter calls its base (a place, perhaps): that is confirmed, and decides no byte.
        """
        plain = self.model_dump(mode="json")
        for model in plain["models"].values():
            del model["source"]
            model["recorded_base"] = None
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def equation(self) -> str:
        """The equation in one line, with this recipe's names and numbers."""
        densities = [term.sparsify.density if term.sparsify else None for term in self.terms]
        terms = [
            show_term(term.scale, term.delta, density) for term, density in zip(self.terms, densities, strict=True)
        ]
        return " ".join([self.start, *terms])


def show_term(scale: float, delta: str, density: float | None) -> str:
    """Return a term as an equation shows it: `+ 0.5 * (aligned - base)`; with a density, as DARE's."""
    inner = f"({delta})" if density is None else f"dare({delta}, density={density:g})"
    return f"{'-' if scale < 0 else '+'} {abs(scale):g} * {inner}"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; relative sources are taken from its folder.

    Raises RequestError: not YAML, a key that is unknown or repeated, or values that do not fit together.
    """
    with named(path):
        recipe = parse_recipe(read_text(path))
    models = {name: _anchored(model, path.parent) for name, model in recipe.models.items()}
    return recipe.model_copy(update={"models": models})


def parse_recipe(text: str) -> Recipe:
    """Validate a recipe's text, or translate a mergekit configuration's.

    Raises RequestError: see `load_recipe`.
    """
    parsed = parse(text)
    return make_recipe(convert(parsed) if is_mergekit(parsed) else parsed)


def mergekit_note(path: Path) -> str | None:
    """Say how a recipe file that is a mergekit configuration is understood; None if it is a recipe of resta."""
    parsed = parse(read_text(path))
    if not is_mergekit(parsed):
        return None
    dtype = parsed.get("dtype")
    narrow = "" if dtype in (None, "float32") else f" (at dtype: {dtype} it rounds every intermediate result to that)"
    return (
        f"{path.name} is a mergekit configuration ({parsed['merge_method']}), translated: --dry-run prints the recipe. "
        f"The arithmetic is in float32 with one rounding at the end, as mergekit's is at dtype: float32{narrow}"
    )


def make_recipe(parsed: object) -> Recipe:
    """Validate a recipe given as plain data.

    Raises RequestError: see `load_recipe`.
    """
    recipe = check(Recipe, parsed)
    recipe.check_terms()
    return recipe


def named_models(parsed: object) -> dict[str, Model]:
    """Validate a recipe's models given as plain data.

    Raises RequestError: see `load_recipe`.
    """
    return check(_Models, {"models": parsed}).models


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, without what has its default value."""
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    plain["models"] = {
        name: model["source"] if set(model) == {"source"} else model for name, model in plain["models"].items()
    }
    return dump(plain)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    plain = schema_of(Recipe)
    # A model may be written as its source alone.
    models = plain["properties"]["models"]
    models["additionalProperties"] = {"anyOf": [models["additionalProperties"], {"type": "string"}]}
    size = plain["$defs"]["OutputChoices"]["properties"]["shard_size"]
    del size["type"]
    size["anyOf"] = [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _SIZE.pattern}]
    return plain


def _anchored(model: Model, folder: Path) -> Model:
    try:
        path = Path(model.source).expanduser()
        if path.is_absolute() or not (folder / path).is_dir():
            return model
    except (OSError, RuntimeError):  # no path: `locate` says why
        return model
    return model.model_copy(update={"source": str((folder / path).resolve())})
