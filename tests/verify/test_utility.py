from __future__ import annotations

import gc
import json
import logging
import math
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from resta.errors import RequestError, ResumeError, UnansweredError
from resta.redeval.models import LocalModel, LocalSpec, load_local, token_id
from resta.verify import utility
from resta.verify.documents import DOCUMENTS, Document, read_documents, read_facts
from resta.verify.regression import made
from resta.verify.utility import (
    PROFILES,
    REGRESSION,
    SMOKE,
    Served,
    Suite,
    Task,
    count_documents,
    measure,
    read_suite,
    suite_facts,
)
from tests.redeval import builders as redeval
from tests.verify.builders import ROWS, a_model, a_task

HEARD: list[str] = []


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("RESTA_API_KEY", raising=False)
    HEARD.clear()


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalModel, LocalModel]:
    folder = tmp_path_factory.mktemp("models")
    return (
        a_model(folder / "with_bos", seed=0, adds_bos=True),
        a_model(folder / "without", seed=1, adds_bos=False),
    )


def results(folder: Path) -> dict[str, float]:
    return {f"{d.task}|{d.doc_id}": d.value for d in read_documents(folder)}


def by_hand(model: LocalModel, prompt: str, choices: list[str]) -> list[float]:
    """Return the log-likelihood of each choice, one forward pass and one token at a time."""
    scores = []
    for choice in choices:
        start = model.tokenizer(prompt)["input_ids"]
        whole = model.tokenizer(prompt + choice)["input_ids"]
        with torch.no_grad():
            logits = model.model(torch.tensor([whole])).logits[0].double()
        score = 0.0
        for position in range(len(start), len(whole)):
            row = logits[position - 1]
            score += float(row[whole[position]] - torch.log(torch.exp(row - row.max()).sum()) - row.max())
        scores.append(score)
    return scores


