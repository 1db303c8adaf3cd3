"""The reader of pickles: torch's restricted loader is the oracle, and nothing that a pickle calls is ever called."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resta.errors import RequestError
from resta.pickled import MOST_STEPS, Described, read_views
from tests.builders import zip_of

NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES |= {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64}
NAMES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
NAMES |= {"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}


def pickle_of(content: Any, folder: Path) -> bytes:
    """The pickle in the file that torch.save makes of something."""
    torch.save(content, folder / "p.bin")
    with zipfile.ZipFile(folder / "p.bin") as archive:
        return archive.read("p/data.pkl")


def every_kind() -> OrderedDict[str, torch.Tensor]:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = OrderedDict(whole=whole, turned=whole.t(), cut=whole[1:3, 2:], scalar=torch.tensor(3), empty=whole[:0])
    tensors |= {name: torch.ones(3).to(dtype) for name, dtype in NAMES.items()}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as a module's state dict has it
    return tensors


def test_tensors_are_described_as_torch_has_them(tmp_path: Path) -> None:
    tensors = every_kind()
    views = read_views(pickle_of(tensors, tmp_path))
    assert list(views) == list(tensors)
    for name, tensor in tensors.items():
        view = views[name]
        assert (view.shape, view.strides, view.offset) == (tensor.shape, tensor.stride(), tensor.storage_offset())
        assert NAMES[view.dtype] == tensor.dtype
    keys = [views[name].storage.key for name in ("whole", "turned", "cut", "scalar")]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("plain", [{}, OrderedDict(), {"a": torch.ones(1)}])
def test_a_plain_dict_is_a_state_dict_too(tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    assert read_views(pickle_of(plain, tmp_path)).keys() == plain.keys()


class Caller:
    """What pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def test_a_pickle_that_would_make_a_file_makes_none_and_is_refused_by_what_it_asks_for(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    hostile = pickle.dumps({"w": Caller(open, str(planted), "w")}, protocol=2)
    with pytest.raises(RequestError, match=r"asks for io\.open at 'w', and was not run"):
        read_views(hostile)
    assert not planted.exists()
    pickle.loads(hostile)["w"].close()
    assert planted.exists()  # it would have


CALLS = {
    "a shell": (Caller(os.system, "true"), "posix.system"),
    "an import": (Caller(__import__, "antigravity"), "builtins.__import__|__builtin__.__import__"),
    "much memory": (Caller(bytearray, 1 << 40), "bytearray"),
    "a set": ({1}, "set"),
    "an array": (torch.ones(2).numpy(), "numpy"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
    "a module": (torch.nn.Linear(1, 1), "Linear"),
    "wide complex numbers": (torch.ones(1, dtype=torch.complex128), "ComplexDoubleStorage"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_whatever_else_a_pickle_asks_for_is_refused_by_name(tmp_path: Path, case: str) -> None:
    value, asked = CALLS[case]
    with pytest.raises(RequestError, match=rf"asks for [\w.]*({asked})"):
        read_views(pickle_of({"w": value}, tmp_path))


def test_the_restricted_loader_of_torch_would_make_what_is_refused_here(tmp_path: Path) -> None:
    hostile = pickle.dumps({"w": Caller(bytearray, 1 << 20)}, protocol=2)
    (tmp_path / "x.bin").write_bytes(zip_of({"x/data.pkl": hostile, "x/version": b"3\n", "x/byteorder": b"little"}))
    assert len(torch.load(tmp_path / "x.bin", weights_only=True)["w"]) == 1 << 20


VALUES = [
    ({"w": {"v": torch.ones(1)}}, "holds a dict under 'w', where a tensor should be"),
    ({"w": 3}, "holds a int under 'w'"),
    ({"w": "text"}, "holds a str under 'w'"),
    ({"w": None}, "holds a NoneType under 'w'"),
    ({"w": torch.float32}, r"holds torch\.float32 under 'w'"),
    ({1: torch.ones(1)}, "a int as the key of a dict"),
    ({"w": [torch.ones(1)]}, "the instruction EMPTY_LIST"),
    (torch.ones(1), "holds a tensor and not a state dict"),
]


@pytest.mark.parametrize(("content", "message"), VALUES)
def test_what_is_no_dict_of_tensors_is_refused_by_the_tensors_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_views(pickle_of(content, tmp_path))


def test_a_name_that_is_set_twice_is_refused(tmp_path: Path) -> None:
    one = pickle_of({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path)
    with pytest.raises(RequestError, match="sets 'a' twice"):
        read_views(one.replace(b"X\1\0\0\0b", b"X\1\0\0\0a"))


def test_a_storage_of_two_kinds_is_refused(tmp_path: Path) -> None:
    one = pickle_of({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.int32)}, tmp_path)
    with pytest.raises(RequestError, match="describes the storage 0 in two ways"):
        read_views(one.replace(b"X\1\0\0\x001", b"X\1\0\0\x000"))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_protocol_is_refused_by_its_number(protocol: int) -> None:
    with pytest.raises(RequestError, match=f"of protocol {protocol}"):
        read_views(pickle.dumps({}, protocol=protocol))


BOMBS = {
    "dicts": b"}" * (1 << 24),
    "marks": b"(" * (1 << 24),
    "references": b"\x80\x02}q\0" + b"h\0" * (1 << 23),
    "nested tuples": b")" + b"\x85" * (1 << 23),
    "a long text": b"X" + struct.pack("<L", (1 << 32) - 1),
    "far memories": b")" + b"".join(b"r" + struct.pack("<L", (1 << 32) - 1 - number) for number in range(1 << 22)),
}
READ = r"""
import re, sys
from pathlib import Path
from resta.errors import RequestError
from resta.pickled import read_views
try:
    read_views(Path(sys.argv[1]).read_bytes())
except RequestError as error:
    print(error)
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("case", BOMBS)
def test_no_pickle_takes_600_mb(tmp_path: Path, case: str) -> None:
    (tmp_path / "p").write_bytes(BOMBS[case])
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "p")], capture_output=True, text=True, check=True)
    said, peak = done.stdout.splitlines()
    assert f"more than {MOST_STEPS:,} instructions" in said or "broken" in said
    assert int(peak) < 600_000, said  # KiB


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_of_a_mutilated_pickle_torch_reads_alike(tmp_path: Path, data: st.DataObject) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}
    pickled = bytearray(pickle_of(tensors, tmp_path))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(pickled) - 1))
        pickled[place] = data.draw(st.integers(0, 255) | st.sampled_from(b"RQbsutK()}.h\x85\x86\x87X\x88\x89N"))
    try:
        views = read_views(bytes(pickled))
    except RequestError:
        return
    assert all(isinstance(view, Described) for view in views.values())
    with zipfile.ZipFile(tmp_path / "p.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "q.bin").write_bytes(zip_of(records | {"p/data.pkl": bytes(pickled)}))
    try:
        loaded = torch.load(tmp_path / "q.bin", weights_only=True)
    except Exception:  # sizes and records are held against each other by those who read the file
        return
    assert {name: (view.shape, view.strides) for name, view in views.items()} == {
        name: (tuple(tensor.shape), tensor.stride()) for name, tensor in loaded.items()
    }
