"""What a finished output says of itself, and what lies in it besides tensors, held against what the merge would write.

From the plan and the facts of its tensors, which an audit checks by themselves, every other file of the directory
follows. So each is laid out again and compared, the manifest key by key, and a file that was not laid out is a finding.
What no comparison can show is named. This module reads; it knows nothing of arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from resta.checkpoint import read_json
from resta.digests import Digests, hash_files
from resta.directory import CARD, HASHED, small_files
from resta.errors import CheckFailedError, RequestError, RestaError
from resta.hub import INDEX, Located
from resta.manifest import CHECKSUM, SCHEMA, TensorFacts, from_json
from resta.output import MARK
from resta.plan import Plan
from resta.recipe import Recipe

# Between these `resta verify --card` puts its verdict into a card.
VERDICT = re.compile(r"\n\n<!-- resta verify: start -->.*<!-- resta verify: end -->\n*\Z", re.DOTALL)
KINDS = ("merge", "convert")
COMMIT = re.compile(r"[0-9a-f]{40}")
RELEASE = re.compile(r"\d[\w.+!-]{0,40}", re.ASCII)  # what a version looks like
MANIFEST_MEMORY = 1_100_000_000  # bytes; what a merge of a hundred thousand tensors records takes 800 million
MOST_ADDED = 1 << 20  # bytes by which a small file may be too long and still be read
MOST_SHOWN = 80  # letters of a value in a finding


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it should be: the file or tensor, and what differs."""

    what: str
    problem: str


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class InputFile(_Loose):
    """An input file as the manifest knew it."""

    bytes: int
    header_sha256: str | None
    sha256: str | None
    sha256_from: str | None


class Input(_Loose):
    """An input model as the manifest knew it: of the Hub if it has a commit, else local."""

    source: str
    commit: str | None
    files: dict[str, InputFile]


class OutputFile(_Loose):
    """A file of the output as the manifest knew it."""

    bytes: int
    sha256: str | None


class Manifest(_Loose):
    """`resta.json` of a merge or a conversion: the parts that an audit begins with, and `document`, all of it."""

    kind: str
    equation: str
    recipe_digest: str
    recipe: Recipe
    inputs: dict[str, Input]
    versions: dict[str, str]
    checksum: str
    digests: str
    outputs: dict[str, OutputFile]
    tensors: dict[str, TensorFacts]
    document: dict[str, Any]


def read_manifest(out: Path) -> Manifest:
    """Read `resta.json`.

    Raises RequestError: there is none, so `out` is not the output of a merge; CheckFailedError: it is not one
    that this version writes.
    """
    path = out / MARK
    if not path.is_file():
        raise RequestError(f"{out}: has no {MARK}; expected the output directory of `resta merge` or `resta convert`")
    try:
        parsed = read_json(path, most_memory=MANIFEST_MEMORY)
        kind = (parsed["schema"], parsed["kind"], parsed["checksum"])
        if kind not in [(SCHEMA, each, CHECKSUM) for each in KINDS]:
            raise CheckFailedError(f"{path}: is {kind}; this version audits {(SCHEMA, ' or '.join(KINDS), CHECKSUM)}")
        tensors = {name: asdict(from_json(plain)) for name, plain in parsed["tensors"].items()}
        return Manifest.model_validate({**parsed, "tensors": tensors, "document": parsed})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckFailedError(f"{path}: {place}: {first['msg']}; the manifest was altered") from error
    except RequestError as error:
        raise CheckFailedError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckFailedError(f"{path}: cannot be read as a manifest: {error!r}") from error


def check_manifest(manifest: Manifest) -> Iterator[Finding]:
    """Compare the manifest with itself, as far as a plan made from it depends on that."""
    if manifest.recipe_digest != manifest.recipe.digest:
        problem = f"recipe_digest is {manifest.recipe_digest}, but its recipe gives {manifest.recipe.digest}"
        yield Finding(what=MARK, problem=problem)
    if (manifest.kind == "merge") != bool(manifest.recipe.terms):
        yield Finding(
            what=MARK, problem=f"is of a {manifest.kind}, and its recipe has {len(manifest.recipe.terms)} terms"
        )
    if manifest.equation != manifest.recipe.equation:
        yield Finding(what=MARK, problem=f"equation is {manifest.equation!r}, not {manifest.recipe.equation!r}")
    if manifest.inputs.keys() != manifest.recipe.models.keys():
        yield Finding(what=MARK, problem="its inputs are not the models of its recipe")
    for name, was in manifest.inputs.items():
        if was.commit is not None and not COMMIT.fullmatch(was.commit):
            yield Finding(what=MARK, problem=f"inputs.{name}.commit is {_shown(was.commit)}, which is no commit")


