"""Recipes as text: what is accepted, what is refused and with which advice, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.errors import RequestError
from resta.recipe import Recipe, dump_recipe, load_recipe, make_recipe, parse_recipe, parse_size, schema

fuzz = settings(deadline=None, max_examples=50)
SCHEMA = schema()

PLAIN = """
models: {base: models/base, aligned: org/aligned@main, tuned: models/tuned}
start: tuned
terms:
  - delta: aligned - base
    scale: 0.5
"""
FULL: dict[str, Any] = {
    "models": {
        "base": "models/base",
        "aligned": {"source": "org/aligned@v1", "strip_prefix": "module."},
        "tuned": {"source": "models/lora", "on": "base", "recorded_base": "org/base"},
    },
    "start": "base",
    "terms": [
        {"delta": "tuned - base", "scale": 1, "name": "task", "sparsify": {"density": 0.7, "rescale": "l1_norm"}},
        {"delta": "aligned - base", "scale": -0.5, "name": "safety", "sparsify": {"method": "dare", "density": 1}},
    ],
    "seed": 7,
    "tokenizers": "ignore",
    "output": {"dtype": "bfloat16", "rounding": "stochastic", "shard_size": "5GB", "files_from": "tuned"},
    "rules": [
        {"match": "*norm*", "keep": True, "nonfinite": "allow"},
        {"match": ["*.0.*", "*.1.*"], "scale_by": {"safety": 0.5}},
        {"match": "lm_head.weight", "stand_in": "model.embed_tokens.weight", "missing": "skip", "rows": "shared"},
        {"match": "*", "scale_by": 2, "extra": "ignore"},
    ],
}


def refusal(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse_recipe(text)
    return str(caught.value)


def changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """FULL with one value set, or one key added."""
    plain = copy.deepcopy(FULL)
    inner: Any = plain
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    return plain


def test_the_plain_recipe_says_what_it_means() -> None:
    recipe = parse_recipe(PLAIN)
    assert recipe.start == recipe.files_from == "tuned"
    assert recipe.terms[0].ends == ("aligned", "base")
    assert recipe.equation == "tuned + 0.5 * (aligned - base)"
    assert (recipe.seed, recipe.output.dtype, recipe.output.shard_size) == (0, "same", 5_000_000_000)
    assert make_recipe(FULL).equation == (
        "base + 1 * dare(tuned - base, density=0.7) - 0.5 * dare(aligned - base, density=1)"
    )


@pytest.mark.parametrize(
    ("place", "typo", "meant"),
    [
        (("term",), "terms", "terms"),
        (("sede",), "seed", "seed"),
        (("models", "tuned", "sorce"), "source", "source"),
        (("models", "aligned", "strip_prefixes"), "strip_prefix", "strip_prefix"),
        (("terms", 0, "scales"), "scale", "scale"),
        (("terms", 1, "sparsify", "densty"), "density", "density"),
        (("output", "dtypes"), "dtype", "dtype"),
        (("rules", 0, "keeps"), "keep", "keep"),
        (("rules", 1, "scaleby"), "scale_by", "scale_by"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    place: tuple[str | int, ...], typo: str, meant: str
) -> None:
    with pytest.raises(RequestError) as caught:
        make_recipe(changed(place, "x"))
    where = ".".join(map(str, place))
    assert f'{where}: unknown key; did you mean "{meant}"?' in str(caught.value)


def test_an_unknown_key_like_no_other_gets_the_list_of_keys() -> None:
    with pytest.raises(RequestError, match=r"output\.zzz: unknown key; known: dtype, rounding, shard_size, files_from"):
        make_recipe(changed(("output", "zzz"), 1))


def test_a_model_may_be_called_as_a_part_of_the_recipe_is() -> None:
    models = {"output": {"source": "a", "sorce": "b"}, "terms": "c"}
    with pytest.raises(RequestError, match=r'models\.output\.sorce: unknown key; did you mean "source"\?'):
        make_recipe({"models": models, "start": "output", "terms": [{"delta": "output - terms", "scale": 1}]})


@pytest.mark.parametrize(
    "text",
    [
        "start: tuned\n" + PLAIN,
        PLAIN + "    scale: 0.6\n",
        PLAIN.replace("base: models/base,", "base: models/base, base: other,"),
        PLAIN + "rules: [{match: '*', keep: true, keep: false}]\n",
        PLAIN + "? [a]\n: 1\n? [a]\n: 2\n",
    ],
)
def test_a_repeated_key_is_refused_at_every_level(text: str) -> None:
    assert "occurs twice" in refusal(text) or "unhashable" in refusal(text)


def test_without_a_scale_the_refusal_says_how_to_choose_one() -> None:
    message = refusal(PLAIN.replace("    scale: 0.5\n", ""))
    assert message.startswith("terms.0.scale is required")
    assert "0.1 to 1.0" in message
    assert "merge at a few scales" in message


NUMBERS: list[tuple[tuple[str | int, ...], Any]] = [
    (("terms", 0, "scale"), True),
    (("terms", 0, "scale"), "half"),
    (("terms", 0, "scale"), math.inf),
    (("terms", 0, "scale"), "nan"),
    (("terms", 0, "scale"), None),
    (("terms", 0, "sparsify", "density"), True),
    (("terms", 0, "sparsify", "density"), 0),
    (("terms", 0, "sparsify", "density"), 1.01),
    (("terms", 0, "sparsify", "density"), math.nan),
    (("seed",), True),
    (("seed",), -1),
    (("seed",), 2**63),
    (("seed",), 0.5),
    (("rules", 3, "scale_by"), False),
    (("rules", 3, "scale_by"), math.nan),
    (("rules", 1, "scale_by"), {"safety": True}),
    (("output", "shard_size"), True),
    (("output", "shard_size"), 0),
    (("output", "shard_size"), "0GB"),
    (("output", "shard_size"), -5),
    (("output", "shard_size"), "5 potatoes"),
    (("output", "shard_size"), "5e9"),
]


@pytest.mark.parametrize(("place", "value"), NUMBERS, ids=str)
def test_what_is_no_number_of_the_right_size_is_refused_where_it_stands(
    place: tuple[str | int, ...], value: Any
) -> None:
    with pytest.raises(RequestError) as caught:
        make_recipe(changed(place, value))
    assert str(caught.value).startswith(".".join(map(str, place)))


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("1E2", 100), ("-.5", -0.5), ("1", 1), ("0.1e1", 1)])
def test_numbers_are_those_that_they_look_like(text: str, number: float) -> None:
    assert parse_recipe(PLAIN.replace("0.5", text)).terms[0].scale == number


@pytest.mark.parametrize("text", ["1:30", "yes", "on", "1_0", "0x10", ".inf", "-.inf", ".nan", "~"])
def test_what_only_yaml_1_1_takes_for_a_number_is_refused(text: str) -> None:
    assert refusal(PLAIN.replace("0.5", text)).startswith("terms.0.scale")


@pytest.mark.parametrize("name", ["2024-05-01", "on", "no", "1:30", "y"])
def test_words_that_yaml_1_1_would_turn_into_something_else_are_words(name: str) -> None:
    recipe = parse_recipe(PLAIN.replace("models/base", name))
    assert recipe.models["base"].source == name
    assert parse_recipe(PLAIN.replace("base", "on")).terms[0].ends == ("aligned", "on")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), ("7B", 7), ("2TiB", 2**41), (10, 10)],
)
def test_sizes_are_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown start": (changed(("start",), "bse"), "'bse' is not among the models; did you mean \"base\""),
    "unknown model in a term": (changed(("terms", 0, "delta"), "tuned - bass"), "'bass' is not among the models"),
    "unknown base of an adapter": (changed(("models", "tuned", "on"), "bass"), "'bass' is not among the models"),
    "unknown files_from": (changed(("output", "files_from"), "tune"), "'tune' is not among the models"),
    "unused model": (changed(("models", "spare"), "x"), "model 'spare' is never used"),
    "bad model name": (changed(("models", "a b"), "x"), "model name 'a b' must be"),
    "no models": (changed(("models",), {}), "models: "),
    "no terms": (changed(("terms",), []), "terms is empty"),
    "delta without spaces": (changed(("terms", 0, "delta"), "tuned-base"), "with spaces around the minus"),
    "delta of three": (changed(("terms", 0, "delta"), "tuned - base - base"), "with spaces around the minus"),
    "delta with a plus": (changed(("terms", 0, "delta"), "tuned + base"), "with spaces around the minus"),
    "duplicate term names": (changed(("terms", 1, "name"), "task"), "two terms have the same name"),
    "scale_by of no term": (changed(("rules", 1, "scale_by"), {"safty": 1}), 'a term\'s name; did you mean "safety"'),
    "method": (changed(("terms", 0, "sparsify", "method"), "ties"), "terms.0.sparsify.method"),
    "dtype": (changed(("output", "dtype"), "int8"), "output.dtype"),
    "keep and more": (changed(("rules", 0, "scale_by"), 1), "keep copies the tensor as it is"),
    "rule without a choice": (changed(("rules", 0), {"match": "*"}), "the rule does nothing"),
    "two lines by Unicode": (changed(("models", "base"), "a\u2028b"), "one line of text"),
    "two lines": (changed(("models", "base"), "a\nb"), "one line of text"),
    "empty source": (changed(("models", "base"), ""), "one line of text"),
    "confirmation without an adapter": (
        changed(("models", "base"), {"source": "x", "recorded_base": "y"}), "recorded_base is for a LoRA adapter",
    ),
    "prefix of an adapter": (changed(("models", "tuned", "strip_prefix"), "m."), "strip_prefix is for a full"),
    "lone surrogate": (changed(("models", "base"), "\ud800"), "models.base"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_recipe_that_does_not_say_one_clear_thing_is_refused(case: str) -> None:
    make_recipe(FULL)
    plain, expected = BROKEN[case]
    with pytest.raises(RequestError) as caught:
        make_recipe(plain)
    assert expected in str(caught.value)


def test_all_that_is_wrong_with_values_is_said_at_once() -> None:
    plain = changed(("seed",), -1) | {"tokenizer": "same"}
    plain["terms"][0]["scale"] = "much"
    with pytest.raises(RequestError) as caught:
        make_recipe(plain)
    assert [line.strip().split(":")[0] for line in str(caught.value).splitlines()] == [
        "terms.0.scale", "seed", "tokenizer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "[]", "a: b: c", "\t", "a: *b", "a: !!python/object:os.system x", "%YAML 9", "\x00", "[" * 5000,
        "seed: 2001-99-99", "seed: !!timestamp x", "seed: !!bool x", "seed: !!int x", "seed: !!float x", "{1: 2}",
        "seed: !!binary é", "&a {models: *a}", "models: &a [*a]", "? {a: 1}\n: 2", "seed: !!set [a]", "seed: !!omap x",
    ],
)  # fmt: skip
def test_any_other_text_is_one_typed_refusal(text: str) -> None:
    assert refusal(text)


@fuzz
@given(st.one_of(st.text(max_size=30), st.text("[]{}:,-?!&*#|>'\"%@ \n0x_eab.", max_size=20)))
def test_no_text_raises_anything_but_a_recipe_error(text: str) -> None:
    assert refusal(text)


# ---- round trip, digest, schema

WORDS = st.one_of(
    st.text(min_size=1, max_size=12).filter(lambda text: text.splitlines() == [text]),
    st.sampled_from(["1e3", "1e-5", "010", "on", "no", "~", "null", "0o7", "1:30", "2001-01-01", "=", "<<", "- a"]),
    st.sampled_from(["#x", "'", '"', "a: b", "*", "&a", "!x", "%", "@x", "`", " a", "a ", "a\tb", "\x07", "\ufeff"]),
)
REALS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    names = draw(
        st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,5}", fullmatch=True), min_size=2, max_size=4, unique=True)
    )
    models: dict[str, Any] = {}
    for name in names:
        models[name] = {"source": draw(WORDS)}
        if name != names[0] and draw(st.booleans()):
            models[name] |= {"on": names[0], "recorded_base": draw(st.one_of(st.none(), WORDS))}
        else:
            models[name] |= {"strip_prefix": draw(st.one_of(st.none(), WORDS))}
    terms = []
    for number, name in enumerate(names[1:]):
        sparsify = {
            "density": draw(st.floats(0, 1, exclude_min=True)),
            "rescale": draw(st.sampled_from(["inverse_density", "l1_norm"])),
        }
        title = draw(st.one_of(st.none(), WORDS))
        terms.append(
            {
                "delta": f"{name} - {names[0]}",
                "scale": draw(REALS),
                "name": f"{title}{number}" if title else None,
                "sparsify": draw(st.sampled_from([None, sparsify])),
            }
        )
    titles = [term["name"] for term in terms if term["name"]]
    by = st.dictionaries(st.sampled_from(titles), REALS) if titles else st.none()
    rules = draw(
        st.lists(
            st.one_of(
                st.fixed_dictionaries({"match": WORDS, "keep": st.just(True)}),
                st.fixed_dictionaries({"match": st.lists(WORDS, min_size=1, max_size=2), "scale_by": REALS}),
                st.fixed_dictionaries({"match": WORDS, "scale_by": by, "nonfinite": st.just("allow")}),
                st.fixed_dictionaries({"match": WORDS, "stand_in": WORDS, "extra": st.just("ignore")}),
                st.fixed_dictionaries({"match": WORDS, "rows": st.just("shared"), "missing": st.just("skip")}),
            ),
            max_size=3,
        )
    )
    output = {
        "dtype": draw(st.sampled_from(["same", "float64", "float32", "bfloat16", "float16"])),
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
        "shard_size": draw(st.integers(1, 2**62)),
        "files_from": draw(st.sampled_from([None, *names])),
    }
    plain = {"models": models, "start": draw(st.sampled_from(names)), "terms": terms, "rules": rules, "output": output}
    plain |= {"seed": draw(st.integers(0, 2**63 - 1)), "tokenizers": draw(st.sampled_from(["same", "ignore"]))}
    return make_recipe(plain)


@fuzz
@given(recipes())
def test_a_recipe_survives_being_written_and_read(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert parse_recipe(text).digest == recipe.digest


@fuzz
@given(recipes())
def test_what_is_written_fits_the_schema_that_editors_use(recipe: Recipe) -> None:
    jsonschema.validate(recipe.model_dump(mode="json"), SCHEMA)
    text = dump_recipe(recipe)
    jsonschema.validate(make_plain(text), SCHEMA)


def make_plain(text: str) -> Any:
    """The recipe's text as an editor reads it: YAML 1.1, the readings of which the dump must not depend on."""
    return yaml.safe_load(text)


