"""The fused loops: widen, take differences, mask, add, round, store, measure. One pass, one signature.

Elements are processed in tiles that stay in the first-level cache; inside a tile every step is a plain loop that LLVM
vectorises. Floating-point operations are strict IEEE (no fast-math, no contraction to fused multiply-add), so that
every CPU makes the same bytes. Half precisions are widened and rounded through their bit patterns, since neither numba
nor numpy has bfloat16.

This module knows nothing of files, tensors or recipes: it gets flat buffers, indices and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

# Dtype codes inside the kernels.
BF16, F16, F32, F64 = 0, 1, 2, 3
CODES = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}

TILE = 2048  # elements: the tiles of three models, the delta and the sum take 40 KB; it divides every chunk
LANES = 256  # partial sums per statistic; a tile adds eight elements to each

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_ROUNDS = 10

# What `combine` sums over elements: squared norms of start and of the two deltas, their product, entries changed.
START, INTENDED, REALISED, PRODUCT, CHANGED = range(5)
SUMS = 5
# What it sums for each term D, with e what rounding did to the sum of all terms: D^2, D e, (D + e)^2 - D^2, the entries
# that the mask keeps; and 1 if any entry of D is not zero.
TERM_INTENDED, TERM_LOSS, TERM_GROWTH, TERM_SELECTED, TERM_NONZERO = range(5)
TERM_SUMS = 5
LOSS_EVERY = 13  # of several terms D e and (D + e)^2 - D^2 are summed over one tile in so many, since all take too long


def _compiled(function: Callable[..., Any]) -> Any:
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable place for numba's cache, as in a read-only container: compile per process
        return numba.njit(**options)(function)


@_compiled
def philox(key0, key1, first, words):
    """Fill `words` (uint32, a multiple of 4 long) with the stream of a key from element `first` (multiple of 4).

    Element e gets word e % 4 of block e // 4, so that any stretch can be made alone, in any order.
    """
    block = np.uint64(first) >> np.uint64(2)
    low = np.uint64(0xFFFFFFFF)
    for j in range(words.size // 4):
        counter = block + np.uint64(j)
        x0 = np.uint32(counter & low)
        x1 = np.uint32(counter >> np.uint64(32))
        x2 = np.uint32(0)
        x3 = np.uint32(0)
        k0 = np.uint32(key0)
        k1 = np.uint32(key1)
        for _ in range(_ROUNDS):
            p0 = _M0 * np.uint64(x0)
            p1 = _M1 * np.uint64(x2)
            x0 = np.uint32(p1 >> np.uint64(32)) ^ x1 ^ k0
            x1 = np.uint32(p1 & low)
            x2 = np.uint32(p0 >> np.uint64(32)) ^ x3 ^ k1
            x3 = np.uint32(p0 & low)
            k0 = np.uint32(k0 + _W0)
            k1 = np.uint32(k1 + _W1)
        words[4 * j] = x0
        words[4 * j + 1] = x1
        words[4 * j + 2] = x2
        words[4 * j + 3] = x3


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 with this uint32 bit pattern."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.uint32), generate


@intrinsic
def _as_bits(typingctx: Any, value: Any) -> Any:
    """The uint32 bit pattern of this float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.uint32(numba.float32), generate


@_compiled
def _widen_half(half):
    magnitude = np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13)
    # Multiplying by 2^112 rebiases the exponent and normalises subnormals, exactly.
    bits = _as_bits(_as_float(np.uint32(magnitude)) * np.float32(2.0**112))
    if magnitude >= np.uint32(0x0F800000):  # infinity or NaN
        bits |= np.uint32(0x7F800000)
    return _as_float(np.uint32(bits | (np.uint32(half & np.uint32(0x8000)) << np.uint32(16))))


