"""The pre-release gate: whether a restored model is safe again, as useful as before, and refuses no more than it must.

A verification reads from left to right:

    policy.py                                       what is asked for      rules, limits, the default policy
    budget.py  plan.py  power.py                    what is measured       questions, judges, tasks; what they can show
    measure.py  utility.py  coherence.py            measuring              three models alike, in folders that go on
    measurement.py  documents.py  places.py         what is kept           one folder per model (samples.py: imported)
    comparison.py  sameness.py  origin.py           what it amounts to     paired differences with intervals
    gate.py  decision.py  trust.py  guidance.py     the verdict            every rule, and what to do about it
    trace.py                                        what cannot be undone  a line for every decision ever made
    views.py  report.py  html.py  junit.py          how it is shown        from one comparison, decision and ruling
    attacks.py  attacked.py  durability.py          beside it              what is left after known attacks; no verdict
    release.py                                      all of it as one call
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.verify.budget import Exam, Utility
    from resta.verify.decision import Verdict
    from resta.verify.durability import Attacks, Durability
    from resta.verify.release import Verification, Views, forecast, run
else:
    __getattr__ = lazily(
        "resta.verify",
        {
            **dict.fromkeys(("Exam", "Utility"), "budget"),
            **dict.fromkeys(("Verification", "Views", "forecast", "run"), "release"),
            "Verdict": "decision",
            **dict.fromkeys(("Attacks", "Durability"), "durability"),
        },
    )

__all__ = ["Attacks", "Durability", "Exam", "Utility", "Verdict", "Verification", "Views", "forecast", "run"]
