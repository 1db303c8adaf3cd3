"""restored = tuned + scale * (aligned - base): give a fine-tuned language model its safety back.

RESTA (Bhardwaj, Do and Poria, ACL 2024, arXiv 2402.11746), and the tools around that one equation.
"""

from resta.version import VERSION as __version__

__all__ = ["__version__"]
