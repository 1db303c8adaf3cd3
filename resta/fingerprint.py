"""Whether a text, a file or a folder is the one it was: SHA-256 of content, and a fingerprint of large files.

The fingerprint of a file is a digest of its size and of a few blocks, taken in milliseconds at any size. Training,
merging and rounding change blocks everywhere, so two models differ in their fingerprints. It is no proof against
somebody who means to deceive; a digest of the whole file is. Knows nothing of models, recipes or runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from resta.errors import RestaError

BLOCK = 1 << 16
BLOCKS = 16


def sha256_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of UTF-8 text; half a surrogate pair, which a server may send, counts as it is."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest(facts: object) -> str:
    """Return the hexadecimal SHA-256 of JSON-able facts, independent of key order."""
    return sha256_text(json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":")))


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content.

    Raises RestaError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RestaError(f"{path}: cannot be read: {error.strerror}") from error


def file_fingerprint(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's size and 16 evenly spread blocks of 64 KiB; a file of up to 2
    MiB is read whole.
    """
    size = path.stat().st_size
    total = hashlib.sha256(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= 2 * BLOCKS * BLOCK:
            total.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK) // (BLOCKS - 1))
                total.update(file.read(BLOCK))
    return total.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Return the hexadecimal SHA-256 of the names and fingerprints of the files that make a model of a folder."""
    suffixes = {".json", ".safetensors", ".jinja", ".model", ".txt", ".bin"}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
    return sha256_text("".join(f"{file.name}\0{file_fingerprint(file)}\0" for file in files))
