"""An audit holds every file and every claim of an output against what the merge would write, and says what is left."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from resta import engine
from resta.auditing import Audit, audit
from resta.claims import output_digests, read_manifest
from resta.cli import main
from resta.errors import CheckFailedError, RequestError
from resta.header import MOST_MEMORY, count_memory
from resta.recipe import make_recipe
from resta.verify.report import CARD_END, CARD_START, with_section
from tests.builders import llama_tensors, nudged, save_model

SAFETY = {"delta": "aligned - base", "scale": 0.5, "name": "safety"}
TERMS = [SAFETY, {"delta": "tuned - base", "scale": -0.3, "sparsify": {"density": 0.9}}]
KEPT = "model.layers.1.mlp.up_proj.weight"
SECTION = f"{CARD_START}\n## Safety\n\nPASS\n{CARD_END}\n"


def merged(folder: Path, *, digests: bool) -> tuple[Path, dict[str, str]]:
    """A merge of local models with a tokenizer and templates, in several shards; returns it and its inputs."""
    base = llama_tensors(0)
    models = {
        "base": str(save_model(folder / "base-model", base)),
        "aligned": str(save_model(folder / "starling", nudged(base, 1))),
        "tuned": str(save_model(folder / "tuned", nudged(base, 2))),
    }
    tuned = Path(models["tuned"])
    (tuned / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}\n")
    (tuned / "tokenizer_config.json").write_text('{"model_max_length": 2048}\n')
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}\n")
    recipe = make_recipe(
        {
            "models": models,
            "start": "tuned",
            "terms": TERMS,
            "output": {"shard_size": 60_000},
            "rules": [{"match": KEPT, "keep": True}],
            "min_coverage": 0.9,
        }
    )
    return engine.merge(recipe, folder / "out", digests=digests).out, models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return merged(tmp_path_factory.mktemp("hashed"), digests=True)


@pytest.fixture(scope="module")
def unhashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return merged(tmp_path_factory.mktemp("unhashed"), digests=False)


@pytest.fixture
def out(made: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


@pytest.fixture
def moved(made: tuple[Path, dict[str, str]]) -> dict[str, str]:
    return made[1]


def problems(report: Audit) -> list[str]:
    return [f"{finding.what}: {finding.problem}" for finding in report.findings]


def assert_found(report: Audit, *parts: str) -> None:
    assert any(all(part in line for part in parts) for line in problems(report)), problems(report)


def rewrite_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((out / "resta.json").read_text())
    change(manifest)
    (out / "resta.json").write_text(json.dumps(manifest))


def test_what_a_merge_wrote_passes(
    made: tuple[Path, dict[str, str]], unhashed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    for place, inputs in (made, unhashed):
        assert not problems(audit(place, moved=inputs))
        assert not problems(audit(place, moved=inputs, sample=2))
        elsewhere = {name: str(shutil.move(path, tmp_path / f"moved-{name}")) for name, path in inputs.items()}
        assert not problems(audit(place, moved=elsewhere))
        for name, path in inputs.items():
            shutil.move(elsewhere[name], path)


STRANGERS = [
    "chat_template.json",
    "tokenizer.json",
    "modeling_evil.py",
    "pytorch_model.bin",
    "extra.safetensors",
    ".hidden",
    "additional_chat_templates/evil.jinja",
    "deep/er/file",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_file_that_the_merge_did_not_write_is_named(name: str, out: Path, moved: dict[str, str]) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("always comply")
    report = audit(out, moved=moved)
    assert problems(report) == [f"{out / name}: was not written by the merge; remove it, or merge again"]


@given(name=st.text("abc.-_ \\\n\x1b", min_size=1, max_size=12).filter(lambda name: name not in (".", "..")))
@settings(max_examples=25)
def test_no_name_hides_a_file(made: tuple[Path, dict[str, str]], name: str) -> None:
    (made[0] / name).write_bytes(b"")
    try:
        assert_found(audit(made[0], moved=made[1], sample=1), str(made[0] / name), "was not written by the merge")
    finally:
        (made[0] / name).unlink()


def test_a_name_that_is_no_text_is_reported_in_every_form(out: Path, moved: dict[str, str]) -> None:
    Path(os.fsdecode(os.fsencode(out) + b"/\xff\x1b[2J")).write_bytes(b"")
    flags = [part for name, place in moved.items() for part in ("--model", f"{name}={place}")]
    done = CliRunner().invoke(main, ["audit", str(out), *flags])
    assert done.exit_code == 1
    assert "\\udcff\\x1b[2J: was not written by the merge" in done.stderr
    document = json.loads(CliRunner().invoke(main, ["audit", str(out), *flags, "--json"]).stdout)
    assert document["findings"][0]["what"].endswith("\udcff\x1b[2J")


@pytest.mark.parametrize("name", ["../starling/model.safetensors", "/etc/passwd", "."])
def test_an_input_is_looked_for_in_its_own_folder_only(name: str, out: Path, moved: dict[str, str]) -> None:
    def add(manifest: dict[str, Any]) -> None:
        files = manifest["inputs"]["aligned"]["files"]
        files[name] = files["model.safetensors"]

    rewrite_manifest(out, add)
    assert_found(audit(out, moved=moved), "the input file of aligned is not there")


def test_links_and_pipes_neither_hide_anything_nor_hang(out: Path, moved: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.py").write_text("")
    (out / "code").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(out / "pipe.json")
    (out / "chat_template.jinja").unlink()
    os.mkfifo(out / "chat_template.jinja")
    report = audit(out, moved=moved)
    for name, words in (("code", "not written"), ("pipe.json", "not written"), ("chat_template.jinja", "not there")):
        assert_found(report, str(out / name), words)
    (out / "resta.json").unlink()
    os.mkfifo(out / "resta.json")
    with pytest.raises(RequestError, match=r"has no resta\.json"):
        audit(out, moved=moved)


@given(data=st.data())
@settings(max_examples=40)
def test_any_altered_byte_of_any_small_file_is_found(made: tuple[Path, dict[str, str]], data: st.DataObject) -> None:
    small = sorted(file for file in made[0].rglob("*") if file.is_file() and file.suffix != ".safetensors")
    file = data.draw(st.sampled_from([file for file in small if file.name != "resta.json"]))
    whole = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        assert any(str(file) in line for line in problems(audit(made[0], moved=made[1], sample=1)))
    finally:
        file.write_bytes(whole)


def test_a_rewritten_card_and_template_are_found_and_the_first_line_shown(out: Path, moved: dict[str, str]) -> None:
    (out / "README.md").write_text("# certified safe\n")
    (out / "chat_template.jinja").write_text("always comply")
    (out / "additional_chat_templates" / "tools.jinja").unlink()
    (out / "tokenizer_config.json").write_bytes(b" " * (2 << 20))
    report = audit(out, moved=moved)
    assert_found(report, "README.md", "line 1 is '# certified safe'", "should be '---'")
    assert_found(report, "chat_template.jinja", "line 1 is 'always comply'")
    assert_found(report, "tools.jinja", "is not there")
    assert_found(report, "tokenizer_config.json", "2,097,152 bytes, should be 27")


# Claims.


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value that is no container, and of every empty one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path
    for key, item in items:
        yield from leaves(item, (*path, key))


def containers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every object."""
    if isinstance(value, dict):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from containers(item, (*path, key))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def refusals(place: Path, inputs: dict[str, str], document: dict[str, Any]) -> list[str]:
    """What an audit has against an output whose manifest says this."""
    whole = (place / "resta.json").read_bytes()
    (place / "resta.json").write_text(json.dumps(document))
    try:
        return problems(audit(place, moved=inputs))
    except CheckFailedError as error:
        return [str(error)]
    finally:
        (place / "resta.json").write_bytes(whole)


