"""Where a measured model lies: noted beside its measurement, looked for again from any directory, known by content.

Of each directory and file that a model was made of, M/model.json holds its name as it was given, its absolute path, and
its path from M, so that it is found from elsewhere and after the whole tree has moved. What is found there counts only
if its content is what was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from resta.errors import ModelError
from resta.redeval.models import LocalSpec
from resta.redeval.records import content_of
from resta.redeval.targets import Target, parse_target

PLACE = "model.json"
PATHS = ("model", "base", "files", "chat_template")  # the fields of a LocalSpec that may be paths
KINDS = ("from_here", "absolute", "name")  # in the order in which they are tried


def note_model(target: Target, folder: Path) -> None:
    """Note in a measurement's folder where a local model's directories and files lie."""
    if target.local is None:
        return
    given = {field.name: getattr(target.local, field.name) for field in fields(LocalSpec) if field.name in PATHS}
    places = {role: _place(name, folder) for role, name in given.items() if name is not None}
    part = folder / f"{PLACE}.part"
    part.write_text(json.dumps(places, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / PLACE)


def _place(name: str, folder: Path) -> dict[str, str]:
    if not Path(name).exists():  # a Hub id
        return {"name": name}
    path = Path(name).resolve()
    return {"name": name, "absolute": str(path), "from_here": os.path.relpath(path, folder.resolve())}


def find_model(folder: Path, facts: Mapping[str, Any], *, device: str) -> Target | None:
    """Return the model that was measured into `folder`, if it is a local one and still to be found, unchanged.

    `facts` are those of the target in the measurement's configuration.
    """
    if facts["kind"] != "local":
        return None
    places = _read_places(folder, facts)
    for kind in KINDS:
        paths = {role: _path(place, kind, folder) for role, place in places.items()}
        name = paths.pop("model")
        try:
            target = parse_target(name, None, device=device, dtype=facts["dtype"], **paths)
            if content_of(target.facts) == content_of(facts):
                return target
        except (ModelError, OSError):  # not there
            continue
    return None


def _read_places(folder: Path, facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return what note_model wrote, or of a measurement without it the names alone."""
    path = folder / PLACE
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    named = {"model": facts["name"], "base": facts["base"], "files": facts["files"]}
    return {role: {"name": name} for role, name in named.items() if name is not None}


def _path(place: Mapping[str, str], kind: str, folder: Path) -> str:
    if kind == "from_here" and kind in place:
        return str(folder.resolve() / place[kind])
    return place.get(kind, place["name"])
