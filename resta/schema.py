"""JSON Schema (2020-12) of what is read and written, made from the types themselves.

Of what users write pydantic makes it; of what commands write it is made here, from the frozen data that is dumped.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NUMBER = {"type": ["number", "null"]}  # null: infinite, which JSON has no word for
TEXTS = {"type": "array", "items": TEXT}

_PLAIN: dict[Any, Mapping[str, Any]] = {
    str: TEXT,
    int: COUNT,
    bool: FLAG,
    float: NUMBER,
    type(None): {"type": "null"},
    Any: {},
}


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of what users write, for editors."""
    return {"$schema": DIALECT, **kind.model_json_schema()}


def schema_of_data(kind: Any) -> dict[str, Any]:
    """Return the schema of what `dataclasses.asdict` makes of a type, infinite numbers as null.

    Every field of a dataclass is there, and no other.
    """
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return closed({field.name: schema_of_data(hints[field.name]) for field in fields(kind)})
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of_data(part) for part in parts]}
    if origin is np.ndarray:
        return {"type": "array"}
    if origin is tuple and parts[-1] is not Ellipsis:
        items = [schema_of_data(part) for part in parts]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of_data(parts[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of_data(parts[0])}
    raise TypeError(f"no schema is known of {kind}")


def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has all of these properties, and no other."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
