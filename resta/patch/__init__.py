"""A safety patch: a small adapter that gives a tuned model its refusals back where no arithmetic of weights does.

    import resta
    resta.patch.run(tuned="tuned", aligned="aligned", task_prompts="train.jsonl", out="patch")

    prompts.py       what is asked          harmful questions, the task's prompts, harmless ones and look-alikes
    teachers.py      phase one              aligned answers the harmful ones, tuned all others
    request.py       phase two              an adapter on tuned, learned by the trainer of resta.sft (sft/distil.py)
    written.py       what is kept           the adapter, its provenance, a card
    learn.py         all of it as one call: run

    minimise  KL(aligned || patched) on harmful prompts + keep_weight * KL(tuned || patched) on all others

with both teachers' own answers given, token by token. No labels, and no harmful answers, are needed. Only phase one
needs aligned, so the two models are never in memory together.
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.patch.learn import run
    from resta.patch.prompts import Drawing
    from resta.patch.request import Learning
    from resta.patch.teachers import Teaching
    from resta.patch.written import Patch
    from resta.redeval.questions import check_apart, digest_of
else:
    __getattr__ = lazily(
        "resta.patch",
        {
            "run": "learn",
            "Drawing": "prompts",
            "Learning": "request",
            "Teaching": "teachers",
            "Patch": "written",
            **dict.fromkeys(("check_apart", "digest_of"), ".redeval.questions"),
        },
    )

__all__ = ["Drawing", "Learning", "Patch", "Teaching", "check_apart", "digest_of", "run"]
