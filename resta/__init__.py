"""restored = tuned + scale * (aligned - base): give a fine-tuned language model its safety back.

RESTA (Bhardwaj, Do and Poria, ACL 2024, arXiv 2402.11746), streamed over checkpoints of any size:

    import resta
    tuned, aligned, base = (resta.load(path) for path in ("tuned", "aligned", "base"))
    (tuned + 0.5 * (aligned - base)).save("restored")
"""

from typing import TYPE_CHECKING, Any

from resta.version import VERSION as __version__

if TYPE_CHECKING:
    from resta.algebra import Checkpoint, Delta, Merge, dare, load
    from resta.engine import merge, tensors
    from resta.errors import RestaError
    from resta.recipe import Recipe, load_recipe

__all__ = [
    "Checkpoint",
    "Delta",
    "Merge",
    "Recipe",
    "RestaError",
    "__version__",
    "dare",
    "load",
    "load_recipe",
    "merge",
    "tensors",
]

_HOMES = {
    "Checkpoint": "algebra",
    "Delta": "algebra",
    "Merge": "algebra",
    "dare": "algebra",
    "load": "algebra",
    "RestaError": "errors",
    "merge": "engine",
    "tensors": "engine",
    "Recipe": "recipe",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import resta` and `resta --help` are instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'resta' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"resta.{_HOMES[name]}"), name)
