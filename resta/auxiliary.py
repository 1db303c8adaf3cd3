"""The small files beside the weights: config, tokenizer, templates. Copied as they are, only the dtype corrected.

A config that goes through a library comes out as that library's version writes it, and older readers then take other
values from it; so it is edited as text.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from resta.checkpoint import Weights, inside, read_json
from resta.errors import RequestError
from resta.files import read_regular
from resta.hub import MODEL_FILES

# Written anew, or of another file set or an adapter: neither copied nor worth a word.
NOT_COPIED = (
    "README.md",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "resta.json",
    "adapter_config.json",
)
MOST_TOKENIZER_MEMORY = 1_000_000_000  # a vocabulary of 262,144 tokens with its merges takes about half of it
MOST_FILE_BYTES = 200_000_000
WITH_AUTO_MAP = ("config.json", "tokenizer_config.json")
TEMPLATE_FOLDER = "additional_chat_templates"
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_AUTO_MAP = re.compile(r'(,)?\s*"auto_map"\s*:\s*\{[^{}]*\}\s*(,)?')
_TIED_FIELD = re.compile(r'("tie_word_embeddings"\s*:\s*)(?:true|null)')
_DTYPE_FIELD = re.compile(r'("(?:torch_)?dtype"\s*:\s*")(float64|float32|float16|bfloat16)(")')


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryFile:
    """A file of the output by its name relative to the directory, and its whole content."""

    name: str
    content: bytes


def read_auxiliary_files(donor: Weights) -> tuple[tuple[AuxiliaryFile, ...], tuple[str, ...]]:
    """Read the files that a result takes from one model; also return the names that are left out.

    Of an adapter its own tokenizer and templates win over its base's. Raises RequestError.
    """
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for folder in donor.tokenizer_folders:
        for path in sorted([*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*.jinja")]):
            name = path.relative_to(folder).as_posix()
            if name == "config.json" and folder != donor.config_folder:
                left_out.append(name)  # the plan went by the base's
            elif _is_copied(path) and inside(path, folder):
                found[name] = path
            elif not path.is_dir() and path.suffix != ".safetensors" and name not in NOT_COPIED:
                left_out.append(name)
    files = []
    for name, path in sorted(found.items()):
        try:
            content = read_regular(path, MOST_FILE_BYTES)
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
        if name in WITH_AUTO_MAP and (without := _without_local_code(content)):
            content = without
            left_out.append(f"auto_map of {name} (it names code, which is not copied)")
        files.append(AuxiliaryFile(name=name, content=content))
    return tuple(files), tuple(left_out)


def plan_auxiliary_files(
    found: Iterable[AuxiliaryFile], dtypes: Iterable[tuple[str, int]], *, is_untied: bool
) -> tuple[AuxiliaryFile, ...]:
    """Return a model's auxiliary files as the result has them, the config corrected.

    Args:
        found: the files as they were read.
        dtypes: (dtype, bytes) of the result's tensors; the config is corrected to the one with most bytes.
        is_untied: whether the result's output layer has a matrix of its own that the config knows nothing of.
    """
    dtype = _main_dtype(dtypes)
    return tuple(
        replace(file, content=_corrected(file.content.decode("utf-8"), dtype, is_untied=is_untied).encode("utf-8"))
        if file.name == "config.json"
        else file
        for file in found
    )


def _without_local_code(text: bytes) -> bytes | None:
    """Return a config without its `auto_map` if that names code beside the config; None where there is nothing to do.

    Left in, it would send a reader that trusts code to files that are not there, even where it knows the model itself.
    """
    try:
        config = json.loads(text)
        classes = config.get("auto_map", {}).values()
    except (ValueError, AttributeError, RecursionError):
        return None
    named = [name for value in classes for name in (value if isinstance(value, list) else [value]) if name]
    if all("--" in str(name) for name in named):  # "org/name--module.Class" lies elsewhere
        return None
    cut = _AUTO_MAP.sub(lambda match: "," if match[1] and match[2] else "", text.decode("utf-8"), count=1)
    try:
        same = json.loads(cut) == {key: value for key, value in config.items() if key != "auto_map"}
    except ValueError:
        same = False
    return cut.encode("utf-8") if same else None


def _corrected(config: str, dtype: str | None, *, is_untied: bool) -> str:
    """Return a config's text with the dtype of the result, and saying that the output layer is tied no more."""
    if dtype:
        config = _DTYPE_FIELD.sub(rf"\g<1>{dtype}\g<3>", config)
    if is_untied:
        config, count = _TIED_FIELD.subn(r"\g<1>false", config)
        if not count:
            config = config.replace("{", '{\n  "tie_word_embeddings": false,', 1)
    return config


def tokenizer_conflict(mine: Weights, theirs: Weights) -> str | None:
    """Say how two models' tokenizers contradict each other, or None.

    Only ids that both have count: a tokenizer may extend another. Models without a tokenizer.json pass.
    """
    files = [_find_tokenizer(model) for model in (mine, theirs)]
    if files[0] is None or files[1] is None or files[0].read_bytes() == files[1].read_bytes():
        return None
    vocabularies = [_vocabulary(file) for file in files if file]
    differing = sorted(
        number for number in vocabularies[0].keys() & vocabularies[1].keys()
        if vocabularies[0][number] != vocabularies[1][number]
    )  # fmt: skip
    if not differing:
        return None
    first = differing[0]
    return f"id {first} is {vocabularies[1][first]!r}, not {vocabularies[0][first]!r} ({len(differing)} ids differ)"


def _is_copied(path: Path) -> bool:
    if not path.is_file() or path.name in NOT_COPIED:
        return False
    return any(fnmatch.fnmatchcase(path.name, glob) for glob in MODEL_FILES)


def _main_dtype(dtypes: Iterable[tuple[str, int]]) -> str | None:
    sizes: Counter[str] = Counter()
    for dtype, nbytes in dtypes:
        if dtype in TORCH_NAMES:
            sizes[TORCH_NAMES[dtype]] += nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _find_tokenizer(model: Weights) -> Path | None:
    files = [folder / "tokenizer.json" for folder in model.tokenizer_folders]
    present = [file for file in files if file.is_file()]
    return present[-1] if present else None


def _vocabulary(file: Path) -> dict[int, str]:
    """Return {id: token} of a `tokenizers` file, whatever its model."""
    tokenizer = read_json(file, most_memory=MOST_TOKENIZER_MEMORY)
    try:
        vocab = tokenizer["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram keeps [token, score] in the order of ids
            tokens = {number: str(token) for number, (token, _) in enumerate(vocab)}
        else:
            tokens = {int(number): token for token, number in vocab.items()}
        tokens.update({int(entry["id"]): str(entry["content"]) for entry in tokenizer.get("added_tokens") or ()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"{file}: is not a file of the tokenizers library: {error!r}") from error
    return tokens
