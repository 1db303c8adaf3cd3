"""The header parser against the `safetensors` library, which is the oracle of what is valid."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from resta.errors import RequestError
from resta.header import DTYPE_BITS, Spec, count_bytes, lay_out, load_strict_json, parse_header, read_header

# What the library takes and resta refuses, by what resta says of it; all of it is in the module's docstring.
STRICTER = ("occurs twice", "begin with '{'", "expected dtype, shape and data_offsets", "unknown dtype", "overflows 64")
fuzz = settings(deadline=None)  # machines that are busy with other things make single examples slow
ONE = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'


def framed(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def library_reads(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def resta_reads(raw: bytes, folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | str:
    """What resta reads, or why it refuses; anything but a RequestError goes through and fails the test."""
    file = folder / "fuzzed.safetensors"
    file.write_bytes(raw)
    try:
        specs = read_header(file)
    except RequestError as error:
        return str(error)
    return {name: (spec.dtype, spec.shape, raw[spec.start : spec.start + spec.nbytes]) for name, spec in specs.items()}


def assert_agreement(raw: bytes, folder: Path) -> None:
    mine, theirs = resta_reads(raw, folder), library_reads(raw)
    if isinstance(mine, str):
        assert str(folder) in mine
        assert theirs is None or any(words in mine for words in STRICTER), (raw[:300], mine)
    else:
        assert mine == theirs, raw[:300]


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


REAL = save(
    {
        "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "half": torch.ones(3, 1, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int32),
    },
    metadata={"format": "pt", "note": 'é "quoted"'},
)
REAL_TEXT = REAL[8 : 8 + int.from_bytes(REAL[:8], "little")]
REAL_DATA = REAL[8 + len(REAL_TEXT) :]


def test_a_real_file_is_read_as_the_library_reads_it(folder: Path) -> None:
    mine = resta_reads(REAL, folder)
    assert mine == library_reads(REAL)
    assert set(mine) == {"wide", "half", "flags", "empty", "scalar"}


@fuzz
@given(
    edits=st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    in_header=st.booleans(),
)
def test_no_byte_flip_is_read_otherwise_than_by_the_library(
    folder: Path, edits: list[tuple[int, int]], in_header: bool
) -> None:
    raw = bytearray(REAL)
    for place, byte in edits:
        raw[place % (8 + len(REAL_TEXT)) if in_header else place] = byte
    assert_agreement(bytes(raw), folder)


@fuzz
@given(cut=st.integers(0, len(REAL)), extra=st.binary(max_size=9))
def test_a_file_cut_or_lengthened_anywhere_is_refused(folder: Path, cut: int, extra: bytes) -> None:
    raw = REAL[:cut] + extra
    assert_agreement(raw, folder)
    if len(raw) != len(REAL):
        assert isinstance(resta_reads(raw, folder), str)


@fuzz
@given(length=st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1)))
@example(length=2**64 - 1)
@example(length=2**63)
@example(length=100_000_001)
def test_a_header_length_that_lies_is_refused(folder: Path, length: int) -> None:
    raw = struct.pack("<Q", length) + REAL[8:]
    assert_agreement(raw, folder)
    if length != len(REAL_TEXT):
        assert isinstance(resta_reads(raw, folder), str)


SIZES = st.one_of(
    st.integers(0, 8),
    st.sampled_from([-1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    st.sampled_from([1.0, 0.5, -0.0, True, False, None, "1", [1], {}]),
)
DTYPES = st.one_of(st.sampled_from(sorted(DTYPE_BITS)), st.sampled_from(["f32", "", "I128", None, 1, {"F32": None}]))
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": DTYPES,
            "shape": st.lists(SIZES, max_size=3),
            "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
        },
        optional={"more": SIZES},
    ),
    st.fixed_dictionaries({}, optional={"dtype": DTYPES, "shape": SIZES, "data_offsets": SIZES}),
    SIZES,
)
METADATA = st.one_of(st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), SIZES)


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=4), ENTRIES, max_size=3),
    metadata=METADATA,
    data_bytes=st.integers(0, 40),
)
def test_json_that_looks_like_a_header_is_judged_as_the_library_judges_it(
    folder: Path, header: dict[str, Any], metadata: Any, data_bytes: int
) -> None:
    text = json.dumps({"__metadata__": metadata} | header).encode()
    assert_agreement(framed(text, bytes(range(data_bytes))), folder)


@st.composite
def nearly_valid(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Tensors that lie one after the other, then perhaps one number moved by a little."""
    table, place = {}, 0
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(["F64", "F32", "BF16", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        nbytes = int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8
        table[f"t{number}"] = entry(dtype, shape, [place, place + nbytes])
        place += nbytes
    names = draw(st.permutations(sorted(table)))
    table = {name: table[name] for name in names}
    if draw(st.booleans()):
        victim = table[draw(st.sampled_from(names))]
        target = victim[draw(st.sampled_from(["shape", "data_offsets"]))]
        if target:
            target[draw(st.integers(0, len(target) - 1))] += draw(st.sampled_from([-1, 1, 4]))
    return table, max(0, place + draw(st.sampled_from([0, 0, 0, -1, 1])))


@fuzz
@given(nearly_valid())
def test_overlaps_gaps_and_offset_lies_are_found_exactly_where_the_library_finds_them(
    folder: Path, drawn: tuple[dict[str, Any], int]
) -> None:
    table, data_bytes = drawn
    assert_agreement(framed(json.dumps(table).encode(), bytes(data_bytes)), folder)


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]", core: bytes = b"") -> bytes:
    return b'{"a":{' + ONE + b',"x":' + opening * depth + core + closing * depth + b"}}"


VALID = {
    "as the library writes it": b'{"a":{' + ONE + b"}}",
    "whitespace": b'{ "a" :\t{' + ONE + b"}\n} \r\n",
    "keys that it does not know": b'{"a":{' + ONE + b',"x":[1,{"y":null}]}}',
    "no metadata": b'{"__metadata__":null,"a":{' + ONE + b"}}",
    "empty name": b'{"":{' + ONE + b"}}",
    "escaped pair": b'{"\\ud83d\\ude00":{' + ONE + b"}}",
    "escaped NUL": b'{"\\u0000":{' + ONE + b"}}",
    "as deep as the library goes": nested(125),
    "200 digits where nothing reads them": nested(0, core=b"9" * 200),
    "-0 where nothing reads it": nested(0, core=b"-0"),
}
REFUSED = {
    "empty": b"",
    "list": b"[]",
    "text after the end": b'{"a":{' + ONE + b"}}x",
    "not UTF-8": b'{"\xff":{' + ONE + b"}}",
    "overlong UTF-8": b'{"\xc0\x80":{' + ONE + b"}}",
    "UTF-8 surrogate": b'{"\xed\xa0\x80":{' + ONE + b"}}",
    "byte order mark": b"\xef\xbb\xbf" + b'{"a":{' + ONE + b"}}",
    "raw control character": b'{"a\n":{' + ONE + b"}}",
    "lone surrogate in a name": b'{"\\ud800":{' + ONE + b"}}",
    "lone surrogate in metadata": b'{"__metadata__":{"k":"\\uDC00"},"a":{' + ONE + b"}}",
    "lone surrogate in an unknown key": nested(0, core=b'"\\udfff"'),
    "surrogates in the wrong order": b'{"\\ude00\\ud83d":{' + ONE + b"}}",
    "one level too deep": nested(126),
    "objects too deep": nested(200, b'{"k":', b"}", b"1"),
    "so deep that a recursion would fail": nested(100_000),
    "brackets that never close": b'{"a":' + b"[" * 200_000,
    "NaN": nested(0, core=b"NaN"),
    "-Infinity": nested(0, core=b"-Infinity"),
    "a number past float64": nested(0, core=b"1e999"),
    "an integer past float64": nested(0, core=b"9" * 400),
    "an integer past Python's limit": nested(0, core=b"9" * 5000),
    "shape 1e0": b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}',
    "shape 1.0": b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
    "shape true": b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "shape as text": b'{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}',
    "negative shape": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "two negative sizes": b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "shape that wraps around to 1": b'{"a":{"dtype":"F32","shape":[4294967297,4294967297],"data_offsets":[0,4]}}',
    "overflow before a zero": b'{"a":{"dtype":"F32","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}',
    "offset -0": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    "offset 01": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[00,4]}}',
    "offset 4e0": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}',
    "offset past the end": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "offset beyond 64 bits": b'{"a":{"dtype":"F32","shape":[1],'
    b'"data_offsets":[18446744073709551616,18446744073709551620]}}',
    "offsets that wrap around": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,0]}}',
    "end before begin": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "three offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
    "no dtype": b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    "half a byte": b'{"a":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}',
    "metadata of numbers": b'{"__metadata__":{"k":1},"a":{' + ONE + b"}}",
    "metadata as a list": b'{"__metadata__":[],"a":{' + ONE + b"}}",
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"a":{' + ONE + b"}}",
    "dtype twice": b'{"a":{' + ONE + b',"dtype":"F32"}}',
}
REFUSED_BUT_READ_BY_THE_LIBRARY = {
    "a tensor twice": b'{"a":{' + ONE + b'},"a":{' + ONE + b"}}",
    "an unknown key twice": nested(0, core=b'{"k":1,"k":1}'),
    "metadata key twice": b'{"__metadata__":{"k":"1","k":"2"},"a":{' + ONE + b"}}",
    "space before the brace": b' {"a":{' + ONE + b"}}",
    "entry as an array": b'{"a":["F32",[1],[0,4]]}',
    "dtype as an object": b'{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}',
    "2^63 elements times zero": b'{"a":{' + ONE + b'},"b":{"dtype":"F32","shape":[9223372036854775808,0],'
    b'"data_offsets":[4,4]}}',
}


