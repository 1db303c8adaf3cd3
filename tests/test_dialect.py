"""One dialect of YAML: what a scalar is, what is refused, and that nothing asks for more than it looks like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.dialect import MOST_CHARACTERS, MOST_DEPTH, MOST_VALUES, dump, parse, parse_untyped
from resta.errors import RequestError


def refusal(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE", "!!bool true")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, None) for word in ("~", "null", "Null", "NULL", "", "!!null ''")),
        *((word, word) for word in ("yes", "No", "ON", "off", "y", "n", "1:30", "1:30.5", "2024-05-01", "1_000")),
        *((word, word) for word in ("0x1F", "0o17", "0b11", "=", "tRue", "1e", ".", "+.5.", ".inF", "1,5")),
        ("2001-12-14 21:59:43.10 -5", "2001-12-14 21:59:43.10 -5"),
        *(("'" + word + "'", word) for word in ("true", "1", "010", "~", "<<")),
        ("!!str 010", "010"),
        *((word, int(word)) for word in ("0", "-1", "+12", "9" * 30)),
        *((word, float(word)) for word in ("1e-3", "1E5", "-.5", "1.", "0.1e1", "+1.5e+2", "00.5", "3.0")),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
    ids=str,
)
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: Any) -> None:
    for found in (parse(f"- {text}")[0], parse(f"a: {text}")["a"]):
        assert found == value
        assert isinstance(found, type(value))


def test_not_a_number_is_a_float() -> None:
    assert all(math.isnan(found) for found in parse("[.nan, .NaN, .NAN]"))


@pytest.mark.parametrize(
    ("text", "here", "there"),
    [("010", "10", "8"), ("-08", "8", "something else"), ("+00", "0", "0"), ("0" * 5000, "0", "something else")],
    ids=["octal", "not octal", "zeros", "long"],
)
def test_a_number_that_two_readers_read_differently_is_refused_with_both(text: str, here: str, there: str) -> None:
    why = f"{text} is {here} to some readers of YAML and {there} to others; write the number that you mean"
    assert refusal(f"a: 1\nb: {text}").startswith(f"not valid YAML: line 2, column 4: {why}")


@pytest.mark.parametrize("text", ["yes", "on", "1:30", "2024-05-01", "0x1F", "1_000", "[no]", "{a: {b: off}}"])
def test_where_no_type_tells_a_word_of_two_meanings_must_be_quoted(text: str) -> None:
    with pytest.raises(RequestError, match="quote it if it is text"):
        parse_untyped(f"a: {text}")
    assert parse_untyped("a: 'yes'") == {"a": "yes"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", 3),
        ("x:\n  a: 1\n  a: 1", 3),
        ("x: [{a: 1, a: 2}]", 1),
        ("x: {y: {'a': 1,\n a: 2}}", 2),
        ("1: a\n1: b", 2),
        ("null: a\n~: b", 2),
    ],
)
def test_a_key_that_occurs_twice_is_refused_at_any_depth_with_its_line(text: str, line: int) -> None:
    assert f"line {line}," in refusal(text)
    assert "occurs twice" in refusal(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &b {c: 1}\nd:\n  <<: *b", "merge keys"),
        ("!!python/object:os.system x", "the tag tag:yaml.org,2002:python/object:os.system is not taken"),
        ("!!set {a}", "is not taken"),
        ("!!binary aGk=", "is not taken"),
        ("!!timestamp 2001-01-01", "is not taken"),
        ("!!int 0x1F", "'0x1F' is no int"),
        ("!!bool yes", "'yes' is no bool"),
        ("!!float x", "'x' is no float"),
        ("a: " + "9" * 5000, "a number of 5,000 digits"),
        ("a: 1\n--- \nb: 2", "line 2"),
        ("a:\n\t- b", "indent with spaces"),
        ("a: \x00", "not valid YAML"),
        ("? [a]\n: 1", "a key must be text"),
        ("&a [*a]", "an alias stands inside of what it stands for"),
        ("a: &a {b: *a}", "an alias stands inside of what it stands for"),
        ("a: *b", "undefined alias"),
        ("[" * (MOST_DEPTH + 1), f"nested more than {MOST_DEPTH} deep"),
        ("[" * 100_000, f"nested more than {MOST_DEPTH} deep"),
        ("a: " * 50, "line 1"),
        ("x" * (MOST_CHARACTERS + 1), "1,000,001 characters, expected at most 1,000,000"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_not_plain_data_is_refused(text: str, why: str) -> None:
    assert why in refusal(text)


def test_aliases_are_taken_for_what_they_stand_for() -> None:
    assert parse("a: &x {b: [1, 2]}\nc: *x") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_aliases_that_multiply_are_refused_before_they_do() -> None:
    laughs = ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20))]
    assert f"more than {MOST_VALUES:,} values" in refusal("\n".join(laughs))
    chain = ["a0: &a0 [lol]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]
    assert f"nested more than {MOST_DEPTH} deep, with aliases" in refusal("\n".join(chain))


def test_the_limits_let_through_what_they_name() -> None:
    assert parse("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    assert parse("[" * (MOST_DEPTH - 1) + "1" + "]" * (MOST_DEPTH - 1))


TEXTS = st.text(max_size=8) | st.text("\n\r\t\x85\u2028\ufeff '\"\\a", max_size=5)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.sampled_from(
        ["yes", "010", "08", "1e3", "1:30", "0o7", "<<", "=", "~", "null", "2001-01-01", ".nan", "1_0", ""]
    ),
)
PLAIN = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@settings(deadline=None, max_examples=150)
@given(PLAIN)
def test_what_is_written_is_read_back_the_same_by_readers_of_either_yaml(plain: Any) -> None:
    text = dump(plain)
    assert parse(text) == plain
    assert yaml.safe_load(text) == plain


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(max_size=30), st.text("[]{}:,-?!&*#|>'\"%@ \n0x_eab.<=~", max_size=20)))
def test_any_text_is_plain_data_or_one_typed_refusal(text: str) -> None:
    try:
        plain = parse(text)
    except RequestError:
        assert refusal(text).startswith("not valid YAML: ")
    else:
        assert dump(parse(dump(plain))) == dump(plain)  # compared as text, since no NaN equals itself
