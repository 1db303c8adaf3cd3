"""What is tried: methods, scales and densities as recipes, and in which order.

    resta           tuned + scale * (aligned - base)
    resta_d         origin + dare(tuned - origin) + scale * (aligned - base)      origin: what the fine-tune began from
    interpolation   tuned + scale * (aligned - tuned)                             needs no base
    both            tuned + scale * (aligned - base) + scale * (aligned - tuned)
    patch           start + scale * (patch - start)                               a learned adapter, on tuned or a merge
    recipe          the user's own recipe with another scale
    groups          any of them, with scales of their own for the tensors of attention, MLP or embeddings
    random          tuned + a random vector, tensor by tensor of the norm of scale * (aligned - base)      the control

`unaligned` may stand for `base` in the vector. Knows nothing of measuring.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import cached_property
from itertools import product
from typing import Any, Literal, TypeVar

from resta.errors import RequestError
from resta.opened import Opened, open_models
from resta.plan import Plan, make_plan
from resta.recipe import Model, OutputChoices, Recipe, Rule, Term, make_recipe

Method = Literal["resta", "resta_d", "interpolation", "both", "patch", "recipe", "random"]
CHOICES = ("resta", "resta_d", "interpolation", "both")  # what --method may name
TOWARDS = ("interpolation", "both")  # methods that go to the aligned model itself, and no farther than scale 1
INTERPOLATION_SCALES = tuple(i / 10 for i in range(1, 10))
TUNED_FILES = OutputChoices(files_from="tuned")
MIN_COVERAGE: float = Recipe.model_fields["min_coverage"].default
MOST = 1000  # values in one range, candidates of one grid
GROUPS = {  # tensors by the names that the architectures of transformers give them
    "attention": ("*.self_attn.*", "*.attn.*", "*.attention.*", "*.self_attention.*", "*.linear_attn.*"),
    "mlp": ("*.mlp.*", "*.feed_forward.*", "*.block_sparse_moe.*"),
    "embeddings": ("*embed_tokens.*", "*lm_head.*", "*wte.*", "*embed_in.*", "*embed_out.*", "*word_embeddings.*"),
}

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One model to try. `density` is the share of entries that DARE keeps, where it is swept.

    `groups` are scales that hold for a group of tensors in place of `scale`. A baseline is measured beside the
    others and never chosen.
    """

    method: Method
    scale: float
    density: float | None = None
    baseline: bool = False
    groups: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Return what its folder is called: resta_d-0.5-density-0.7-mlp-0.2."""
        named = [] if self.density is None else [("density", self.density)]
        parts = [(self.method, self.scale), *named, *self.groups]
        return "-".join(f"{word}-{digits(value)}" for word, value in parts)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all candidates share: the models by name, a recipe's choices, and what else decides their bytes.

    `start` and `terms` are those of a recipe of the user's own, for the method `recipe`; a patch is added to `start`,
    too. `groups` are names of GROUPS, whose tensors may have a scale of their own.
    """

    models: Mapping[str, Model]
    seed: int = 0
    tokenizers: Literal["same", "ignore"] = "same"
    min_coverage: float = MIN_COVERAGE
    allow_config: tuple[str, ...] = ()
    output: OutputChoices = TUNED_FILES
    rules: tuple[Rule, ...] = ()
    origin: str = "base"
    rescale: Literal["inverse_density", "l1_norm"] = "inverse_density"
    groups: tuple[str, ...] = ()
    start: str = "tuned"
    terms: tuple[Term, ...] = ()

    @property
    def subtrahend(self) -> str:
        """Return the model that is subtracted from `aligned`."""
        return next((name for name in ("unaligned", "base") if name in self.models), "tuned")

    @property
    def choices(self) -> dict[str, Any]:
        """Return what goes into every candidate's recipe, but for where its files come from."""
        names = ("seed", "tokenizers", "min_coverage", "allow_config", "output", "rules")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def weights(self) -> Opened:
        """The models, opened once for all candidates. Raises what `open_models` does."""
        return open_models(self.models)

    @cached_property
    def tuned_plan(self) -> Plan:
        """The plan whose result is `tuned`, bit for bit."""
        return make_plan(tuned_recipe(self), weights=self.weights)

    @cached_property
    def globs(self) -> dict[str, tuple[str, ...]]:
        """The globs of each group that match a tensor of the model. Raises RequestError for a group without any."""
        return {name: _globs(name, [step.name for step in self.tuned_plan.steps]) for name in self.groups}


