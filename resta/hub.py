"""Where a model lies: a local directory, or `org/name@revision` on the Hugging Face Hub.

Only safetensors, JSON, tokenizer and template files are fetched, never code, and PyTorch files for their conversion
alone: no other command fetches or loads one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resta.errors import RequestError

# What belongs to a model beside its weights, by name; a directory may hold anything else, data and logs among it.
MODEL_FILES = (
    *("config.json", "generation_config.json", "configuration.json", "chat_template.json", "*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "vocab.bpe", "encoder.json", "bpe.codes", "normalizer.json"),
    *("*.tiktoken", "tokenizer.model*", "spiece.model", "sentencepiece*.model"),
    *("preprocessor_config.json", "processor_config.json", "*_processor_config.json", "*_preprocessor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
INDEX, PYTORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
FETCHED = (*MODEL_FILES, INDEX, "adapter_config.json", "resta.json")
TEMPLATES = ("additional_chat_templates/*.jinja",)
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")  # where no index names others
NEVER_FETCHED = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PYTORCH_FILE = re.compile(r"pytorch_model(?:[-.].*)?\.bin")

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A model's directory on this machine, and what names it: the source as given and, from the Hub, the commit."""

    source: str
    folder: Path
    hub_id: str | None = None
    commit: str | None = None

    @property
    def public_source(self) -> str:
        """What others may be told: the source as given on the Hub, else the directory's name; never where it lies."""
        return self.source if self.hub_id else self.folder.name


def locate(source: str, *, pytorch: bool = False) -> Located:
    """Return the local directory of a model, downloading it if it is named by its Hub id.

    A directory of that name wins over the Hub. The Hub's cache is used as `huggingface_hub` is set up. With `pytorch`
    it is the PyTorch files of a model that are fetched, and not its safetensors.

    Raises RequestError: no such directory and no such model, or the download failed; or its repository has no weights
    of that kind, but of the other.
    """
    folder = check_source(source)
    if folder:
        return Located(source=source, folder=folder)
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    download = _download_pytorch if pytorch else _download
    commit_folder = download(source, match["id"], match["revision"])
    return Located(source=source, folder=commit_folder, hub_id=match["id"], commit=commit_folder.name)


def check_source(source: str) -> Path | None:
    """Return the directory that a source names, or None if it is a Hub id.

    Raises RequestError: it is neither.
    """
    try:
        folder = Path(source).expanduser()
        if source and folder.is_dir():  # "" would be the current directory
            return folder.resolve()
        found = "is a file" if folder.is_file() else "does not exist"
    except (OSError, RuntimeError) as error:  # a name too long, no permission, or the home of nobody
        raise RequestError(f"{source}: cannot be read: {error}") from error
    if kind := _other_kind(source):
        raise RequestError(f"{source}: {kind}")
    if _HUB_ID.fullmatch(source) is None or source.startswith((".", "~")):
        raise RequestError(f"{source}: expected a model directory or a Hub id like org/name@revision; it {found}")
    return None


def _other_kind(source: str) -> str | None:
    """Say what a source is that is known by its looks and not read, and what to do."""
    if source.endswith(".gguf"):
        return "is GGUF, made for llama.cpp; name the safetensors model that it was converted from"
    scheme, divider, rest = source.partition("://")
    if not divider or not scheme.isalnum():
        return None
    if scheme == "hf":
        return f"name a model of the Hub by its id alone: {rest.removeprefix('models/')}"
    if scheme in ("http", "https") and rest.startswith("huggingface.co/"):
        return f"name a model of the Hub by its id alone: {'/'.join(rest.split('/')[1:3])}"
    return f"{scheme}:// is not read from; copy the model into a directory first, and name that"


def check_there(source: str) -> None:
    """Raise RequestError where a Hub id (NAME or NAME@REVISION) is neither in the Hub's cache nor on the Hub.

    The Hub is asked once. transformers asks six times for every file, with pauses: 50 seconds to see one wrong name
    where there is no network.
    """
    hub_id, _, revision = source.partition("@")
    _fetch(source, hub_id, revision or None, [])


