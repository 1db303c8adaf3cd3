"""The scale that restores safety at the least cost: candidates applied to one model in memory, measured, and chosen.

A sweep reads from left to right:

    candidates.py                               what is tried            methods, scales, groups, each as a recipe
    measure.py  apply.py  ray.py                how it is measured       one loaded model, or several on a cluster
    search.py  response.py  forecast.py         which is asked how much  bisection, a curve through all scales, chances
    records.py  pruning.py                      what was seen of it      counts; what cannot pass any more
    choose.py  baselines.py                     which is chosen          the front, noise and interpolation beside it
    outcome.py  report.py  settings.py          what it comes to         the folder, chosen.yaml
    conduct.py                                  all of it in one call
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.sweep.candidates import Candidate, Family, Grid
    from resta.sweep.choose import Choice, Tried
    from resta.sweep.conduct import make_family, run
    from resta.sweep.outcome import Outcome
else:
    __getattr__ = lazily(
        "resta.sweep",
        {
            **dict.fromkeys(("Candidate", "Family", "Grid"), "candidates"),
            **dict.fromkeys(("Choice", "Tried"), "choose"),
            **dict.fromkeys(("make_family", "run"), "conduct"),
            "Outcome": "outcome",
        },
    )

__all__ = ["Candidate", "Choice", "Family", "Grid", "Outcome", "Tried", "make_family", "run"]