@pytest.mark.usefixtures("_no_network")
def test_smoke_scores_are_those_of_a_naive_loop_without_a_network(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    suite = read_suite("smoke", None, [])
    for number, model in enumerate(models):
        measure(model, suite, tmp_path / str(number), limit=12, note=HEARD.append)
        expected = []
        for task, prompt in (("smoke_knowledge", "Question: {}\nAnswer:"), ("smoke_sense", "{}")):
            lines = (SMOKE / f"{task}.jsonl").read_text().splitlines()[:12]
            for document in map(json.loads, lines):
                text = prompt.format(document.get("question", document.get("start")))
                scores = by_hand(model, text, [f" {choice}" for choice in document["choices"]])
                expected.append(float(np.argmax(scores) == document["answer"]))
        values = [document.value for document in read_documents(tmp_path / str(number))]
        assert values == expected
        assert {(d.generated, d.runs) for d in read_documents(tmp_path / str(number))} == {(False, ())}
        assert 0 < sum(values) < len(values), "an oracle that always says the same shows nothing"


@pytest.mark.usefixtures("_no_network")
def test_the_regression_check_is_made_here_and_scored_as_by_a_naive_loop(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    suite = read_suite("regression", None, [])
    measure(models[0], suite, tmp_path / "u", limit=12, note=HEARD.append)
    expected = []
    for document in made.documents()[:12]:
        scores = by_hand(models[0], document["start"], [f" {choice}" for choice in document["choices"]])
        expected.append(float(np.argmax(scores) == document["answer"]))
    assert [document.value for document in read_documents(tmp_path / "u")] == expected
    assert 0 < sum(expected) < len(expected)


def test_parts_of_a_task_share_no_document_and_make_up_the_whole(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    whole = read_suite("smoke", None, ["smoke_sense"])
    halves = [replace(whole, part=(i, 2)) for i in range(2)]
    found = []
    for number, suite in enumerate([whole, *halves]):
        measure(models[0], suite, tmp_path / str(number), limit=None, note=HEARD.append)
        found.append({each.doc_id: each.value for each in read_documents(tmp_path / str(number))})
    assert found[1]
    assert found[2]
    assert not found[1].keys() & found[2].keys()
    assert found[1] | found[2] == found[0]
    assert [count_documents(suite, None)["smoke_sense"] for suite in halves] == [len(each) for each in found[1:]]
    assert suite_facts(halves[0], limit=None, backend="hf") != suite_facts(halves[1], limit=None, backend="hf")
    with pytest.raises(RequestError, match="none of its"):
        measure(models[0], replace(whole, part=(997, 1000)), tmp_path / "none", limit=None, note=HEARD.append)


def test_documents_have_the_same_ids_for_every_model_and_one_id_each(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    a_task(tmp_path / "tasks", "twice", [ROWS[0], ROWS[1], ROWS[0]])
    suite = read_suite("smoke", tmp_path / "tasks", ["smoke_sense", "twice"])
    for number, model in enumerate(models):
        measure(model, suite, tmp_path / str(number), limit=3, note=HEARD.append)
    first, second = results(tmp_path / "0"), results(tmp_path / "1")
    assert first.keys() == second.keys()
    assert len(first) == 6
    assert [key for key in first if key.endswith("#2")]


def test_a_killed_run_goes_on_with_the_next_task_and_asks_nothing_twice(
    models: tuple[LocalModel, LocalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = read_suite("smoke", None, [])
    measure(models[0], suite, tmp_path / "whole", limit=3, note=HEARD.append)

    asked: list[str] = []
    real = utility._ask

    def ask(lm: Any, task: Task, *rest: Any) -> list[Document]:
        asked.append(task.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(lm, task, *rest)

    monkeypatch.setattr(utility, "_ask", ask)
    with pytest.raises(KeyboardInterrupt):
        measure(models[0], suite, tmp_path / "killed", limit=3, note=HEARD.append)
    assert len(results(tmp_path / "killed")) == 3
    measure(models[0], suite, tmp_path / "killed", limit=3, note=HEARD.append)
    measure(models[0], suite, tmp_path / "killed", limit=3, note=HEARD.append)
    assert asked == ["smoke_knowledge", "smoke_sense", "smoke_sense"]
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_torn_task_is_measured_again(models: tuple[LocalModel, LocalModel], tmp_path: Path) -> None:
    suite = read_suite("smoke", None, ["smoke_sense"])
    measure(models[0], suite, tmp_path / "u", limit=3, note=HEARD.append)
    before = results(tmp_path / "u")
    path = tmp_path / "u" / DOCUMENTS
    path.write_bytes(path.read_bytes()[:-20])
    assert results(tmp_path / "u") == {}
    measure(models[0], suite, tmp_path / "u", limit=3, note=HEARD.append)
    assert results(tmp_path / "u") == before


def test_other_settings_do_not_go_on_in_the_same_folder(models: tuple[LocalModel, LocalModel], tmp_path: Path) -> None:
    suite = read_suite("smoke", None, ["smoke_sense"])
    measure(models[0], suite, tmp_path / "u", limit=1, note=HEARD.append)
    with pytest.raises(ResumeError, match="limit: 1 there, 2 now"):
        measure(models[0], suite, tmp_path / "u", limit=2, note=HEARD.append)


@pytest.mark.usefixtures("_no_network")
def test_a_users_folder_is_measured_with_its_first_metric_or_a_named_one(
    models: tuple[LocalModel, LocalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_task(tmp_path / "tasks", "mine", ROWS, fewshot_split="test", num_fewshot=2)
    monkeypatch.chdir(tmp_path)
    suite = read_suite(None, Path("tasks"), [])
    [task] = suite.tasks
    assert (task.name, task.metric, task.num_fewshot, task.chat_template) == ("mine", "acc", 2, False)
    measure(models[0], suite, tmp_path / "acc", limit=None, note=HEARD.append)
    named = read_suite(None, Path("tasks"), ["mine:acc_norm"])
    measure(models[0], named, tmp_path / "norm", limit=None, note=HEARD.append)
    assert {d.metric for d in read_documents(tmp_path / "norm")} == {"acc_norm"}
    assert [d.doc_id for d in read_documents(tmp_path / "acc")] == [d.doc_id for d in read_documents(tmp_path / "norm")]
    assert Path.cwd() == tmp_path


def test_a_group_is_one_task_whose_documents_name_their_subtask(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    a_task(folder, "left", ROWS[:3])
    a_task(folder, "right", ROWS)  # shares documents with the other
    a_task(folder, "alone", ROWS[:2])
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["left", "right"]}))
    suite = read_suite(None, folder, [])
    assert [task.name for task in suite.tasks] == ["both", "alone"]
    measure(models[0], suite, tmp_path / "u", limit=None, note=HEARD.append)
    found = [d for d in read_documents(tmp_path / "u") if d.task == "both"]
    assert [d.doc_id.split("/")[0] for d in found] == ["left"] * 3 + ["right"] * 6
    assert len({d.doc_id for d in found}) == 9
    measure(models[0], read_suite(None, folder, ["right"]), tmp_path / "r", limit=None, note=HEARD.append)
    assert [d.value for d in found[3:]] == [d.value for d in read_documents(tmp_path / "r")]


def test_a_generation_task_is_scored_by_its_filter_and_asked_through_the_chat_template(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    a_task(
        tmp_path / "tasks",
        "said",
        [{"q": "anything", "answer": ""}, {"q": "else", "answer": "never this"}],
        output_type="generate_until",
        doc_to_choice=None,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        filter_list=[
            {"name": "nothing", "filter": [{"function": "regex", "regex_pattern": "(^$)", "fallback": ""},
                                           {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        metadata={"chat_template": True},
    )  # fmt: skip
    [task] = read_suite(None, tmp_path / "tasks", []).tasks
    assert (task.metric, task.chat_template) == ("exact_match,nothing", True)
    suite = read_suite(None, tmp_path / "tasks", ["said:exact_match,nothing"])
    measure(models[0], suite, tmp_path / "u", limit=None, note=HEARD.append)
    assert [d.value for d in read_documents(tmp_path / "u")] == [1.0, 0.0]
    # Of what was said nobody can read it, yet it can be compared.
    assert all(d.generated and d.runs for d in read_documents(tmp_path / "u"))

    model = models[0]
    without = LocalModel(model.model, redeval.save_tokenizer(tmp_path / "t", adds_bos=True), name="plain")
    without.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template, which said asks for"):
        measure(without, suite, tmp_path / "v", limit=None, note=HEARD.append)


def test_what_cannot_be_measured_is_refused_before_a_model_is_met(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    a_task(folder, "mine", ROWS)
    f1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    a_task(folder, "f", ROWS, metric_list=[f1])
    for profile, where, names, message in (
        (None, None, [], "name a profile"),
        ("smok", None, [], 'did you mean "smoke"'),
        ("smoke", None, ["smoke_sens"], 'no task .smoke_sens..*did you mean "smoke_sense"'),
        (None, tmp_path / "nowhere", [], "no such folder"),
        (None, folder, ["mime"], 'no task .mime..*did you mean "mine"'),
        (None, folder, ["mine:acc_nor"], 'no metric .acc_nor..*did you mean "acc_norm"'),
        (None, folder, ["mine", "mine:acc_norm"], "mine is meant twice"),
        (None, folder, ["f"], "f1 cannot be compared in pairs, for it is neither the mean"),
    ):
        with pytest.raises(RequestError, match=message):
            read_suite(profile, where, names)


PERPLEXITIES = {
    name: {"metric": name, "aggregation": how, "higher_is_better": False}
    for name, how in (
        ("perplexity", "perplexity"),
        ("word_perplexity", "weighted_perplexity"),
        ("byte_perplexity", "weighted_perplexity"),
        ("bits_per_byte", "bits_per_byte"),
    )
}


def test_a_perplexity_is_kept_as_each_documents_loss(models: tuple[LocalModel, LocalModel], tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    texts = ["one two three", "a dog and a cat", "x"]
    rows = [{"q": f"{text} is", "text": text, "answer": "so"} for text in texts]
    a_task(
        folder, "target", rows, metric_list=[PERPLEXITIES["perplexity"]], output_type="loglikelihood",
        doc_to_choice=None, doc_to_text="{{q}}", doc_to_target=" so",
    )  # fmt: skip
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        a_task(
            folder, name, rows, metric_list=[PERPLEXITIES[name]], output_type="loglikelihood_rolling",
            doc_to_choice=None, doc_to_text="", doc_to_target="{{text}}",
        )  # fmt: skip
    suite = read_suite(None, folder, [])
    assert [task.higher_is_better for task in suite.tasks] == [False] * 4
    measure(models[1], suite, tmp_path / "u", limit=None, note=HEARD.append)
    found = {
        name: [d.value for d in read_documents(tmp_path / "u") if d.task == name] for name in list(PERPLEXITIES)[1:]
    }
    by_target = [d.value for d in read_documents(tmp_path / "u") if d.task == "target"]
    assert by_target == pytest.approx([-by_hand(models[1], f"{text} is", [" so"])[0] for text in texts], rel=1e-4)
    words, sizes = [len(text.split()) for text in texts], [len(text) for text in texts]
    totals = [value * count for value, count in zip(found["word_perplexity"], words, strict=True)]
    assert min(totals) > 0
    by_byte = [total / size for total, size in zip(totals, sizes, strict=True)]
    assert found["byte_perplexity"] == pytest.approx(by_byte)
    assert found["bits_per_byte"] == pytest.approx([value / math.log(2) for value in by_byte])
    assert suite_facts(suite, limit=None, backend="hf")["tasks"]["word_perplexity"]["higher_is_better"] is False


def test_an_error_of_which_lower_is_better_is_measured_and_may_exceed_1(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    a_task(folder, "slips", ROWS, metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": False}])
    (folder / "score.py").write_text("def slips(doc, results):\n    return {'acc': 3.0}\n")
    config = (folder / "slips.yaml").read_text().removesuffix("}")
    (folder / "slips.yaml").write_text(config + ', "process_results": !function score.slips }')
    measure(models[0], read_suite(None, folder, []), tmp_path / "u", limit=2, note=HEARD.append)
    assert [d.value for d in read_documents(tmp_path / "u")] == [3.0, 3.0]


def test_any_task_of_lm_evals_catalogue_is_known_by_its_name() -> None:
    [task] = read_suite(None, None, ["ifeval"]).tasks
    assert (task.metric, task.num_fewshot, task.generates) == ("prompt_level_strict_acc", 0, True)
    [named] = read_suite(None, None, ["ifeval:prompt_level_loose_acc"]).tasks
    assert named.metric == "prompt_level_loose_acc"
    [group] = read_suite(None, None, ["mmlu_stem"]).tasks
    assert (group.metric, group.higher_is_better) == ("acc", True)
    [text] = read_suite(None, None, ["wikitext"]).tasks
    assert (text.metric, text.higher_is_better) == ("word_perplexity", False)
    [sums] = read_suite(None, None, ["gsm8k:exact_match,flexible-extract"]).tasks
    assert sums.metric == "exact_match,flexible-extract"
    assert [task.name for task in read_suite("smoke", None, ["smoke_sense", "ifeval"]).tasks] == [
        "smoke_sense",
        "ifeval",
    ]
    for name, message in (("ifevall", 'did you mean "ifeval"'), ("ifeval:acc", "ifeval has no metric 'acc'")):
        with pytest.raises(RequestError, match=message):
            read_suite(None, None, [name])


def test_shots_and_generation_settings_stand_in_place_of_the_tasks_own(
    models: tuple[LocalModel, LocalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    a_task(folder, "shots", ROWS, fewshot_split="test", num_fewshot=2)
    a_task(
        folder, "said", [{"q": "anything", "answer": ""}], output_type="generate_until", doc_to_choice=None,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    )  # fmt: skip
    suite = read_suite(None, folder, [], num_fewshot=0, gen_kwargs={"max_gen_toks": 2})
    by_name = {task.name: task for task in suite.tasks}
    assert {task.num_fewshot for task in suite.tasks} == {0}
    assert (by_name["shots"].gen_kwargs, by_name["said"].gen_kwargs) == ((), (("max_gen_toks", 2),))
    facts = suite_facts(suite, limit=None, backend="hf")
    assert facts["tasks"]["said"]["gen_kwargs"] == {"max_gen_toks": 2}
    asked: list[int] = []
    real = LocalModel.rows_that_fit

    def rows(self: LocalModel, longest: int, new: int) -> int:
        asked.append(new)
        return real(self, longest, new)

    monkeypatch.setattr(LocalModel, "rows_that_fit", rows)
    measure(models[0], suite, tmp_path / "u", limit=1, note=HEARD.append)
    assert asked == [2]
    with pytest.raises(RequestError, match="no task generates anything"):
        read_suite(None, folder, ["shots"], gen_kwargs={"temperature": 0.5})


def test_a_folder_that_lm_eval_would_read_in_part_is_refused(tmp_path: Path) -> None:
    a_task(tmp_path / "broken", "mine", ROWS)
    (tmp_path / "broken" / "other.yaml").write_text("task: [unclosed")
    with pytest.raises(RequestError, match=r"cannot read all of it: Skip .*other.yaml"):
        read_suite(None, tmp_path / "broken", [])
    a_task(tmp_path / "twice", "mine", ROWS)
    (tmp_path / "twice" / "copy.yaml").write_text((tmp_path / "twice" / "mine.yaml").read_text())
    with pytest.raises(RequestError, match="Duplicate task name 'mine'"):
        read_suite(None, tmp_path / "twice", [])
    a_task(tmp_path / "empty", "mine", ROWS)
    (tmp_path / "empty" / "mine.jsonl").unlink()
    with pytest.raises(RequestError, match=r"mine cannot be read: .*relative paths start at the folder"):
        read_suite(None, tmp_path / "empty", [])


@pytest.mark.usefixtures("_no_network")
def test_a_folders_task_does_not_reach_for_the_hub(tmp_path: Path) -> None:
    a_task(tmp_path / "tasks", "hub", ROWS, dataset_path="nobody/nothing", dataset_kwargs=None)
    with pytest.raises(RequestError, match="hub cannot be read"):
        read_suite(None, tmp_path / "tasks", [])


def test_a_score_outside_0_to_1_is_refused_and_nothing_is_kept(
    models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    a_task(folder, "percent", ROWS, metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}])
    (folder / "score.py").write_text("def percent(doc, results):\n    return {'acc': 55.0}\n")
    config = (folder / "percent.yaml").read_text().removesuffix("}")
    (folder / "percent.yaml").write_text(config + ', "process_results": !function score.percent }')
    suite = read_suite(None, folder, [])
    with pytest.raises(RequestError, match=r"acc of a document is 55.0; expected a number from 0 to 1"):
        measure(models[0], suite, tmp_path / "u", limit=None, note=HEARD.append)
    assert read_documents(tmp_path / "u") == ()


def test_the_facts_name_all_that_must_be_equal(tmp_path: Path, models: tuple[LocalModel, LocalModel]) -> None:
    a_task(tmp_path / "tasks", "mine", ROWS)
    suite = read_suite("smoke", tmp_path / "tasks", [])
    facts = suite_facts(suite, limit=4, backend="hf")
    *smoke, mine = suite.tasks
    assert facts["tasks"].keys() == {"smoke_knowledge", "smoke_sense", "mine"}
    assert json.loads(json.dumps(facts)) == facts
    for other in (
        suite_facts(suite, limit=5, backend="hf"),
        suite_facts(suite, limit=4, backend="local-completions"),
        suite_facts(replace(suite, tasks=suite.tasks[:2]), limit=4, backend="hf"),
        suite_facts(replace(suite, tasks=(*smoke, replace(mine, metric="acc_norm"))), limit=4, backend="hf"),
        suite_facts(replace(suite, tasks=(*smoke, replace(mine, chat_template=True))), limit=4, backend="hf"),
    ):
        assert other != facts
    (tmp_path / "tasks" / ".hidden").write_text("x")
    assert suite_facts(suite, limit=4, backend="hf") == facts
    a_task(tmp_path / "tasks", "mine", ROWS[:5])
    assert suite_facts(suite, limit=4, backend="hf") != facts
    measure(models[0], read_suite("smoke", None, ["smoke_sense"]), tmp_path / "u", limit=1, note=HEARD.append)
    assert read_facts(tmp_path / "u")["backend"] == "hf"


def test_lm_eval_leaves_no_trace_and_is_heard_through_note_alone(
    models: tuple[LocalModel, LocalModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(utility, "NOTE_S", 0.0)
    names = ("lm_eval", "datasets", "transformers")

    def state() -> Any:
        loggers = [logging.getLogger(name) for name in names]
        return (
            dict(os.environ), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers],
            datasets.config.HF_HUB_OFFLINE, Path.cwd(), models[0].tokenizer.pad_token, models[0].tokenizer.padding_side,
        )  # fmt: skip

    measure(models[0], read_suite("smoke", None, ["smoke_sense"]), tmp_path / "import", limit=1, note=HEARD.append)
    capfd.readouterr()
    # Somewhere else than where the first call may have left them.
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = state()
    suite = read_suite("smoke", None, ["smoke_sense"])
    measure(models[0], suite, tmp_path / "u", limit=2, note=lambda text: print(text))
    assert state() == before
    said = capfd.readouterr()
    assert said.err == ""
    *counts, last = said.out.splitlines()
    assert counts == [f"smoke_sense: {i} of 8 requests" for i in range(1, 9)]
    assert last.startswith("smoke_sense: acc ")


def test_a_prompt_longer_than_the_context_is_counted_and_said(tmp_path: Path) -> None:
    redeval.save_llama(tmp_path / "short", context=64)
    redeval.save_tokenizer(tmp_path / "short", adds_bos=True)
    model = load_local(LocalSpec(model=str(tmp_path / "short"), device="cpu"))
    a_task(tmp_path / "tasks", "long", [{"q": "x" * 100, "choices": ["a", "bc"], "answer": 0}])
    measure(model, read_suite(None, tmp_path / "tasks", []), tmp_path / "u", limit=None, note=HEARD.append)
    mark = json.loads((tmp_path / "u" / DOCUMENTS).read_text().splitlines()[-1])
    assert mark["cut"] == 2
    assert any("2 prompts were longer" in text for text in HEARD)


def test_every_profile_names_tasks_and_metrics_that_lm_eval_has() -> None:
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    root = Path(lm_eval.tasks.__file__).parent
    parts = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k", "leaderboard/bbh_mc")
    index = TaskIndex.build(
        [*(root / part for part in parts), root / "bigbench" / "multiple_choice", SMOKE, REGRESSION]
    )

    def leaves(name: str) -> Iterator[dict[str, Any]]:
        entry = index[name]
        if entry.kind.name == "TAG":
            for child in sorted(entry.tags):
                yield from leaves(child)
        elif entry.kind.name == "GROUP":
            for child in entry.cfg["task"]:
                yield from leaves(child)
        else:
            yield entry.cfg

    for task in {task for tasks in PROFILES.values() for task in tasks}:
        metric, _, part = task.metric.partition(",")
        found = list(leaves(task.name))
        assert len(found) == {"mmlu": 57, "leaderboard_bbh": 24}.get(task.name, 1)
        for config in found:
            assert metric in {entry["metric"] for entry in config["metric_list"]}, task
            assert (part or "none") in {f["name"] for f in config.get("filter_list", [{"name": "none"}])}, task


# -- a served model ------------------------------------------------------------------------------------------


def echo(model: LocalModel, body: dict[str, Any]) -> dict[str, Any]:
    """Answer a completion request with echo and log-probabilities as vLLM does: null for the first token."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = []
    for index, ids in enumerate(prompts):
        with torch.no_grad():
            rows = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].float(), dim=-1)
        after = int(rows[-1].argmax())
        tokens = [*ids[1:], after]
        own = [None, *(float(rows[i, token]) for i, token in enumerate(tokens))]
        top = [None, *({str(int(row.argmax())): float(row.max())} for row in rows)]
        logprobs = {"token_logprobs": own, "top_logprobs": top, "tokens": [str(t) for t in [ids[0], *tokens]]}
        choices.append({"index": index, "text": "", "finish_reason": "length", "logprobs": logprobs})
    return {"choices": choices}


def served(stub: redeval.Stub, model: LocalModel) -> Served:
    return Served(base_url=stub.url, model="it", tokenizer=model.name)


def test_a_served_model_gets_the_scores_it_has_here(
    stub: redeval.Stub, models: tuple[LocalModel, LocalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another tool's")
    suite = read_suite("smoke", None, ["smoke_knowledge"])
    for number, model in enumerate(models):
        stub.answer = lambda body, model=model: (200, echo(model, body))
        measure(served(stub, model), suite, tmp_path / f"s{number}", limit=10, note=HEARD.append)
        measure(model, suite, tmp_path / f"l{number}", limit=10, note=HEARD.append)
        assert results(tmp_path / f"s{number}") == results(tmp_path / f"l{number}")
        starts = {body["prompt"][0][0] for body in stub.bodies[1:] if isinstance(body["prompt"][0], list)}
        assert starts == ({model.tokenizer.bos_token_id} if model.adds_bos else {token_id(model.tokenizer, "Q")})
        stub.bodies.clear()
    with pytest.raises(ResumeError, match="backend"):
        measure(models[0], suite, tmp_path / "s0", limit=10, note=HEARD.append)


def test_a_server_without_echo_is_refused_rather_than_scored_as_zero(
    stub: redeval.Stub, models: tuple[LocalModel, LocalModel], tmp_path: Path
) -> None:
    suite = read_suite("smoke", None, ["smoke_sense"])
    stub.answer = lambda body: (200, redeval.completion("x", {"x": -1.0}))
    with pytest.raises(RequestError, match="gave 1 log-probabilities for a prompt of"):
        measure(served(stub, models[0]), suite, tmp_path / "u", limit=2, note=HEARD.append)
    stub.answer = lambda body: (400, {"error": "echo is not supported"})
    with pytest.raises(RequestError, match="echo is not supported"):
        measure(served(stub, models[0]), suite, tmp_path / "u", limit=2, note=HEARD.append)
    nowhere = Served(base_url="http://127.0.0.1:9/v1", model="it", tokenizer=models[0].name)
    with pytest.raises(UnansweredError, match="nothing answers"):
        measure(nowhere, suite, tmp_path / "u", limit=2, note=HEARD.append)
    assert read_documents(tmp_path / "u") == ()


def test_a_server_that_fails_midway_is_an_error_and_keeps_the_finished_tasks(
    stub: redeval.Stub,
    models: tuple[LocalModel, LocalModel],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        late = len(stub.bodies) > 1 + 4  # one to check the server, one document's choices
        return (500, {}) if late else (200, echo(models[0], body))

    stub.answer = answer
    suite = read_suite("smoke", None, [])
    with pytest.raises(UnansweredError, match="finished tasks are kept"):
        measure(served(stub, models[0]), suite, tmp_path / "u", limit=1, note=HEARD.append)
    gc.collect()
    assert (capfd.readouterr().err, caplog.text) == ("", "")
    assert {d.task for d in read_documents(tmp_path / "u")} == {"smoke_knowledge"}


def test_a_suite_without_missing_tasks_needs_no_model(tmp_path: Path) -> None:
    suite = Suite(name="none", tasks=())
    nobody: Any = object()
    measure(nobody, suite, tmp_path / "u", limit=None, note=HEARD.append)
    assert read_documents(tmp_path / "u") == ()
