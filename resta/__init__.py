"""restored = tuned + scale * (aligned - base): give a fine-tuned language model its safety back.

RESTA (Bhardwaj, Do and Poria, ACL 2024, arXiv 2402.11746), streamed over checkpoints of any size:

    import resta
    tuned, aligned, base = (resta.load(path) for path in ("tuned", "aligned", "base"))
    (tuned + 0.5 * (aligned - base)).save("restored")
    resta.audit("restored", moved={"tuned": "tuned", "aligned": "aligned", "base": "base"}).raise_if_any()
"""

from typing import TYPE_CHECKING

from resta.lazy import lazily
from resta.version import VERSION as __version__

if TYPE_CHECKING:
    from resta import ladder, patch, redeval, sft, sweep, verify
    from resta.algebra import Checkpoint, Delta, Merge, dare, load
    from resta.auditing import audit
    from resta.conversion import convert
    from resta.distance import diff
    from resta.engine import merge, tensors
    from resta.errors import RestaError
    from resta.ladder.conduct import restore
    from resta.recipe import Recipe, load_recipe
else:
    __getattr__ = lazily(
        "resta",
        {
            **dict.fromkeys(("Checkpoint", "Delta", "Merge", "dare", "load"), "algebra"),
            **dict.fromkeys(("merge", "tensors"), "engine"),
            **dict.fromkeys(("Recipe", "load_recipe"), "recipe"),
            "RestaError": "errors",
            "audit": "auditing",
            "convert": "conversion",
            "diff": "distance",
            "restore": "ladder.conduct",
            **{package: package for package in ("ladder", "patch", "redeval", "sft", "sweep", "verify")},
        },
    )

__all__ = [
    "Checkpoint",
    "Delta",
    "Merge",
    "Recipe",
    "RestaError",
    "__version__",
    "audit",
    "convert",
    "dare",
    "diff",
    "ladder",
    "load",
    "load_recipe",
    "merge",
    "patch",
    "redeval",
    "restore",
    "sft",
    "sweep",
    "tensors",
    "verify",
]
