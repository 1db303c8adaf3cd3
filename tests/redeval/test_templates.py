from __future__ import annotations

from pathlib import Path

import pytest

from resta.errors import BankError
from resta.redeval.templates import BUILT_IN, PLACEHOLDER, read_template

from .test_questions import RED_INSTRUCT, published


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_hold_the_question_once(name: str) -> None:
    template = read_template(name)
    assert template.text.count(PLACEHOLDER) == 1
    assert "  what?  " not in template.fill("  what?  ")
    assert "what?" in template.fill("  what?  ")


def test_the_chain_of_utterances_has_the_papers_structure() -> None:
    text = read_template("cou").text
    assert text.count("Red-LM:") == 2  # the demonstration and the question
    assert text.endswith("Base-LM:\n")
    assert text.index("(Internal thought:") < text.index("<question>")


@published
@pytest.mark.parametrize("name", BUILT_IN)
def test_published_templates_load_unchanged_and_are_recognised(name: str) -> None:
    path = RED_INSTRUCT / f"{name}.txt"
    template = read_template(str(path))
    assert template.published
    assert template.text.encode() == path.read_bytes()


def test_a_template_without_placeholder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Answer me.")
    with pytest.raises(BankError, match="no placeholder <question>"):
        read_template(str(tmp_path / "t.txt"))


def test_an_unknown_template_suggests_the_nearest() -> None:
    with pytest.raises(BankError, match='did you mean "standard"'):
        read_template("standart")


def test_line_ends_of_a_template_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"<question>\r\nnow")
    assert read_template(str(tmp_path / "t.txt")).fill("a?") == "a?\r\nnow"
