"""What users write: five kinds of file, of which every line means the same and every mistake is answered alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.dialect import Word, parse
from resta.errors import RequestError
from resta.recipe import Recipe as Merge
from resta.recipe import load_recipe
from resta.redeval.judges import JudgeSpec, read_judge
from resta.sft.collect import Collect
from resta.sft.recipe import Recipe as Sft
from resta.sft.recipe import load
from resta.strict import check, override
from resta.verify.policy import Policy, read_policy


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: a valid text with a place for a scalar of each type, and where that is found again."""

    read: Callable[[Path], Any]
    plain: str
    places: dict[str, tuple[str, str, Callable[[Any], Any]]]  # type -> (what to replace, key in messages, value)


KINDS = {
    "merge": Kind(
        read=load_recipe,
        plain="models: {base: TEXT, a: A}\nstart: base\nseed: 7\nterms: [{delta: a - base, scale: 0.125}]\n"
        "rules: [{match: x, nonfinite: allow, keep: true}]\n",
        places={
            "text": ("TEXT", "models.base", lambda found: found.models["base"].source),
            "bool": ("true", "rules.0.keep", lambda found: found.rules[0].keep),
            "number": ("0.125", "terms.0.scale", lambda found: found.terms[0].scale),
            "whole": ("7", "seed", lambda found: found.seed),
        },
    ),
    "sft": Kind(
        read=lambda path: load(Sft, path),
        plain="base: TEXT\ndata: [{name: a, path: a.jsonl}]\nseed: 7\ntrain: {packing: true, learning_rate: 0.125}\n",
        places={
            "text": ("TEXT", "base", lambda found: found.base),
            "bool": ("true", "train.packing", lambda found: found.train.packing),
            "number": ("0.125", "train.learning_rate", lambda found: found.train.learning_rate),
            "whole": ("7", "seed", lambda found: found.seed),
        },
    ),
    "collect": Kind(
        read=lambda path: load(Collect, path),
        plain="endpoint: {url: 'http://x/v1', model: TEXT, temperature: 0.125}\nseed: 7\n",
        places={
            "text": ("TEXT", "endpoint.model", lambda found: found.endpoint.model),
            "number": ("0.125", "endpoint.temperature", lambda found: found.endpoint.temperature),
            "whole": ("7", "seed", lambda found: found.seed),
        },
    ),
    "policy": Kind(
        read=read_policy,
        plain="judge: TEXT\ncoherence: true\nasr: {max_upper: 0.125}\n",
        places={
            "text": ("TEXT", "judge", lambda found: found.judge),
            "bool": ("true", "coherence", lambda found: found.coherence),
            "number": ("0.125", "asr.max_upper", lambda found: found.asr.max_upper),
        },
    ),
    "judge": Kind(
        read=lambda path: read_judge(str(path)),
        plain="name: mine\nabout: x\nconfirmed: true\nmax_new_tokens: 7\n"
        "render: {kind: raw, text: '{question} {answer}'}\n"
        "read: {kind: tokens, positive: [TEXT], negative: [fine], threshold: 0.125}\nrules: [{label: safe}]\n",
        places={
            "text": ("TEXT", "read.positive.0", lambda found: found.read.positive[0]),
            "bool": ("true", "confirmed", lambda found: found.confirmed),
            "number": ("0.125", "read.threshold", lambda found: found.read.threshold),
            "whole": ("7", "max_new_tokens", lambda found: found.max_new_tokens),
        },
    ),
}

# (as it is written, what it is, its value); a whole number is also a number
SCALARS: list[tuple[str, str, Any]] = [
    *((word, "bool", True) for word in ("true", "True", "TRUE")),
    *((word, "bool", False) for word in ("false", "False", "FALSE")),
    *((word, "text", word) for word in ("yes", "Yes", "no", "NO", "on", "off", "y", "n")),
    *((word, "text", word) for word in ("1:30", "12:30:45", "2024-05-01", "2001-12-14t21:59:43.10-05:00")),
    *((word, "text", word) for word in ("1_000", "0x1F", "0b11", "0o17", "1e", "abc", "=")),
    *((f'"{word}"', "text", word) for word in ("true", "1", "0.5", "010", "~", "yes")),
    *((word, "number", float(word)) for word in ("1e-3", "1E-3", "0.5", ".5", "00.25")),
    ("12", "whole", 12),
    ("+3", "whole", 3),
    *(
        (word, "refused", None)
        for word in ("010", "007", "08", ".inf", ".nan", "<<: x", "!!int 0x1F", "[]", "!!set {a}")
    ),
    ("9" * 5000, "refused", None),
]


