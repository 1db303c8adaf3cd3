from __future__ import annotations

from contextlib import nullcontext

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resta import kernels
from tests import oracle

ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Float64 values of bfloat16 bits."""
    return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def run(
    operands: list[tuple[np.ndarray, str]],
    terms: list[tuple[int, int, float, float, int]],
    *,
    out: str,
    rounding_key: int | None = None,
    first: int = 0,
    measure: int = 0,
    work: type = np.float32,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Call `combine` on whole arrays of raw bits; terms are (to, from, scale, density, key)."""
    count = operands[0][0].size
    raw = np.zeros((len(operands), count * 8), np.uint8)
    for row, (bits, _) in enumerate(operands):
        raw[row, : bits.nbytes] = bits.view(np.uint8)
    codes = np.array([kernels.CODES[dtype] for _, dtype in operands])
    keys = [term[4] for term in terms] + [rounding_key or 0]
    width = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[out]
    result = np.zeros(count * width, np.uint8)
    sums = np.zeros(kernels.SUMS)
    bad = kernels.combine(
        raw,
        codes,
        np.array([term[:2] for term in terms], np.int64).reshape(-1, 2),
        np.array([term[2] for term in terms], work),
        np.array([round(term[3] * 2**32) for term in terms], np.uint64),
        np.array([(key & 0xFFFFFFFF, key >> 32) for key in keys], np.uint32),
        (first, count, count, measure),
        result,
        kernels.CODES[out],
        rounding_key is not None,
        np.zeros((len(operands) + 4, kernels.TILE), work),
        sums,
        np.zeros((len(terms), kernels.TERM_SUMS)),
    )
    return result, sums, bad


def convert(values: np.ndarray, source: str, out: str, **options: object) -> np.ndarray:
    """Start alone, no terms: a conversion."""
    kind = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}[out]
    work = np.float64 if source == "F64" else np.float32
    return run([(values, source)], [], out=out, work=work, **options)[0].view(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_oracle_is_philox_as_published(counter: list[int], key: list[int], block: list[int]) -> None:
    assert oracle.philox4x32(counter, key) == block


@given(
    key=st.integers(0, 2**64 - 1),
    block=st.one_of(st.integers(0, 1000), st.integers(2**32 - 3, 2**32 + 3)),
    blocks=st.integers(1, 40),
)
def test_any_stretch_of_the_stream_equals_philox(key: int, block: int, blocks: int) -> None:
    got = np.zeros(4 * blocks, np.uint32)
    kernels.philox(np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), 4 * block, got)
    want = [
        oracle.philox4x32([(block + b) & 0xFFFFFFFF, (block + b) >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])
        for b in range(blocks)
    ]
    assert got.reshape(-1, 4).tolist() == want


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_half_widens_and_rounds_back_to_itself(dtype: str) -> None:
    wide = convert(ALL_HALVES, dtype, "F32")
    with np.errstate(invalid="ignore"):
        want = as_bf16(ALL_HALVES) if dtype == "BF16" else ALL_HALVES.view(np.float16).astype(np.float64)
    np.testing.assert_array_equal(wide.astype(np.float64), want)
    back = convert(wide, "F32", dtype)
    finite = ~np.isnan(wide)
    np.testing.assert_array_equal(back[finite], ALL_HALVES[finite])
    assert np.isnan(convert(back[~finite], dtype, "F32")).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
def test_float32_rounds_to_half_as_numpy_does(values: list[float]) -> None:
    singles = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        want = singles.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(convert(singles, "F32", "F16"), want)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=300))