@fuzz
@given(recipe=recipes(), folder=st.text("abc/", min_size=1, max_size=6))
def test_the_digest_does_not_depend_on_where_the_models_lie(recipe: Recipe, folder: str) -> None:
    models = {name: model.model_copy(update={"source": folder + model.source}) for name, model in recipe.models.items()}
    moved = recipe.model_copy(update={"models": models})
    assert moved != recipe
    assert moved.digest == recipe.digest


@fuzz
@given(first=recipes(), second=recipes())
def test_two_recipes_have_one_digest_only_if_nothing_but_places_differs(first: Recipe, second: Recipe) -> None:
    def placeless(recipe: Recipe) -> Any:
        plain = recipe.model_dump(mode="json")
        for model in plain["models"].values():
            del model["source"], model["recorded_base"]
        return plain

    assert (first.digest == second.digest) == (placeless(first) == placeless(second))


CHANGES: list[tuple[tuple[str | int, ...], Any]] = [
    (("models", "tuned", "on"), "aligned"),
    (("models", "aligned", "strip_prefix"), "m."),
    (("start",), "aligned"),
    (("terms", 0, "delta"), "base - tuned"),
    (("terms", 0, "scale"), 1.0000000000000002),
    (("terms", 0, "name"), None),
    (("terms", 0, "sparsify", "density"), 0.7000000000000001),
    (("terms", 0, "sparsify", "rescale"), "inverse_density"),
    (("terms", 0, "sparsify"), None),
    (("terms",), FULL["terms"][::-1]),
    (("seed",), 8),
    (("tokenizers",), "same"),
    (("output", "dtype"), "float16"),
    (("output", "rounding"), "nearest"),
    (("output", "shard_size"), 4_999_999_999),
    (("output", "files_from"), "base"),
    (("rules", 0, "match"), "*norm"),
    (("rules", 0, "nonfinite"), None),
    (("rules", 1, "scale_by"), {"safety": 0.25}),
    (("rules", 2, "stand_in"), "other"),
    (("rules", 2, "missing"), None),
    (("rules", 2, "rows"), None),
    (("rules", 3, "extra"), None),
    (("rules",), FULL["rules"][::-1]),
]


