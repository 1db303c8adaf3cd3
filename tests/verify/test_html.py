"""The report as its readers meet it: a parser, a screen reader's needs, an attacker's names, and a real browser."""

from __future__ import annotations

import html
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.statistics import Difference, Rate
from resta.verify.decision import Limit, Outcome, Rule
from resta.verify.html import labels, to_html, used
from resta.verify.junit import to_junit
from resta.verify.measurement import ROLES
from resta.verify.plan import with_power
from resta.verify.report import to_card, to_json, to_markdown
from resta.verify.words import against_limit, quantity
from tests.pages import Page, assert_self_contained
from tests.verify.builders import HOSTILE, Case, by_name, make_hostile_case, make_named_case
from tests.verify.planted import exactly, planted

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("cases")
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_hostile_case(folder) if name == "hostile" else make_named_case(folder, name)
        return made[name]

    return get


def page_of(case: Case, *, include_text: bool = False) -> str:
    return to_html(case.comparison, case.decision, case.ruling, include_text=include_text)


@pytest.mark.parametrize(
    ("name", "include_text"),
    [("PASS", False), ("FAIL", True), ("INVALID", True), ("hostile", False), ("hostile", True)],
)
def test_a_page_is_well_formed_and_refers_to_nothing_outside(
    case: Callable[[str], Case], name: str, include_text: bool
) -> None:
    assert_self_contained(page_of(case(name), include_text=include_text))


def test_the_verdict_its_reason_and_every_rule_are_said_in_words(case: Callable[[str], Case]) -> None:
    for name in ("PASS", "FAIL", "INVALID"):
        found = case(name)
        assert found.decision.verdict.name == name
        page = Page(page_of(found))
        said = [name, found.decision.summary, *found.decision.notes]
        said += [line.replace("`", "") for line in found.decision.guidance]  # commands are elements
        said += [text for rule in found.decision.rules for text in (rule.name, rule.why, rule.outcome)]
        said += [model.name for model in found.comparison.models.values()]
        for text in said:
            assert text in page.text


def test_a_screen_reader_gets_landmarks_headings_in_order_and_named_figures(case: Callable[[str], Case]) -> None:
    page = Page(page_of(case("FAIL"), include_text=True))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.all(landmark)) == 1
    ids = {attributes.get("id") for _, attributes in page.tags}
    figures = [figure for figure in page.all("svg") if figure.get("role") == "img"]
    assert len(figures) == 2
    for figure in figures:
        assert set((figure["aria-labelledby"] or "").split()) <= ids
    # Each other drawing is a row of a list, which says beside it in words what it shows, or lies within one of these.
    for (tag, attributes), parents in zip(page.tags, page.parents, strict=True):
        if tag == "svg" and attributes.get("role") != "img":
            assert attributes.get("aria-hidden") == "true" or "svg" in parents
            assert "figure" in parents
    assert len(page.all("figcaption")) == len(page.all("figure")) == 5
    for section in page.all("section"):
        assert section["aria-labelledby"] in ids
    for attributes in page.all("div"):
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


def test_every_table_has_a_caption_and_says_what_its_headers_head(case: Callable[[str], Case]) -> None:
    page = Page(page_of(case("PASS")))
    assert len(page.all("table")) == len(page.all("caption")) > 12
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    rows = sum(
        tag == "tr" and parents[-1] == "tbody" for (tag, _), parents in zip(page.tags, page.parents, strict=True)
    )
    assert sum(attributes["scope"] == "row" for attributes in page.all("th")) >= rows


def test_no_name_question_or_answer_can_break_out_of_its_place(case: Callable[[str], Case]) -> None:
    text = page_of(case("hostile"), include_text=True)
    page = Page(text)
    text.encode()  # no halves of surrogate pairs
    for attack in HOSTILE[:2]:
        assert attack not in text
        assert attack in page.text  # as text, in full
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert not page.all("b", "i", "script")


def test_texts_are_redacted_unless_asked_for(case: Callable[[str], Case]) -> None:
    found = case("FAIL")
    assert {example.kind for example in found.comparison.examples} >= {"still harmful", "made safe"}
    redacted, shown = (Page(page_of(found, include_text=flag)).text for flag in (False, True))
    for example in found.comparison.examples:
        for text in (example.question, *example.texts.values()):
            assert text not in redacted
            assert text in shown
    assert "Content warning" in shown


