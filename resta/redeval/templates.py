"""Prompt templates: text files with the placeholder <question>; their digests name what was asked.

Files load byte for byte, so red-instruct's own work unchanged. The built-in ones have the same structures in this
project's words: numbers made with them are not comparable with numbers made with the published files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from resta.errors import RequestError
from resta.strict import did_you_mean

PLACEHOLDER = "<question>"
BUILT_IN = ("standard", "cot", "suffix", "cou")
# SHA-256 of the files of declare-lab/red-instruct at 73c759c, to recognise them
PUBLISHED = {
    "0b6387d8dfddaa0373995096406f797c8c488e1cb53e2f7616a0fec7547cce12": "standard",
    "a709314e698800cf22db72502036849e300db58f549ce9fe1c10f4e8d696c6b7": "cot",
    "63b565138f0a402e2bee7e379e4dcdbad011de32094af74e6efe94766f603f9a": "suffix",
    "e53c0cdc861222f62e083f9670bfaad81cb2ae6f1d4fae4aa3039e61116439cb": "cou",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A prompt template; `published` says that its bytes are red-instruct's."""

    name: str
    text: str
    sha256: str
    published: bool

    def fill(self, question: str) -> str:
        """Return the prompt for one question, stripped as red-instruct strips it."""
        return self.text.replace(PLACEHOLDER, question.strip())


def read_template(spec: str) -> Template:
    """Return the template that `spec` names: a built-in name or a path. Raises RequestError."""
    if spec in BUILT_IN:
        name, data = spec, (resources.files("resta.redeval") / "template" / f"{spec}.txt").read_bytes()
    elif Path(spec).is_file():
        name, data = Path(spec).stem, Path(spec).read_bytes()
    else:
        hint = did_you_mean(spec, BUILT_IN)
        raise RequestError(f"unknown template {spec!r}: neither a file nor one of {', '.join(BUILT_IN)}{hint}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"template {spec}: not UTF-8: {error}") from error
    if PLACEHOLDER not in text:
        raise RequestError(f"template {spec}: no placeholder {PLACEHOLDER}; the question would never be asked")
    digest = hashlib.sha256(data).hexdigest()
    return Template(name=name, text=text, sha256=digest, published=digest in PUBLISHED)