@pytest.mark.parametrize(("text", "what", "value"), SCALARS, ids=[text[:12] for text, _, _ in SCALARS])
@pytest.mark.parametrize("name", KINDS)
def test_a_scalar_means_the_same_in_every_kind_of_file(
    name: str, text: str, what: str, value: Any, tmp_path: Path
) -> None:
    kind, path = KINDS[name], tmp_path / "file.yaml"
    path.write_text(kind.plain)
    kind.read(path)
    for place, (old, key, found) in kind.places.items():
        assert kind.plain.count(old) == 1
        path.write_text(kind.plain.replace(old, text))
        fits = place == what or (place, what) == ("number", "whole")
        if fits and not (place == "number" and name in ("policy", "judge") and value > 1):
            assert found(kind.read(path)) == value
            continue
        with pytest.raises(RequestError) as caught:
            kind.read(path)
        assert str(path) in str(caught.value)
        assert key in str(caught.value) or "not valid YAML: line" in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_mistake_is_answered_with_file_key_expected_and_found_in_every_kind(name: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / "file.yaml"
    number, key, _ = kind.places["number"]
    text, text_key, _ = kind.places["text"]
    cases = [
        (kind.plain.replace(number, "'much'"), f"{key}: expected a number, found 'much'"),
        (kind.plain.replace(number, "{a: 1}"), f"{key}: expected a number, found a mapping of a"),
        (kind.plain.replace(text, "12"), f"{text_key}: expected "),
        (kind.plain.replace(text, "[[1]]"), f"{text_key}"),
        (kind.plain + "zzzz: 1\n", "zzzz: unknown key; known: "),
        (kind.plain + kind.plain.splitlines()[0], "occurs twice"),
        ("- a\n", "expected a mapping with "),
        ("a: [", "not valid YAML: line 1, column "),
        ("[" * 1000, "nested more than 40 deep"),
        ("&a [*a]", "an alias stands inside of what it stands for"),
    ]
    for written, expected in cases:
        path.write_text(written)
        with pytest.raises(RequestError) as caught:
            kind.read(path)
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)
        assert "Input should" not in str(caught.value)
    path.write_bytes(b"a: \xff")
    with pytest.raises(RequestError, match="cannot be read"):
        kind.read(path)


