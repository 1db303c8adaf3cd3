"""Public names that are imported when they are first used, so that `import resta` and `resta --help` are instant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`; `homes` is {public name: its module}, or {package: itself}; a
    module of the package above begins with a dot.

    No module may bear the name of a function that is public: importing it would put it in the function's place.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f".{homes[name]}", package)
        return module if homes[name] == name else getattr(module, name)

    return get
