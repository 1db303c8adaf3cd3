"""What the repository promises outside of the package: how it is checked, and what a wheel carries."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_workflow_calls_the_script_that_contributors_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert all(re.search(r"@v\d+$", step["uses"]) for step in steps if "uses" in step)


def test_the_tests_that_the_script_names_exist() -> None:
    [names] = re.findall(r"tests/test_\{([\w,]+)\}\.py", (ROOT / ".ci/run").read_text())
    assert [name for name in names.split(",") if not (ROOT / f"tests/test_{name}.py").is_file()] == []


def test_the_python_versions_that_are_claimed_are_those_that_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (setup,) = [step for step in workflow["jobs"]["ci"]["steps"] if "setup-python" in step.get("uses", "")]
    claimed = re.findall(r"Python :: (\d\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.MULTILINE)
    assert [setup["with"]["python-version"]] == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"


def test_commits_are_checked_with_the_tools_that_ci_uses() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    script = (ROOT / ".ci/run").read_text()
    for tool in (".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/mypy"):
        assert tool in script
        assert any(entry.startswith(tool) for entry in entries)


def test_the_pins_lie_within_the_ranges() -> None:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "resta":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_type_checkers_see_the_annotations() -> None:
    assert (ROOT / "resta" / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["resta"]