def lay_out_again(manifest: Manifest, plan: Plan, taken: Mapping[str | Path, str]) -> dict[str, bytes] | None:
    """Return the small files that the merge would write, if it named its inputs as the manifest does.

    Args:
        manifest: what the output says.
        plan: the merge, planned again from where its inputs lie now.
        taken: SHA-256 of the output's weight files, by name, and of input files by path: of all, or of none,
            which are then believed.

    Returns:
        Content by name, or None if the figures in the manifest are none that a merge records.
    """
    weights = {}
    for name, model in plan.weights.items():
        was = manifest.inputs[name]
        place = Path(was.source)
        files = {}
        for path, identity in model.files.items():
            if path.parent == model.located.folder:
                recorded = was.files.get(path.name)
                by_hub = recorded is not None and recorded.sha256_from == "hub" and was.commit is not None
                read = identity.sha256 if identity.sha256_from == "content" else None  # a config's, with every plan
                known = by_hub or read is not None or manifest.digests == HASHED
                believed = read or (recorded.sha256 if recorded else None)
                files[place / path.name] = replace(
                    identity,
                    sha256=taken.get(path, believed) if known else None,
                    sha256_from=("hub" if by_hub else "content") if known else None,
                )
        hub_id = was.source.partition("@")[0] if was.commit else None
        located = Located(source=was.source, folder=place, hub_id=hub_id, commit=was.commit)
        weights[name] = replace(model, located=located, files=files)
    claimed = replace(plan, recipe=manifest.recipe, weights=weights)
    sha256: dict[str | Path, str] = {name: taken.get(name, "") for name in plan.headers}
    digests = Digests(sha256=sha256, core_s=0.0, after_s=0.0)
    try:
        return small_files(claimed, manifest.tensors, digests if manifest.digests == HASHED else None)
    except (ArithmeticError, LookupError, ValueError):
        return None


