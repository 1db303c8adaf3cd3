from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from resta.redeval.report import Report, Section, make_report, print_report, redact, to_html, to_markdown
from resta.redeval.score import join, score
from tests.redeval.test_records import CONFIG
from tests.redeval.test_score import answer, question, verdict


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


def report_of(labels: list[str], rows: int = 64) -> Report:
    questions = [question(i) for i in range(len(labels))]
    answers = [replace(answer(each), rows=rows) for each in questions]
    verdicts = [verdict(each, label) for each, label in zip(answers, labels, strict=True)]
    by_id = {each.qid: each for each in questions}
    decoding = {"mode": "greedy", "max_new_tokens": 8}
    facts = {"about": "", "wording": "own", "confirmed": True, "measures": ["harm"], "read": {"kind": "regex"}}
    return make_report(
        CONFIG | {"banks": [], "decoding": decoding, "target": {"name": "m", "kind": "local", "batch_rows": 64}},
        score(by_id, answers, verdicts),
        join(by_id, answers, verdicts),
        {"j": facts},
        answered=(len(labels), len(labels)),
        include_text=False,
    )


def on_a_terminal(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_a_terminal_of_80_columns_shows_both_rates_the_worst_case_and_the_coverage_whole() -> None:
    shown = on_a_terminal(report_of(["harmful"] * 6 + ["blocked"] * 4))
    for header in ("harmful", "safe", "refused", "blocked", "ASR = H/N", "ASR = H/(H+U)", "worst case", "coverage"):
        assert header in shown
    assert "60.0 % [31.3-83.2]  100.0 %        100.0 %     60.0 %" in shown
    assert "unparsed " not in shown.partition("In brackets")[0]  # where there are none
    assert max(map(len, shown.splitlines())) <= 80


def test_a_judge_that_read_nothing_gets_no_rate_and_no_dot() -> None:
    report = report_of(["unparsed"] * 24)
    shown = on_a_terminal(report)
    assert "could not be read on 24 of 24 answers" in " ".join(shown.split())
    assert "0.0 % [0.0" not in shown
    assert "-          -              100.0 %     0.0 %" in shown
    page = to_html(report)
    assert "<circle" not in page
    assert 'class="interval"' not in page
    assert "<circle" in to_html(report_of(["safe"] * 24))


def test_answers_from_smaller_batches_than_the_run_asks_for_are_told() -> None:
    warning = "2 of 2 answers were given in batches of fewer than 64"
    assert any(warning in each for each in report_of(["safe", "safe"], rows=32).warnings)
    assert not any("batches" in each for each in report_of(["safe", "safe"]).warnings)
