"""Red-Eval: harmful questions x prompt templates -> model -> judge -> Attack Success Rate with intervals.

The benchmark of Bhardwaj and Poria (arXiv 2308.09662). A run reads from left to right:

    questions.py  templates.py               what is asked           banks, prompts, digests
    targets.py  models.py                    who is asked            local models in batches, or a server
    engine.py  batchfile.py  wire.py         how it gets there       Inspect, or a file for elsewhere
    plan.py                                  what a run is           protocol, prompts, the digest that names it
    answering.py  thoughts.py  progress.py      phase one: answers      thoughts stripped, failures noted
    judging.py  judges.py  control.py        phase two: verdicts     declarations in judge/*.yaml, known answers
    records.py                               what is kept            flat, append-only JSON lines
    score.py  report.py                      what it amounts to
    tasks.py                                 the same for people who live in Inspect
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.redeval.evaluation import Run, Views, run
    from resta.redeval.profiles import Questions
    from resta.redeval.progress import RunOptions
    from resta.redeval.targets import Target, parse_target
else:
    __getattr__ = lazily(
        "resta.redeval",
        {
            **dict.fromkeys(("Run", "Views", "run"), "evaluation"),
            **dict.fromkeys(("Target", "parse_target"), "targets"),
            "Questions": "profiles",
            "RunOptions": "progress",
        },
    )

__all__ = ["Questions", "Run", "RunOptions", "Target", "Views", "parse_target", "run"]
