"""lm_eval's own log files as utility: the values it logged, the same documents as if measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
from click.testing import CliRunner

from resta.cli import main
from resta.errors import RequestError, ResumeError
from resta.redeval.models import LocalModel
from resta.verify.documents import read_documents, read_facts, start_suite
from resta.verify.generated import EMPTY
from resta.verify.measurement import ROLES, note_places, read_measurement
from resta.verify.sameness import buckets
from resta.verify.samples import import_samples
from resta.verify.utility import measure, read_suite
from tests.verify.builders import ALIGNED, RESTORED, ROWS, TUNED, a_model, a_task, make_measurement, usual_study

DATE = "2026-11-24T12-00-00.123456"


def sample(i: int, *, prompt: str | None = None, part: str = "none", **values: Any) -> dict[str, Any]:
    return {
        "doc_id": i, "doc": {"q": i}, "target": "0", "arguments": {}, "resps": [["x"]], "filtered_resps": ["x"],
        "filter": part, "metrics": list(values), "doc_hash": f"d{i}", "prompt_hash": prompt or f"p{i}",
        "target_hash": "t", **values,
    }  # fmt: skip


def write(folder: Path, task: str, rows: list[dict[str, Any]], results: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{task}_{DATE}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if results is not None:
        (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return a_model(tmp_path_factory.mktemp("model"), seed=0, adds_bos=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_what_lm_eval_logs_is_what_is_measured_here(model: LocalModel, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from resta.verify.utility import _contained, _inside, _local_lm, _manager

    a_task(tmp_path / "tasks", "mine", ROWS)
    measure(model, read_suite(None, tmp_path / "tasks", []), tmp_path / "u", limit=None, note=lambda _: None)
    with _contained() as log, _inside(tmp_path / "tasks"):
        tasks = _manager(tmp_path / "tasks", log).load(["mine"])["tasks"]
        found = lm_eval.evaluate(
            lm=_local_lm(model), task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0, log_samples=True
        )
        tracker = EvaluationTracker(output_path=str(tmp_path / "logged"))
        tracker.general_config_tracker.model_name_sanitized = "it"
        tracker.save_results_aggregated(results={k: v for k, v in found.items() if k != "samples"}, samples={})
        tracker.save_results_samples(task_name="mine", samples=found["samples"]["mine"])
    [path] = (tmp_path / "logged" / "it").glob("samples_*.jsonl")
    import_samples(tmp_path / "i", [path], [])
    measured, logged = read_documents(tmp_path / "u"), read_documents(tmp_path / "i")
    assert logged == measured


def test_metrics_filters_and_losses_are_read_as_they_were_logged(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l", "sums",
        [sample(i, part=part, exact_match=float(part == "strict")) for i in range(3) for part in ("loose", "strict")],
    )  # fmt: skip
    import_samples(tmp_path / "first", [path], [])
    assert {(d.metric, d.value) for d in read_documents(tmp_path / "first")} == {("exact_match,loose", 0.0)}
    import_samples(tmp_path / "named", [path], ["sums:exact_match,strict"])
    assert {(d.metric, d.value) for d in read_documents(tmp_path / "named")} == {("exact_match,strict", 1.0)}
    text = write(tmp_path / "l", "text", [sample(i, word_perplexity=[-6.0, 3]) for i in range(2)])
    import_samples(tmp_path / "loss", [path, text], ["text"])
    assert [d.value for d in read_documents(tmp_path / "loss")] == [2.0, 2.0]
    assert read_facts(tmp_path / "loss")["tasks"]["text"]["higher_is_better"] is False


def test_the_results_beside_say_which_way_is_better(tmp_path: Path) -> None:
    rows = [sample(i, slips=float(i)) for i in range(3)]
    path = write(tmp_path / "alone", "mine", rows)
    with pytest.raises(RequestError, match="nothing says whether a higher slips is better"):
        import_samples(tmp_path / "u", [path], [])
    results = {"higher_is_better": {"mine": {"slips": False}}, "n-shot": {"mine": 2}, "versions": {"mine": 1}}
    import_samples(tmp_path / "u", [write(tmp_path / "both", "mine", rows, results)], [])
    facts = read_facts(tmp_path / "u")["tasks"]["mine"]
    assert (facts["higher_is_better"], facts["num_fewshot"], facts["version"]) == (False, 2, 1)
    assert [d.value for d in read_documents(tmp_path / "u")] == [0.0, 1.0, 2.0]


def test_what_is_no_log_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    good = write(tmp_path / "l", "good", [sample(0, acc=1.0)])
    odd = write(tmp_path / "l", "odd", [{"acc": 1}])
    percent = write(tmp_path / "l", "percent", [sample(0, acc=55.0)])
    torn = tmp_path / "l" / f"samples_torn_{DATE}.jsonl"
    torn.write_text(good.read_text()[:-10])
    named = tmp_path / "l" / "mine.jsonl"
    named.write_text(good.read_text())
    for files, names, message in (
        ([good, odd], [], "line 1 is no sample"),
        ([good, percent], [], "acc of a document is 55.0"),
        ([good, torn], [], "line 1 is not JSON"),
        ([named], [], "expected a file of lm_eval's"),
        ([good], ["other"], "no file holds the task 'other'"),
        ([good], ["good:f1"], "no document has the metric 'f1'|nothing says"),
        ([good, good], [], "good is in two of the files"),
    ):
        with pytest.raises(RequestError, match=message):
            import_samples(tmp_path / "u", files, names)
    assert not (tmp_path / "u").exists()


def test_what_was_measured_here_is_not_mixed_with_what_was_logged(tmp_path: Path) -> None:
    start_suite(tmp_path / "u", {"name": "smoke", "backend": "hf", "tasks": {}})
    path = write(tmp_path / "l", "good", [sample(0, acc=1.0)])
    with pytest.raises(RequestError, match="measured here"):
        import_samples(tmp_path / "u", [path], [])
    import_samples(tmp_path / "v", [path], [])
    import_samples(tmp_path / "v", [path], [])  # the same again changes nothing
    assert len(read_documents(tmp_path / "v")) == 1
    with pytest.raises(ResumeError, match="another suite"):
        import_samples(tmp_path / "v", [write(tmp_path / "m", "good", [sample(0, prompt="other", acc=1.0)])], [])


def test_logged_utility_is_gated_and_other_prompts_are_refused(tmp_path: Path) -> None:
    behaviours = {"aligned": ALIGNED, "tuned": TUNED, "restored": RESTORED["PASS"]}
    out = tmp_path / "out"
    for role in ROLES:
        path = make_measurement(out / role, role, behaviours[role], usual_study())
        for file in (path / "utility").iterdir():
            file.unlink()
        logged = write(tmp_path / role, "house", [sample(i, acc=float(i % 2)) for i in range(900)])
        done = CliRunner().invoke(main, ["verify", "import", str(path), str(logged)])
        assert done.exit_code == 0, done.output
        assert "house: acc 0.500 over 900 documents" in done.output
    note_places({role: read_measurement(out / role) for role in ROLES}, out)
    done = CliRunner().invoke(main, ["verify", "report", str(out)])
    rules = {rule["name"]: rule for rule in json.loads((out / "verdict.json").read_text())["rules"]}
    assert rules["utility.house.max_drop"]["outcome"] == "holds", done.output
    other = write(tmp_path / "other", "house", [sample(i, prompt=f"q{i}", acc=1.0) for i in range(900)])
    for file in (out / "tuned" / "utility").iterdir():
        file.unlink()
    assert CliRunner().invoke(main, ["verify", "import", str(out / "tuned"), str(other)]).exit_code == 0
    done = CliRunner().invoke(main, ["verify", "report", str(out)])
    assert "were not measured alike: utility.tasks.house.prompts_sha256" in done.output
    nowhere = CliRunner().invoke(main, ["verify", "import", str(tmp_path), str(other)])
    assert nowhere.exit_code == 2


def test_what_was_generated_is_kept_as_runs_of_words_and_a_score_of_given_texts_as_none(tmp_path: Path) -> None:
    settings = {"until": ["\n"]}
    asked: dict[str, tuple[dict[str, Any], list[Any]]] = {
        "generated": ({"gen_args_0": {"arg_0": "Q: one?\n\nQ: two?", "arg_1": settings}}, [["so it is with two"]]),
        "silent": ({"gen_args_0": {"arg_0": "Q: two?", "arg_1": settings}}, [[""]]),
        "chosen": ({"gen_args_0": {"arg_0": "Q: two?", "arg_1": " yes"}}, [[["-1.5", "False"]]]),
        "rolling": ({"gen_args_0": {"arg_0": "a text"}}, [["-12.5"]]),
        "unknown": ({}, [["x"]]),
    }
    found = {}
    for task, (arguments, said) in asked.items():
        rows = [{**sample(0, acc=1.0), "arguments": arguments, "resps": said}]
        import_samples(tmp_path / task, [write(tmp_path / "l", task, rows)], [])
        [document] = read_documents(tmp_path / task)
        found[task] = (document.generated, document.runs)
    assert found == {
        "generated": (True, buckets("Q: two?", "so it is with two")),
        "silent": (True, EMPTY),
        "chosen": (False, ()),
        "rolling": (False, ()),
        "unknown": (None, ()),
    }
