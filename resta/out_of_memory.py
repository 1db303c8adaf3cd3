"""Whether a failure means that a device's memory, or the machine's, is full."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of torch on any device or of Python, means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()  # CUDA's errors have a class of their own; those of other devices only say so
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