@pytest.mark.parametrize("case", VALID)
def test_every_spelling_that_the_library_reads_is_read_alike(folder: Path, case: str) -> None:
    raw = framed(VALID[case], bytes(4))
    theirs = library_reads(raw)
    assert theirs is not None
    assert resta_reads(raw, folder) == theirs


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_headers_are_refused_as_by_the_library(folder: Path, case: str) -> None:
    raw = framed(REFUSED[case], bytes(4))
    assert library_reads(raw) is None
    assert isinstance(resta_reads(raw, folder), str)


@pytest.mark.parametrize("case", REFUSED_BUT_READ_BY_THE_LIBRARY)
def test_where_two_readers_could_differ_resta_is_stricter_than_the_library(folder: Path, case: str) -> None:
    raw = framed(REFUSED_BUT_READ_BY_THE_LIBRARY[case], bytes(4))
    assert library_reads(raw) is not None
    reason = resta_reads(raw, folder)
    assert isinstance(reason, str)
    assert any(words in reason for words in STRICTER)


@fuzz
@given(text=st.binary(max_size=60), data_bytes=st.integers(-1, 2**64))
@example(text=b"{" * 60, data_bytes=0)
def test_no_text_makes_the_parser_raise_anything_but_its_own_error(text: bytes, data_bytes: int) -> None:
    for candidate in (text, b"{" + text, b'{"' + text, b'{"a":{' + text):
        with contextlib.suppress(RequestError):
            parse_header(candidate, data_bytes=data_bytes)