def _globs(group: str, tensors: Sequence[str]) -> tuple[str, ...]:
    found = tuple(glob for glob in GROUPS[group] if fnmatch.filter(tensors, glob))
    if not found:
        raise RequestError(f"--group {group}: no tensor of the model is called like {', '.join(GROUPS[group])}")
    return found


def family_of(recipe: Recipe) -> Family:
    """Return the family of a recipe of the user's own, whose scale is swept."""
    own = {name: getattr(recipe, name) for name in ("models", "start", "terms")}
    choices = {name: getattr(recipe, name) for name in Family(models={}).choices}
    return Family(**own, **choices, origin=recipe.start if recipe.start != "tuned" else "base")


# -- from texts ----------------------------------------------------------------------------------------------


def parse_numbers(text: str, what: str) -> tuple[float, ...]:
    """Return the numbers of a list "0.2,0.5" or of an inclusive range "0:1:0.1". Raises RequestError.

    Counted in decimals, so that the fourth value of 0:1:0.1 is 0.3 and nothing near it.
    """
    numbers = _range(text, what) if ":" in text else [_decimal(part, text, what) for part in text.split(",")]
    values = tuple(float(number) for number in numbers)
    if len(set(values)) < len(values):
        raise RequestError(f"{what} {text!r} names a value twice")
    return values


def _range(text: str, what: str) -> list[Decimal]:
    parts = [_decimal(part, text, what) for part in text.split(":")]
    if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
        raise RequestError(f"{what} {text!r}: expected FROM:TO:STEP with a positive step and FROM not above TO")
    first, last, step = parts
    if (last - first) / step >= MOST:
        raise RequestError(f"{what} {text!r} has more than {MOST} values")
    count, rest = divmod(last - first, step)
    if rest:
        raise RequestError(
            f"{what} {text!r}: steps of {step} from {first} do not end at {last}, which is meant to be in"
        )
    return [first + i * step for i in range(int(count) + 1)]