@pytest.mark.parametrize(
    ("name", "key"),
    [("sft", "trainer"), ("sft", "parallel: {strategy: fsdp, fsdp"), ("judge", "render")],
)
def test_what_is_handed_on_untyped_holds_no_word_of_two_meanings(name: str, key: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / "file.yaml"
    option = {"trainer": "disable_tqdm", "render": "enable_thinking"}.get(key, "version")
    for value, refused in (("yes", True), ("0x10", True), ("true", False), ("'yes'", False), ("3", False)):
        if key == "render":
            chat = (
                "{kind: chat, messages: [{role: user, content: '{question} {answer}'}], template_args: {OPTION: VALUE}}"
            )
            text = kind.plain.replace("{kind: raw, text: '{question} {answer}'}", chat)
            text = text.replace("OPTION", option).replace("VALUE", value)
        else:
            text = kind.plain + f"{key}: {{{option}: {value}}}" + ("}" if "{" in key else "")
        path.write_text(text)
        if refused:
            with pytest.raises(RequestError, match=f"{option}: {value} is text here and something else to older"):
                kind.read(path)
        else:
            kind.read(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "merge",
            "rules: [{match: 3, keep: true}]",
            "rules.0.match: expected text or a list, found 3 (quote it if it is",
        ),
        ("merge", "output: {dtype: bfloat}", "found 'bfloat'; did you mean \"bfloat16\"?"),
        ("merge", "scale: 1", 'scale: unknown key; "scale" belongs under "terms"'),
        ("sft", "learning_rate: 1", 'learning_rate: unknown key; "learning_rate" belongs under "train"'),
        (
            "sft",
            "lora: {target_modules: [q, 3]}",
            "lora.target_modules.1: expected text, found 3 (quote it if it is text)",
        ),
        ("sft", "train: {seed: 3}", 'train.seed: unknown key; "seed" belongs at the top'),
        ("sft", "lora: {ranks: 3}", 'lora.ranks: unknown key; did you mean "rank"?'),
        ("sft", "holdout: 1.5", "holdout: expected a number below 1, found 1.5"),
        ("sft", "seed: '3'", "seed: expected a whole number, found '3' (leave out the quotes)"),
        ("sft", "bad_rows: no", "bad_rows: expected 'refuse' or 'drop', found 'no'"),
        ("collect", "judge: {url: x, model: m}", "judge.url: expected text that matches ^https?://, found 'x'"),
        ("policy", "max_upper: 0.1", 'max_upper: unknown key; "max_upper" belongs under "asr" or under "over_refusal"'),
        ("policy", "regained: {}", "regained.min is required: The upper bound of"),
        ("policy", "utility: {any: {max_drp: 0.1}}", 'utility.any.max_drp: unknown key; did you mean "max_drop"?'),
        ("judge", "control: {}", "control.compliance is required"),
        ("judge", "policies: [a]", "policies: expected a mapping, found a list of 1"),
    ],
)
def test_typical_mistakes_are_answered_with_what_was_meant(name: str, text: str, expected: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / "file.yaml"
    key = text.partition(":")[0]
    rest = [line for line in kind.plain.splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*rest, text]))
    with pytest.raises(RequestError) as caught:
        kind.read(path)
    assert f"{path}: {expected}" in str(caught.value) or expected in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: tokens",
            "kind: token",
            "read.kind: expected 'tokens', 'digits', 'regex', 'classifier', 'strings', found",
        ),
        ("kind: tokens, ", "", "read.kind is required"),
        ("positive: [TEXT]", "positiv: [TEXT]", 'read.positiv: unknown key; did you mean "positive"?'),
        (
            "positive: [TEXT]",
            "lowest: 1",
            "read.lowest: unknown key; known: kind, positive, negative, force, threshold",
        ),
        ("label: safe", "lable: safe", 'rules.0.lable: unknown key; did you mean "label"?'),
    ],
)
def test_of_two_kinds_of_section_only_the_keys_of_the_named_one_are_meant(
    old: str, new: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(KINDS["judge"].plain.replace(old, new))
    with pytest.raises(RequestError) as caught:
        read_judge(str(path))
    assert expected in str(caught.value)


WORDS = [Word("yes"), "blue_red", "tokens", "chat", "a - base", "{question} {answer}", "dare", "["]
KEYS = st.text(max_size=3) | st.integers(0, 3)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.just(10**400),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(WORDS),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["merge", "sft", "collect", "policy", "judge"])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_whatever_stands_where_a_value_should_is_taken_or_refused_in_our_words(name: str, data: st.DataObject) -> None:
    model = {"merge": Merge, "sft": Sft, "collect": Collect, "policy": Policy, "judge": JudgeSpec}[name]
    plain = parse(KINDS[name].plain)
    inner: Any = plain
    while True:  # down to a random place
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from([*keys, *(list(model.model_fields) if inner is plain else [])]))
        if key in keys and isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
        else:
            break
    inner[key] = data.draw(VALUES)
    try:
        check(model, plain)
    except RequestError as error:
        message = str(error)
    else:
        return
    assert message.strip()
    assert not re.search(r"Input should|Value error|function-after|tuple\[|\bstr\b", message)


def test_a_number_that_nobody_can_write_is_still_one_sentence() -> None:
    with pytest.raises(RequestError, match="judge: expected text, found a number of too many digits"):
        check(Policy, {"judge": 10**5000})


def test_many_mistakes_are_said_up_to_a_number(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(KINDS["sft"].plain + "".join(f"zzzz{number}: 1\n" for number in range(30)))
    with pytest.raises(RequestError, match="and 22 more") as caught:
        load(Sft, path)
    assert len(str(caught.value).splitlines()) == 9


def test_an_assignment_changes_one_setting_and_leaves_the_rest() -> None:
    before = {"a": {"b": [1, {"c": 2}]}, "d": 3}
    assert override(before, ["a.b.1.c=1e-3", "d=true", "e.f=yes"]) == {
        "a": {"b": [1, {"c": 1e-3}]},
        "d": True,
        "e": {"f": "yes"},
    }
    assert before == {"a": {"b": [1, {"c": 2}]}, "d": 3}
    for wrong in ("a", "=1", "a.b.7=1", "a.b.-1=1", "a.b.²=1", "d.x=1", "d=010"):
        with pytest.raises(RequestError, match=r"--set "):
            override(before, [wrong])
