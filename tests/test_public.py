from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import resta
from resta.errors import RestaError

PACKAGE = Path(resta.__file__).parent

# Each layer knows nothing of those after it, nor of itself.
LAYERS = {
    name: number
    for number, names in enumerate(
        (
            "version errors lazy kernels statistics unique_keys page files coverage compatibility",
            "mergekit fingerprint",
            "header hub recipe chat_templates",
            "checkpoint safety",
            "tied",
            "adapter sidefiles digests naming",
            "opened",
            "plan",
            "compute cautions output",
            "manifest",
            "directory",
            "engine forecast",
            "algebra show distance claims",
            "auditing",
        )
    )
    for name in names.split()
}


def imports_of(file: Path) -> set[str]:
    """Names of the resta modules that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resta."):
            found.add(str(node.module).split(".")[1])
    return found


def test_the_public_surface_is_this() -> None:
    assert sorted(resta.__all__) == [
        "Checkpoint", "Delta", "Merge", "Recipe", "RestaError", "__version__", "audit", "dare", "diff", "load",
        "load_recipe", "merge", "redeval", "sft", "sweep", "tensors", "verify",
    ]  # fmt: skip
    for name in resta.__all__:
        assert getattr(resta, name) is not None
    with pytest.raises(AttributeError):
        resta.nothing  # noqa: B018


def test_public_names_are_themselves_after_every_module_is_imported(trio: dict[str, str], tmp_path: Path) -> None:
    script = """
import importlib, pkgutil, sys, types, resta
for module in pkgutil.walk_packages(resta.__path__, "resta."):
    if module.name != "resta.__main__":
        importlib.import_module(module.name)
packages = [resta.redeval, resta.sft, resta.sweep, resta.verify]
assert all(isinstance(package, types.ModuleType) for package in packages)
for package in (resta, *packages):
    for name in getattr(package, "__all__", ()):
        named = getattr(package, name)
        assert named in packages or not isinstance(named, types.ModuleType), f"{package.__name__}.{name} is a module"
out, tuned, aligned, base = sys.argv[1:]
models = {name: resta.load(path) for name, path in dict(tuned=tuned, aligned=aligned, base=base).items()}
(models["tuned"] + 0.5 * (models["aligned"] - models["base"])).save(out)
resta.audit(out, moved=dict(tuned=tuned, aligned=aligned, base=base)).raise_if_any()
assert resta.diff(tuned, out).total.relative > 0
"""
    arguments = [str(tmp_path / "out"), trio["tuned"], trio["aligned"], trio["base"]]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["resta"]


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_to_lower_layers_only(name: str) -> None:
    for other in imports_of(PACKAGE / f"{name}.py"):
        assert LAYERS[other] < LAYERS[name], f"{name} imports {other}"


def test_every_module_of_the_merge_has_a_layer() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == LAYERS.keys()


def test_a_merge_of_local_models_imports_no_heavy_library(trio: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import sys; from resta.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'inspect_ai', 'lm_eval', 'huggingface_hub', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    arguments = ["merge", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "--scale", "0.5"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--quiet", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert (tmp_path / "out").is_dir()


def test_every_error_says_its_exit_code_and_is_in_the_drawn_tree() -> None:
    import resta.errors as errors

    def below(kind: type[RestaError]) -> list[type[RestaError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    for kind in below(RestaError):
        assert kind.__name__ in str(errors.__doc__)
        assert kind.exit_code in errors.EXIT_CODES
        assert (kind.exit_code == 2) == issubclass(kind, errors.RequestError)
