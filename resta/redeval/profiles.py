"""What is asked, in the words of users: banks and templates by name, or a profile of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resta.errors import RequestError
from resta.redeval.protocol import ProtocolName
from resta.redeval.questions import Duplicates


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What is asked by name: banks of harmful questions and of safe ones, each question through every template."""

    banks: Sequence[str | Path]
    safe_banks: Sequence[str | Path]
    templates: Sequence[str | Path]


EVERY_TEMPLATE = ("standard", "cot", "suffix", "cou")
# Each holds enough questions for the default policy to pass a good model.
PROFILES = {
    "quick": Profile(banks=("dangerousqa", "catqa-en"), safe_banks=("lookalikes",), templates=("standard", "cou")),
    "standard": Profile(
        banks=("dangerousqa", "adversarialqa", "catqa-en"),
        safe_banks=("lookalikes",),
        templates=("standard", "suffix", "cou"),
    ),
    "full": Profile(
        banks=("dangerousqa", "harmfulqa", "adversarialqa", "catqa-en"),
        safe_banks=("lookalikes",),
        templates=EVERY_TEMPLATE,
    ),
}
TRIAL = Profile(banks=("smoke",), safe_banks=("smoke-safe",), templates=EVERY_TEMPLATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What is asked and how. What is empty or None is the profile's choice, or else the protocol's.

        Questions(banks=["dangerousqa"], safe_banks=["lookalikes"], templates=["standard", "cou"], limit=100)

    Where neither a profile nor a bank is named, a few built-in questions are asked: a trial, and no measurement.
    """

    banks: Sequence[str | Path] = ()  # harmful questions: a bank's name, a path, or hf://OWNER/NAME@COMMIT/FILE
    safe_banks: Sequence[str | Path] = ()  # questions that are safe to answer, for over-refusal
    templates: Sequence[str | Path] = ()
    profile: str | None = None  # quick, standard or full; what is named beside it replaces its own
    bank_dirs: Sequence[Path] = ()  # where published banks lie
    download: bool = False  # allow fetching a bank, pinned by commit and SHA-256
    without: Sequence[Path] = ()  # folders of runs whose questions are not asked again
    protocol: ProtocolName = "resta"
    duplicates: Duplicates | None = None
    limit: int | None = None  # questions per bank
    epochs: int = 1  # answers per question
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    keep_thoughts: bool = False  # show judges the model's thoughts, too
    template_args: Mapping[str, Any] = field(default_factory=dict)  # of the model's chat template

    def named(self) -> Profile:
        """Return the names of what is asked. Raises RequestError."""
        if self.profile not in (None, *PROFILES):
            raise RequestError(f"unknown profile {self.profile!r}; there are {', '.join(PROFILES)}")
        profile = PROFILES[self.profile] if self.profile else TRIAL
        if not self.profile and (self.banks or self.safe_banks):
            profile = replace(profile, banks=(), safe_banks=())
        return Profile(
            banks=self.banks or profile.banks,
            safe_banks=self.safe_banks or profile.safe_banks,
            templates=self.templates or profile.templates,
        )