@_compiled
def _load(raw, code, begin, n, row):
    """Widen elements begin..begin+n of a raw buffer into `row`."""
    if code == BF16:
        halves = raw.view(np.uint16)[begin : begin + n]
        for i in range(n):
            row[i] = _as_float(np.uint32(np.uint32(halves[i]) << np.uint32(16)))
    elif code == F16:
        halves = raw.view(np.uint16)[begin : begin + n]
        for i in range(n):
            row[i] = _widen_half(np.uint32(halves[i]))
    elif code == F32:
        singles = raw.view(np.float32)[begin : begin + n]
        for i in range(n):
            row[i] = singles[i]
    else:
        doubles = raw.view(np.float64)[begin : begin + n]
        for i in range(n):
            row[i] = doubles[i]


@_compiled
def _to_single(value):
    """Narrow to float32 by rounding to odd, after which one more rounding to a half is the only one that counts."""
    single = np.float32(value)
    back = np.float64(single)
    if back != value and abs(back) < np.inf:  # inexact and finite
        bits = _as_bits(single)
        if abs(back) > abs(value):
            bits -= np.uint32(1)
        single = _as_float(np.uint32(bits | np.uint32(1)))
    return single


@_compiled
def _round_bf16(single):
    bits = _as_bits(single)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.uint32(nan if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@_compiled
def _round_bf16_stochastic(single, word):
    bits = _as_bits(single)
    rounded = (bits + (word & np.uint32(0xFFFF))) >> np.uint32(16)
    nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.uint32(nan if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@_compiled
def _finish_half(magnitude, small, rounded):
    """Choose between the subnormal result, the rounded normal one, infinity and NaN; all are float16 magnitudes."""
    half = small if magnitude < np.uint32(0x38800000) else rounded  # below 2^-14
    if magnitude >= np.uint32(0x47800000):  # 2^16 and above
        half = np.uint32(0x7C00)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    return half


@_compiled
def _round_f16(single):
    bits = _as_bits(single)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Adding 0.5 leaves a subnormal's 10 bits at the end of the sum, rounded to even by the addition itself.
    small = _as_bits(_as_float(np.uint32(magnitude)) + np.float32(0.5)) - np.uint32(0x3F000000)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    rounded = (magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    half = _finish_half(magnitude, small, rounded)
    return np.uint32(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@_compiled
def _round_f16_stochastic(single, word):
    bits = _as_bits(single)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    low = word & np.uint32(0x1FFF)
    # A subnormal is a whole number of 2^-24: add a uniform share of one and cut.
    units = min(_as_float(np.uint32(magnitude)) * np.float32(2.0**24), np.float32(1024.0))
    small = np.uint32(units + np.float32(low) * np.float32(2.0**-13))
    rounded = (magnitude - np.uint32(0x38000000) + low) >> np.uint32(13)
    half = _finish_half(magnitude, small, rounded)
    return np.uint32(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@_compiled
def _finish(start, delta, result, n, out, code, begin, stochastic, words):
    """Round start + delta once into the output, leave what it now holds in `result`; count NaN and infinity."""
    bad = np.uint32(0)
    if code == BF16 and not stochastic:
        halves = out.view(np.uint16)[begin : begin + n]
        for i in range(n):
            h = _round_bf16(_to_single(start[i] + delta[i]))
            halves[i] = h
            result[i] = _as_float(np.uint32(h << np.uint32(16)))
            bad += np.uint32((h & np.uint32(0x7F80)) == np.uint32(0x7F80))
    elif code == BF16:
        halves = out.view(np.uint16)[begin : begin + n]
        for i in range(n):
            h = _round_bf16_stochastic(_to_single(start[i] + delta[i]), words[i])
            halves[i] = h
            result[i] = _as_float(np.uint32(h << np.uint32(16)))
            bad += np.uint32((h & np.uint32(0x7F80)) == np.uint32(0x7F80))
    elif code == F16:
        halves = out.view(np.uint16)[begin : begin + n]
        for i in range(n):
            single = _to_single(start[i] + delta[i])
            h = _round_f16_stochastic(single, words[i]) if stochastic else _round_f16(single)
            halves[i] = h
            result[i] = _widen_half(h)
            bad += np.uint32((h & np.uint32(0x7C00)) == np.uint32(0x7C00))
    elif code == F32:
        singles = out.view(np.float32)[begin : begin + n]
        for i in range(n):
            single = np.float32(start[i] + delta[i])
            singles[i] = single
            result[i] = single
            bad += np.uint32(not (abs(single) < np.float32(np.inf)))
    else:
        doubles = out.view(np.float64)[begin : begin + n]
        for i in range(n):
            double = np.float64(start[i] + delta[i])
            doubles[i] = double
            result[i] = double
            bad += np.uint32(not (abs(double) < np.inf))
    return bad


@_compiled
def _add_term(before, delta, to, from_, scale, keep, words, sums):
    """Write `before` plus a scaled, masked difference to `delta`, a whole tile, and add its square to partial sums.

    Returns:
        How many NaN and infinities the mask met. Those of a term without a mask reach the result and are counted there.
    """
    bad = np.uint32(0)
    if keep >= np.uint64(0x100000000):
        for j in range(LANES):
            total = sums[j]
            for k in range(TILE // LANES):
                i = j + k * LANES
                value = scale * (to[i] - from_[i])
                delta[i] = before[i] + value
                total += value * value
            sums[j] = total
    else:
        threshold = np.uint32(keep)
        nothing = -(scale - scale)  # -0.0 in the working dtype, which changes no sum
        for j in range(LANES):
            total = sums[j]
            for k in range(TILE // LANES):
                i = j + k * LANES
                difference = to[i] - from_[i]
                bad += np.uint32(not (abs(difference) < np.float32(np.inf)))
                value = scale * difference if words[i] < threshold else nothing
                delta[i] = before[i] + value
                total += value * value
            sums[j] = total
    return bad


@_compiled
def _count_kept(keep, words, n):
    """Count the entries that a mask keeps."""
    kept = np.uint32(0)
    threshold = np.uint32(keep)
    for i in range(n):
        kept += np.uint32(words[i] < threshold)
    return kept


@_compiled
def _has_nonzero(to, from_, scale, keep, words, n):
    """Whether any entry of a term is not zero."""
    whole = keep >= np.uint64(0x100000000)
    threshold = np.uint32(keep)
    found = False
    for i in range(n):
        found |= scale * (to[i] - from_[i]) != 0 and (whole or words[i] < threshold)
    return found


@_compiled
def _measure(start, delta, result, lanes):
    """Add one whole tile to the partial sums, in an order that is fixed and yet vectorises; count what changed."""
    for j in range(LANES):
        weight = lanes[START, j]
        intended = lanes[INTENDED, j]
        realised = lanes[REALISED, j]
        product = lanes[PRODUCT, j]
        for k in range(TILE // LANES):
            s = start[j + k * LANES]
            d = delta[j + k * LANES]
            r = result[j + k * LANES] - s
            weight += s * s
            intended += d * d
            realised += r * r
            product += d * r
        lanes[START, j] = weight
        lanes[INTENDED, j] = intended
        lanes[REALISED, j] = realised
        lanes[PRODUCT, j] = product
    changed = np.uint32(0)
    for i in range(TILE):
        changed += np.uint32(result[i] != start[i])
    return changed


@_compiled
def _measure_loss(start, deltas, result, loss, lanes):
    """Add what rounding did to one whole tile to the partial sums of each term.

    Args:
        start: (TILE,), as for `_measure`.
        deltas: (terms + 1, TILE), the sums of the first 0, 1, ... all terms.
        result: (TILE,), what the output holds.
        loss: (TILE,), scratch.
        lanes: (terms, TERM_SELECTED, LANES).
    """
    terms = deltas.shape[0] - 1
    for i in range(TILE):
        loss[i] = (result[i] - start[i]) - deltas[terms, i]
    for t in range(terms):
        for j in range(LANES):
            product = lanes[t, TERM_LOSS, j]
            growth = lanes[t, TERM_GROWTH, j]
            for k in range(TILE // LANES):
                d = deltas[t + 1, j + k * LANES] - deltas[t, j + k * LANES]
                e = loss[j + k * LANES]
                product += d * e
                growth += e * (d + d + e)
            lanes[t, TERM_LOSS, j] = product
            lanes[t, TERM_GROWTH, j] = growth


@_compiled
def combine(raw, codes, terms, scales, keeps, keys, span, out, out_code, stochastic, work, sums, term_sums):
    """out = round( raw[0] + sum_t scales[t] * mask_t * (raw[terms[t, 0]] - raw[terms[t, 1]]) ), one chunk.

    Args:
        raw: uint8 (operands, capacity), each row one operand's elements; row 0 is the start.
        codes: int64 (operands,), dtype code of each row.
        terms: int64 (terms, 2), rows of `to` and `from`.
        scales: (terms,) in the working dtype; DARE's 1/density is already in it.
        keeps: uint64 (terms,), an element stays if its 32-bit word is below this; 2^32 keeps all.
        keys: uint32 (terms + 1, 2), Philox keys of the masks and, last, of the rounding.
        span: (first element, a multiple of TILE; elements; elements that have a delta; whether to measure: 0 no, 1
            against the start, 2 against the start rounded like the result, for starts of another dtype).
        out: uint8, the result, dtype by `out_code`; rounded to nearest even, or stochastically.
        work: (operands + 4, TILE), float32 or float64: the dtype that the arithmetic is done in.
        sums: float64 (SUMS,), added to.
        term_sums: float64 (terms, TERM_SUMS), added to; those of the loss stay 0 where there is one term, whose loss
            follows from `sums`, and where nothing is measured.

    Returns:
        How many NaN and infinities were met, in differences and in the result; 0 means that all is finite.
    """
    first, n, n_delta, measure = span
    words = np.empty(TILE, np.uint32)
    operands, count = codes.size, terms.shape[0]
    start, loss, result = work[0], work[operands], work[operands + 1]
    lanes = work[operands + 2].reshape((-1, LANES))
    reference = work[operands + 3] if measure == 2 else start  # the rounding of the start is no part of the change
    lanes[:] = 0
    deltas = np.empty((count + 1, TILE), work.dtype)
    deltas[0, :] = -0.0  # the neutral element: +0.0 would turn a start of -0.0 into +0.0
    delta = deltas[count]
    term_lanes = np.zeros((count, TERM_SELECTED, LANES), work.dtype)
    bad = 0
    for begin in range(0, n, TILE):
        size = min(TILE, n - begin)
        touched = min(max(n_delta - begin, 0), size)
        for m in range(operands):
            _load(raw[m], codes[m], begin, size if m == 0 else touched, work[m])
        for t in range(count):
            to, from_ = work[terms[t, 0]], work[terms[t, 1]]
            if keeps[t] < np.uint64(0x100000000):
                philox(keys[t, 0], keys[t, 1], first + begin, words)
                term_sums[t, TERM_SELECTED] += _count_kept(keeps[t], words, touched)
            else:
                term_sums[t, TERM_SELECTED] += touched
            if touched < TILE:  # past the end, and in rows that only the start has, there is no difference
                loss[:touched], result[:touched] = to[:touched], from_[:touched]
                loss[touched:], result[touched:] = 0, 0
                to, from_ = loss, result
            bad += _add_term(
                deltas[t], deltas[t + 1], to, from_, scales[t], keeps[t], words, term_lanes[t, TERM_INTENDED]
            )
            deltas[t + 1, touched:] = -0.0
            if term_sums[t, TERM_NONZERO] == 0:
                term_sums[t, TERM_NONZERO] = _has_nonzero(to, from_, scales[t], keeps[t], words, touched)
        if stochastic:
            philox(keys[count, 0], keys[count, 1], first + begin, words)
        if measure == 2:
            result[:] = -0.0
            _finish(start, result, reference, size, out, out_code, begin, stochastic, words)
        bad += _finish(start, delta, result, size, out, out_code, begin, stochastic, words)
        if measure:
            reference[size:] = 0
            delta[size:] = 0
            result[size:] = 0
            sums[CHANGED] += _measure(reference, delta, result, lanes)
            if count > 1 and (first + begin) // TILE % LOSS_EVERY == 0:
                _measure_loss(reference, deltas, result, loss, term_lanes)
    for j in range(LANES):
        for k in range(CHANGED):
            sums[k] += lanes[k, j]
        for t in range(count):
            for k in range(TERM_SELECTED):
                term_sums[t, k] += term_lanes[t, k, j]
    return bad


@_compiled
def count_non_finite(raw, code, n, row):
    """Count NaN and infinity among the first n elements; `row` is scratch of TILE elements."""
    bad = np.int64(0)
    for begin in range(0, n, TILE):
        size = min(TILE, n - begin)
        _load(raw, code, begin, size, row)
        for i in range(size):
            bad += np.uint32(not (abs(row[i]) < np.inf))
    return bad


@_compiled
def widen(raw, code, n, out):
    """Widen the first n elements into `out`, float32 or float64."""
    _load(raw, code, 0, n, out)


@_compiled
def add_low_rank(values, left, right, scaling, first):
    """Add scaling * (left @ right), flattened, from its element `first`, to `values`, in place.

    Products are summed over the rank in order, so that an element does not depend on how the matrix is cut. `left`
    (rows, rank), `right` (rank, columns) and `values` (n,) have the working dtype.
    """
    columns = right.shape[1]
    rank = right.shape[0]
    product = np.empty(TILE, values.dtype)
    done = 0
    while done < values.size:
        row = (first + done) // columns
        column = (first + done) % columns
        size = min(TILE, columns - column, values.size - done)
        product[:size] = 0
        for k in range(0, rank - rank % 4, 4):  # four at a time, still one after the other for each element
            a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
            w = right[k, column : column + size]
            x = right[k + 1, column : column + size]
            y = right[k + 2, column : column + size]
            z = right[k + 3, column : column + size]
            for j in range(size):
                product[j] = (((product[j] + a * w[j]) + b * x[j]) + c * y[j]) + d * z[j]
        for k in range(rank - rank % 4, rank):
            a = left[row, k]
            w = right[k, column : column + size]
            for j in range(size):
                product[j] += a * w[j]
        target = values[done : done + size]
        for j in range(size):
            target[j] += scaling * product[j]
        done += size


@_compiled
def absolute_sums(raw, codes, keep, key, first, n, work, sums):
    """Add to `sums` (2,) the L1 norms of raw[0] - raw[1] and of its entries that the mask keeps."""
    words = np.empty(TILE, np.uint32)
    lanes = np.zeros((2, LANES), work.dtype)
    for begin in range(0, n, TILE):
        size = min(TILE, n - begin)
        work[:] = 0
        _load(raw[0], codes[0], begin, size, work[0])
        _load(raw[1], codes[1], begin, size, work[1])
        philox(key[0], key[1], first + begin, words)
        for j in range(LANES):
            for k in range(TILE // LANES):
                i = j + k * LANES
                x = abs(work[0, i] - work[1, i])
                lanes[0, j] += x
                lanes[1, j] += x if np.uint64(words[i]) < keep else x * 0
    for j in range(LANES):
        sums[0] += lanes[0, j]
        sums[1] += lanes[1, j]


FOLD_LANES = 16
FOLD_BYTES = 8 * FOLD_LANES


@_compiled
def fold(data, state):
    """Fold bytes into 16 running 64-bit polynomials: any one altered word alters the state, at memory speed.

    `data` is uint8 and a multiple of 128 long (the caller pads the end with zeros); `state` is uint64 (16,). This finds
    torn and decayed data; it is no defence against forgery.
    """
    words = data.view(np.uint64)
    for i in range(0, words.size, FOLD_LANES):
        for j in range(FOLD_LANES):
            state[j] = state[j] * np.uint64(0x9E3779B97F4A7C15) + words[i + j]
