"""Supervised fine-tuning: make the models that the equation adds and subtracts.

    import resta
    resta.sft.run(recipe="recipes/sft/cpu-safety.yaml", out="safety")

A run reads from left to right, each part in its own file:

    recipe.py                       what is asked       the YAML, its digest
    data.py                         what is read        conversations, sources, the held-out split
    chat.py  samples.py             what is trained     templates, masks, cuts
    objective.py  train.py          how                 losses, the trainer, going on after a stop
    save.py                         what is kept        weights, tokenizer, provenance, the card
    finetune.py                     all of it as one call: run
    memory.py  show.py              the estimate and the samples that the command prints
    collect.py                      safe conversations from a well-aligned model, for `resta collect`

Nothing here knows how models are merged or judged; it meets those parts only at the directories it writes. Only
collect.py asks models and judges, by the means of Red-Eval.
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily

if TYPE_CHECKING:
    from resta.sft.finetune import Trained, run
    from resta.sft.recipe import Recipe
    from resta.sft.samples import LeftOut
    from resta.sft.train import Progress
else:
    __getattr__ = lazily(
        "resta.sft",
        {
            **dict.fromkeys(("Trained", "run"), "finetune"),
            "LeftOut": "samples",
            "Progress": "train",
            "Recipe": "recipe",
        },
    )

__all__ = ["LeftOut", "Progress", "Recipe", "Trained", "run"]
