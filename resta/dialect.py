"""One dialect of YAML for all that users write: YAML 1.2 with decimal numbers.

`true` and `false` alone are truth values and `1e-3` is a number; `on`, `1:30` and `2024-05-01` are text. Refused are a
key that occurs twice, a merge key (`<<`), a number like `010`, which is eight to half of the world's readers and ten to
the others, and text that asks for more than it looks like. This module knows nothing of what files say.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from resta.errors import RequestError

MOST_CHARACTERS = 1_000_000
MOST_DEPTH = 40  # mappings and lists inside each other
MOST_VALUES = 200_000  # in the whole file, each alias counted as what it stands for


def parse(text: str) -> Any:
    """Return YAML as plain data: mappings, lists, text, numbers, truth values and None. Raises RequestError."""
    if len(text) > MOST_CHARACTERS:
        raise RequestError(f"not valid YAML: {len(text):,} characters, expected at most {MOST_CHARACTERS:,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        context = f" ({error.context})" if error.context else ""
        advice = "; indent with spaces, and quote text that holds tabs" if "'\\t'" in str(error.problem) else ""
        raise RequestError(f"not valid YAML: {place}{error.problem}{advice}{context}") from error
    except yaml.YAMLError as error:  # a character that no YAML may hold
        raise RequestError(f"not valid YAML: {' '.join(str(error).split())}") from error


def parse_untyped(text: str) -> Any:
    """Return YAML whose values no type tells apart. Raises RequestError, too, for a word that could mean two things."""
    try:
        return settle(parse(text))
    except ValueError as error:
        raise RequestError(str(error)) from error


def dump(plain: Any) -> str:
    """Return plain data as YAML that readers of either YAML, 1.1 or 1.2, take for the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class Word(str):
    """Text without quotes that YAML 1.1 takes for something else, such as `yes`, `1:30` or `0x10`."""

    __slots__ = ()


def settle(value: Any, place: str = "") -> Any:
    """Return plain data that no field's type tells apart. Raises ValueError for a word that could mean two things."""
    if isinstance(value, Word):
        raise ValueError(
            f"{place}{value} is text here and something else to older readers of YAML; quote it if it is text, "
            "else write true, false or a decimal number"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            settle(inner, f"{place}{settle(key)}: ")
    elif isinstance(value, list):
        for inner in value:
            settle(inner, place)
    return value


_BOOL, _INT, _FLOAT, _NULL = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null"))
_WORD, _LEADING_ZERO = "tag:resta:word", "tag:resta:leading-zero"
_INFINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = {
    _NULL: re.compile(r"^(?:~|null|Null|NULL|)$"),
    _BOOL: re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    _INT: re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"),
    _LEADING_ZERO: re.compile(r"^[-+]?0[0-9]+$"),
    _FLOAT: re.compile(rf"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|{_INFINITE})$"),
}
_FIRST = [*"~nNtTfF-+.0123456789", ""]  # what such scalars begin with


class _Loader(yaml.SafeLoader):
    """Of two resolvers that match a scalar the first decides, and the older YAML's come last."""

    depth = 0

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's node."""
        node = super().get_single_node()
        if node is not None:
            _weigh(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node, unless it lies too deep."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _refusal(mark, f"nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping of which no key occurs twice."""
        found: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refusal(key_node.start_mark, "a key must be text, found an unhashable one")
            if key in found:
                raise _refusal(key_node.start_mark, f"the key {key!r} occurs twice")
            if isinstance(key, Word) and key == "<<":
                raise _refusal(key_node.start_mark, "YAML 1.2 has no merge keys (<<); write out what it stands for")
            found.add(key)
        return super().construct_mapping(node, deep)

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        """Return a truth value."""
        return self.scalar_of(_BOOL, node).lower() == "true"

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number in decimal digits."""
        text = self.scalar_of(_INT, node)
        try:
            return int(text)
        except ValueError:  # more digits than Python converts
            raise _refusal(node.start_mark, f"a number of {len(text):,} digits") from None

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Return a number."""
        return float(self.scalar_of(_FLOAT, node).replace(".inf", "inf").replace(".nan", "nan"))

    def construct_word(self, node: yaml.ScalarNode) -> Word:
        """Return text that another YAML takes for something else."""
        return Word(self.construct_scalar(node))

    def construct_leading_zero(self, node: yaml.ScalarNode) -> Any:
        """Refuse a number that two readers of YAML read differently."""
        digits = node.value.lstrip("+-")
        octal = set(digits) <= set("01234567") and len(digits) <= 20
        other = str(int(digits, 8)) if octal else "something else"
        why = f"{node.value} is {digits.lstrip('0') or '0'} to some readers of YAML and {other} to others"
        raise _refusal(node.start_mark, f"{why}; write the number that you mean, or quote it if it is text")

    def refuse_tag(self, node: yaml.Node) -> Any:
        """Refuse a tag that means more than plain data."""
        raise _refusal(node.start_mark, f"the tag {node.tag} is not taken; write plain text, numbers, lists, mappings")

    def scalar_of(self, tag: str, node: yaml.ScalarNode) -> str:
        """Return a scalar's text, in lower case; it need not fit the tag if that stands before it."""
        text = str(self.construct_scalar(node))
        if not _SCALARS[tag].match(text) and not (tag == _FLOAT and _SCALARS[_INT].match(text)):
            raise _refusal(node.start_mark, f"{text!r} is no {tag.rpartition(':')[2]}")
        return text.lower()


def _weigh(node: yaml.Node, weights: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many values a node stands for, and how deep, aliases followed. Raises YAMLError where too many.

    An alias comes after what it stands for, so this goes no deeper than the text does.
    """
    if id(node) in weights:
        if (known := weights[id(node)]) is None:
            raise _refusal(node.start_mark, "an alias stands inside of what it stands for")
        return known
    weights[id(node)] = None
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    below = [_weigh(part, weights) for part in inner]
    values, depth = 1 + sum(count for count, _ in below), 1 + max((depth for _, depth in below), default=0)
    if values > MOST_VALUES or depth > MOST_DEPTH:
        most = f"more than {MOST_VALUES:,} values" if values > MOST_VALUES else f"nested more than {MOST_DEPTH} deep"
        raise _refusal(node.start_mark, f"{most}, with aliases (*) as what they stand for")
    weights[id(node)] = values, depth
    return values, depth


def _refusal(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _FIRST)
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        if _tag != _NULL:
            _Loader.add_implicit_resolver(_WORD, _pattern, [_first])
_Loader.yaml_constructors = {
    _NULL: yaml.SafeLoader.construct_yaml_null,
    _BOOL: _Loader.construct_bool,
    _INT: _Loader.construct_int,
    _FLOAT: _Loader.construct_float,
    _WORD: _Loader.construct_word,
    _LEADING_ZERO: _Loader.construct_leading_zero,
    "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
    "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
    None: _Loader.refuse_tag,
}


class _Dumper(yaml.SafeDumper):
    """Quotes the text that a reader of either YAML would take for something else, and repeats instead of aliasing."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value is written again where it stands twice: always."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks that only YAML 1.1 knows are escaped, which is done between double quotes alone.
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", str(text), '"' if set(text) & set("\x85\u2028\u2029") else None
    )


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Word, _represent_text)
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *resolvers]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
