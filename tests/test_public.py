from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import resta
from resta.errors import RestaError

PACKAGE = Path(resta.__file__).parent

# Each layer knows nothing of those after it, nor of itself; a line that begins with a package's name is of its modules.
LAYERS = (
    "version errors lazy kernels out_of_memory served statistics page coverage compatibility",
    "dialect figure mergekit fingerprint quantized files schema",
    "strict",
    "header archive pickled hub journal recipe chat_templates",
    "stored safety",
    "checkpoint",
    "tied pytorch",
    "adapter auxiliary digests naming",
    "opened",
    "plan",
    "compute cautions output",
    "manifest",
    "directory",
    "engine forecast",
    "algebra show distance claims conversion shorthand",
    "auditing",
    "sft: adapters lessons recipe",
    "sft: data objective",
    "sft: chat",
    "sft: samples",
    "sft: distil",
    "sft: train",
    "sft: memory save",
    "sft: finetune",
    "sft: show",
    "sft: __init__",
    "redeval: messages questions templates",
    "redeval: thoughts language records wire",
    "redeval: batchfile control labels models protocol",
    "redeval: targets",
    "redeval: judges profiles score",
    "redeval: engine plan",
    "redeval: progress",
    "redeval: answering",
    "redeval: judging report tasks",
    "redeval: evaluation",
    "redeval: __init__",
    "sft: collect",
    "patch: prompts",
    "patch: teachers",
    "patch: request",
    "patch: written",
    "patch: learn",
    "patch: __init__",
    "verify: coherence decision documents places policy regression.made regression.__init__ sameness scores",
    "verify: attacks generated measurement words",
    "verify: claims comparison samples utility",
    "verify: budget durability origin parts provenance trace trust",
    "verify: attacked guidance junit measure power report",
    "verify: gate html plan",
    "verify: views written",
    "verify: release",
    "verify: __init__",
    "sweep: candidates pruning response",
    "sweep: apply forecast",
    "sweep: choose search",
    "sweep: baselines measure",
    "sweep: ray records settings",
    "sweep: outcome",
    "sweep: report",
    "sweep: conduct written",
    "sweep: __init__",
    "ladder: questions",
    "ladder: rungs",
    "ladder: patches",
    "ladder: proof request",
    "ladder: costs story",
    "ladder: conduct",
    "ladder: __init__",
    "__init__",
    "demo: corpus",
    "demo: files",
    "demo: models",
    "demo: run",
    "demo: __init__",
    "cli: options audit completion output schema",
    "cli: collect convert demo diff merge patch redeval sft verify",
    "cli: restore sweep",
    "cli: __init__",
    "__main__",
)
# What anybody may use, and what each package uses of the merge beside it: its calls, and facts about its files.
GROUND = (
    "chat_templates dialect errors figure files fingerprint journal lazy out_of_memory page quantized schema served "
    "statistics strict version"
)
DOORS = {
    "sft": "hub",
    "redeval": "engine hub",
    "patch": "distance",
    "verify": "auditing manifest",
    "ladder": "engine manifest recipe",
    "sweep": "engine hub opened plan recipe shorthand",
    "demo": "__init__ recipe",
}


