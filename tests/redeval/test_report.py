from __future__ import annotations

import html
import io
from dataclasses import replace

import pytest
from rich.console import Console

from resta.page import table
from resta.redeval.control import Control, controls, known_answers, read_control, record_of
from resta.redeval.records import Judgement, JudgementLabel
from resta.redeval.report import Report, Section, make_report, print_report, redact, to_html, to_markdown
from resta.redeval.score import join, score
from tests.pages import Page, assert_self_contained
from tests.redeval.builders import CONFIG, answer, question, verdict


def test_a_text_with_half_a_surrogate_pair_can_be_redacted_and_shown() -> None:
    assert redact("a\ud800b", include_text=False) != redact("a\ud801b", include_text=False)
    assert redact("a\ud800b", include_text=True) == r"a\ud800b"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\x9b", "\r", "\u202e", "\u2066"])
def test_what_takes_hold_of_a_screen_is_not_shown(mark: str) -> None:
    assert redact(f"a{mark}b", include_text=True) == f"a{repr(mark)[1:-1]}b"


def test_lines_tabs_and_all_scripts_are_shown_as_they_are() -> None:
    text = "a\tb\nשלום 你好 👩‍🔬"
    assert redact(text, include_text=True) == text


def test_an_answer_shown_in_markdown_fetches_nothing_and_breaks_no_table() -> None:
    section = Section(table=table("t", ("a", "b"), [("![x](http://h/x.png)", "<b>|\x1b\n")]))
    page = to_markdown(Report(name="t", protocol="p", answer={}, warnings=(), sections=(section,), bars=()))
    assert "](" not in page
    assert r"| !&#91;x&#93;(http://h/x.png) | &lt;b&gt;&#124;&#92;x1b |" in page


def report_of(labels: list[str], controls: tuple[Control, ...] = (), *, rows: int = 64) -> Report:
    questions = [question(i) for i in range(len(labels))]
    answers = [replace(answer(each), rows=rows) for each in questions]
    verdicts = [verdict(each, label) for each, label in zip(answers, labels, strict=True)]
    by_id = {each.qid: each for each in questions}
    decoding = {"mode": "greedy", "max_new_tokens": 8}
    facts = {"about": "", "wording": "own", "confirmed": True, "measures": ["harm"], "read": {"kind": "regex"}}
    return make_report(
        CONFIG | {"banks": [], "decoding": decoding, "target": {"name": "m", "kind": "local", "batch_rows": 64}},
        replace(score(by_id, answers, verdicts), controls={"j": controls} if controls else {}),
        join(by_id, answers, verdicts),
        {"j": facts},
        answered=(len(labels), len(labels)),
        include_text=False,
    )


def on_a_terminal(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def judge_says(label: JudgementLabel | None, least: int = 99) -> tuple[Control, ...]:
    """Return how a judge does that knows, or says `label` to everything, of the first so many known answers."""
    known = known_answers(read_control("en"), "en", ["harm"])[:least]
    right: dict[str, JudgementLabel] = {"compliance": "harmful", "refusal": "refused"}
    said = [
        record_of(
            each,
            Judgement(
                answer_id=each.answer.id, judge="j", judge_sha256="0", label=label or right.get(each.kind, "safe")
            ),
            "",
        )
        for each in known
    ]
    return controls(said, ["harm"], ["en"])


@pytest.mark.parametrize(
    ("found", "told_apart", "warning"),
    [
        (judge_says(None), "yes", ""),
        (judge_says("safe"), "no", "j did not tell known harm from what is none (known answers in en, p = 1)"),
        (judge_says("harmful"), "no", "j did not tell known harm from what is none"),
        (judge_says(None, least=20), "too few asked", "j on known harm (en): too few asked"),
        (judge_says(None, least=0), "not tested", "j on known harm (en): not tested"),
        ((), "not tested", "j was not tested on known answers"),
    ],
)
def test_every_view_says_how_each_judge_did_on_known_answers_and_warns_where_its_rates_show_nothing(
    found: tuple[Control, ...], told_apart: str, warning: str
) -> None:
    report = report_of(["harmful", "safe"], found)
    [section] = [section for section in report.sections if section.table.caption == "Judges on known answers"]
    assert [row[3].text for row in section.table.rows] == [told_apart]
    shown = on_a_terminal(report)
    assert max(map(len, shown.splitlines())) <= 80
    for page in (" ".join(shown.split()), to_markdown(report), to_html(report)):
        assert told_apart in page
        assert ("show nothing" in page.replace("Without that its rates show nothing", "")) == bool(warning)
        assert html.escape(warning) in page
    if found and found[0].at:
        for page in (shown, to_markdown(report), to_html(report)):
            assert f"{found[0].p:.2g}" in page
            assert found[0].at in page


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
    assert 'class="mark' not in page
    assert 'class="interval rate"' not in page
    assert 'class="reach"' in page
    for drawn in ('class="mark rate', 'class="interval rate"'):
        assert drawn in to_html(report_of(["safe"] * 24))


def test_answers_from_smaller_batches_than_the_run_asks_for_are_told() -> None:
    warning = "2 of 2 answers were given in batches of fewer than 64"
    assert any(warning in each for each in report_of(["safe", "safe"], rows=32).warnings)
    assert not any("batches" in each for each in report_of(["safe", "safe"]).warnings)


def test_a_runs_page_says_its_rate_first_and_no_name_breaks_out_of_its_place() -> None:
    attack = "<script>alert('x')</script> \x1b[31m\u202e</td>"
    found = replace(report_of(["harmful", "safe"]), name=attack, warnings=(f"{attack} is read with care",))
    row = table(attack, (attack, "b"), [(attack, "1")])
    page = to_html(replace(found, sections=(*found.sections, Section(table=row, note=attack))))
    assert_self_contained(page)
    reader = Page(page)
    assert "50.0 % of all answers to harmful questions are harmful to j" in " ".join(reader.text.split())
    assert (
        reader.text.index("of all answers") < reader.text.index("Read with care") < reader.text.index("Headline rates")
    )
    assert reader.text.count("<script>alert('x')</script> \\x1b[31m\\u202e</td>") >= 4
    assert len(reader.all("nav")) == len(reader.all("main")) == len(reader.all("h1")) == 1
    assert "No judge has seen answers to harmful questions." in to_html(replace(found, answer={}))
