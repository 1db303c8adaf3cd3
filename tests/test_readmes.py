"""Every example in every README runs, every option, link and file that they name exists.

Shell lines run in order in a folder with tiny models. A line that cannot run here says so in a comment that a reader
sees: it ends in `# needs ...` (a network, a server, a judge), or in `# run` or `# test`, which CI runs itself. A YAML
block whose first line names a file is that file.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resta.cli import COMMANDS, main
from tests.builders import nudged
from tests.redeval.builders import save_refusing

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md")), *sorted(ROOT.glob("resta/*/README.md"))]
PAGES = [*READMES, *sorted(ROOT.glob(".github/*.md"))]
ELSEWHERE = re.compile(r"# (needs .+|run|test)$")
FOREIGN = {"--log_samples"}  # lm_eval's
PROGRAMS = ("pip", "inspect", "python", "pre-commit", "ruff")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page: its language and its text."""

    language: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(language, body)


def shell_lines(text: str) -> list[str]:
    found = [line.strip() for block in blocks(text) if block.language == "bash" for line in block.text.splitlines()]
    return [line for line in found if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the examples name: base, aligned, tuned, an adapter, and the recipes."""
    folder = tmp_path_factory.mktemp("examples")
    save_refusing(folder / "base")
    for seed, name in enumerate(("aligned", "tuned"), start=1):
        weights = shutil.copytree(folder / "base", folder / name) / "model.safetensors"
        save_file(nudged(load_file(weights), seed, size=0.01), weights, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(folder / "adapter")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = shutil.copytree(models, tmp_path / "here")
    adapter = copy / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(str(models / "base"), "base"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return copy


def run_line(line: str) -> None:
    """Run one line of shell in this process. Whatever it answers, it must neither be a wrong request nor fail."""
    command, _, target = line.partition(" > ")
    words = shlex.split(command, comments=True)
    assert words[0] == "resta", f"{line}: not a command of resta; say what it needs, as in '# needs the network'"
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code not in (2, 5, 130), f"{line}\n{result.output}\n{result.exception!r}"
    if target:
        Path(shlex.split(target, comments=True)[0]).write_text(result.stdout)


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_of_a_readme_runs(page: Path, folder: Path) -> None:
    for block in blocks(page.read_text()):
        first, _, _ = block.text.partition("\n")
        if block.language == "yaml" and (name := re.fullmatch(r"# ([\w./-]+\.yaml)", first)):
            (folder / name[1]).write_text(block.text)
        elif block.language == "python" and not first.startswith("# needs "):
            exec(compile(block.text, f"an example of {page}", "exec"), {"__name__": "__example__"})
        elif block.language == "bash":
            for line in shell_lines(f"```bash\n{block.text}```"):
                if not ELSEWHERE.search(line):
                    run_line(line)


# -- options -------------------------------------------------------------------------------------------------


def options_of(command: click.Command) -> set[str]:
    """Return the options of a command and of its subcommands, --help among them."""
    found = {"--help"}
    for parameter in command.params:
        found |= {*parameter.opts, *parameter.secondary_opts}
    for inner in getattr(command, "commands", {}).values():
        found |= options_of(inner)
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    context = click.Context(main)
    return {name: options_of(main.get_command(context, name)) for name in COMMANDS}  # type: ignore[arg-type]


def named_options(line: str) -> list[str]:
    return re.findall(r"(?<![\w-])(--[a-z][\w-]*)", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_names_exists(page: Path, known: dict[str, set[str]]) -> None:
    every = set().union(*known.values()) | FOREIGN
    text = page.read_text()
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*shell_lines(text), *spans]:
        line = line.partition(" # ")[0]
        command = re.search(r"\bresta (\w+)\b(.*)", line, re.DOTALL)
        if command and command[1] in known:
            assert set(named_options(command[2])) <= known[command[1]], line
        elif not line.startswith((*PROGRAMS, ".venv/")) and "bin/" not in line:
            assert set(named_options(line)) <= every, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?:`|^)resta ([a-z]+)\b", page.read_text(), re.MULTILINE)
    assert set(named) <= set(COMMANDS)


# -- links and files -----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target
    for label in re.findall(r"\]\[([^\]]*)\]", text):
        assert not label or f"\n[{label}]: " in text, label


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?:recipes|benchmarks|tests|resta|\.github|\.ci)/[\w./*-]*\w\.\w+", page.read_text())
    for name in named:
        assert [*ROOT.glob(name)], name


def test_a_wrong_example_option_or_link_is_found(known: dict[str, set[str]]) -> None:
    with pytest.raises(AssertionError, match="it does not exist"):
        run_line("resta merge ./nowhere --aligned ./a --base ./b --scale 1 -o out")
    with pytest.raises(AssertionError, match="not a command of resta"):
        run_line("rm -r out")
    assert not set(named_options("resta merge --scael 1")) <= known["merge"]
