"""The profiles: enough questions of both kinds in every cell for the default policy to pass a good model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from resta.cli.options import questions_of, target_of
from resta.cli.verify import exam_of
from resta.redeval.plan import RunPlan, make_plan, read_spec
from resta.redeval.profiles import PROFILES
from resta.redeval.questions import PUBLISHED
from resta.verify.budget import read_budget
from resta.verify.policy import read_policy
from resta.verify.power import AS_GOOD, Sample, chances
from resta.verify.regression.made import documents

# As published, repeats left out.
DISTINCT = {"dangerousqa": 200, "catqa-en": 543, "adversarialqa": 500, "harmfulqa": 1938}
SEVERAL = ("banks", "safe_banks", "templates", "judges", "task_names")
UNASKED = (
    *("base_url", "base", "files", "chat_template", "batch_size", "duplicates", "limit", "temperature"),
    *("max_new_tokens", "profile_name", "task_folder", "documents", "tokenizer", "num_fewshot", "gen_kwargs"),
)


@pytest.fixture(scope="module")
def bank_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of banks of the published sizes."""
    folder = tmp_path_factory.mktemp("banks")
    for name, count in DISTINCT.items():
        texts = [f"question {i} of {name}?" for i in range(count)]
        (folder / PUBLISHED[name][0]).write_text(json.dumps({"A": {"x": texts}}))
    return folder


def given(bank_dir: Path, **more: Any) -> dict[str, Any]:
    """Return what the command line gives `resta verify`."""
    usual = {
        "bank_dirs": [bank_dir], "download": False, "protocol": "resta", "epochs": 1, "top_p": 1.0, "seed": 0,
        "keep_thoughts": False, "template_args": {},
        "device": "cpu", "dtype": "auto", "no_utility": False, "allow_self_judge": False,
    }  # fmt: skip
    return dict.fromkeys(UNASKED) | dict.fromkeys(SEVERAL, ()) | usual | more


def plan_of(options: dict[str, Any], model: str) -> RunPlan:
    return make_plan(read_spec(questions_of(options)), target_of(model, options))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.redeval.builders import save_llama, save_tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    save_tokenizer(folder, adds_bos=True)
    return str(folder)


@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_cell_of_a_profile_is_large_enough_and_safe_questions_are_asked(
    profile: str, bank_dir: Path, model: str
) -> None:
    plan = plan_of(given(bank_dir, profile=profile), model)
    by_bank: dict[tuple[str, bool], int] = {}
    for question in plan.questions:
        by_bank[question.bank, question.safe] = by_bank.get((question.bank, question.safe), 0) + 1
    assert by_bank.pop(("lookalikes", True)) >= 200
    assert min(by_bank.values()) >= 100
    assert not any(safe for _, safe in by_bank)


@pytest.mark.parametrize("profile", list(PROFILES))
def test_a_profile_passes_a_good_model_with_probability_of_at_least_0_8(
    profile: str, bank_dir: Path, model: str
) -> None:
    plan = plan_of(given(bank_dir, profile=profile), model)
    count: dict[bool, Counter[str]] = {
        safe: Counter(question.bank for question in plan.questions if question.safe == safe) for safe in (False, True)
    }
    sample = Sample(
        harmful=count[False],
        safe=count[True],
        templates=PROFILES[profile].templates,
        documents={"regression": len(documents())},
    )
    found = chances(read_policy(None), sample, AS_GOOD, draws=200)
    assert found.all >= 0.9, found.by_rule
    few = chances(read_policy(None), replace(sample, documents={"regression": 40}), AS_GOOD, draws=200)
    assert few.all < 0.8, "40 documents would do as well"


def test_the_profiles_grow() -> None:
    sizes = [(len(profile.banks), len(profile.templates)) for profile in PROFILES.values()]
    assert list(PROFILES) == ["quick", "standard", "full"]
    assert sizes == [(2, 2), (3, 3), (4, 4)]


def test_what_is_named_replaces_the_profiles_own(bank_dir: Path, model: str) -> None:
    def banks(**more: Any) -> list[str]:
        return [bank.name for bank in read_spec(questions_of(given(bank_dir, **more))).banks]

    assert banks(profile="quick", banks=("dangerousqa",)) == ["dangerousqa", "lookalikes"]
    assert banks(profile="quick", safe_banks=("smoke-safe",)) == ["dangerousqa", "catqa-en", "smoke-safe"]
    assert banks(profile=None) == ["smoke", "smoke-safe"]
    assert banks(profile=None, banks=("dangerousqa",)) == ["dangerousqa"]
    assert banks(profile=None, safe_banks=("smoke-safe",)) == ["smoke-safe"]


def test_without_a_word_on_utility_the_regression_check_is_measured(bank_dir: Path, model: str) -> None:
    suite = read_budget(exam_of(given(bank_dir, profile=None))).suite
    assert suite is not None
    assert [task.name for task in suite.tasks] == ["regression"]
    named = read_budget(exam_of(given(bank_dir, profile=None, task_names=("smoke_sense",)))).suite
    assert named is not None
    assert [task.name for task in named.tasks] == ["smoke_sense"]
