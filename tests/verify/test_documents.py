from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.errors import ResumeError
from resta.verify.documents import (
    DOCUMENTS,
    Document,
    finished_tasks,
    read_documents,
    read_facts,
    start_suite,
    write_documents,
)


def documents(task: str, count: int) -> list[Document]:
    return [Document(task=task, doc_id=f"{i:x}", metric="acc", value=i % 2) for i in range(count)]


def test_what_was_written_is_read_and_an_absent_folder_holds_nothing(tmp_path: Path) -> None:
    assert read_documents(tmp_path / "none") == ()
    assert read_facts(tmp_path / "none") == {}
    write_documents(tmp_path, "sums", documents("sums", 3))
    write_documents(tmp_path, "facts", documents("facts", 2), cut=1)
    assert read_documents(tmp_path) == (*documents("sums", 3), *documents("facts", 2))
    assert finished_tasks(tmp_path) == {"sums", "facts"}


@given(cut=st.integers(min_value=0))
def test_a_task_torn_at_any_byte_counts_not_at_all_until_it_is_measured_again(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    write_documents(folder, "sums", documents("sums", 3))
    kept = (folder / DOCUMENTS).stat().st_size
    write_documents(folder, "facts", documents("facts", 4))
    whole = (folder / DOCUMENTS).read_bytes()
    (folder / DOCUMENTS).write_bytes(whole[: kept + cut % (len(whole) - kept)])

    assert finished_tasks(folder) == {"sums"}
    assert read_documents(folder) == tuple(documents("sums", 3))

    write_documents(folder, "facts", documents("facts", 4))
    assert read_documents(folder) == (*documents("sums", 3), *documents("facts", 4))


def test_documents_that_are_missing_before_their_mark_are_noticed(tmp_path: Path) -> None:
    write_documents(tmp_path, "sums", documents("sums", 3))
    lines = (tmp_path / DOCUMENTS).read_text().splitlines(keepends=True)
    (tmp_path / DOCUMENTS).write_text("".join(lines[1:]))
    with pytest.raises(ResumeError, match="documents of sums are not all there"):
        read_documents(tmp_path)


def test_a_line_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / DOCUMENTS).write_text('{"task": "sums", "finished": 0, "schema": 99}\n')
    with pytest.raises(ResumeError, match="schema 99"):
        read_documents(tmp_path)


def test_a_folder_of_another_suite_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    start_suite(tmp_path / "u", {"limit": 5, "tasks": {"sums": {"metric": "acc"}}})
    start_suite(tmp_path / "u", {"limit": 5, "tasks": {"sums": {"metric": "acc"}}})
    with pytest.raises(ResumeError, match="limit: 5 there, 6 now"):
        start_suite(tmp_path / "u", {"limit": 6, "tasks": {"sums": {"metric": "acc"}}})
    assert read_facts(tmp_path / "u")["limit"] == 5
