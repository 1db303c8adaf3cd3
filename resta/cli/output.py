"""Where a command writes: one spelling for all, and those that there were before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
NAMES = ("-o", "--out", "--output")


def output(**attributes: Any) -> Callable[[Function], Function]:
    """Return the decorator of a command's output option, which hands over `out`; `attributes` are click.option's."""
    return click.option(*NAMES, "out", **attributes)