def read_tree(package: Path) -> dict[str, set[str]]:
    """Return, of every module at any depth, which modules of the package it imports, wherever in the file that stands.

    Names are dotted and without the package's own: `verify.gate`; the file that makes a folder a package is its
    `__init__`. What is imported from a package's `__init__` counts as that, a module of the package as the module.
    """
    files = {".".join(file.relative_to(package).with_suffix("").parts): file for file in package.rglob("*.py")}

    def module(name: str) -> str:
        inner = name.removeprefix(package.name).lstrip(".")
        return inner if inner in files else f"{inner}.__init__".lstrip(".")

    def found(importer: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = [package.name, *importer.split(".")][: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield whole if module(whole) in files else origin

    def imports(name: str) -> set[str]:
        nodes = ast.walk(ast.parse(files[name].read_text(encoding="utf-8")))
        named = {each for node in nodes for each in found(name, node)}
        own = {module(each) for each in named if each.split(".")[0] == package.name}
        return own - {name}

    return {name: imports(name) for name in files}


def places_of(layers: Iterable[str]) -> dict[str, int]:
    """Return the number of each module's layer."""
    places = {}
    for number, line in enumerate(layers):
        package, colon, names = line.rpartition(":")
        for name in names.split():
            places[f"{package}.{name}" if colon else name] = number
    return places


def misplaced(tree: Mapping[str, set[str]], layers: Iterable[str]) -> list[str]:
    """Return what stands in no layer or twice, and each import that does not point to a lower one."""
    layers = tuple(layers)
    places = places_of(layers)
    listed = sum(len(line.rpartition(":")[2].split()) for line in layers)
    lines = [f"{name} has no layer" for name in sorted(tree.keys() - places.keys())]
    lines += [f"{name} is no module" for name in sorted(places.keys() - tree.keys())]
    lines += ["a module stands in two layers"] * (listed != len(places))
    return lines + [
        f"{name} imports {other}"
        for name in sorted(tree.keys() & places.keys())
        for other in sorted(tree[name] & places.keys())
        if places[other] >= places[name]
    ]


def past_the_doors(tree: Mapping[str, set[str]], doors: Mapping[str, str]) -> list[str]:
    """Return each import of the merge's insides by a package for which they are not named."""
    return [
        f"{name} imports {other}"
        for name in sorted(tree)
        for other in sorted(tree[name])
        if name.split(".")[0] in doors
        and "." not in other
        and other not in f"{GROUND} {doors[name.split('.')[0]]}".split()
    ]


def test_the_public_surface_is_this() -> None:
    assert sorted(resta.__all__) == [
        "Checkpoint", "Delta", "Merge", "Recipe", "RestaError", "__version__", "audit", "convert", "dare", "diff",
        "ladder", "load", "load_recipe", "merge", "patch", "redeval", "restore", "sft", "sweep", "tensors", "verify",
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
packages = [resta.ladder, resta.patch, resta.redeval, resta.sft, resta.sweep, resta.verify]
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


def test_every_module_has_a_layer_and_imports_from_lower_ones_only() -> None:
    assert not misplaced(read_tree(PACKAGE), LAYERS)


def test_no_package_imports_the_insides_of_the_merge_but_by_the_doors_that_are_named() -> None:
    tree = read_tree(PACKAGE)
    assert not past_the_doors(tree, DOORS)
    for package, doors in DOORS.items():
        used = set().union(*(tree[name] for name in tree if name.startswith(f"{package}.")))
        assert set(doors.split()) <= used, f"a door of {package} that nobody uses"


def test_no_module_uses_a_private_name_of_another() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resta"):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and "__" not in alias.name]
                assert not private, f"{file} imports {private} from {node.module}"


UP = {
    "from": "from house.roof.tiles import slate",
    "from a package": "from house.roof import tiles",
    "import": "import house.roof.tiles",
    "import as": "import house.roof.tiles as tiles",
    "relative": "from ..roof import tiles",
    "relative, of a name": "from ..roof.tiles import slate",
    "in a function": "def lay():\n    from house.roof.tiles import slate",
    "for type checkers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.roof.tiles",
    "of a package's name": "from house.roof import ridge",
    "of a package": "import house.roof",
}


@pytest.mark.parametrize("statement", UP.values(), ids=UP.keys())
def test_an_import_that_points_up_is_found_in_every_form(statement: str, tmp_path: Path) -> None:
    house = tmp_path / "house"
    for folder in ("", "cellar", "roof"):
        (house / folder).mkdir()
        (house / folder / "__init__.py").write_text("")
    (house / "roof" / "tiles.py").write_text("from house.cellar.stones import granite\nimport os.path\n")
    (house / "cellar" / "stones.py").write_text("import json\n")
    layers = ("cellar: stones __init__", "roof: tiles", "roof: __init__", "__init__")
    assert not misplaced(read_tree(house), layers)
    (house / "cellar" / "stones.py").write_text(f"{statement}\n")
    [line] = misplaced(read_tree(house), layers)
    assert line in ("cellar.stones imports roof.tiles", "cellar.stones imports roof.__init__")
    assert misplaced(read_tree(house), layers[::-1])
    assert misplaced(read_tree(house), layers[1:])
    assert misplaced(read_tree(house), (*layers, "roof: tiles"))
    assert misplaced(read_tree(house), (*layers, "roof: chimney"))
    (house / "deep.py").write_text("from house import kitchen\n")
    (house / "kitchen.py").write_text("")
    (house / "cellar" / "stones.py").write_text("from house import deep\n")
    assert past_the_doors(read_tree(house), {"cellar": ""}) == ["cellar.stones imports deep"]
    assert not past_the_doors(read_tree(house), {"cellar": "deep"})


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


@pytest.mark.parametrize(
    ("now", "former"),
    [
        ("RequestError", "Header Checkpoint Adapter Recipe Plan Data Template Bank Judge Task Policy Compare Model"),
        ("RequestError", "MissingExtra"),
        ("CheckFailedError", "Audit Demo"),
        ("UnansweredError", "Endpoint"),
        ("RestaError", "Training"),
    ],
)
def test_who_catches_an_error_by_its_former_name_still_does(now: str, former: str) -> None:
    import resta.errors as errors

    for name in former.split():
        assert getattr(errors, f"{name}Error") is getattr(errors, now)
    assert errors.Finding is errors.CheckFailedError


def test_every_error_says_its_exit_code_and_is_in_the_drawn_tree() -> None:
    import resta.errors as errors

    def below(kind: type[RestaError]) -> list[type[RestaError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    for kind in below(RestaError):
        assert kind.__name__ in str(errors.__doc__)
        assert kind.exit_code in errors.EXIT_CODES
        assert (kind.exit_code == 2) == issubclass(kind, errors.RequestError)
