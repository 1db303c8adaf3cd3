"""The pickle of a state dict, told without running it: which tensors it describes.

A pickle is a program for a stack machine, and one of its instructions calls any function that it names. What
`torch.save(model.state_dict(), ...)` writes needs few of them, and calls only what makes dicts and tensors. This reader
knows these alone, makes plain data of them, and refuses everything else by name. It is narrower than the restricted
loader of torch, `torch.load(..., weights_only=True)`, which is the oracle of the tests: that one makes a bytearray of
any size for a pickle of 40 bytes. This module knows nothing of files.

Instructions: Lib/pickletools.py of Python, protocol 2.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resta.errors import RequestError

MOST_BYTES = 64 << 20
MOST_STEPS = 1_500_000  # instructions, of about 100 bytes of memory each; a tensor takes about 30
SHOWN = 200  # letters of a name in a message

# Storage classes of torch, and dtypes of tensors in bare storages, by what a safetensors header calls them.
STORAGES: dict[str, str | None] = {
    **{"torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16"},
    **{"torch BFloat16Storage": "BF16", "torch LongStorage": "I64", "torch IntStorage": "I32"},
    **{"torch ShortStorage": "I16", "torch CharStorage": "I8", "torch ByteStorage": "U8", "torch BoolStorage": "BOOL"},
    **{"torch ComplexFloatStorage": "C64", "torch.storage UntypedStorage": None},
}
DTYPES = {
    **{"torch float64": "F64", "torch float32": "F32", "torch float16": "F16", "torch bfloat16": "BF16"},
    **{"torch int64": "I64", "torch int32": "I32", "torch int16": "I16", "torch int8": "I8"},
    **{"torch uint64": "U64", "torch uint32": "U32", "torch uint16": "U16", "torch uint8": "U8", "torch bool": "BOOL"},
    **{"torch float8_e4m3fn": "F8_E4M3", "torch float8_e5m2": "F8_E5M2", "torch float8_e8m0fnu": "F8_E8M0"},
    **{"torch float8_e4m3fnuz": "F8_E4M3FNUZ", "torch float8_e5m2fnuz": "F8_E5M2FNUZ", "torch complex64": "C64"},
}
ADVICE = (
    "only state dicts of plain tensors are read. If you trust whoever made the file, load it with the program that "
    "made it and save such a dict; if you do not, remove it: loading it may run code"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """The memory of one or more tensors: the record that holds it and its elements, or bytes where `dtype` is None."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A tensor: where in its storage the first element lies, and how far apart neighbours are, in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Named:
    """A function or class that the pickle names; it is never looked up."""

    name: str


def read_views(pickle: bytes) -> dict[str, Described]:
    """Return the tensors of a state dict's pickle by name, in its order.

    Raises RequestError: it is not such a pickle, or needs what no state dict of plain tensors needs.
    """
    if len(pickle) > MOST_BYTES:
        raise RequestError(f"its pickle has {len(pickle):,} bytes; at most {MOST_BYTES:,} are read")
    machine = _Machine()
    try:
        for step, (opcode, argument, place) in enumerate(pickletools.genops(pickle)):
            if step >= MOST_STEPS:
                raise RequestError(f"its pickle has more than {MOST_STEPS:,} instructions; save it in more files")
            instruction = _INSTRUCTIONS.get(opcode.name)
            if instruction is None:
                raise RequestError(f"its pickle has the instruction {opcode.name} at byte {place}; {ADVICE}")
            instruction(machine, argument)
    except (ValueError, IndexError, KeyError, TypeError) as error:  # what a broken pickle meets
        raise RequestError(f"its pickle is broken: {error!r:.{SHOWN}}; download the file again") from None
    if len(machine.stack) != 1 or machine.below or place != len(pickle) - 1:
        raise RequestError("its pickle does not end where it should; download the file again")
    return _tensors_of(machine.stack[0])


def _tensors_of(top: Any) -> dict[str, Described]:
    if not isinstance(top, dict):
        raise RequestError(f"holds {_kind(top)} and not a state dict; {ADVICE}")
    for name, value in top.items():
        if not isinstance(value, Described):
            raise RequestError(f"holds {_kind(value)} under {name[:SHOWN]!r}, where a tensor should be; {ADVICE}")
    return top


