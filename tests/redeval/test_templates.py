from __future__ import annotations

from pathlib import Path

import pytest

from resta.errors import RequestError
from resta.redeval import templates
from resta.redeval.templates import BUILT_IN, PLACEHOLDER, read_template

TINY = Path(__file__).parent / "published"  # the published structures in words of our own


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


@pytest.mark.parametrize("name", BUILT_IN)
def test_published_templates_load_unchanged_and_are_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TINY / f"{name}.txt"
    template = read_template(str(path))
    assert template.text.encode() == path.read_bytes()
    assert template.published == (name == "standard")  # of which there is only one wording
    monkeypatch.setattr(templates, "PUBLISHED", {template.sha256: name})
    assert read_template(str(path)).published
    assert template.fill(" Why \\1 %s? ") == path.read_text(encoding="utf-8").replace("<question>", "Why \\1 %s?")


def test_a_template_without_placeholder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Answer me.")
    with pytest.raises(RequestError, match="no placeholder <question>"):
        read_template(str(tmp_path / "t.txt"))


def test_an_unknown_template_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match='did you mean "standard"'):
        read_template("standart")


def test_line_ends_of_a_template_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"<question>\r\nnow")
    assert read_template(str(tmp_path / "t.txt")).fill("a?") == "a?\r\nnow"
