"""Slow, plain re-statements of the mathematics, in float64 and Python integers, that share no code with resta."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

Array = np.ndarray


def philox4x32(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """One block of Philox4x32 (Salmon et al., SC 2011), in Python integers."""
    x, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ x[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def words(seed: int, purpose: str, term: int, tensor: str, count: int) -> Array:
    """The first `count` 32-bit words of a tensor's random stream."""
    text = json.dumps([seed, purpose, term, tensor]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    blocks = [philox4x32([block, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32]) for block in range(-(-count // 4))]
    return np.array(blocks, np.uint64).reshape(-1)[:count]


def quantum(values: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of a format at each value."""
    mantissa, smallest = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}[dtype]
    exponent = np.frexp(np.abs(values))[1] - 1
    return np.exp2(np.maximum(np.where(values == 0, smallest, exponent), smallest) - mantissa)


def rounded(values: Array, dtype: str) -> Array:
    """Float64 values rounded once, to nearest even, to a narrower format; exact for values in its range."""
    step = quantum(values, dtype)
    return np.rint(values / step) * step


def merged(start: Array, terms: list[tuple[float, Array, Array, Array]]) -> Array:
    """start + sum of scale * mask * (to - from), in float64."""
    out = start.astype(np.float64)
    for scale, mask, to, from_ in terms:
        out = out + scale * mask * (to.astype(np.float64) - from_.astype(np.float64))
    return out


def double(tensor: torch.Tensor) -> Array:
    """A tensor's exact values as float64."""
    return tensor.to(torch.float64).numpy()


def assert_rounded_well(got: torch.Tensor, exact: Array, largest: Array) -> None:
    """The numerical promise: 99.9 % of entries correctly rounded; the rest within one unit in the last place or, where
    the sum cancels, within 2^-22 of the largest operand.
    """
    dtype = str(got.dtype).removeprefix("torch.")
    values = double(got)
    correct = values == rounded(exact, dtype)
    error = np.abs(values - exact)
    near = error <= np.maximum(1.000001 * quantum(exact, dtype), 2.0**-22 * largest)
    assert near.all(), f"{np.count_nonzero(~near)} entries are off, the worst by {error[~near].max()}"
    assert correct.mean() >= 0.999, f"only {correct.mean():.5f} of the entries are correctly rounded"
