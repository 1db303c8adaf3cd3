"""Which model is meant: a reference as users write it, what identifies it, and whether an endpoint is there.

The back end is always said, never guessed from a name: `--base-url` means an OpenAI-compatible server,
`inspect:PROVIDER/NAME` one of Inspect's providers, all else a local model.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from resta.errors import RequestError, UnansweredError
from resta.redeval.models import ROWS, LocalSpec, fingerprint
from resta.served import request

KEY, JUDGE_KEY = "RESTA_API_KEY", "RESTA_JUDGE_API_KEY"
INSPECT = "inspect:"
BATCH = "batch:"  # in the place of a URL: a served model that is asked by a file


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model to ask. `local` is set for a model of this process, `base_url` for a served one, else Inspect's.

    `key_variable` names the environment variable that holds the server's key; None: it is sent none.
    """

    name: str
    local: LocalSpec | None = None
    base_url: str | None = None
    key_variable: str | None = KEY

    @property
    def identity(self) -> str:
        """Return what two references to the same model share: path, Hub id, or name."""
        if self.local is None:
            return self.name
        return str(Path(self.name).resolve()) if Path(self.name).exists() else self.name

    @property
    def facts(self) -> dict[str, Any]:
        """Return what identifies the model in a run's configuration. Where it is served does not."""
        if self.local is None:
            return {"kind": "served" if self.base_url else "inspect", "name": self.name}
        spec = self.local
        return {
            "kind": "local",
            "name": self.name,
            "base": spec.base,
            "files": spec.files,
            "dtype": spec.dtype,
            "batch_rows": spec.batch_rows or ROWS,
            "fingerprint": fingerprint(spec),
        }


class LocalOptions(TypedDict, total=False):
    """How a model of this process is loaded: the fields of LocalSpec but the model itself."""

    base: str | None
    files: str | None
    chat_template: str | None
    device: str
    dtype: str
    batch_rows: int | None


def parse_target(name: str | Path, base_url: str | None = None, **options: Unpack[LocalOptions]) -> Target:
    """Return the model that a name means: a directory, a Hub id, an adapter, a recipe, or what is served at `base_url`.

    Raises RequestError.
    """
    name = str(name)
    if base_url is not None or name.startswith(INSPECT):
        given = [f"--{key.replace('_', '-')}" for key in ("base", "files", "chat_template") if options.get(key)]
        if given:
            raise RequestError(f"{' and '.join(given)} would change nothing: {name} is not a model of this process")
    if base_url is not None:
        if name.startswith(INSPECT):
            raise RequestError(f"{name} names an Inspect provider and --base-url a server; choose one")
        if not base_url.startswith(("http://", "https://")) and base_url != BATCH:
            raise RequestError(f"--base-url {base_url}: expected http://HOST:PORT/v1 (or https)")
        return Target(name=name, base_url=base_url.rstrip("/"))
    if name.startswith(INSPECT):
        if "/" not in name:
            raise RequestError(f"{name}: expected {INSPECT}PROVIDER/NAME, for example {INSPECT}anthropic/claude-x")
        return Target(name=name.removeprefix(INSPECT))
    spec = LocalSpec(model=name, **options)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or spec.is_recipe
    if looks_like_path and not Path(name).exists():
        raise RequestError(f"{name}: no such file or folder")
    return Target(name=name, local=spec)


def same_model(first: Target, second: Target) -> bool:
    """Whether a judge may be the model under test: the same identity, or the same last part of the name."""
    return first.identity == second.identity or _short(first) == _short(second)


def _short(target: Target) -> str:
    return target.identity.rstrip("/").split("/")[-1].split("@")[0].lower()


def check_endpoint(base_url: str, key_variable: str | None, timeout_s: float = 10) -> None:
    """Raise UnansweredError where nothing answers at `base_url`, RequestError where it wants another key."""
    try:
        request(f"{base_url.rstrip('/')}/models", key=api_key(key_variable), timeout_s=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            where = f"see {key_variable}" if key_variable else "no key was sent, for none is named"
            raise RequestError(f"{base_url} refuses the key (HTTP {error.code}); {where}") from error
        # Any other status came from a server, and not all of them list their models.
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnansweredError(f"nothing answers at {base_url}: {error}") from error


def api_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, or None; without the line break that one read from a file ends in.

    Other tools' variables are used only where a user names them: the key leaves for wherever the URL points.
    """
    return (os.environ.get(variable) or "").strip() or None if variable else None
