from __future__ import annotations

import pytest

from resta.redeval.report import Report, Section, redact, to_markdown


def test_a_text_with_half_a_surrogate_pair_can_be_redacted_and_shown() -> None:
    assert redact("a\ud800b", include_text=False) != redact("a\ud801b", include_text=False)
    assert redact("a\ud800b", include_text=True) == "a\ufffdb"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\x9b", "\r", "\u202e", "\u2066"])
def test_what_takes_hold_of_a_screen_is_not_shown(mark: str) -> None:
    assert redact(f"a{mark}b", include_text=True) == "a\ufffdb"


def test_lines_tabs_and_all_scripts_are_shown_as_they_are() -> None:
    text = "a\tb\nשלום 你好 👩‍🔬"
    assert redact(text, include_text=True) == text


def test_an_answer_shown_in_markdown_fetches_nothing_and_breaks_no_table() -> None:
    section = Section(title="t", header=("a", "b"), rows=(("![x](http://h/x.png)", "<b>|\x1b\n"),))
    page = to_markdown(Report(title="t", warnings=(), sections=(section,), bars=()))
    assert "](" not in page
    assert "| ![x]\\(http://h/x.png) | &lt;b&gt;\\|\ufffd  |" in page