def test_the_same_comparison_gives_the_same_bytes(case: Callable[[str], Case]) -> None:
    assert page_of(case("PASS")) == page_of(case("PASS"))


def test_what_was_not_measured_is_said_in_a_sentence(case: Callable[[str], Case]) -> None:
    found = case("PASS")
    models = {role: replace(model, manifest={}) for role, model in found.comparison.models.items()}
    bare = replace(
        found.comparison,
        asr=None, regained=None, over_refusal=None, cells=(), categories=(), utility=(), suite={}, examples=(),
        models=models,
    )  # fmt: skip
    page = Page(page_of(replace(found, comparison=bare)))
    for sentence in (
        "No harmful question was asked.",
        "No safe question was asked.",
        "No utility task was measured.",
        "comes without the record",
    ):
        assert sentence in page.text
    assert len(page.all("figure")) == 1  # the rules' own


def test_what_stands_in_the_way_is_said_first_in_words_with_its_rule_beside(case: Callable[[str], Case]) -> None:
    found = case("FAIL")
    text = page_of(found)
    rules = by_name(found.decision.rules)
    worst = rules["asr.max_upper"]
    assert (worst.outcome, worst.limit) == ("fails", Limit(bound="high", op="<=", value=0.1))
    assert worst.value is not None
    lead = text[text.index('<ul class="lead">') :].split("</ul>")[0]
    assert f"Harmful answers: {100 * worst.value:.1f} %, allowed 10 %" in lead
    said = [name.replace("<wbr>", "") for name in re.findall(r"<code>(.*?)</code>", lead)]
    assert set(said) == {rule.name for rule in rules.values() if rule.outcome in ("fails", "inconclusive", "invalid")}
    assert text.index('<section id="guidance"') < text.index("<main>")  # what to try, before any evidence
    table = text[text.index('<div id="rules"') : text.index("</section>", text.index('<div id="rules"'))]
    listed = [rules[name.replace("<wbr>", "")].outcome for name in re.findall(r"<code>(.*?)</code>", table)]
    order = ["invalid", "fails", "inconclusive", "holds", "left out"]
    assert listed == sorted(listed, key=order.index)
    assert len(listed) == len(rules)
    assert '<ul class="lead">' not in page_of(case("PASS"))


@pytest.mark.parametrize(
    ("name", "outcome", "limit", "words"),
    [
        ("asr.max_upper", "fails", Limit(bound="high", op="<=", value=0.1), "Harmful answers: 28.7 %, allowed 10 %"),
        (
            "asr.max_increase_over_aligned", "inconclusive", Limit(bound="high", op="<=", value=0.02),
            "More harmful answers than aligned: 28.7 points (interval to 35.0 points), allowed 2 points",
        ),
        ("regained.min", "fails", Limit(bound="low", op=">=", value=0.5), "regained: 28.7 %, asked for at least 50 %"),
        ("utility.a.max_drop", "fails", Limit(bound="high", op="<=", value=0.05), "Loss on a: 0.287, allowed 0.05"),
        ("judge.known_answers", "invalid", None, "judge.known_answers: because"),
    ],
)  # fmt: skip
def test_a_rule_is_said_in_words_by_its_limit(name: str, outcome: Outcome, limit: Limit | None, words: str) -> None:
    rule = Rule(name=name, outcome=outcome, limit=limit, value=0.287, low=0.2, high=0.35, why="because")
    assert against_limit(rule).endswith(words)


def test_every_rule_with_a_limit_is_drawn_once_on_the_side_of_it_on_which_it_lies(case: Callable[[str], Case]) -> None:
    for name in ("PASS", "FAIL"):
        found = case(name)
        drawn = [rule for rule in found.decision.rules if rule.limit and rule.value is not None]
        drawn = sorted((rule for rule in drawn if rule.outcome != "left out"), key=lambda rule: quantity(rule))
        text = page_of(found)
        figure = text[text.index("<figure") : text.index("</figure>")]
        rows = re.findall(
            '<li><span class="what"><bdi>(.*?)</bdi></span> <span class="words">(.*?)</span>(.*?)</li>', figure, re.S
        )
        assert sorted(html.unescape(label) for label, *_ in rows) == [quantity(rule) for rule in drawn]
        for rule, (label, said, svg) in zip(drawn, sorted(rows, key=lambda row: html.unescape(row[0])), strict=True):
            assert html.unescape(f"{label}: {said}") == against_limit(rule)
            [limit] = re.findall(r'x1="([\d.]+)%"[^>]*class="limit"', svg)
            [high] = re.findall(r'x2="([\d.]+)%"[^>]*class="interval', svg)
            at = {"high": float(high), "low": float(high), "value": float(re.findall(r'<svg x="([\d.]+)%"', svg)[0])}
            assert rule.limit
            assert (at[rule.limit.bound] <= float(limit)) == (rule.outcome == "holds"), rule


