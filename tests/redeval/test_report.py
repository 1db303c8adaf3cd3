from __future__ import annotations

import pytest

from resta.redeval.report import redact


def test_a_text_with_half_a_surrogate_pair_can_be_redacted_and_shown() -> None:
    assert redact("a\ud800b", include_text=False) != redact("a\ud801b", include_text=False)
    assert redact("a\ud800b", include_text=True) == "a\ufffdb"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\x9b", "\r", "\u202e", "\u2066"])
def test_what_takes_hold_of_a_screen_is_not_shown(mark: str) -> None:
    assert redact(f"a{mark}b", include_text=True) == "a\ufffdb"


def test_lines_tabs_and_all_scripts_are_shown_as_they_are() -> None:
    text = "a\tb\nשלום 你好 👩‍🔬"
    assert redact(text, include_text=True) == text
