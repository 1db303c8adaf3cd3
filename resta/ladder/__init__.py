"""From a tuned model to a released one: remedies tried from the cheapest on, and the first that works is proved.

A ladder reads from left to right:

    rungs.py  patches.py    what is tried          tuned as it is, weight arithmetic, other rounding, a patch
    questions.py            by which questions     parts that share none; those of the verdict are spent once
    request.py  costs.py    what is asked for      refused before anything is loaded; what it will take
    proof.py                the verdict            on the written candidate, which is released by one rename
    story.py                what came of it        a page, a table, a sentence
    conduct.py              all of it in one call
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.ladder.conduct import restore
    from resta.ladder.rungs import Choices
    from resta.ladder.story import Restoration
else:
    __getattr__ = lazily("resta.ladder", {"restore": "conduct", "Choices": "rungs", "Restoration": "story"})

__all__ = ["Choices", "Restoration", "restore"]