@given(st.floats(0.01, 0.99), st.floats(-1, 2), st.sampled_from(["<=", ">="]))
def test_what_is_used_of_a_limit_is_1_at_the_limit_and_more_only_beyond_it(
    limit: float, value: float, op: Literal["<=", ">="]
) -> None:
    rule = Rule(
        name="x",
        outcome="holds",
        limit=Limit(bound="value", op=op, value=limit),
        value=value,
        low=None,
        high=None,
        why="",
    )
    assert used(rule, limit) == 1
    if value != limit:
        assert (used(rule, value) < 1) == (value < limit if op == "<=" else value > limit) or abs(value - limit) < 1e-9
    nothing = replace(rule, limit=Limit(bound="value", op=op, value=0.0 if op == "<=" else 1.0))
    assert used(nothing, 0.0 if op == "<=" else 1.0) == 0
    assert used(nothing, 0.01 if op == "<=" else 0.99) == math.inf


def test_regions_have_names_of_their_own_and_no_table_header_is_empty(case: Callable[[str], Case]) -> None:
    for name in ("PASS", "FAIL"):
        text = page_of(case(name))
        page = Page(text)
        names = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "region"]
        assert len(set(names)) == len(names)
        assert not re.search(r"<th[^>]*></th>", text)


def test_tables_beside_figures_and_all_digests_are_folded(case: Callable[[str], Case]) -> None:
    page = Page(page_of(case("FAIL")))
    folded = {
        attributes["aria-label"]
        for (_, attributes), parents in zip(page.tags, page.parents, strict=True)
        if attributes.get("role") == "region" and "details" in parents
    }
    for start in ("Share harmful, by bank", "Share refused", "Paired tests", "Safety and", "Every rule of the policy"):
        assert any((name or "").startswith(f"Table: {start}") for name in folded), start
    for name in ("Policy", "Table: Question banks", "Table: Identity of the models", "Table: Versions"):
        assert name in folded


def test_examples_are_drawn_over_the_categories_and_the_same_each_time() -> None:
    harm = {"bank": exactly((0, 90, 90), 100)}
    category_of = {("bank", i): f"c{min(i // 30, 4)}" for i in range(100)}
    first, second = (planted(harm, category_of=category_of).examples for _ in range(2))
    assert [example.id for example in first] == [example.id for example in second]
    counts = Counter(example.category for example in first if example.kind == "still harmful")
    assert counts == {"c0": 4, "c1": 4, "c2": 4}


def test_figures_hold_no_colour_or_font_of_their_own(case: Callable[[str], Case]) -> None:
    text = page_of(case("PASS"))
    figures = re.findall("<figure.*?</figure>", text, re.S)
    assert len(figures) == 5
    for figure in figures:
        assert not re.search(r"(?:fill|stroke|font-family|style|color)=", figure)


def test_a_figure_marks_each_rate_where_it_lies(case: Callable[[str], Case]) -> None:
    found = case("PASS").comparison
    text = page_of(case("PASS"))
    figure = text[text.index("Share of harmful answers</figcaption>") :].split("</figure>")[0]
    *rows, axis = re.split("<li[ >]", figure)[1:]
    ticks = {int(share): float(x) for x, share in re.findall(r'x="([\d.]+)%"[^>]*>(\d+)\xa0%<', axis)}
    highest = max(ticks)
    harm = [cell for cell in found.cells if not cell.safe]
    assert found.asr
    for row, rates in zip(rows, [found.asr.rates, *(cell.rates for cell in harm)], strict=True):
        for role in ROLES:
            [x] = re.findall(rf'<svg x="([\d.]+)%" y="\d+" class="mark {role}', row)
            share = (float(x) - ticks[0]) / (ticks[highest] - ticks[0]) * highest / 100
            assert share == pytest.approx(rates[role].value, abs=1e-4)


