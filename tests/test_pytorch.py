"""Tensors of PyTorch files by where their bytes lie: torch is the oracle, and what contradicts itself is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resta.checkpoint import Reader, identify
from resta.errors import ChangedError, RequestError
from resta.hub import Located
from resta.pytorch import read_stored
from tests.builders import Tensors, zip_of


def bytes_of(file: Path, first_byte: int = 0, nbytes: int | None = None) -> dict[str, bytes]:
    """The bytes of every tensor of a file, or the same stretch of each, as a merge or a conversion reads them."""
    found = {}
    with Reader({file: identify(file, Located(source="", folder=file.parent))}) as reader:
        for name, stored in read_stored(file).items():
            data = bytearray(stored.spec.nbytes - first_byte if nbytes is None else nbytes)
            reader.read(stored, first_byte, memoryview(data))
            found[name] = bytes(data)
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def saved(tensors: Tensors, folder: Path, name: str = "x.bin") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda whole: whole,
    "turned": lambda whole: whole.transpose(0, 2),
    "rows": lambda whole: whole[1:3],
    "columns": lambda whole: whole[:, 1:, ::2],
    "one": lambda whole: whole[3, 2, 1],
    "none": lambda whole: whole[:, :0],
    "with ones": lambda whole: whole[:, None, :1].transpose(0, 1),
    "overlapping": lambda whole: whole.flatten().unfold(0, 8, 4)[:3],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_is_read_in_the_order_of_its_indices_however_it_lies(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    tensor = LAYOUTS[layout](torch.arange(60).reshape(4, 3, 5).to(dtype))
    file = saved({"before": torch.ones(3), "w": tensor}, tmp_path)
    assert bytes_of(file)["w"] == raw(tensor)
    if tensor.numel() > 2:
        width = tensor.element_size()
        assert bytes_of(file, width, width)["w"] == raw(tensor)[width : 2 * width]


def test_a_file_that_is_cut_after_it_was_planned_is_noticed_however_a_tensor_lies(tmp_path: Path) -> None:
    file = saved({"w": torch.arange(6000.0).reshape(60, 100).t()}, tmp_path)
    stored = read_stored(file)["w"]
    with Reader({file: identify(file, Located(source="", folder=tmp_path))}) as reader:
        with file.open("r+b") as handle:
            handle.truncate(1000)
        with pytest.raises(ChangedError, match="ends within a tensor"):
            reader.read(stored, 0, memoryview(bytearray(8)))


def edited(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Write the file anew with other records."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    file.write_bytes(zip_of(records))
    return file


def put(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.update({f"x/{name}": content})


def replace(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        assert old in records["x/data.pkl"]
        records["x/data.pkl"] = records["x/data.pkl"].replace(old, new)

    return change


LIES: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "a storage that is not there": (lambda records: records.pop("x/data/1") and None, "'b' is in the storage 1, and"),
    "a storage beyond its record": (put("data/0", bytes(20)), "'a' is in .* 24 bytes, but its record has 20"),
    "a storage short of its record": (put("data/0", bytes(28)), "of 24 bytes, but its record has 28"),
    "a larger shape": (replace(b"K\2K\3\x86", b"K\2K\4\x86"), r"'a': F32 of shape \[2, 4\] .* beyond its storage"),
    "a larger stride": (replace(b"K\3K\1\x86", b"K\4K\1\x86"), r"strides \[4, 1\], reaches beyond"),
    "an offset": (replace(b"QK\0K\2", b"QK\1K\2"), "at element 1, strides"),
    "a repetition": (replace(b"K\2K\3\x86q", b"M\0\2K\3\x86q"), r"'a': F32 of shape \[512, 3\]"),
    "no pickle": (lambda records: records.pop("x/data.pkl") and None, "without data.pkl"),
    "another byte order": (put("byteorder", b"big"), "another byte order"),
    "a byte order without end": (put("byteorder", bytes(1000)), "its record byteorder has 1,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_contradicts_itself_is_refused_by_file_and_tensor(tmp_path: Path, case: str) -> None:
    change, message = LIES[case]
    file = edited(saved({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path), change)
    with pytest.raises(RequestError, match=message) as caught:
        read_stored(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_tensor_that_repeats_its_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"tensor 'w': shape \[1099511627776\] repeats the 4 bytes of its storage"):
        read_stored(saved({"w": torch.ones(1).expand(1 << 40)}, tmp_path))


def test_the_format_before_zip_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(RequestError, match=r"x\.bin: is a bare pickle .*torch\.load\(FILE, weights_only=True\)"):
        read_stored(tmp_path / "x.bin")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_a_file_it_is_refused_or_read_as_torch_reads_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    whole = bytearray(saved({"a": base, "b": base.t(), "c": torch.ones(3).bfloat16()}, tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.bin"
    file.write_bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    try:
        found = bytes_of(file)
    except RequestError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017
        return
    try:
        loaded = torch.load(file, weights_only=True, mmap=True)
    except Exception:  # it also looks at what no tensor depends on, the version among it
        return
    assert found == {name: raw(tensor) for name, tensor in loaded.items()}
