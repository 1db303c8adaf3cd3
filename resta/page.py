"""Text from elsewhere (paths, tensor names, what models wrote) as a terminal may show it.

A name may hold escape sequences that a terminal obeys, letters that turn the reading direction, line breaks that
fake a message, or rich's markup. Whatever prints such text passes it through `printable` and a `console` of this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: object) -> str:
    r"""Return text as one line in which whatever is not visible is written out, as in "\x1b" or "\u202e"."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def printable_lines(text: object) -> str:
    r"""Return text that may have several lines, each of them as `printable` gives it; only "\n" parts lines."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def console(**options: Any) -> Console:
    """Return a rich console that takes text for what it is: no markup, no emoji names, no guesses at colours."""
    from rich.console import Console  # imported here: `resta --help` prints without it

    return Console(highlight=False, markup=False, emoji=False, **options)
