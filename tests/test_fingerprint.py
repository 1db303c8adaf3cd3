"""A fingerprint tells files apart by what training changes, and does not read them whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resta.fingerprint import BLOCK, BLOCKS, file_fingerprint


@pytest.mark.parametrize("size", [0, 1, BLOCK, 2 * BLOCKS * BLOCK, 2 * BLOCKS * BLOCK + 1, 50 * BLOCK + 7])
def test_a_change_all_over_a_file_or_at_an_end_changes_its_fingerprint(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    file = tmp_path / "file"

    def fingerprint_of(content: np.ndarray) -> str:
        file.write_bytes(content.tobytes())
        return file_fingerprint(file)

    same = fingerprint_of(data)
    assert fingerprint_of(data) == same
    assert fingerprint_of(np.append(data, np.uint8(0))) != same
    if size:
        for place in (0, size - 1):
            changed = data.copy()
            changed[place] ^= 1
            assert fingerprint_of(changed) != same
        assert fingerprint_of(data ^ (np.arange(size) % BLOCK == 0)) != same
