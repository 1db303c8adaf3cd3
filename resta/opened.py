"""The models of a recipe, opened: what planning asks of their files is read once, however many plans are made.

Headers, configs and adapters are read when the models are opened; tokenizers, small files and the tensors that models
must agree on when a plan first asks for them. Whether a file has changed since is noticed when a merge reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from resta.adapter import is_adapter, read_adapter
from resta.auxiliary import AuxiliaryFile, read_auxiliary_files, tokenizer_conflict
from resta.checkpoint import PROBE_BYTES, FileIdentity, Operand, Reader, Weights, read_weights, same_bytes
from resta.errors import RequestError
from resta.hub import locate
from resta.recipe import Model
from resta.stored import Stored, View
from resta.tied import untie

Answer = TypeVar("Answer")


def open_models(models: Mapping[str, Model]) -> Opened:
    """Locate models and read their headers, adapters on their bases.

    Raises RequestError: a model cannot be read; or `on` is said of a full model, or missing for an adapter.
    """
    located = {name: locate(model.source) for name, model in models.items()}
    full, adapters = {}, {}
    for name, model in models.items():
        if is_adapter(located[name].folder):
            if model.on is None:
                raise RequestError(f"{name} ({model.source}) is a LoRA adapter: say which model it is `on`")
            adapters[name] = model
        elif model.on is not None:
            raise RequestError(f"{name} ({model.source}) is a full model, not an adapter: `on` is not for it")
        else:
            full[name] = read_weights(located[name], strip_prefix=model.strip_prefix)
    for name, model in adapters.items():
        if model.on in adapters:
            raise RequestError(f"{name} is on {model.on}, which is an adapter itself; merge that one first")
    mounted = {
        name: read_adapter(located[name], full[str(model.on)], recorded_base=model.recorded_base)
        for name, model in adapters.items()
    }
    return Opened(models, {name: (full | mounted)[name] for name in models})


class Opened:
    """Models that have been opened, and the answers that their files gave so far."""

    def __init__(self, models: Mapping[str, Model], weights: Mapping[str, Weights]) -> None:
        self._models = dict(models)
        self._weights = dict(weights)
        self._answers: dict[Hashable, Any] = {}

    def of(self, models: Mapping[str, Model]) -> dict[str, Weights]:
        """Return the weights of some of the models, as a recipe with no others has them.

        If one has an output layer of its own for the sake of an adapter, then all do, so that each finds its peers.
        """
        assert all(self._models[name] == model for name, model in models.items())
        found = {name: self._weights[name] for name in models}
        return (
            {name: untie(each) for name, each in found.items()} if any(w.is_untied for w in found.values()) else found
        )

    def has_config(self, name: str) -> bool:
        """Whether a model has a config.json."""
        path = self._weights[name].config_folder / "config.json"
        return self._once(("config", path), path.is_file)

    def tokenizer_conflict(self, mine: str, theirs: str) -> str | None:
        """Say how two models' tokenizers contradict each other, or None. Raises RequestError."""
        pair = self._weights[mine], self._weights[theirs]
        return self._once(("tokenizers", mine, theirs), lambda: tokenizer_conflict(*pair))

    def auxiliary_files(self, name: str) -> tuple[tuple[AuxiliaryFile, ...], tuple[str, ...]]:
        """Return the small files that a merge takes from a model, and the names left out. Raises RequestError."""
        return self._once(("auxiliary files", name), lambda: read_auxiliary_files(self._weights[name]))

    def same_bytes(self, mine: Stored | View, theirs: Stored | View, *, most: int | None = None) -> bool:
        """Whether two stored tensors of one size begin with the same bytes, `most` of them or all."""

        def read() -> bool:
            with Reader(self._files) as reader:
                return same_bytes(mine, theirs, reader, most=most)

        return self._once(("bytes", mine, theirs, most), read)

    def same_content(self, pairs: Sequence[tuple[Operand, Operand]]) -> bool:
        """Whether both tensors of every pair are the same by their bytes; where models differ, a few mostly tell.

        False where only arithmetic could tell: of an adapter, or where dtypes or shapes differ.
        """
        for mine, theirs in pairs:
            if mine.low_ranks or theirs.low_ranks or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                return False
        probed = all(self.same_bytes(mine.stored, theirs.stored, most=PROBE_BYTES) for mine, theirs in pairs)
        return probed and all(self.same_bytes(mine.stored, theirs.stored) for mine, theirs in pairs)

    @cached_property
    def _files(self) -> dict[Any, FileIdentity]:
        return {path: identity for each in self._weights.values() for path, identity in each.files.items()}

    def _once(self, question: Hashable, ask: Callable[[], Answer]) -> Answer:
        if question not in self._answers:
            self._answers[question] = ask()
        answer: Answer = self._answers[question]
        return answer