@pytest.mark.parametrize(("place", "value"), CHANGES, ids=lambda value: str(value)[:40])
def test_the_digest_sees_every_other_change(place: tuple[str | int, ...], value: Any) -> None:
    assert make_recipe(changed(place, value)).digest != make_recipe(FULL).digest


def test_defaults_said_aloud_do_not_change_the_digest() -> None:
    loud = PLAIN + "seed: 0\ntokenizers: same\noutput: {dtype: same, rounding: nearest, shard_size: 5GB}\nrules: []\n"
    assert parse_recipe(loud).digest == parse_recipe(PLAIN).digest


def test_the_schema_is_valid_and_takes_what_the_parser_takes() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for plain in (FULL, yaml.safe_load(PLAIN), changed(("output", "shard_size"), 17)):
        make_recipe(plain)
        jsonschema.validate(plain, SCHEMA)


BAD_FOR_BOTH = [
    *((place, value) for place, value in NUMBERS if value not in ("nan", "0GB") and not isinstance(value, float)),
    (("term",), 1),
    (("models", "aligned", "sorce"), "x"),
    (("terms", 0, "scales"), 1),
    (("terms", 0, "sparsify", "densty"), 1),
    (("output", "dtypes"), "same"),
    (("rules", 0, "keeps"), True),
    (("models",), {}),
    (("output", "dtype"), "int8"),
]