def _decimal(part: str, text: str, what: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or abs(number) > 1000 or (number and abs(number) < Decimal("1e-6")):
        raise RequestError(f"{what} {text!r}: expected numbers like 0.2,0.5 or a range like 0:1:0.1, found {part!r}")
    return number


def check_density(values: Iterable[float]) -> None:
    """Raise RequestError unless each is a share of entries that may be kept."""
    for value in values:
        if not 0 < value <= 1:
            raise RequestError(f"--density {value:g}: a density is the share of entries kept, above 0 and at most 1")


# -- which, and in which order -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The values to try. Each method takes the scales, `both` those up to 1, RESTA_d (and a recipe with DARE) every
    density, too.

    Baselines of the chosen candidate's norm are run anyway; these are more.
    """

    scales: tuple[float, ...]
    methods: tuple[Method, ...] = ("resta",)
    densities: tuple[float, ...] = ()
    interpolation_scales: tuple[float, ...] | None = None  # None: INTERPOLATION_SCALES
    random_scales: tuple[float, ...] | None = None  # None: those of `scales`


def searched(grid: Grid) -> Grid:
    """Return what a search begins with: the methods, and only those baselines that are named."""
    usual = None if "interpolation" in grid.methods else ()
    scales = usual if grid.interpolation_scales is None else grid.interpolation_scales
    return replace(grid, interpolation_scales=scales, random_scales=grid.random_scales or ())


def candidates_of(grid: Grid, groups: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Return all candidates, coarse steps first, so that a grid that is cut short has seen the whole range.

    Each of `groups` has every scale, whatever that of the rest is. RESTA and interpolation at scale 0 are `tuned`,
    which is measured anyway, and are left out.
    """
    grid = replace(
        grid,
        interpolation_scales=INTERPOLATION_SCALES if grid.interpolation_scales is None else grid.interpolation_scales,
    )
    columns = [
        [more for each in _column(method, grid) for more in _grouped(each, grid.scales, groups)]
        for method in grid.methods
    ]
    if sum(map(len, columns)) > MOST:
        raise RequestError(f"--grid: more than {MOST} candidates; give fewer scales, or leave the search to --search")
    if "interpolation" not in grid.methods:
        columns.append(
            [Candidate(method="interpolation", scale=scale, baseline=True) for scale in grid.interpolation_scales or ()]
        )
    randoms = grid.scales if grid.random_scales is None else grid.random_scales
    columns.append([Candidate(method="random", scale=scale, baseline=True) for scale in randoms])
    ranked = [
        (rank, place, candidate)
        for place, column in enumerate(columns)
        for rank, candidate in enumerate(coarse_first([c for c in column if not _is_tuned(c)]))
    ]
    return tuple(candidate for _, _, candidate in sorted(ranked, key=lambda entry: entry[:2]))


def _column(method: Method, grid: Grid) -> list[Candidate]:
    densities: tuple[float | None, ...] = grid.densities if method in ("resta_d", "recipe") else ()
    scales = grid.interpolation_scales or () if method == "interpolation" else grid.scales
    if method == "both":
        scales = tuple(scale for scale in scales if 0 < scale <= 1)
    return [
        Candidate(method=method, scale=scale, density=density) for scale in scales for density in densities or (None,)
    ]


def _grouped(candidate: Candidate, scales: Sequence[float], groups: Sequence[str]) -> list[Candidate]:
    """Return a candidate, and with every combination of the groups' scales."""
    if candidate.scale == 0 or not groups:
        return [candidate]
    if len(scales) ** len(groups) > MOST:
        raise RequestError(f"--grid: more than {MOST} candidates; give fewer scales, or leave the search to --search")
    return [
        replace(candidate, groups=tuple((group, scale) for group, scale in found if scale != candidate.scale))
        for found in product(*([(group, scale) for scale in scales] for group in groups))
    ]


def _is_tuned(candidate: Candidate) -> bool:
    return candidate.scale == 0 and candidate.method in ("resta", "interpolation", "random")


def coarse_first(items: Sequence[Item]) -> list[Item]:
    """Return items reordered: the ends, the middle, then the middles of what is left."""
    order: list[int] = []
    spans = [(0, len(items) - 1)] if items else []
    order += dict.fromkeys(end for span in spans for end in span)
    while spans:
        low, high = spans.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return [items[i] for i in order]


# -- as recipes ----------------------------------------------------------------------------------------------


def plan_of(candidate: Candidate, family: Family) -> Plan:
    """Return the plan of a candidate's merge; for `random`, see `recipe_of`. Raises what `make_plan` does."""
    return make_plan(recipe_of(candidate, family), weights=family.weights)


def recipe_of(candidate: Candidate, family: Family) -> Recipe:
    """Return a candidate's recipe; for `random`, the recipe whose vector has its norm. Raises RequestError."""
    found = _own(candidate, family) if candidate.method == "recipe" else _by_method(candidate, family)
    if not candidate.groups:
        return found
    plain = found.model_dump(mode="json")
    terms = plain["terms"]
    swept = terms if candidate.method == "both" else [terms[swept_term(found.terms)]]
    for term in swept:
        term["name"] = term["name"] or "safety"
    plain["rules"] = [
        {"match": list(family.globs[group]), "scale_by": {term["name"]: scale / candidate.scale for term in swept}}
        for group, scale in candidate.groups
    ]
    if any(scale == 0 for _, scale in candidate.groups):
        plain["min_coverage"] = 0.0  # a group that stays as it is, is left alone on purpose
    return make_recipe(plain)


def _by_method(candidate: Candidate, family: Family) -> Recipe:
    vector = {"name": "safety", "delta": f"aligned - {family.subtrahend}", "scale": candidate.scale}
    towards = {"name": "interpolation", "delta": "aligned - tuned", "scale": candidate.scale}
    if candidate.method == "patch":
        patch = {"name": "patch", "delta": f"patch - {family.start}", "scale": candidate.scale}
        return _recipe(family, family.start, [patch])
    if candidate.method != "resta_d":
        terms = {"interpolation": [towards], "both": [vector, towards]}.get(candidate.method, [vector])
        return _recipe(family, "tuned", terms)
    dare = {"density": candidate.density, "rescale": family.rescale}
    finetune = {"name": "finetune", "delta": f"tuned - {family.origin}", "scale": 1.0, "sparsify": dare}
    return _recipe(family, family.origin, [finetune, vector])


def tuned_recipe(family: Family) -> Recipe:
    """Return the recipe whose result is `tuned`, bit for bit."""
    return _recipe(family, "tuned", [{"name": "safety", "delta": "aligned - tuned", "scale": 0.0}])


def _recipe(family: Family, start: str, terms: list[dict[str, Any]]) -> Recipe:
    models = family.models
    used = {start, "tuned", *(end for term in terms for end in term["delta"].split(" - "))}
    missing = sorted(used - models.keys())
    if missing:
        raise RequestError(f"{terms[-1]['name']} needs the model(s) {', '.join(missing)}; given: {', '.join(models)}")
    used |= {on for name in used if (on := models[name].on)}
    return make_recipe(
        {
            **family.choices,
            "models": {name: model for name, model in models.items() if name in used},
            "start": start,
            "terms": terms,
            "output": family.output.model_copy(update={"files_from": "tuned"}),
        }
    )


def swept_term(terms: Sequence[Term]) -> int:
    """Return which term's scale is swept: `safety`, else `interpolation`, else the only one. Raises RequestError."""
    names = [term.name for term in terms]
    for name in ("safety", "interpolation"):
        if name in names:
            return names.index(name)
    if len(names) != 1:
        raise RequestError("the recipe has several terms; name the one whose scale is swept `safety`")
    return 0


def _own(candidate: Candidate, family: Family) -> Recipe:
    terms = [term.model_dump() for term in family.terms]
    terms[swept_term(family.terms)]["scale"] = candidate.scale
    if candidate.density is not None:
        thinned = [term["sparsify"] for term in terms if term["sparsify"]]
        if not thinned:
            raise RequestError("--density: no term of the recipe is sparsified")
        for sparsify in thinned:
            sparsify["density"] = candidate.density
    return make_recipe({**family.choices, "models": family.models, "start": family.start, "terms": terms})


def check_methods(grid: Grid, family: Family) -> None:
    """Refuse methods that need what is not given. Raises RequestError."""
    models = family.models
    for role in ("tuned", "aligned"):
        if role not in models:
            raise RequestError(f"no model is called {role!r}; a sweep compares with tuned and aligned, by these names")
    if {"resta", "resta_d", "both"} & set(grid.methods) and family.subtrahend == "tuned":
        raise RequestError("resta, resta_d and both need --base (or --unaligned), which is subtracted from aligned")
    if "both" in grid.methods and not any(0 < scale <= 1 for scale in grid.scales):
        raise RequestError("both goes to the aligned model and no farther: it needs a --scale above 0 and at most 1")
    if "resta_d" in grid.methods and family.origin not in models:
        raise RequestError(f"resta_d starts from {family.origin}, which is not given; say --{family.origin}")
    if "resta_d" in grid.methods and not grid.densities:
        raise RequestError(
            "resta_d needs --density, the share of the fine-tune's delta that DARE keeps (the paper: 0.7)"
        )
    if grid.densities and not {"resta_d", "recipe"} & set(grid.methods):
        raise RequestError("--density is used by resta_d alone; add it to --method")


def check_groups(family: Family) -> None:
    """Refuse groups that are not known or not there. Raises RequestError."""
    names = family.groups
    if names and family.rules:
        raise RequestError(
            "--group: the recipe has rules of its own, and the first that matches decides; leave one out"
        )
    if not set(names) <= GROUPS.keys() or len(set(names)) < len(names):
        raise RequestError(f"--group {','.join(names)}: expected some of {', '.join(GROUPS)}, each once")
    _ = family.globs  # found now, and refused here if a group has no tensor


def digits(value: float) -> str:
    """Return the shortest decimal that is this number: 0.1, 1, 0.25."""
    return format(Decimal(repr(value)).normalize(), "f")
