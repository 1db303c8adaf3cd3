"""A module's tests are found by its name: those of resta/verify/gate.py lie in tests/verify/test_gate.py."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "resta"

# Modules whose tests bear another name, by the file that holds them.
ELSEWHERE = {
    # commands, tested by what they do: the command line as a whole, or with the package that carries it out
    "test_cli": "cli/audit cli/completion cli/diff cli/merge cli/output",
    "demo/test_run": "cli/demo",
    "redeval/test_run": "cli/options cli/redeval redeval/answering redeval/batchfile redeval/labels redeval/protocol "
    "redeval/tasks",
    "sft/test_cli": "cli/sft sft/show",
    "ladder/test_conduct": "cli/restore ladder/story",
    "ladder/test_proof": "ladder/request",
    "patch/test_learn": "cli/patch patch/request patch/teachers patch/written",
    "sft/test_collect": "cli/collect",
    "sft/test_distil": "sft/lessons",
    "sweep/test_measure": "cli/sweep opened",
    "test_schema": "cli/schema",
    "verify/test_measure": "cli/verify verify/places verify/release",
    # parts of one thing, tested as the whole
    "test_conversion": "cli/convert",
    "test_cautions": "compatibility forecast",
    "test_plan": "coverage naming shorthand",
    "test_target": "directory files",
    "test_public": "errors lazy version",
    "test_manifest": "safety",
    "test_digests": "show",
    "demo/test_corpus": "demo/files",
    "redeval/test_questions": "redeval/plan",
    "redeval/test_models": "redeval/messages redeval/targets",
    "redeval/test_control": "redeval/judging redeval/progress",
    "redeval/test_faults": "redeval/wire",
    "sft/test_train": "quantized sft/save",
    "sweep/test_search": "sweep/forecast",
    "sweep/test_outcome": "sweep/records sweep/report",
    "verify/test_gate": "verify/comparison verify/decision verify/measurement",
    "verify/test_html": "verify/plan verify/report verify/words",
    "verify/test_origin": "verify/provenance",
    "verify/test_profiles": "verify/budget verify/policy redeval/profiles",
    "verify/test_regression": "verify/regression/made",
    "verify/test_samples": "verify/generated",
    "verify/test_trace": "verify/views",
}


def test_a_modules_tests_are_found_by_its_name() -> None:
    modules = {
        str(file.relative_to(PACKAGE).with_suffix(""))
        for file in PACKAGE.rglob("*.py")
        if not file.stem.startswith("__")
    }
    own = {name for name in modules if (TESTS / Path(name).parent / f"test_{Path(name).name}.py").is_file()}
    elsewhere = [name for names in ELSEWHERE.values() for name in names.split()]
    assert all((TESTS / f"{file}.py").is_file() for file in ELSEWHERE)
    assert len(set(elsewhere)) == len(elsewhere)
    assert not own & set(elsewhere), "has a file of its own"
    assert modules - own == set(elsewhere)


def test_no_test_file_imports_from_another() -> None:
    for file in TESTS.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        imports = [line.split() for line in lines if line.lstrip().startswith(("from tests", "from .", "import tests"))]
        found = [words[1] for words in imports if words[1].split(".")[-1].startswith("test_")]
        assert not found, f"{file} imports from {found}; what two files build belongs in builders.py"
