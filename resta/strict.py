"""What users write: one frozen base, one way to read a file, one way to say what is wrong with it.

Recipes of every kind, policies and judges are read here, so that a line means the same in each of them, and a mistake
is answered alike: file, key, what was expected, what was found, what was perhaps meant. This module knows nothing of
what the files say.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from resta.dialect import parse, settle
from resta.errors import RequestError

MOST_PROBLEMS = 8  # said in one message

Item = TypeVar("Item")
Checked = TypeVar("Checked", bound=BaseModel)


class Strict(BaseModel):
    """The base of all that users write: frozen, unknown keys refused, nothing taken for what it only looks like."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# A list in YAML; frozen, as a model of frozen parts must be.
Several = Annotated[tuple[Item, ...], Field(strict=False)]


# Settings that are handed on to a library as they are.
Options = Annotated[dict[str, Any], BeforeValidator(settle)]


# -- reading -------------------------------------------------------------------------------------------------


def load(kind: type[Checked], path: Path) -> Checked:
    """Return a YAML file as the model that it should be. Raises RequestError, which names the file and the key."""
    with named(path):
        return check(kind, parse(read_text(path)))


def read_text(path: Path) -> str:
    """Return a file's text. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError("no such file") from None
    except (OSError, ValueError) as error:  # not to be read, not text, or no name that a file could have
        raise RequestError(f"cannot be read: {error}") from error


@contextmanager
def named(name: object) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def override(settings: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return settings with `a.b=value` assignments applied; values are YAML, items of lists go by number.

    Raises RequestError.
    """
    result = copy.deepcopy(dict(settings))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise RequestError(f"--set {assignment}: expected KEY=VALUE, for example seed=1")
        *parents, last = path.split(".")
        place: Any = result
        with named(f"--set {assignment}"):
            for part in parents:
                place = _step(place, part)
            if isinstance(place, list):
                _step(place, last)
            place[int(last) if isinstance(place, list) else last] = parse(text)
    return result


def _step(place: Any, part: str) -> Any:
    if isinstance(place, list):
        if not (part.isascii() and part.isdigit()) or int(part) >= len(place):
            raise RequestError(f"{part!r} is not a place in a list of {len(place)}")
        return place[int(part)]
    inner = place.setdefault(part, {})
    if not isinstance(inner, dict | list):
        raise RequestError(f"{part!r} is a value, not a section")
    return inner