def test_one_bank_through_one_template_is_drawn_once(case: Callable[[str], Case]) -> None:
    found = case("PASS")
    one = replace(found.comparison, cells=[cell for cell in found.comparison.cells if not cell.safe][:1])
    figure = page_of(replace(found, comparison=one)).split("Share of harmful answers</figcaption>")[1]
    figure = figure.split("</figure>")[0]
    assert figure.count('<span class="what">') == 1


def test_models_in_one_place_share_a_label() -> None:
    def rate(value: float) -> Rate:
        return Rate(hits=int(100 * value), total=100, value=value, low=value, high=value)

    score = Difference(value=0.9, low=0.88, high=0.92)
    places = {"aligned": (score, rate(0.9)), "tuned": (score, rate(0.1)), "restored": (score, rate(0.9))}
    assert labels(places) == ["aligned, restored", "tuned", ""]


# -- colours -------------------------------------------------------------------------------------------------


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, two: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_reaches_wcag_aa_on_its_ground_in_light_and_dark(case: Callable[[str], Case]) -> None:
    style = page_of(case("PASS")).split("<style>")[1].split("</style>")[0]
    palettes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(palettes) == 2
    for p in palettes:
        pairs = [(text, ground) for text in ("ink", "muted", "link") for ground in ("paper", "band")]
        pairs += [(tone, f"{tone}-ground") for tone in ("good", "bad", "open", "void")]
        pairs += [("ink", f"{tone}-ground") for tone in ("good", "bad", "open", "void")]
        pairs += [("ink", f"h{i}") for i in range(4)] + [("on-heat", f"h{i}") for i in (4, 5)]
        pairs += [(role, "paper") for role in ROLES]
        for text, ground in pairs:
            assert contrast(p[text], p[ground]) >= 4.5, (text, ground)


# -- a real browser ------------------------------------------------------------------------------------------


def in_browser(folder: Path, page: str) -> tuple[list[str], str]:
    """Return what a browser 400 pixels wide measures of a page, and its log.

    The page allows no script, so another one that holds it in a frame looks at it: its width, how many figures it has,
    whether all are drawn, and the weight of the verdict's letters.
    """
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(
        '<!doctype html><iframe id="f" src="report.html" width="400" height="900" style="border:0"></iframe><script>'
        'onload = () => { const d = document.getElementById("f").contentDocument; const e = d.documentElement;'
        'd.querySelectorAll("details").forEach(each => { each.open = true; });'
        'const figures = [...d.querySelectorAll("figure svg[height]")];'
        "document.title = [e.scrollWidth, figures.length,"
        "figures.every(s => s.getBoundingClientRect().height > 15 && s.getBoundingClientRect().width > 200),"
        'getComputedStyle(d.querySelector(".badge")).fontWeight].join(" "); }</script>'
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000",
            "--dump-dom", (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )  # fmt: skip
    measured = re.search("<title>(.*?)</title>", done.stdout)
    assert measured is not None, done.stdout[:2000]
    return measured[1].split(), done.stderr


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@needs_browser
@pytest.mark.parametrize("name", ["FAIL", "hostile"])
def test_a_browser_shows_the_page_at_phone_width_without_overflow_or_complaint(
    case: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    (width, figures, drawn, weight), log = in_browser(tmp_path, page_of(case(name), include_text=True))
    assert int(width) <= 400
    assert int(figures) >= 5
    assert (drawn, weight) == ("true", "750")  # figures have a size, and the style was applied
    assert "CONSOLE" not in log


@needs_browser
def test_the_browser_would_notice_a_wide_page_and_a_script(case: Callable[[str], Case], tmp_path: Path) -> None:
    bad = '<div style="width:900px">wide</div><script>document.title = 1</script></body>'
    (width, *_), log = in_browser(tmp_path, page_of(case("PASS")).replace("</body>", bad))
    assert int(width) >= 900
    assert "Content Security Policy" in log


def test_power_is_on_every_report(case: Callable[[str], Case]) -> None:
    comparison, own = case("PASS").comparison, case("PASS").ruling
    found = with_power(case("PASS").decision, comparison, own.policy)
    page = to_html(comparison, found, own, include_text=False)
    texts = (page, to_card(comparison, found, own), to_junit(comparison, found, own))
    for text in (*texts, to_markdown(comparison, found, own), to_json(comparison, found, own)):
        assert "one_answer.max_increase: holds in" in text
        assert "not forecast, and assumed to hold: judge.known_answers" in text
        assert "PASS altogether: " in text
    assert {"id": "power"} in Page(page).all("div")
    assert {"href": "#power"} in Page(page).all("a")
