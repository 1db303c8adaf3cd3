"""The safetensors header: read it, distrust it, write it.

A file is `u64 little-endian header length | JSON header | tensor bytes`. The JSON maps each tensor name to `{"dtype",
"shape", "data_offsets"}`, offsets relative to the first byte after the header; the tensors must cover the data without
gaps or overlaps. This module knows nothing of models, arithmetic or directories.

Format: https://huggingface.co/docs/safetensors, whose library is the oracle of the tests. Stricter than it: a key that
occurs twice is refused, since two readers could take two different tensors for the same name; the text must begin with
"{", as the format says; an entry must be an object and its dtype a string, where the library would also take an array
and {"F32": null}; a shape may not count past 63 bits, even if its next size is 0; and a header that would take more
than MOST_MEMORY to read (some 140,000 tensors in one file) is refused before it is.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resta.errors import RequestError
from resta.files import open_regular

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_ELEMENTS = 2**63 - 1
MAX_DEPTH = 127  # of nested arrays and objects; the library's limit
MOST_MEMORY = 270_000_000  # bytes that reading a text of JSON may take, by `count_memory`
PER_MARK = 120  # bytes of objects for each comma, colon and bracket: measured at 32 ("[],") to 115 (one more key)

# Bits per element; sub-byte and 8-bit floats are parsed so that a plan can refuse them by name.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89abABcdefCDEF]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One tensor as its header declares it; `start` is the absolute byte offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Spec]:
    """Read and check the header of one file.

    Raises RequestError: the file is torn, its header is not valid, or the two disagree.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise RequestError(
                    f"{path}: the header should have {length} bytes but the file has {size} in all; "
                    "the file is truncated or is not safetensors: download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise RequestError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
            text = file.read(length)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return parse_header(text, data_bytes=size - 8 - length)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def parse_header(text: bytes, *, data_bytes: int) -> dict[str, Spec]:
    """Check header text against the number of data bytes that follow it; tensors come in file order.

    Raises RequestError: anything the safetensors library would refuse, and repeated keys.
    """
    if not text.startswith(b"{"):
        raise RequestError("the header does not begin with '{'; this is not a safetensors file")
    parsed = load_strict_json(text)
    metadata = parsed.pop("__metadata__", None)
    if metadata is not None and not _maps_text_to_text(metadata):
        raise RequestError("__metadata__ must map strings to strings")
    specs = {name: _read_spec(name, entry, 8 + len(text)) for name, entry in parsed.items()}
    ordered = sorted(specs.items(), key=lambda item: (item[1].start, item[1].nbytes))
    expected = 8 + len(text)
    for name, spec in ordered:
        if spec.start != expected:
            kind = "overlaps the tensor before it" if spec.start < expected else "leaves a gap before it"
            raise RequestError(
                f"tensor {_short(name)} {kind}: its data starts at byte {spec.start}, expected {expected}"
            )
        expected += spec.nbytes
    if expected != 8 + len(text) + data_bytes:
        raise RequestError(
            f"the tensors need {expected - 8 - len(text)} data bytes but {data_bytes} follow the header; "
            "the file is truncated or has trailing data: download it again"
        )
    return dict(ordered)


def load_strict_json(text: bytes, *, most_memory: int = MOST_MEMORY) -> dict[str, Any]:
    """Parse a JSON object of which any two readers would make the same thing.

    Raises RequestError: not UTF-8, not one object, a key twice, NaN, a number past float64, nested too deeply, or so
    full of values that it would take more than `most_memory` bytes.
    """
    memory = count_memory(text)
    if memory > most_memory:
        raise RequestError(
            f"reading its {len(text):,} bytes of JSON would take about {memory // 1_000_000:,} MB of memory, and at "
            f"most {most_memory // 1_000_000:,} MB are given to it; no model needs that many values in one file"
        )

    def reject_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RequestError(f"the key {_short(key)} occurs twice")
            found[key] = value
        return found

    def reject_constant(name: str) -> Any:
        raise RequestError(f"{name} is not JSON")

    def parse_real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise RequestError(f"the number {_short(digits)} is out of range")
        return value

    def parse_integer(digits: str) -> int | float:
        # "-0" and what is longer than 64 bits are floats to the library's reader.
        return parse_real(digits) if digits == "-0" or len(digits) > 20 else int(digits)

    try:
        parsed = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=reject_repeats,
            parse_constant=reject_constant,
            parse_int=parse_integer,
            parse_float=parse_real,
        )
        if _ESCAPED_SURROGATE.search(text):  # alone, it is valid for Python's reader and for no other
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise RequestError("the JSON is nested too deeply") from None
    except UnicodeError:
        raise RequestError("the JSON is not valid UTF-8") from None
    except ValueError as problem:
        raise RequestError(f"not valid JSON: {problem}") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"expected a JSON object, found {type(parsed).__name__}")
    if _is_deep(parsed):
        raise RequestError("the JSON is nested too deeply")
    return parsed


def count_memory(text: bytes) -> int:
    r"""Return about how many bytes of memory JSON text takes at most while it is parsed, from its bytes alone.

    Marks inside of strings are counted as well. Of letters there are up to three copies at once, the text's bytes
    among them; Python gives each four bytes if there may be one outside of the basic plane, and `\u` is checked by
    writing it.
    """
    marks = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    per_letter = 13 if b"\\u" in text else 3 if text.isascii() else 9
    return len(text) * per_letter + marks * PER_MARK


def lay_out(specs: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Spec]]:
    """Return the bytes that begin a file holding these (name, dtype, shape), and where each tensor goes.

    Wider dtypes come first so that every tensor is aligned to its element, as the library also writes it.
    """
    ordered = sorted(specs, key=lambda item: -DTYPE_BITS[item[1]])
    offset = 0
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for name, dtype, shape in ordered:
        nbytes = count_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        ends.append((name, dtype, shape, offset, nbytes))
        offset += nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    slots = {
        name: Spec(dtype=dtype, shape=shape, start=len(head) + start, nbytes=nbytes)
        for name, dtype, shape, start, nbytes in ends
    }
    return head, slots


def count_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _read_spec(name: str, entry: object, data_start: int) -> Spec:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise RequestError(f"tensor {_short(name)}: expected dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise RequestError(f"tensor {_short(name)}: unknown dtype {_short(dtype)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise RequestError(f"tensor {_short(name)}: shape must be a list of sizes, found {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(end) for end in offsets):
        raise RequestError(f"tensor {_short(name)}: data_offsets must be two sizes, found {_short(offsets)}")
    count = 1
    for size in shape:  # step by step, as the library does: an overflow before a zero is refused too
        count *= size
        if count > MAX_ELEMENTS:
            raise RequestError(f"tensor {_short(name)}: shape {_short(shape)} overflows 64 bits")
    bits = count * DTYPE_BITS[dtype]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise RequestError(
            f"tensor {_short(name)}: {dtype} of shape {_short(shape)} needs {bits / 8:g} bytes, "
            f"its offsets {_short(offsets)} hold {end - begin}"
        )
    return Spec(dtype=dtype, shape=tuple(shape), start=data_start + begin, nbytes=end - begin)


def _is_deep(parsed: dict[str, Any]) -> bool:
    """Whether containers are nested deeper than MAX_DEPTH; level by level, since a recursion would run out."""
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _maps_text_to_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