# -- what is wrong -------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """Return '; did you mean "x"?' if a known word is close, else nothing."""
    close = difflib.get_close_matches(word, [str(each) for each in known], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def check(kind: type[Checked], data: Any) -> Checked:
    """Return plain data as the model that it should be. Raises RequestError: one line per problem."""
    if not isinstance(data, dict):
        needed = [name for name, field in kind.model_fields.items() if field.is_required()]
        raise RequestError(f"expected a mapping with {_words(needed or list(kind.model_fields))}, found {_found(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestError("\n  ".join(explain(kind, data, error))) from error


def explain(kind: type[BaseModel], data: Any, error: ValidationError) -> list[str]:
    """Return one sentence per problem: the key's place in the file, what was expected, what was found."""
    said: dict[str, dict[str, str]] = {}  # place -> what is wrong, found
    for problem in error.errors():
        place = _place(problem["loc"], data, absent=problem["type"] in ("missing", "invalid_key"))
        wrong, found = _complaint(kind, problem, place)
        said.setdefault(".".join(map(str, place)), {}).setdefault(wrong, found)
    # Where a value may be of two kinds and is nearly one of them, the other's complaint says nothing.
    lines = [
        _line(place, complaints)
        for place, complaints in said.items()
        if not place or not any(other.startswith(f"{place}.") for other in said)
    ]
    more = len(lines) - MOST_PROBLEMS
    return [*lines[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def _line(place: str, complaints: Mapping[str, str]) -> str:
    """Return what is wrong with one value, of which one of several things may have been expected."""
    first, *others = complaints
    wrong = " or ".join([first, *(each.removeprefix(": expected ") for each in others)])
    found = complaints[first]
    return (place + wrong if place else wrong.removeprefix(": ")) + (f", found {found}" if found else "")


def _place(location: Sequence[int | str], data: Any, *, absent: bool) -> list[int | str]:
    """Return the keys and numbers of a location, without the names that pydantic gives to alternatives.

    The last part may be `absent` from the data.
    """
    place: list[int | str] = []
    for index, part in enumerate(location):
        if isinstance(data, dict) and (part in data or (absent and index == len(location) - 1)):
            data = data.get(part)
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        place.append(part)
    return place


def _complaint(kind: type[BaseModel], problem: Any, place: Sequence[int | str]) -> tuple[str, str]:
    """Return what is wrong with a value, to stand after its place, and what was found, if that is to be said."""
    location, given, context = problem["loc"], problem["input"], problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return f": unknown key{_known_instead(kind, location, place)}", ""
    if problem["type"] == "missing":
        about = _descriptions(kind, location[:-1]).get(str(location[-1]))
        return f" is required{f': {about}' if about else ''}", ""
    if problem["type"] == "union_tag_not_found":
        return f".{context['discriminator'].strip(chr(39))} is required", ""
    found = _found(given)
    if problem["type"] == "value_error":
        message = f": {problem['msg'].removeprefix('Value error, ')}"
        return message, "" if isinstance(given, dict | list | tuple) or "found" in message else found
    expected = _expected(problem["type"], context) or problem["msg"].removeprefix("Input should be ")
    if problem["type"] == "union_tag_invalid":
        given, found = context["tag"], repr(context["tag"])
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        found += did_you_mean(str(given), re.findall(r"'([^']*)'", expected))
    found += _quotes(problem["type"], given)
    where = f".{context['discriminator'].strip(chr(39))}" if problem["type"] == "union_tag_invalid" else ""
    return f"{where}: expected {expected}", found


def _quotes(problem: str, given: Any) -> str:
    """Return what to do where quotes make the difference between what was found and what was expected."""
    if problem == "string_type" and isinstance(given, bool | int | float):
        return " (quote it if it is text)"
    if problem not in ("bool_type", "int_type", "float_type") or not isinstance(given, str):
        return ""
    if given.lower() in ("yes", "on", "no", "off"):
        return " (which is text)"
    return " (leave out the quotes)" if re.fullmatch(r"true|false|[-+]?[0-9.]+(e[-+]?[0-9]+)?", given) else ""


def _expected(problem: str, context: Mapping[str, Any]) -> str | None:
    """Return in words what was expected where pydantic found a problem of this type."""
    words = {
        "bool_type": "true or false",
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "greater_than": "a number above {gt:g}",
        "greater_than_equal": "a number of at least {ge:g}",
        "less_than": "a number below {lt:g}",
        "less_than_equal": "a number of at most {le:g}",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "string_pattern_mismatch": "text that matches {pattern}",
        "invalid_key": "a key that is text",
        "tuple_type": "a list",
        "too_short": "at least {min_length} of them",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "literal_error": "{expected}",
        "union_tag_invalid": "{expected_tags}",
    }
    return words[problem].format(**context) if problem in words else None


def _found(value: Any) -> str:
    """Return a value as a message shows it: as YAML writes it, text in quotes, no more than a line."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a mapping of {_words(list(value))}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    try:
        shown = repr(str(value)) if isinstance(value, str) else str(value)
    except ValueError:  # more digits than Python writes
        return "a number of too many digits"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _words(keys: Sequence[object]) -> str:
    """Return at most a dozen keys as a list in words."""
    shown = [str(key) for key in keys[:12]] + (["others"] if len(keys) > 12 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


# -- where a key belongs -------------------------------------------------------------------------------------


def _known_instead(kind: type[BaseModel], location: Sequence[int | str], place: Sequence[int | str]) -> str:
    """Return which key was meant instead of an unknown one, where it belongs, or all that are known there."""
    key, known = str(location[-1]), _descriptions(kind, location[:-1])
    if hint := did_you_mean(key, known):
        return hint
    here = ".".join(part for part in place[:-1] if isinstance(part, str))
    elsewhere: dict[str, list[str]] = {}
    for section, name in _keys(kind, ""):
        if section != here:
            elsewhere.setdefault(name, []).append(f'under "{section}"' if section else "at the top")
    if close := difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        return f'; "{close[0]}" belongs {" or ".join(dict.fromkeys(elsewhere[close[0]]))}'
    return f"; known: {', '.join(known)}"


def _descriptions(kind: type[BaseModel], location: Sequence[int | str]) -> dict[str, str | None]:
    """Return the keys that a place takes, and what is said of each."""
    annotations: list[Any] = [kind]
    for part in location:
        inner = [found for each in _alternatives(annotations) for found in _inside(each, part)]
        # A part that leads nowhere is the name that pydantic gives to an alternative: that of a kind, or none of ours.
        tagged = [each for each in _alternatives(annotations) if _tag_of(each) == part]
        annotations = inner or tagged or annotations
    models = [each for each in _alternatives(annotations) if _is_model(each)]
    return {name: field.description for model in models for name, field in model.model_fields.items()}


def _keys(kind: type[BaseModel], place: str) -> Iterator[tuple[str, str]]:
    """Yield every key of a model and of those inside it, after the place that it belongs to."""
    for name, field in kind.model_fields.items():
        yield place, name
        inner = f"{place}.{name}" if place else name
        for model in _models_in(field.annotation):
            yield from _keys(model, inner)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotations: Collection[Any]) -> list[Any]:
    """Return annotations without `Annotated`, and unions as their parts."""
    found: list[Any] = []
    for each in annotations:
        if get_origin(each) is Annotated:
            found += _alternatives(get_args(each)[:1])
        elif get_origin(each) in (Union, types.UnionType):
            found += _alternatives(get_args(each))
        else:
            found.append(each)
    return found


def _inside(annotation: Any, part: int | str) -> list[Any]:
    """Return what a field, an item or a value of an annotation is; nothing if it has no such part."""
    if _is_model(annotation):
        return [annotation.model_fields[part].annotation] if part in annotation.model_fields else []
    if get_origin(annotation) is tuple and isinstance(part, int):
        return [get_args(annotation)[0]]
    return [get_args(annotation)[1]] if get_origin(annotation) is dict and isinstance(part, str) else []


def _tag_of(annotation: Any) -> Any:
    """Return the only value that a model's `kind` may have; None without one."""
    field = annotation.model_fields.get("kind") if _is_model(annotation) else None
    known = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return known[0] if len(known) == 1 else None