@pytest.mark.parametrize(("place", "value"), BAD_FOR_BOTH, ids=str)
def test_the_schema_refuses_the_mistakes_that_an_editor_can_see(place: tuple[str | int, ...], value: Any) -> None:
    plain = changed(place, value)
    with pytest.raises(RequestError):
        make_recipe(plain)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, SCHEMA)


# ---- files


def test_relative_sources_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "here" / "models" / "base").mkdir(parents=True)
    (tmp_path / "here" / "recipe.yaml").write_text(PLAIN)
    recipe = load_recipe(tmp_path / "here" / "recipe.yaml")
    assert recipe.models["base"].source == str(tmp_path / "here" / "models" / "base")
    assert recipe.models["aligned"].source == "org/aligned@main"
    assert recipe.digest == parse_recipe(PLAIN).digest


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "n" * 5000, "a\\0b"])
def test_a_source_that_is_no_path_is_left_for_the_plan_to_refuse(tmp_path: Path, source: str) -> None:
    (tmp_path / "recipe.yaml").write_text(PLAIN.replace("models/base", f'"{source}"'))
    assert load_recipe(tmp_path / "recipe.yaml").models["base"].source == source.replace("\\0", "\0")


def test_a_recipe_that_cannot_be_read_is_a_recipe_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.yaml").write_text("start: 1")
    for name in ("absent.yaml", "bytes.yaml", "bad.yaml", ".", "nul\0.yaml"):
        with pytest.raises(RequestError) as caught:
            load_recipe(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


def test_a_key_that_occurs_twice_is_found_among_twenty_thousand() -> None:
    text = "models: {" + ", ".join(f"m{number}: x" for number in range(20_000)) + "}\nstart: m0\nterms: []\n"
    with pytest.raises(RequestError, match="terms is empty"):
        parse_recipe(text)
    with pytest.raises(RequestError, match="'m7' occurs twice"):
        parse_recipe(text.replace("m19999: x", "m7: x"))
