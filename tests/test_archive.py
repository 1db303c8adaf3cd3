"""Archives of torch.save: Python's zipfile is the oracle, and each way to lie has its refusal."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resta.archive import MOST_DIRECTORY, read_archive, read_record
from resta.errors import RequestError
from tests.builders import zip_of

PLAIN = {"a/data.pkl": b"abc", "a/data/0": b"12345678", "a/version": b"3\n"}


@pytest.mark.parametrize("tensors", [0, 1, 40])
def test_records_lie_where_zipfile_finds_them(tmp_path: Path, tensors: int) -> None:
    torch.save({str(number): torch.rand(number + 1) for number in range(tensors)}, tmp_path / "x.bin")
    found = read_archive(tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as oracle:
        assert {f"x/{name}" for name in found.records} == set(oracle.namelist())
        for name, record in found.records.items():
            assert read_record(tmp_path / "x.bin", record) == oracle.read(f"x/{name}")


def test_another_content_is_another_directory(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.full((4,), value)}, tmp_path / name / "x.bin")
    one, other = (read_archive(tmp_path / name / "x.bin") for name in "ab")
    assert one.records == other.records
    assert one.directory_sha256 != other.directory_sha256


def test_sizes_of_64_bits_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(zip_of(PLAIN, wide=True))
    assert read_archive(tmp_path / "x.bin").records["data/0"].nbytes == 8


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bare pickle": (lambda: b"\x80\x02}.", "is a bare pickle and not a zip archive"),
    "an empty file": (lambda: b"", "does not begin as a zip archive"),
    "a page of the web": (lambda: b"<html>", "does not begin as a zip archive"),
    "cut": (lambda: zip_of(PLAIN)[:-1], "does not end as a zip archive"),
    "cut to nearly nothing": (lambda: b"PK\3\4", "does not end as a zip archive"),
    "trailing data": (lambda: zip_of(PLAIN) + b"x", "does not end as a zip archive"),
    "a comment": (lambda: zip_of(PLAIN, comment=b"hello"), "does not end as a zip archive"),
    "data before": (lambda: b"PK\3\4" + zip_of(PLAIN), "does not end as a zip archive"),
    "compressed": (lambda: zip_of(PLAIN, packed="a/data/0"), r"record 'a/data/0' is compressed \(method 8\)"),
    "a bomb": (lambda: zip_of(PLAIN | {"a/data/0": bytes(1 << 24)}, packed="a/data/0"), "'a/data/0' is compressed"),
    "out of its folder": (lambda: zip_of(PLAIN | {"a/../b": b""}), r"record 'a/\.\./b' is not called as"),
    "another folder": (lambda: zip_of(PLAIN | {"b/data/1": b""}), "record 'b/data/1' is not called as"),
    "absolute": (lambda: zip_of({"/a/data.pkl": b""}), "is not called as"),
    "without a folder": (lambda: zip_of({"data.pkl": b""}), "is not called as"),
    "twice but for its case": (lambda: zip_of(PLAIN | {"a/DATA/0": b"x"}), "two of its records are called 'a/DATA/0'"),
    "another name of its own": (
        lambda: zip_of(PLAIN).replace(b"a/data/0", b"a/data/7", 1),
        "'a/data/0' has another header of its own",
    ),
    "beyond the file": (lambda: moved(zip_of(PLAIN), b"a/data/0", 1 << 30), "should begin at byte 1073741824"),
    "on another": (lambda: moved(zip_of(PLAIN), b"a/version", 0), "has another header of its own at byte 0"),
}  # fmt: skip


def moved(archive: bytes, name: bytes, offset: int) -> bytes:
    """The archive with another offset in the directory's entry of a record."""
    at = archive.rindex(name) - 4
    return archive[:at] + struct.pack("<L", offset) + archive[at + 4 :]


@pytest.mark.parametrize("case", LIES)
def test_what_is_no_archive_of_torch_or_lies_is_refused(tmp_path: Path, case: str) -> None:
    make, message = LIES[case]
    (tmp_path / "x.bin").write_bytes(make())
    with pytest.raises(RequestError, match=message) as caught:
        read_archive(tmp_path / "x.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'x.bin'}: ")


def test_records_that_lie_on_each_other_are_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a/data/1", b"inside")
    local = inner.getvalue()[: inner.getvalue().index(b"PK\1\2")]  # a local header and its data, within another's data
    whole = zip_of({"a/data/0": local, "a/data/1": b"inside"})
    (tmp_path / "x.bin").write_bytes(moved(whole, b"a/data/1", whole.index(local)))
    with pytest.raises(RequestError, match="lie on each other"):
        read_archive(tmp_path / "x.bin")


def test_a_directory_of_millions_of_records_is_not_read(tmp_path: Path) -> None:
    size = MOST_DIRECTORY + 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 40, 0)
    with (tmp_path / "x.bin").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(40 + size)
        file.write(end)
    with pytest.raises(RequestError, match="its directory has 16,777,217 bytes"):
        read_archive(tmp_path / "x.bin")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_an_archive_it_is_read_within_its_bytes_or_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(zip_of(PLAIN, wide=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    (tmp_path / "x.bin").write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        found = read_archive(tmp_path / "x.bin")
    except RequestError as error:
        assert str(error).startswith(str(tmp_path / "x.bin"))  # noqa: PT017
        return
    assert all(record.start + record.nbytes <= len(whole) for record in found.records.values())