class _Machine:
    """The stack of a pickle, the stacks below its marks, and what it remembers."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        """Take so many values from the stack, in the order in which they were put there."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def name(self, argument: str) -> None:
        if argument not in _NAMES:
            raise RequestError(
                f"its pickle asks for {argument.replace(' ', '.', 1)[:SHOWN]}{self._where()}, and was not run; {ADVICE}"
            )
        self.stack.append(_Named(argument))

    def _where(self) -> str:
        """Say which tensor the pickle is at, as far as that can be told: the last text that stands for a key."""
        keys = (
            value for level in (self.stack, *reversed(self.below)) for value in level[-1:] if isinstance(value, str)
        )
        return next((f" at {key[:SHOWN]!r}" for key in keys), "")

    def storage(self) -> None:
        """Replace the description of a storage by it."""
        (told,) = self.take(1)
        if not (isinstance(told, tuple) and len(told) == 5):
            raise ValueError("no storage")
        kind, named, key, _, count = told
        if kind != "storage" or not isinstance(named, _Named) or named.name not in STORAGES:
            raise ValueError("no storage")
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and _is_size(count)):
            raise ValueError("no storage")
        storage = Storage(key=key, dtype=STORAGES[named.name], count=count)
        if self.storages.setdefault(key, storage) != storage:
            raise RequestError(f"its pickle describes the storage {key} in two ways; {ADVICE}")
        self.stack.append(storage)

    def call(self) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, _Named) or not isinstance(arguments, tuple) or function.name not in _CALLS:
            raise ValueError("a call of what is no function")
        self.stack.append(_CALLS[function.name](arguments))

    def set_items(self, flat: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(flat) % 2:
            raise ValueError("entries of what is no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                raise RequestError(f"its pickle has {_kind(key)} as the key of a dict; {ADVICE}")
            if key in target:
                raise RequestError(f"its pickle sets {key[:SHOWN]!r} twice; {ADVICE}")
            target[key] = value

    def build(self) -> None:
        """Drop the attributes of a dict: torch keeps the versions of modules there, which no tensor needs."""
        self.take(1)
        if not isinstance(self.stack[-1], dict):
            raise ValueError("attributes of what is no dict")


def _tensor_of_typed(arguments: tuple[Any, ...]) -> Described:
    """_rebuild_tensor_v2: the dtype is that of the storage."""
    storage, offset, shape, strides, _, hooks, *metadata = arguments
    return _view(storage, offset, shape, strides, None, hooks, *metadata)


def _tensor(arguments: tuple[Any, ...]) -> Described:
    """_rebuild_tensor_v3: the dtype is said."""
    storage, offset, shape, strides, _, hooks, dtype, *metadata = arguments
    if not isinstance(dtype, _Named):
        raise ValueError("no dtype")
    return _view(storage, offset, shape, strides, DTYPES[dtype.name], hooks, *metadata)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None, *more: Any) -> Described:
    """Return a tensor; `more` are hooks and metadata, of which a plain one has none."""
    sizes = [sizes for sizes in (shape, strides) if isinstance(sizes, tuple) and all(map(_is_size, sizes))]
    if not isinstance(storage, Storage) or not _is_size(offset) or any(more) or len(more) > 2:
        raise ValueError("no plain tensor")
    dtype = dtype or storage.dtype
    if dtype is None or len(sizes) != 2 or len(shape) != len(strides):
        raise ValueError("no plain tensor")
    return Described(storage=storage, dtype=dtype, offset=offset, shape=shape, strides=strides)


def _parameter(arguments: tuple[Any, ...]) -> Described:
    data, _, hooks = arguments
    if not isinstance(data, Described) or hooks:
        raise ValueError("no plain parameter")
    return data


def _dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise ValueError("a dict of what was not told yet")
    return {}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _kind(value: object) -> str:
    if isinstance(value, _Named):
        return value.name.replace(" ", ".", 1)
    return {Described: "a tensor", Storage: "a storage", dict: "a dict"}.get(type(value), f"a {type(value).__name__}")


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections OrderedDict": _dict,
    "torch._utils _rebuild_tensor_v2": _tensor_of_typed,
    "torch._utils _rebuild_tensor_v3": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_NAMES = {*_CALLS, *STORAGES, *DTYPES}


def _push(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(make(argument))


def _remember(machine: _Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


def _check_protocol(_: _Machine, protocol: int) -> None:
    if protocol != 2:
        raise RequestError(f"its pickle is of protocol {protocol}; torch.save writes 2 unless told otherwise")


def _append(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _check_protocol,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.mark(),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _push(lambda value: value)),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "EMPTY_DICT": _push(lambda _: {}),
    "TUPLE": lambda machine, _: _append(machine, tuple(machine.items())),
    "TUPLE1": lambda machine, _: _append(machine, machine.take(1)),
    "TUPLE2": lambda machine, _: _append(machine, machine.take(2)),
    "TUPLE3": lambda machine, _: _append(machine, machine.take(3)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: _append(machine, machine.memo[place])),
    "GLOBAL": lambda machine, argument: machine.name(argument),
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
}