def check_claims(manifest: Manifest, expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare every key of the manifest with the manifest that the merge would write."""
    for path, found, due in _differences(manifest.document, expected, ""):
        if path.startswith("versions.") and isinstance(found, str) and due is not _ABSENT:
            if not RELEASE.fullmatch(found):
                yield Finding(what=MARK, problem=f"{path} is {_shown(found)}, which is no version")
        elif due is _ABSENT:
            yield Finding(what=MARK, problem=f"{path} is {_shown(found)}, a claim that no merge records")
        elif found is _ABSENT:
            yield Finding(what=MARK, problem=f"lacks {path}, which is {_shown(due)}")
        else:
            problem = f"{path} is {_shown(found)}, but recipe, inputs and tensors give {_shown(due)}"
            yield Finding(what=MARK, problem=problem)


def check_files(out: Path, manifest: Manifest, texts: Mapping[str, bytes] | None) -> Iterator[Finding]:
    """Compare the files beside the weights with what the merge would write, and name those that it would not.

    Args:
        out: the directory.
        manifest: its manifest.
        texts: every small file that the merge would write; None if that is not known, since no plan could be made.
    """
    weights = {fact.file for fact in manifest.tensors.values()}
    laid_out = weights | (texts.keys() if texts is not None else manifest.outputs.keys()) | {MARK}
    for name in entries(out):
        if name not in laid_out:
            yield Finding(what=str(out / name), problem="was not written by the merge; remove it, or merge again")
    index = list(_check_index(out / INDEX, manifest)) if len(weights) > 1 else []
    yield from index
    for name, content in (texts or {}).items():
        if name == MARK or (name == INDEX and index):
            continue
        problem = _compare(out / name, content, is_card=name == CARD)
        if problem:
            yield Finding(what=str(out / name), problem=problem)


def check_heads(out: Path, plan: Plan) -> Iterator[Finding]:
    """Compare the headers of the weight files with those that the merge lays out."""
    for name, head in plan.headers.items():
        if (out / name).is_file():
            with (out / name).open("rb") as handle:
                if handle.read(len(head)) != head:
                    yield Finding(what=str(out / name), problem="its header is not the one that the merge lays out")


def entries(out: Path) -> Iterator[str]:
    """Yield the relative name of everything below a directory that is no directory; a link to one is not followed.

    Raises RestaError: a directory cannot be looked into.
    """

    def fail(error: OSError) -> None:
        raise RestaError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(out, onerror=fail):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *linked]):
            yield (here / name).relative_to(out).as_posix()


def has_verdict(out: Path) -> bool:
    """Whether `resta verify` has put its verdict into the card."""
    try:
        return VERDICT.search((out / CARD).read_bytes().decode("utf-8", "replace")) is not None
    except OSError:
        return False


def output_digests(out: str | Path, *, workers: int = 1) -> dict[str, str]:
    """Return the SHA-256 of every file of a finished output, the manifest included: what a signature is made over.

    They are taken now, of the files as they are; what the manifest records must agree.

    Raises RequestError: `out` is no finished merge; CheckFailedError: a file is missing, was not written by the merge,
    or is another than the manifest records; RestaError: a file cannot be read.
    """
    out = Path(out)
    manifest = read_manifest(out)
    expected, names = {*manifest.outputs, MARK}, set(entries(out))
    for name in sorted(expected ^ names):
        fault = "is not there" if name in expected else "was not written by the merge"
        raise CheckFailedError(f"{out / name}: {fault}; audit the output before its digests are used")
    taken, _ = hash_files([out / name for name in names], workers)
    for name, was in manifest.outputs.items():
        digest = taken[out / name]
        if name == CARD and has_verdict(out):
            digest = hashlib.sha256(VERDICT.sub("\n", (out / CARD).read_bytes().decode("utf-8")).encode()).hexdigest()
        if was.sha256 not in (None, digest):
            raise CheckFailedError(f"{out / name}: its SHA-256 is {digest}, but the manifest has {was.sha256}")
    return {name: taken[out / name] for name in sorted(names)}


def not_proved(manifest: Manifest, *, moved: Mapping[str, str], is_sample: bool, has_verdict: bool) -> Iterator[str]:
    """Yield what a passing audit leaves open, each as the end of a sentence that begins with "not proved:"."""
    yield (
        "who made this: nothing in it is signed, and whoever can write the directory can make another one whose "
        "manifest fits it as well"
    )
    made_with = ", ".join(f"{name} {found}" for name, found in manifest.versions.items())
    yield f"what it was made with: the manifest says {made_with}"
    local = {name: was.source for name, was in manifest.inputs.items() if not was.commit}
    if local:
        named = ", ".join(f"{name} ({source!r})" for name, source in local.items())
        yield f"what {named} are: local files are known by their content alone, whatever their folders are called"
    for name, was in manifest.inputs.items():
        if was.commit and name in moved:
            yield (
                f"that {name} is {was.source} at commit {was.commit}: other files were named with --model; leave that "
                "out to have it fetched"
            )
    if is_sample:
        yield (
            "that the tensors outside of the sample are what recipe and inputs give and did what is recorded of them, "
            "and that the inputs hold the bytes that the merge read: only checksums, sizes and headers were compared"
        )
    elif manifest.digests != HASHED:
        yield (
            "that the inputs are in every byte the files that the merge read: it recorded no digests of them "
            "(--digests). The result was compared with what these inputs give"
        )
    if not is_sample and manifest.kind == "merge":
        yield "the last digits of recorded norms: they are compared to one part in 10,000"
    if any(rule.nonfinite for rule in manifest.recipe.rules):
        yield "the recorded norms of tensors in which a rule allows NaN or infinity"
    if manifest.kind == "convert":
        yield "that others read the PyTorch files as torch.load(weights_only=True) here does, which gave every value"
    if has_verdict:
        yield f"the section of {CARD} that `resta verify` may have written: compare it with its report"
    yield "that the model is safe: an audit asks it nothing"


_ABSENT = object()


def _differences(found: Any, due: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two JSON values differ: dotted path, what is there, what should be."""
    if isinstance(found, dict) and isinstance(due, dict):
        for key in [*found, *(key for key in due if key not in found)]:
            place = f"{path}.{key}" if path else str(key)
            yield from _differences(found.get(key, _ABSENT), due.get(key, _ABSENT), place)
    elif isinstance(found, list) and isinstance(due, list) and len(found) == len(due):
        for index, pair in enumerate(zip(found, due, strict=True)):
            yield from _differences(*pair, f"{path}.{index}")
    elif found != due or isinstance(found, bool) != isinstance(due, bool):
        yield path, found, due


def _check_index(index: Path, manifest: Manifest) -> Iterator[Finding]:
    expected = {name: fact.file for name, fact in manifest.tensors.items()}
    try:
        found = read_json(index).get("weight_map")
    except RequestError as error:
        yield Finding(what=str(index), problem=str(error).removeprefix(f"{index}: "))
        return
    listed = found if isinstance(found, dict) else {}
    for name in sorted(n for n in expected.keys() | listed.keys() if expected.get(n) != listed.get(n)):
        problem = f"says {listed.get(name)!r} holds the tensor {name!r}; it is {expected.get(name)!r}"
        yield Finding(what=str(index), problem=problem)


def _compare(path: Path, content: bytes, *, is_card: bool) -> str | None:
    """Return how a small file differs from what it should hold, or None."""
    if not path.is_file():
        return "is not there; the merge writes it"
    try:
        size = path.stat().st_size
        if size > len(content) + MOST_ADDED:
            return f"differs from what the merge writes: {size:,} bytes, should be {len(content):,}"
        found = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found == content:
        return None
    texts = [text.decode("utf-8", "replace") for text in (found, content)]
    if is_card and VERDICT.sub("\n", texts[0]) == texts[1]:
        return None
    lines = [text.splitlines() for text in texts]
    number = next((i for i, pair in enumerate(zip(*lines, strict=False)) if pair[0] != pair[1]), min(map(len, lines)))
    here, due = (repr(text[number][:MOST_SHOWN]) if number < len(text) else "its end" for text in lines)
    return f"differs from what the merge writes: line {number + 1} is {here}, should be {due}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