def test_float64_is_rounded_once_even_near_ties(values: list[float]) -> None:
    exact = np.array(values)
    # Points half-way between two bfloat16 numbers, and as close to them as float64 gets.
    ties = oracle.rounded(exact, "bfloat16") + oracle.quantum(exact, "bfloat16") / 2
    exact = np.concatenate([exact, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    got = as_bf16(convert(exact, "F64", "BF16"))
    np.testing.assert_array_equal(got, oracle.rounded(exact, "bfloat16"))
    small = exact[np.abs(exact) < 6e4]
    if small.size:
        halves = convert(small, "F64", "F16").view(np.float16).astype(np.float64)
        np.testing.assert_array_equal(halves, oracle.rounded(small, "float16"))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(dtype: str) -> None:
    name = {"BF16": "bfloat16", "F16": "float16"}[dtype]
    draws = 1 << 16
    for value in (1.0 + 2**-9, 0.3, -0.123, 3e-6, 5e-8, -65000.0):
        single = np.float32(value)
        bits = convert(np.full(draws, single), "F32", dtype, rounding_key=11)
        got = as_bf16(bits) if dtype == "BF16" else bits.view(np.float16).astype(np.float64)
        step = oracle.quantum(np.array([float(single)]), name)[0]
        low = np.floor(float(single) / step) * step
        assert set(np.unique(got)) <= {low, low + step}
        share = (float(single) - low) / step
        spread = np.sqrt(share * (1 - share) / draws)
        assert abs((got == low + step).mean() - share) <= 5 * spread + 2**-12


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_leaves_representable_values_alone(dtype: str) -> None:
    finite = ALL_HALVES[np.isfinite(convert(ALL_HALVES, dtype, "F32"))]
    np.testing.assert_array_equal(convert(convert(finite, dtype, "F32"), "F32", dtype, rounding_key=5), finite)


def test_zero_delta_keeps_negative_zero() -> None:
    start = np.array([0x8000, 0x0000, 0x3F80], np.uint16)
    same = np.array([0x3F80] * 3, np.uint16)
    got, _, _ = run([(start, "BF16"), (same, "BF16")], [(1, 1, 0.5, 1e-6, 3)], out="BF16")
    np.testing.assert_array_equal(got.view(np.uint16), start)


@settings(max_examples=30)
@given(
    count=st.integers(1, 3 * kernels.TILE),
    first=st.integers(0, 5),
    density=st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_combine_equals_the_oracle(count: int, first: int, density: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    start, to, from_ = (generator.standard_normal(count).astype(np.float32) for _ in range(3))
    first *= kernels.TILE
    got, sums, bad = run(
        [(start, "F32"), (to, "F32"), (from_, "F32")],
        [(1, 2, 0.5, density, 99)],
        out="F32",
        first=first,
        measure=1,
    )
    words = np.zeros(-(-(first + count) // 4) * 4, np.uint32)
    kernels.philox(np.uint32(99), np.uint32(0), 0, words)
    mask = (words[first : first + count] < round(density * 2**32)) if density < 1 else np.ones(count, bool)
    want = start + np.where(mask, np.float32(0.5) * (to - from_), np.float32(-0.0))
    result = got.view(np.float32)
    np.testing.assert_array_equal(result, want)
    delta = np.where(mask, 0.5 * (to.astype(np.float64) - from_), 0)
    realised = result.astype(np.float64) - start
    np.testing.assert_allclose(
        sums,
        [(start.astype(np.float64) ** 2).sum(), (delta**2).sum(), (realised**2).sum(), (delta * realised).sum(),
         (result != start).sum()],
        rtol=1e-4,
        atol=1e-9,
    )  # fmt: skip
    assert bad == 0


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 0x7F80), ("BF16", 0xFFC1), ("F16", 0x7C00), ("F16", 0xFE00)])
def test_non_finite_entries_are_noticed_even_where_the_mask_drops_them(dtype: str, bits: int) -> None:
    start = np.zeros(5000, np.uint16)
    to = start.copy()
    to[[7, 4999]] = bits
    _, _, bad = run([(start, dtype), (to, dtype)], [(1, 0, 1.0, 1e-9, 0)], out=dtype)
    assert bad == 2
    raw = to.view(np.uint8)
    assert kernels.count_non_finite(raw, kernels.CODES[dtype], to.size, np.zeros(kernels.TILE)) == 2


def test_an_overflow_of_finite_inputs_is_noticed() -> None:
    start = np.full(3, 60000, np.float16).view(np.uint16)
    _, _, bad = run([(start, "F16"), (np.zeros(3, np.uint16), "F16")], [(0, 1, 1.0, 1.0, 0)], out="F16")
    assert bad == 3


def test_reading_past_a_buffer_is_an_error_where_bounds_are_checked() -> None:
    """So that the run with NUMBA_BOUNDSCHECK=1 could notice what it is there for; the memory read here is ours."""
    whole = np.zeros(64, np.uint8)
    with pytest.raises(IndexError) if numba.config.BOUNDSCHECK else nullcontext():
        kernels.widen(whole[:16], kernels.F64, 4, np.zeros(4))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 5000),
    rank=st.integers(1, 11),
    cut=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_low_rank_product_does_not_depend_on_how_it_is_cut(
    rows: int, columns: int, rank: int, cut: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    left = generator.standard_normal((rows, rank)).astype(np.float32)
    right = generator.standard_normal((rank, columns)).astype(np.float32)
    base = generator.standard_normal(rows * columns).astype(np.float32)
    whole, parts = base.copy(), base.copy()
    kernels.add_low_rank(whole, left, right, np.float32(2), 0)
    middle = int(cut * base.size)
    kernels.add_low_rank(parts[:middle], left, right, np.float32(2), 0)
    kernels.add_low_rank(parts[middle:], left, right, np.float32(2), middle)
    np.testing.assert_array_equal(whole, parts)
    exact = base + 2 * (left.astype(np.float64) @ right).reshape(-1)
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-5 * rank)


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_one_altered_bit_changes_the_checksum(content: bytes, data: st.DataObject) -> None:
    from resta.engine import Checksum

    def digest(content: bytes) -> str:
        checksum = Checksum()
        checksum.add(np.frombuffer(content, np.uint8).copy())
        return checksum.digest()

    position = data.draw(st.integers(0, 8 * len(content) - 1))
    altered = bytearray(content)
    altered[position // 8] ^= 1 << position % 8
    assert digest(bytes(altered)) != digest(content)
    assert digest(content + b"\0") != digest(content)
