"""The everyday request: which model is which, how strong the safety vector is, and whether DARE thins a delta out.

    tuned + scale * (aligned - base)                              RESTA
    origin + dare(tuned - origin) + scale * (aligned - base)      RESTA_d, origin: what the fine-tune began from

Its messages name the flags of the command line, which say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resta.adapter import base_name, is_adapter
from resta.errors import RequestError
from resta.hub import locate
from resta.recipe import SCALE_ADVICE, Model, Recipe, make_recipe, named_models


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Which model plays which part: directories, adapters or `org/name@revision`.

    `unaligned` is subtracted from `aligned` in place of `base`. `tuned_from` is what the fine-tune began from: "base",
    "aligned" or another model. `recorded_base` confirms bases that adapters record under other names.
    """

    tuned: str
    aligned: str | None = None
    base: str | None = None
    unaligned: str | None = None
    tuned_from: str | None = None
    recorded_base: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """What a recipe calls the model that the fine-tune began from."""
        if self.tuned_from in ("base", "aligned"):
            return self.tuned_from
        return "origin" if self.tuned_from else "base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shorthand:
    """A merge of such models. `dare_on` is the delta that DARE thins out, "tuned" or "safety".

    `choices` are others of a recipe: seed, min_coverage, allow_config, and output as a mapping.
    """

    roles: Roles
    scale: float | None
    dare_density: float | None = None
    dare_on: str = "tuned"
    dare_rescale: str = "inverse_density"
    choices: Mapping[str, Any] = field(default_factory=dict)


def to_recipe(request: Shorthand) -> Recipe:
    """Return the recipe that says the same.

    Raises RequestError: something is missing, or does not fit together; or a model is not there.
    """
    roles, scale = request.roles, request.scale
    if scale is None:
        raise RequestError(f"--scale is required: {SCALE_ADVICE}")
    if roles.aligned is None or not (roles.base or roles.unaligned):
        raise RequestError("say --aligned, and --base or --unaligned: the safety vector is their difference")
    subtrahend = "unaligned" if roles.unaligned else "base"
    vector: dict[str, Any] = {"name": "safety", "delta": f"aligned - {subtrahend}", "scale": scale}
    dare = None
    if request.dare_density is not None:
        dare = {"density": request.dare_density, "rescale": request.dare_rescale}
    models = read_roles(roles)
    terms, start = [vector], "tuned"
    if dare and request.dare_on == "safety":
        vector["sparsify"] = dare
    elif dare:
        start = _origin(roles, models)
        terms = [{"name": "finetune", "delta": f"tuned - {start}", "scale": 1.0, "sparsify": dare}, vector]
    elif roles.tuned_from and models["tuned"].on is None:
        raise RequestError("--tuned-from is only used for an adapter, or with --dare-density and --dare-on tuned")
    used = {start, "aligned", subtrahend, "tuned"} | {model.on for model in models.values() if model.on}
    named = {name: model for name, model in models.items() if name in used}
    return make_recipe({"models": named, "start": start, "terms": terms, **request.choices})


def read_roles(roles: Roles) -> dict[str, Model]:
    """Return a recipe's models, adapters on their bases. Raises RequestError."""
    named = {"tuned": roles.tuned, "aligned": roles.aligned, "base": roles.base, "unaligned": roles.unaligned}
    if roles.origin == "origin":
        named["origin"] = roles.tuned_from
    models: dict[str, dict[str, Any]] = {
        name: {"source": _absolute(source)} for name, source in named.items() if source
    }
    confirmed = set(roles.recorded_base)
    for name, model in models.items():
        folder = locate(model["source"]).folder
        if not is_adapter(folder):
            continue
        if name not in ("tuned", "aligned"):
            raise RequestError(f"--{name} is an adapter; write a recipe that says which model it is on")
        model["on"] = _origin(roles, models) if name == "tuned" else "base"
        if model["on"] not in models:
            raise RequestError(f"--{name} is an adapter; say --{model['on']}, the model that it is on")
        if base_name(folder) in confirmed:
            model["recorded_base"] = base_name(folder)
    unused = confirmed - {model.get("recorded_base") for model in models.values()}
    if unused:
        raise RequestError(f"--recorded-base {sorted(unused)[0]!r}: no adapter given records that base")
    return named_models(models)


def _origin(roles: Roles, models: Mapping[str, Any]) -> str:
    if roles.origin not in models:
        raise RequestError(f"the model that the fine-tune began from is needed: say --{roles.origin} or --tuned-from")
    return roles.origin


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source
