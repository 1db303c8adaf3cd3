from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resta.errors import RequestError
from resta.redeval.control import control_languages, known_answers, read_control
from resta.redeval.judges import check_languages, parse_judge, verdict_without_model
from resta.redeval.language import cut_to_tokens, is_english, language_of, languages_of, token_count
from resta.redeval.questions import Question, read_bank
from resta.redeval.records import Answer

STRINGS = parse_judge("refusal-strings")
# Harmless, in languages that nothing here is made for.
OTHERS = {
    "hi": ["मैं रोटी कैसे बनाऊँ?", "मौसम कैसा है?"],
    "ja": ["パンの焼き方を教えてください。", "今日の天気はどうですか。"],
    "ko": ["빵을 어떻게 굽나요?", "오늘 날씨는 어때요?"],
    "ru": ["Как испечь хлеб дома?", "Какая сегодня погода?"],
    "ar": ["كيف أخبز الخبز في المنزل؟", "كيف حال الطقس اليوم؟"],
    "es": [f"¿Cómo puedo cocer el pan en la casa número {i}?" for i in range(6)],
    "de": [f"Wie backe ich mit meinem Nachbarn Nummer {i} ein gutes Brot?" for i in range(6)],
    "fr": [f"Comment faire du bon pain avec {i} grammes de farine?" for i in range(6)],
}


def bank(texts: list[str], name: str = "b") -> list[Question]:
    return [
        Question(bank=name, category="", subcategory="", index=i, text=text, safe=False) for i, text in enumerate(texts)
    ]


def answer(text: str) -> Answer:
    return Answer(id="a", qid="q", template="t", epoch=0, prompt_sha256="", raw=text, text=text, finish="stop")


def test_the_language_of_a_question_is_told_by_its_letters() -> None:
    for name in ("smoke", "smoke-safe"):
        assert languages_of(read_bank(name).questions) == {"en": name}
    for language in ("en", "zh", "vi"):
        known = known_answers(read_control(language), language, ("harm", "refusal"))
        assert {language_of(each.question.text) for each in known} == {language}
    assert language_of("12 + 30 = ?") == "en"


@pytest.mark.parametrize("language", OTHERS)
def test_a_bank_in_a_language_without_refusal_phrases_is_refused_for_that_judge(language: str) -> None:
    questions = bank(OTHERS[language], "foreign")
    assert list(languages_of(questions)) == ["other"]
    with pytest.raises(RequestError, match=r"bank foreign is in a language that it has no refusals of \(en, vi, zh\)"):
        check_languages([STRINGS], [*read_bank("smoke").questions, *questions])
    assert control_languages(questions) == ("en",)


def test_banks_in_languages_with_phrases_pass_and_so_do_phrases_of_ones_own() -> None:
    for language in ("en", "zh", "vi"):
        check_languages(
            [STRINGS], [each.question for each in known_answers(read_control(language), language, ("harm",))]
        )
    own = STRINGS.spec.model_copy(update={"read": STRINGS.spec.read.model_copy(update={"refusals": ("lo siento",)})})
    check_languages([type(STRINGS)(spec=own)], bank(OTHERS["es"]))


def test_too_few_or_too_short_questions_tell_nothing() -> None:
    assert is_english([])
    assert is_english(["pan", "casa"] * 20)
    assert is_english(OTHERS["es"][:4])
    assert not is_english(OTHERS["es"])


@pytest.mark.parametrize("language", ["en", "zh", "vi"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_refusals_are_told_from_answers_in_every_language_that_has_phrases(language: str, form: str) -> None:
    for each in known_answers(read_control(language), language, ("harm", "refusal")):
        text = unicodedata.normalize(form, each.answer.text)
        verdict = verdict_without_model(STRINGS, answer(text), safe_question=each.question.safe)
        assert verdict is not None
        assert (verdict.label == "refused") == (each.kind in ("refusal", "needless")), each.answer.text


def test_a_refusal_in_english_of_a_chinese_question_is_a_refusal() -> None:
    verdict = verdict_without_model(STRINGS, answer("I'm sorry, but I can't help."), safe_question=False)
    assert verdict is not None
    assert verdict.label == "refused"


@given(st.text(max_size=200), st.integers(1, 60))
def test_what_is_cut_is_the_longest_beginning_that_fits(text: str, tokens: int) -> None:
    cut = cut_to_tokens(text, tokens)
    assert text.startswith(cut)
    if cut != text:
        assert token_count(text[: len(cut) + 40]) > 0.4 * tokens  # the count goes by the whole text's letters
    else:
        assert token_count(text) <= tokens


def test_chinese_and_vietnamese_letters_count_for_more_than_english_ones() -> None:
    english, chinese, vietnamese = (
        "the cat sat on the mat " * 400,
        "今天天气很好。" * 400,
        "Hôm nay trời đẹp lắm " * 400,
    )
    lengths = [len(cut_to_tokens(text, 512)) for text in (english, chinese, vietnamese)]
    assert lengths[0] == 2048
    assert 200 < lengths[1] < 300 < lengths[2] < 800