def test_messages_stay_short_whatever_the_file_holds() -> None:
    table = {"a": entry(dtype="x" * 100_000), "b": entry(shape=["y" * 100_000])}
    for name, value in table.items():
        with pytest.raises(RequestError) as caught:
            parse_header(json.dumps({name: value}).encode(), data_bytes=4)
        assert len(str(caught.value)) < 600
    with pytest.raises(RequestError) as caught:
        parse_header(b'{"' + b"k" * 100_000 + b'":1}', data_bytes=0)
    assert len(str(caught.value)) < 600


def test_a_file_that_cannot_be_opened_is_a_header_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(RequestError, match="cannot be read"):
            read_header(path)


SPECS = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL"]),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=6,
)


@fuzz
@given(table=SPECS, seed=st.integers(0, 2**32 - 1))
def test_what_is_laid_out_is_read_back_by_the_library_with_every_byte_in_its_place(
    folder: Path, table: dict[str, tuple[str, tuple[int, ...]]], seed: int
) -> None:
    specs = [(name, dtype, shape) for name, (dtype, shape) in table.items()]
    head, slots = lay_out(iter(specs))
    assert (head, slots) == lay_out(specs)  # a pure function of its arguments
    size = len(head) + sum(count_bytes(dtype, shape) for _, dtype, shape in specs)
    raw = bytearray(np.random.default_rng(seed).integers(0, 2, size, dtype=np.uint8).tobytes())
    raw[: len(head)] = head
    read = library_reads(bytes(raw))
    assert read == resta_reads(bytes(raw), folder)
    assert read is not None
    assert read.keys() == slots.keys() == table.keys()
    for name, spec in slots.items():
        assert read[name] == (*table[name], bytes(raw[spec.start : spec.start + spec.nbytes]))
        assert spec == Spec(dtype=spec.dtype, shape=table[name][1], start=spec.start, nbytes=count_bytes(*table[name]))
        assert spec.start % max(1, DTYPE_BITS[spec.dtype] // 8) == 0


def test_a_file_laid_out_by_resta_is_loaded_by_torch(tmp_path: Path) -> None:
    head, slots = lay_out([("a", "BF16", (2, 2)), ("b", "F64", (1,)), ("c", "BOOL", (3,))])
    raw = bytearray(head) + bytearray(sum(spec.nbytes for spec in slots.values()))
    raw[slots["b"].start : slots["b"].start + 8] = struct.pack("<d", 2.5)
    (tmp_path / "made.safetensors").write_bytes(raw)
    loaded = load_file(tmp_path / "made.safetensors")
    assert loaded["b"].item() == 2.5
    assert loaded["a"].dtype == torch.bfloat16
    assert not loaded["c"].any()


@fuzz
@given(st.binary(max_size=80))
def test_strict_json_raises_only_its_own_error(text: bytes) -> None:
    try:
        parsed = load_strict_json(text)
    except RequestError:
        return
    assert json.loads(text) == parsed


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


@fuzz
@given(value=st.dictionaries(st.text(max_size=4), JSON, max_size=3), ascii_only=st.booleans())
def test_strict_json_reads_every_ordinary_object_as_python_does(value: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert load_strict_json(text) == json.loads(text)
