"""Weights in 4 bits, alike wherever a model is loaded so: NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

from resta.errors import RequestError


def nf4(computes: Any) -> Any:
    """Return how transformers loads weights in 4 bits that are computed with in a torch dtype.

    Raises RequestError: the library that does it is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401  # only whether it loads
    except ImportError:
        raise RequestError("4-bit weights need bitsandbytes; install it with: pip install 'resta[qlora]'") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computes,
    )
