from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from resta.cli import COMMANDS, main
from resta.engine import merge
from resta.errors import EXIT_CODES, CheckFailedError, RequestError, RestaError
from resta.plan import make_plan
from resta.recipe import load_recipe, make_recipe, parse_recipe
from tests.builders import digests, everyday, read, run, save_model

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_flags_and_recipe_give_the_same_directory(trio: dict[str, str], tmp_path: Path) -> None:
    done = run(*everyday(trio, tmp_path / "flags", "--scale", 0.5, "--quiet"))
    assert (done.exit_code, done.output) == (0, "")
    terms = [{"name": "safety", "delta": "aligned - base", "scale": 0.5}]
    models = {name: trio[name] for name in ("tuned", "aligned", "base")}
    recipe = make_recipe({"models": models, "start": "tuned", "terms": terms, "output": {"files_from": "tuned"}})
    merge(recipe, tmp_path / "recipe")
    assert digests(tmp_path / "flags") == digests(tmp_path / "recipe")
    assert json.loads((tmp_path / "flags" / "resta.json").read_text())["recipe_digest"] == recipe.digest


@pytest.mark.parametrize(
    ("flags", "equation"),
    [
        (["--scale", "0.5"], "tuned + 0.5 * (aligned - base)"),
        (["--scale", "-0.5"], "tuned - 0.5 * (aligned - base)"),
        (
            ["--scale", "0.5", "--dare-density", "0.7"],
            "base + 1 * dare(tuned - base, density=0.7) + 0.5 * (aligned - base)",
        ),
        (
            ["--scale", "0.5", "--dare-density", "0.7", "--tuned-from", "aligned"],
            "aligned + 1 * dare(tuned - aligned, density=0.7) + 0.5 * (aligned - base)",
        ),
        (
            ["--scale", "0.5", "--dare-density", "0.7", "--dare-on", "safety"],
            "tuned + 0.5 * dare(aligned - base, density=0.7)",
        ),
        (["--scale", "0.5", "--unaligned", "BASE"], "tuned + 0.5 * (aligned - unaligned)"),
        (
            ["--scale", "0.5", "--dare-density", "0.7", "--tuned-from", "BASE"],
            "origin + 1 * dare(tuned - origin, density=0.7) + 0.5 * (aligned - base)",
        ),
    ],
)
def test_flags_say_an_equation(trio: dict[str, str], tmp_path: Path, flags: list[str], equation: str) -> None:
    arguments = [trio["base"] if flag == "BASE" else flag for flag in flags]
    done = run(*everyday(trio, tmp_path / "out", *arguments, "--json"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["equation"] == equation
    recorded = json.loads((tmp_path / "out" / "resta.json").read_text())["recipe"]
    assert make_recipe(recorded).files_from == "tuned"


def test_the_command_that_a_merge_prints_audits_it(trio: dict[str, str], tmp_path: Path) -> None:
    done = run(*everyday(trio, tmp_path / "the out", "--scale", 0.5))
    line = next(line for line in done.stdout.splitlines() if line.startswith("check it:"))
    words = shlex.split(line.removeprefix("check it:"))
    assert words[0] == "resta"
    audited = run(*words[1:])
    assert audited.exit_code == 0, audited.output


def test_a_missing_scale_is_one_sentence_of_advice(trio: dict[str, str], tmp_path: Path) -> None:
    done = run(*everyday(trio, tmp_path / "out"))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --scale is required")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "TUNED", "--scale", 1, "-o", "OUT"], "say --aligned"),
        (["merge", "TUNED", "--aligned", "NOWHERE", "--base", "TUNED", "--scale", 1, "-o", "OUT"], "does not exist"),
        (["merge", "NONE.yaml", "-o", "OUT"], "no such file"),
        (["merge", "TUNED", "--aligned", "TUNED", "--base", "TUNED", "--scale", "nan", "-o", "OUT"], "finite"),
        (
            [
                "merge",
                "TUNED",
                "--aligned",
                "TUNED",
                "--base",
                "TUNED",
                "--scale",
                1,
                "--dare-density",
                1.7,
                "-o",
                "OUT",
            ],
            "density",
        ),
        (
            [
                "merge",
                "TUNED",
                "--aligned",
                "TUNED",
                "--base",
                "TUNED",
                "--scale",
                1,
                "--tuned-from",
                "base",
                "-o",
                "OUT",
            ],
            "--tuned-from is only used",
        ),
        (
            [
                "merge",
                "TUNED",
                "--aligned",
                "TUNED",
                "--base",
                "TUNED",
                "--scale",
                1,
                "--recorded-base",
                "x",
                "-o",
                "OUT",
            ],
            "no adapter given",
        ),
    ],
)
def test_a_wrong_request_exits_with_2_and_one_message(
    trio: dict[str, str], tmp_path: Path, arguments: list[object], message: str
) -> None:
    places = {"TUNED": trio["tuned"], "OUT": tmp_path / "out", "NOWHERE": "./nowhere"}
    done = run(*(places.get(str(argument), argument) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_damaged_weights_exit_as_a_failed_run(trio: dict[str, str], tmp_path: Path) -> None:
    tensors = read(trio["tuned"])
    tensors["model.norm.weight"][0] = float("nan")
    trio["tuned"] = str(save_model(tmp_path / "nan", tensors))
    done = run(*everyday(trio, tmp_path / "out", "--scale", 1))
    assert done.exit_code == 5
    assert "model.norm.weight" in done.stderr


class _Broken(Exception):
    """What nobody foresaw."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RestaError("the run failed"), 5, "error: the run failed"),
        (RequestError("not so"), 2, "error: not so"),
        (CheckFailedError("the answer is no"), 1, "error: the answer is no"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (MemoryError(), 5, "please report it"),
        (_Broken("surprise"), 5, "surprise"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_command_fails_with_the_code_that_means_no(
    command: str, error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(COMMANDS[command][0]).command, "make_context", broken)
    done = run(command)
    assert done.exit_code == code
    assert says in done.stderr


def test_every_exit_code_of_an_error_is_documented() -> None:
    kinds = [RestaError, *RestaError.__subclasses__()]
    kinds += [below for kind in kinds for below in kind.__subclasses__()]
    assert {kind.exit_code for kind in kinds} <= EXIT_CODES.keys()
    shown = run("--help").output
    assert all(words in " ".join(shown.split()) for words in EXIT_CODES.values())


@pytest.mark.parametrize("name", ["merge", "sft", "collect", "redeval", "verify", "sweep", "demo"])
def test_every_command_that_writes_a_folder_or_file_takes_its_place_as_o(name: str) -> None:
    command = importlib.import_module(COMMANDS[name][0]).command
    if isinstance(command, click.Group):
        command = command.commands["run"]
    [option] = [parameter for parameter in command.params if "-o" in parameter.opts]
    assert option.opts == ["-o", "--out", "--output"]
    assert option.name == "out"


def test_the_demo_takes_its_folder_once(tmp_path: Path) -> None:
    done = run("demo", tmp_path / "a", "-o", tmp_path / "b")
    assert done.exit_code == 2
    assert "name the folder once" in done.stderr


def test_a_reader_that_has_gone_is_no_answer() -> None:
    done = subprocess.Popen(
        [sys.executable, "-m", "resta", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    done.stdout.close()
    assert done.stderr is not None
    with done.stderr as errors:
        assert errors.read() == ""
    assert done.wait() == 5


def test_an_interrupted_merge_says_so_and_goes_on(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("resta.engine.Output.commit", interrupted)
        done = run(*everyday(trio, tmp_path / "out", "--scale", 0.5))
    assert done.exit_code == 130
    assert done.stderr.startswith("interrupted")
    assert (tmp_path / "out.partial").is_dir()
    assert run(*everyday(trio, tmp_path / "out", "--scale", 0.5)).exit_code == 0


def test_a_recipe_file_takes_no_flag_that_changes_the_result(trio: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "models: {tuned: tuned, aligned: aligned, base: base}\nstart: tuned\n"
        "terms: [{delta: aligned - base, scale: 1}]\n"
    )
    done = run("merge", recipe, "-o", tmp_path / "out", "--dtype", "float32")
    assert done.exit_code == 2
    assert "--dtype changes the result: set it in" in done.stderr
    assert run("merge", recipe, "-o", tmp_path / "out", "--workers", 1).exit_code == 0


def test_a_dry_run_prints_plan_and_recipe_and_writes_nothing(trio: dict[str, str], tmp_path: Path) -> None:
    before = digests(tmp_path)
    done = run(*everyday(trio, tmp_path / "out", "--scale", 0.5, "--dry-run"))
    assert done.exit_code == 0, done.output
    assert digests(tmp_path) == before
    recipe = parse_recipe(done.stdout[done.stdout.index("models:") :])
    facts = json.loads(run(*everyday(trio, tmp_path / "out", "--scale", 0.5, "--dry-run", "--json")).stdout)
    assert make_recipe(facts["recipe"]) == recipe
    files = [Path(path) / file for path in trio.values() for file in Path(path).glob("*.safetensors")]
    assert 0 < facts["bytes_read"] < sum(file.stat().st_size for file in files)
    merged = run(*everyday(trio, tmp_path / "out", "--scale", 0.5))
    assert merged.exit_code == 0
    sides = sum((tmp_path / "out" / name).stat().st_size for name in ("README.md", "resta.json"))
    assert facts["bytes_written"] + sides == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_a_dry_run_prints_every_refusal(trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resta.output.RESERVE_BYTES", 1 << 60)
    done = run(*everyday(trio, Path(trio["base"]) / "out", "--scale", 0.5, "--dry-run"))
    assert done.exit_code == 2
    assert "overlap" in done.stderr
    assert "free" in done.stderr


def test_rounding_that_loses_the_vector_is_warned_of(trio: dict[str, str], tmp_path: Path) -> None:
    usual = run(*everyday(trio, tmp_path / "big", "--scale", 5))
    assert "rounding lost" not in " ".join(usual.output.split())
    small = run(*everyday(trio, tmp_path / "small", "--scale", 0.001))
    assert "rounding lost much of the change" in " ".join(small.output.split())
    assert json.loads(run(*everyday(trio, tmp_path / "json", "--scale", 0.001, "--json")).stdout)["warning"]
    for name, ways_out in {"float": ["--dtype", "float32"], "drawn": ["--rounding", "stochastic"]}.items():
        kept = run(*everyday(trio, tmp_path / name, "--scale", 0.001, *ways_out))
        assert "rounding lost" not in " ".join(kept.output.split())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_in_the_folder_can_be_planned(file: Path, trio: dict[str, str], tmp_path: Path) -> None:
    recipe = load_recipe(file)
    stand_ins = trio | {"unaligned": trio["base"]}
    models = {}
    for name, model in recipe.models.items():
        source = _adapter(tmp_path, trio["base"]) if model.on else stand_ins[name]
        models[name] = model.model_copy(update={"source": source})
    plan = make_plan(recipe.model_copy(update={"models": models}))
    assert any(step.terms for step in plan.steps)


def _adapter(tmp_path: Path, base: str) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str) -> None:
    assert "_RESTA_COMPLETE" in run("completion", shell).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert done.output.startswith("Usage:")


def test_help_imports_no_command_and_little_else() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "resta", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numba", "numpy", "pydantic", "transformers", "rich"}
    assert not imported & {module for module, _ in COMMANDS.values()}
    assert len(imported) < 200  # nearly all of them are Python's own and click's


def test_version_is_printed() -> None:
    assert "resta, version" in run("--version").output


@pytest.mark.parametrize("name", ["redeval", "verify"])
def test_the_help_of_a_group_lists_the_options_of_what_it_does_without_a_word(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"]).output
    run = importlib.import_module(f"resta.cli.{name}").command.commands["run"]
    options = [parameter for parameter in run.params if isinstance(parameter, click.Option)]
    assert len(options) > 30
    for option in options:
        assert option.opts[0] in shown
    assert shown.startswith(f"Usage: main {name} [OPTIONS] {'MODEL' if name == 'redeval' else 'RESTORED'}\n")
    assert "report" in shown.partition("Options:")[0]