def altered(value: Any) -> Any:
    """Another value, of the same type where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else "x"


@pytest.mark.parametrize("kind", ["altered", "removed", "added"])
@given(data=st.data())
@settings(max_examples=60)
def test_whatever_is_altered_removed_or_added_in_the_manifest_is_found(
    kind: str, made: tuple[Path, dict[str, str]], data: st.DataObject
) -> None:
    document = json.loads((made[0] / "resta.json").read_text())
    claimed = copy.deepcopy(document)
    if kind == "added":
        at(claimed, data.draw(st.sampled_from(list(containers(document)))))["evaluated"] = "asr 0.0, certified safe"
    else:
        # A small part of the manifest is of many tensors; each part is drawn as often.
        parts = {path[0]: [] for path in leaves(document)}
        for path in leaves(document):
            parts[path[0]].append(path)
        *place, key = data.draw(st.sampled_from(parts[data.draw(st.sampled_from(sorted(parts)))]))
        parent = at(claimed, tuple(place))
        if kind == "removed":
            del parent[key]
        else:
            parent[key] = altered(parent[key])
    if kind == "altered" and document["versions"] != claimed["versions"]:
        return  # what software made it cannot be shown: the next test
    assert refusals(*made, claimed)


@pytest.mark.parametrize("value", ["certified safe", "", "1.0 certified", "1\u0660", 7])
def test_a_version_is_not_proved_but_must_be_one(value: Any, out: Path, moved: dict[str, str]) -> None:
    rewrite_manifest(out, lambda manifest: manifest["versions"].update(resta="9.9.9"))
    report = audit(out, moved=moved)
    assert not problems(report)
    assert any("resta 9.9.9" in line for line in report.not_proved)
    document = json.loads((out / "resta.json").read_text())
    document["versions"]["numpy"] = value
    assert any("resta.json: versions.numpy" in line for line in refusals(out, moved, document))


def test_the_manifest_of_a_very_large_merge_can_be_read(out: Path) -> None:
    """A mixture of experts may have ninety thousand tensors; these already take more than a header may."""
    document = json.loads((out / "resta.json").read_text())
    fact = next(fact for fact in document["tensors"].values() if fact["terms"])
    document["tensors"] = {f"model.layers.{i}.mlp.experts.{i}.up_proj.weight": fact for i in range(36_000)}
    (out / "resta.json").write_text(json.dumps(document, indent=1))
    assert count_memory((out / "resta.json").read_bytes()) > MOST_MEMORY
    assert len(read_manifest(out).tensors) == 36_000


def test_a_key_that_occurs_twice_is_refused(out: Path, moved: dict[str, str]) -> None:
    text = (out / "resta.json").read_text()
    (out / "resta.json").write_text('{"kind": "certified",' + text[1:])
    with pytest.raises(CheckFailedError, match="'kind' occurs twice"):
        audit(out, moved=moved)


def claim_source(source: str, commit: str | None, *, everywhere: bool) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["inputs"]["aligned"].update(source=source, commit=commit)
        if everywhere:
            manifest["recipe"]["models"]["aligned"]["source"] = source

    return change


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    ("source", "commit", "words"),
    [
        ("declare-lab/starling-7B", None, "source"),
        ("/models/starling", None, "source"),
        ("declare-lab/starling-7B", "v1", "is no commit"),
    ],
)
def test_a_source_that_no_merge_would_record_is_found(
    source: str, commit: str | None, words: str, everywhere: bool, out: Path, moved: dict[str, str]
) -> None:
    rewrite_manifest(out, claim_source(source, commit, everywhere=everywhere))
    assert_found(audit(out, moved=moved), "resta.json", "inputs.aligned", words)


def test_a_public_name_in_the_place_of_a_local_one_is_found_or_named(out: Path, moved: dict[str, str]) -> None:
    commit = "c0ffee" + 34 * "0"
    rewrite_manifest(out, claim_source("declare-lab/starling-7B@main", commit, everywhere=True))
    report = audit(out, moved=moved)
    assert_found(report, "README.md", "differs from what the merge writes")
    card = (out / "README.md").read_text()
    card = card.replace("| aligned | starling | local files |", f"| aligned | declare-lab/starling-7B | {commit} |")
    (out / "README.md").write_text(card.replace("- starling\n", "- declare-lab/starling-7B\n"))
    digest = hashlib.sha256((out / "README.md").read_bytes()).hexdigest()
    size = (out / "README.md").stat().st_size
    rewrite_manifest(out, lambda manifest: manifest["outputs"]["README.md"].update(sha256=digest, bytes=size))
    report = audit(out, moved=moved)
    assert not problems(report)  # forged from end to end: nothing contradicts it
    assert any(f"aligned is declare-lab/starling-7B@main at commit {commit}" in line for line in report.not_proved)


def test_local_inputs_are_named_as_not_proved(out: Path, moved: dict[str, str]) -> None:
    named = next(line for line in audit(out, moved=moved).not_proved if "local files" in line)
    assert all(words in named for words in ("base ('base-model')", "aligned ('starling')", "tuned ('tuned')"))


# Digests.


def flip_kept_entry(place: str) -> Callable[[], None]:
    """Alter a tensor that no element of the result depends on; returns what undoes it."""
    file = Path(place) / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])[KEPT]["data_offsets"][0]

    def flip() -> None:
        data[begin] ^= 1
        file.write_bytes(data)

    flip()
    return flip


def test_an_input_byte_that_changes_no_element_is_found_where_digests_were_taken(
    made: tuple[Path, dict[str, str]], unhashed: tuple[Path, dict[str, str]]
) -> None:
    for (place, inputs), is_hashed in ((made, True), (unhashed, False)):
        undo = flip_kept_entry(inputs["aligned"])
        try:
            report = audit(place, moved=inputs)
            if is_hashed:
                assert_found(report, "resta.json", "inputs.aligned.files.model.safetensors.sha256")
            else:
                assert not problems(report)
                assert any("recorded no digests" in line for line in report.not_proved)
            assert any("inputs hold the bytes" in x for x in audit(place, moved=inputs, sample=1).not_proved)
        finally:
            undo()


def test_an_audit_takes_the_digests_that_the_manifest_lacks(unhashed: tuple[Path, dict[str, str]]) -> None:
    place, inputs = unhashed
    expected = {file.relative_to(place).as_posix(): file for file in place.rglob("*") if file.is_file()}
    expected |= {f"{name}/{file.name}": file for name, at in inputs.items() for file in Path(at).glob("*.safetensors")}
    found = audit(place, moved=inputs)
    assert found.sha256 == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in expected.items()}
    assert audit(place, moved=inputs, sample=1).sha256.keys() == output_digests(place).keys()


def test_what_is_signed_is_every_file_as_it_is(out: Path) -> None:
    whole = {f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in out.rglob("*.*")}
    assert output_digests(out, workers=2) == whole
    for name in ("config.json", min(file.name for file in out.glob("*.safetensors"))):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(CheckFailedError, match=f"{name}: its SHA-256 is"):
            output_digests(out)
        (out / name).write_bytes(kept)
    (out / "modeling.py").write_text("")
    with pytest.raises(CheckFailedError, match=r"modeling\.py: was not written by the merge"):
        output_digests(out)
    (out / "modeling.py").unlink()
    (out / "chat_template.jinja").unlink()
    with pytest.raises(CheckFailedError, match=r"chat_template\.jinja: is not there"):
        output_digests(out)


# What `resta verify` adds, and what is printed.


def test_the_verdict_in_a_card_is_named_and_the_rest_of_the_card_still_compared(
    out: Path, moved: dict[str, str]
) -> None:
    card = out / "README.md"
    whole = card.read_text()
    for section in (SECTION, SECTION.replace("PASS", "FAIL")):  # the second takes the place of the first
        card.write_text(with_section(card.read_text(), section))
        report = audit(out, moved=moved)
        assert not problems(report)
        assert any("section of README.md" in line for line in report.not_proved)
        assert output_digests(out)["README.md"] == hashlib.sha256(card.read_bytes()).hexdigest()
    card.write_text(card.read_text() + "certified safe\n")
    assert_found(audit(out, moved=moved), "README.md", "differs")
    card.write_text(with_section(whole.replace("0.5", "0.6"), SECTION))
    assert_found(audit(out, moved=moved), "README.md", "differs")
    card.write_text(whole)
    assert not any("section of README.md" in line for line in audit(out, moved=moved).not_proved)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("sample", [True, False])
def test_what_is_not_proved_is_printed_with_every_verdict(
    fails: bool, sample: bool, out: Path, moved: dict[str, str]
) -> None:
    if fails:
        (out / "README.md").write_text("# certified safe")
    flags = [part for name, place in moved.items() for part in ("--model", f"{name}={place}")]
    flags += ["--sample", "2"] if sample else []
    done = CliRunner().invoke(main, ["audit", str(out), *flags])
    assert done.exit_code == int(fails)
    assert ("every file is as the merge writes it" in done.stdout) != fails
    lines = [line.removeprefix("not proved: ") for line in done.stdout.splitlines() if line.startswith("not proved: ")]
    report = audit(out, moved=moved, sample=2 if sample else None)
    assert lines == list(report.not_proved)
    assert any("outside of the sample" in line for line in lines) == sample
    assert any("last digits of recorded norms" in line for line in lines) != sample
    assert any("nothing in it is signed" in line for line in lines)
    assert any("the model is safe" in line for line in lines)
    document = json.loads(CliRunner().invoke(main, ["audit", str(out), *flags, "--json"]).stdout)
    assert document["not_proved"] == lines
    assert document["sha256"] == report.sha256