def convert_advice(source: str, names: Collection[str]) -> str:
    """Return what to do where these files of a model are PyTorch files and no safetensors; "" where they are not."""
    if any(name.endswith((".safetensors", INDEX)) for name in names):
        return ""
    found = sorted(name for name in names if PYTORCH_FILE.fullmatch(name) or name == PYTORCH_INDEX)
    if not found:
        return ""
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not Path(source).is_dir()
    out = f"./{source.partition('@')[0].partition('/')[2]}" if is_hub_id else f"{source.rstrip('/')}-safetensors"
    return (
        f"{found[0]} is a pickle, which is never loaded. Convert the model, and name what comes of it: "
        f"resta convert {shlex.quote(source)} -o {shlex.quote(out)}"
    )


def refuse_pytorch(name: str, revision: str | None = None) -> None:
    """Refuse a model whose weights are PyTorch files alone, before a library loads them.

    Args:
        name: a directory, or a Hub id; what is neither, or cannot be looked into, is left to whoever loads it.
        revision: of the Hub.

    Raises RequestError: with the command that converts it.
    """
    source = name if revision in (None, "main") or Path(name).is_dir() else f"{name}@{revision}"
    if Path(name).is_dir():
        names = {path.name for path in Path(name).iterdir()}
    elif _HUB_ID.fullmatch(name):
        names = _list_files(name, revision)
    else:
        return
    if advice := convert_advice(source, names):
        raise RequestError(f"{source}: holds no safetensors; {advice}")


def _list_files(hub_id: str, revision: str | None) -> set[str]:
    """Return the names of a repository's files: those on the Hub, else those in its cache, else none."""
    from huggingface_hub import HfApi, snapshot_download

    with suppress(Exception):
        return set(HfApi().list_repo_files(hub_id, revision=revision))
    with suppress(Exception):
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        return {path.name for path in folder.iterdir()}
    return set()


def _download(source: str, hub_id: str, revision: str | None) -> Path:
    small = _fetch(source, hub_id, revision, FETCHED, NEVER_FETCHED)
    # The index says which weights are read: repositories hold others, whole copies among them.
    folder = _fetch(source, hub_id, small.name, [*_weight_names(small), *TEMPLATES])
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if not weights and (advice := convert_advice(source, _list_files(hub_id, small.name))):
        raise RequestError(f"{source}: its repository holds no safetensors; {advice}")
    return folder


def _download_pytorch(source: str, hub_id: str, revision: str | None) -> Path:
    small = _fetch(source, hub_id, revision, (*FETCHED, PYTORCH_INDEX), NEVER_FETCHED)
    weights = sorted({"model.safetensors", INDEX} & _list_files(hub_id, small.name))
    if weights:
        raise RequestError(f"{source}: its repository has {weights[0]}, which every command reads as it is: {source}")
    names = _indexed(small / PYTORCH_INDEX, ".bin") or ["pytorch_model.bin"]
    return _fetch(source, hub_id, small.name, [*names, *TEMPLATES])


def _fetch(source: str, hub_id: str, revision: str | None, wanted: Sequence[str], never: Sequence[str] = ()) -> Path:
    # Imported here: a merge of local directories should not wait for it.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(never))
        )
    except Exception as error:  # among them those of its HTTP client, which it has changed twice
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"{source}: there is no such directory, and it could not be fetched from the Hub: {reason}"
        ) from error


def _weight_names(folder: Path) -> list[str]:
    """Return the names of the weight files that a model says are its own; whether it is right, its reader says."""
    return [*WEIGHTS, *_indexed(folder / INDEX, ".safetensors")]


def _indexed(index: Path, suffix: str) -> list[str]:
    """Return the names of the files that an index names; none where it is none."""
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({name for name in names if str(name).endswith(suffix)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
