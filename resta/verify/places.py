"""When a model was measured and where it lies: noted beside its measurement, found from any directory by content.

Of each directory and file that a model was made of, M/model.json holds its name as it was given, its absolute path, and
its path from M, so that it is found from elsewhere and after the whole tree has moved. What is found there counts only
if its content is what was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resta.errors import RequestError, ResumeError
from resta.journal import to_json, write_whole
from resta.redeval.records import content_of, utc_now
from resta.redeval.targets import Target, parse_target

PLACE = "model.json"
PATHS = ("model", "base", "files", "chat_template")  # the fields of a LocalSpec that may be paths
KINDS = ("from_here", "absolute", "name")  # in the order in which they are tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """When a model was measured (ISO 8601, UTC; None where it was not noted), and {what of it: {kind: path}}."""

    measured_at: str | None
    paths: Mapping[str, Mapping[str, str]]


def note_model(target: Target, folder: Path, *, anew: bool) -> None:
    """Note in a measurement's folder where the model lies, and where it was measured `anew` that this was now."""
    given = {} if target.local is None else {name: getattr(target.local, name) for name in PATHS}
    place = Place(
        measured_at=utc_now() if anew else read_place(folder).measured_at,
        paths={role: _place(name, folder) for role, name in given.items() if name is not None},
    )
    write_whole(folder / PLACE, to_json(asdict(place), indent=2) + "\n")


def read_place(folder: Path) -> Place:
    """Return what was noted in a measurement's folder. Raises ResumeError."""
    path = folder / PLACE
    if not path.is_file():
        return Place(measured_at=None, paths={})
    try:
        return Place(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ResumeError(f"{path}: not a note of where a model lies ({error}); remove it") from error


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
    named = {"model": facts["name"], "base": facts["base"], "files": facts["files"]}
    places = read_place(folder).paths or {role: {"name": name} for role, name in named.items() if name is not None}
    for kind in KINDS:
        paths = {role: _path(place, kind, folder) for role, place in places.items()}
        try:
            target = parse_target(
                paths["model"],
                base=paths.get("base"),
                files=paths.get("files"),
                chat_template=paths.get("chat_template"),
                device=device,
                dtype=facts["dtype"],
            )
            if content_of(target.facts) == content_of(facts):
                return target
        except (RequestError, OSError):  # not there
            continue
    return None


def _path(place: Mapping[str, str], kind: str, folder: Path) -> str:
    if kind == "from_here" and kind in place:
        return str(folder.resolve() / place[kind])
    return place.get(kind, place["name"])
