"""Text from elsewhere on a terminal: nothing of it is obeyed, by the terminal or by rich."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from resta.cli import main
from resta.page import console, printable, printable_lines
from tests.conftest import llama_tensors, nudged, save_model

HOSTILE = ["[/v1]", "[v2]", "[bold]x[/bold]", ":smile:", "a\x1b]0;pwned\x07b", "a\u202eb", "a\nerror: b", "\x9b31m"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@given(st.text())
def test_what_is_printed_is_one_visible_line_and_visible_text_is_kept(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    assert printable_lines(text).count("\n") == text.count("\n")


@given(st.text(max_size=60))
def test_rich_prints_the_very_text_that_it_is_given(text: str) -> None:
    file = io.StringIO()
    console(file=file, width=1000).print(printable(text))
    assert file.getvalue().rstrip("\n").rstrip() == printable(text).rstrip()


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\n" not in name])
def test_a_merge_into_a_folder_of_any_name_says_where_it_is_and_ends_well(
    trio: dict[str, str], tmp_path: Path, name: str
) -> None:
    out = tmp_path / name.replace("/", "") / ("x" + name.replace("/", ""))
    done = run("merge", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "--scale", 1, "-o", out)
    assert done.exit_code == 0, done.output
    assert out.is_dir()
    assert printable(out) in done.stdout
    assert done.stdout.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_and_inputs_of_any_name_are_compared_and_refused_in_visible_text(tmp_path: Path, name: str) -> None:
    tensors = {f"{name}.weight": torch.ones(4, 4), **llama_tensors(0)}
    folder = "in" + printable(name.replace("/", ""))
    models = [save_model(tmp_path / folder / side, nudged(tensors, seed)) for seed, side in enumerate("ab")]
    lacking = save_model(tmp_path / folder / "c", llama_tensors(3))
    done = run("diff", *models)
    assert done.exit_code == 0, done.output
    assert done.stdout.replace("\n", "").isprintable()
    flags = ("--aligned", models[0], "--base", lacking, "--scale", 1, "-o", tmp_path / "out")
    refused = run("merge", models[1], *flags)
    assert refused.exit_code == 2
    assert printable(f"{name}.weight") in refused.stderr
    assert refused.stderr.replace("\n", "").isprintable()
    planned = run("merge", models[1], "--aligned", models[0], "--base", models[0], *flags[4:], "--dry-run")
    assert planned.stdout.replace("\n", "").isprintable()
