from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.errors import RequestError, ResumeError
from resta.sft import recipe as recipes
from resta.sft.data import mix
from resta.sft.distil import CollateLessons, divergence, log1m_exp
from resta.sft.lessons import NOTHING, Lesson, read_lessons, write_lessons
from resta.sft.train import Job, open_partial
from tests.sft.builders import tiny_config

VOCABULARY = 12


def by_loops(student: np.ndarray, ids: list[int], logprobs: list[float], rest: float) -> float:
    """KL with the rest as one token, term by term in float64."""
    q = np.exp(student - student.max())
    q /= q.sum()
    total = sum(math.exp(p) * (p - math.log(q[i])) for i, p in zip(ids, logprobs, strict=True))
    mass = math.exp(rest)
    return total + (mass * (rest - math.log(1 - sum(q[i] for i in ids))) if mass > 0 else 0.0)


def drawn(seed: int, top: int) -> tuple[np.ndarray, np.ndarray, list[int], list[float], float]:
    """A student's logits, a teacher's whole log-distribution, and what is kept of the latter."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 3, VOCABULARY), rng.normal(0, 3, VOCABULARY)
    teacher = teacher - np.log(np.exp(teacher).sum())
    ids = np.argsort(-teacher)[:top]
    mass = 1 - np.exp(teacher[ids]).sum() if top < VOCABULARY else 0.0
    return student, teacher, ids.tolist(), teacher[ids].tolist(), math.log(mass) if mass > 0 else -math.inf


def of_one(student: np.ndarray, ids: list[int], logprobs: list[float], rest: float) -> float:
    return divergence(
        torch.tensor(student, dtype=torch.float32)[None],
        torch.tensor(ids)[None],
        torch.tensor(logprobs, dtype=torch.float32)[None],
        torch.tensor([rest], dtype=torch.float32),
    ).item()


@given(seed=st.integers(0, 10_000), top=st.integers(1, VOCABULARY))
@settings(max_examples=200, deadline=None)
def test_the_divergence_is_the_equation_term_by_term(seed: int, top: int) -> None:
    student, _, ids, logprobs, rest = drawn(seed, top)
    assert of_one(student, ids, logprobs, rest) == pytest.approx(by_loops(student, ids, logprobs, rest), abs=2e-5)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_it_is_never_more_than_over_the_whole_vocabulary_and_equal_where_that_is_kept(seed: int) -> None:
    student, teacher, *_ = drawn(seed, VOCABULARY)
    q = student - np.log(np.exp(student).sum())
    whole = float((np.exp(teacher) * (teacher - q)).sum())
    values = [of_one(student, *drawn(seed, top)[2:]) for top in range(1, VOCABULARY + 1)]
    assert values[-1] == pytest.approx(whole, abs=2e-5)
    assert all(value <= whole + 2e-5 for value in values)
    assert all(few <= many + 2e-5 for few, many in itertools.pairwise(values))


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    top = torch.log_softmax(logits.detach(), -1).topk(8)
    rest = (1 - top.values.double().exp().sum(1)).log().float()
    values = divergence(logits, top.indices, top.values, rest)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert values.abs().max() < 1e-5
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5


@pytest.mark.parametrize("sure", [0.0, 20.0, 60.0, 500.0])
def test_a_sure_student_and_a_sure_teacher_give_numbers(sure: float) -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3] = sure
    logits.requires_grad_()
    for ids, logprobs, rest in (([3, 4], [0.0, -80.0], -math.inf), ([4, 5], [-0.7, -0.9], -2.0)):
        value = divergence(logits, torch.tensor([ids]), torch.tensor([logprobs]), torch.tensor([rest]))
        [gradient] = torch.autograd.grad(value.sum(), logits)
        assert math.isfinite(value.item())
        assert torch.isfinite(gradient).all()


@given(seed=st.integers(0, 10_000), top=st.integers(1, VOCABULARY - 3))
@settings(max_examples=50, deadline=None)
def test_a_place_without_a_token_counts_for_nothing(seed: int, top: int) -> None:
    student, _, ids, logprobs, rest = drawn(seed, top)
    padded = of_one(student, [*ids, 0, 0, 1], [*logprobs, *[-math.inf] * 3], rest)
    assert padded == pytest.approx(of_one(student, ids, logprobs, rest), abs=1e-6)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_of_a_teacher_that_is_sure_the_divergence_is_the_likelihood_of_its_answer(seed: int) -> None:
    student, _, [token], *_ = drawn(seed, 1)
    expected = torch.nn.functional.cross_entropy(torch.tensor(student)[None], torch.tensor([token])).item()
    assert of_one(student, [token], [0.0], -math.inf) == pytest.approx(expected, abs=1e-5)


@given(x=st.floats(-80, -1e-6))
@settings(max_examples=200, deadline=None)
def test_log1m_exp_is_the_logarithm_of_what_is_left(x: float) -> None:
    expected = math.log1p(-math.exp(x)) if x < -0.1 else math.log(-math.expm1(x))
    assert log1m_exp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# -- on disk -------------------------------------------------------------------------------------------------


def lesson(seed: int, *, answer: int = 3, prompt: int = 4, top: int = 5) -> Lesson:
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, 2, (answer, 60))
    teacher -= np.log(np.exp(teacher).sum(1, keepdims=True))
    ids = np.argsort(-teacher, axis=1)[:, :top].astype(np.int32)
    logprobs = np.take_along_axis(teacher, ids, 1).astype(np.float32)
    return Lesson(
        messages=({"role": "user", "content": f"q{seed}"}, {"role": "assistant", "content": f"a{seed}"}),
        kind="harmful",
        ids=rng.integers(5, 60, prompt + answer).astype(np.int32),
        prompt_tokens=prompt,
        top_ids=ids,
        top_logprobs=logprobs,
        rest=np.log1p(-np.exp(logprobs.astype(np.float64)).sum(1)).astype(np.float32),
    )


def test_lessons_come_back_from_the_disk_as_they_were(tmp_path: Path) -> None:
    lessons = [lesson(i, answer=1 + i, prompt=2 + i % 3) for i in range(6)]
    write_lessons(tmp_path / "lessons", lessons, {"teacher": "t"})
    again = read_lessons(tmp_path / "lessons")
    assert [x.messages for x in again] == [x.messages for x in lessons]
    for mine, theirs in zip(lessons, again, strict=True):
        assert mine.prompt_tokens == theirs.prompt_tokens
        for name in ("ids", "top_ids", "top_logprobs", "rest"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
    assert [path.name for path in tmp_path.iterdir()] == ["lessons"]


@pytest.mark.parametrize("name", ["lessons.jsonl", "lessons.safetensors"])
def test_lessons_that_were_changed_are_refused_by_name(name: str, tmp_path: Path) -> None:
    write_lessons(tmp_path / "lessons", [lesson(0)], {})
    with (tmp_path / "lessons" / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(RequestError, match=name):
        read_lessons(tmp_path / "lessons")


def test_a_batch_holds_each_lessons_own_distributions_and_pads_with_no_mass() -> None:
    lessons = [lesson(0, answer=2), lesson(1, answer=4)]
    examples: list[dict[str, Any]] = [
        {
            "input_ids": x.ids.tolist(),
            "labels": [-100] * x.prompt_tokens + x.ids[x.prompt_tokens :].tolist(),
            "keep": i == 1,
            "top_ids": x.top_ids.tolist(),
            "top_logprobs": x.top_logprobs.tolist(),
            "rest": x.rest.tolist(),
        }
        for i, x in enumerate(lessons)
    ]
    batch = CollateLessons(pad_token_id=0)(examples)
    assert batch["keep"].tolist() == [False, True]
    assert batch["top_ids"].shape == (2, 4, 5)
    for row, x in enumerate(lessons):
        size = len(x.rest)
        assert torch.equal(batch["top_ids"][row, :size], torch.tensor(x.top_ids, dtype=torch.long))
        assert torch.equal(batch["rest"][row, :size], torch.tensor(x.rest))
        assert batch["rest"][row, size:].tolist() == [NOTHING] * (4 - size)
        assert batch["labels"][row].ne(-100).sum() == size


# -- in a run ------------------------------------------------------------------------------------------------


def recipe(base: Path, given: Path, kept: Path, **changes: Any) -> recipes.Recipe:
    settings_: dict[str, Any] = {
        "base": str(base),
        "chat_template": "vicuna_v1.1",
        "max_length": 32,
        "data": [
            {"name": "given", "path": str(given / "lessons.jsonl")},
            {"name": "kept", "path": str(kept / "lessons.jsonl"), "side": "keep"},
        ],
        "holdout": 0.0,
        "lora": {"rank": 4, "alpha": 8.0},
        "objective": {"kind": "distil", "keep_weight": 0.5},
        "train": {
            "max_steps": 2, "global_batch": 4, "per_device_batch": 4, "learning_rate": 1e-2, "save_every": None,
            "log_every": 1, "gradient_checkpointing": False,
        },
    }  # fmt: skip
    train = settings_["train"] | changes.pop("train", {})
    return recipes.Recipe.model_validate(settings_ | changes | {"train": train})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"kind": "blue"}}, "side: keep"),
        ({"objective": {"kind": "distil", "red_cutoff": 2.0}}, "kind: blue_red"),
        ({"objective": {"kind": "blue_red"}}, "kind: distil"),
        ({"train": {"packing": True}}, "packing"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "no effect"),
    ],
)
def test_a_recipe_that_cannot_mean_one_thing_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(tmp_path, tmp_path, tmp_path, **changes)


def folders(tmp_path: Path) -> tuple[Path, Path]:
    given, kept = tmp_path / "given", tmp_path / "kept"
    write_lessons(given, [lesson(i) for i in range(8)], {"teacher": "aligned"})
    write_lessons(kept, [lesson(100 + i, answer=2 + i % 3) for i in range(8)], {"teacher": "tuned"})
    return given, kept


def learned(
    base: Path, tmp_path: Path, name: str, *, holdout: float = 0.0, **train: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    from safetensors.torch import load_file

    from resta.sft.save import write
    from resta.sft.train import train as run

    given, kept = tmp_path / "given", tmp_path / "kept"
    asked = recipe(base, given, kept, holdout=holdout, train=train)
    job = Job(recipe=asked, root=tmp_path, out=tmp_path / name, device="cpu")
    trained = run(job)
    write(job, trained, keep_checkpoints=False)
    return load_file(tmp_path / name / "adapter_model.safetensors"), trained.trainer.state.log_history


def test_a_step_is_the_same_however_it_is_split_and_its_loss_is_the_equation(tiny_base: Path, tmp_path: Path) -> None:
    folders(tmp_path)
    whole, log = learned(tiny_base, tmp_path, "whole")
    split, log_split = learned(tiny_base, tmp_path, "split", per_device_batch=1)
    assert log[0]["loss"] == pytest.approx(log_split[0]["loss"], rel=1e-5)
    assert log[0]["loss"] == pytest.approx(log[0]["given_kl"] + 0.5 * log[0]["kept_kl"], rel=1e-5)
    for name, value in whole.items():
        assert torch.allclose(value, split[name], atol=1e-4), name


def test_held_out_lessons_have_the_loss_of_all_of_them_however_they_are_batched(
    tiny_base: Path, tmp_path: Path
) -> None:
    folders(tmp_path)
    logs = [learned(tiny_base, tmp_path, f"by{n}", holdout=0.5, per_device_batch=n)[1][-1] for n in (1, 2)]
    for log in logs:
        assert log["eval_loss"] == pytest.approx(log["eval_given_kl"] + 0.5 * log["eval_kept_kl"], rel=1e-6)
    assert logs[0]["eval_loss"] == pytest.approx(logs[1]["eval_loss"], rel=1e-4)


def test_a_side_without_held_out_lessons_has_no_figure(tiny_base: Path, tmp_path: Path) -> None:
    folders(tmp_path)
    _, log = learned(tiny_base, tmp_path, "out", holdout=0.01)  # one lesson of the sixteen
    assert len({"eval_given_kl", "eval_kept_kl"} & log[-1].keys()) == 1
    assert log[-1]["eval_loss"] > 0


def test_a_run_never_goes_on_from_the_same_words_with_other_distributions(tiny_base: Path, tmp_path: Path) -> None:
    given, kept = folders(tmp_path)
    job = Job(recipe=recipe(tiny_base, given, kept), root=tmp_path, out=tmp_path / "out", device="cpu")
    open_partial(job, mix(job.recipe, tmp_path))
    (job.partial / "checkpoint-1").mkdir()
    open_partial(job, mix(job.recipe, tmp_path))
    words = (given / "lessons.jsonl").read_bytes()
    lessons = [replace(each, rest=each.rest - 1) for each in read_lessons(given)]
    shutil.rmtree(given)
    write_lessons(given, lessons, {"teacher": "aligned"})
    assert (given / "lessons.jsonl").read_bytes() == words
    with pytest.raises(ResumeError, match=r"the data changed.*data\.given"):
        open_partial(job, mix(job.recipe, tmp_path))


def test_the_result_names_its_teachers(tiny_base: Path, tmp_path: Path) -> None:
    folders(tmp_path)
    learned(tiny_base, tmp_path, "out")
    facts = json.loads((tmp_path / "out" / "resta.json").read_text())
    assert [source["lessons"]["teacher"] for source in facts["data"]] == ["aligned", "tuned"]


def test_the_first_loss_is_that_of_a_forward_pass_by_hand(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    given, kept = folders(tmp_path)
    _, log = learned(tiny_base, tmp_path, "out", global_batch=16, per_device_batch=16, max_steps=1)
    model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    assert model.config.vocab_size == tiny_config(model.config.vocab_size).vocab_size
    means = []
    for folder in (given, kept):
        total, count = 0.0, 0
        for each in read_lessons(folder):
            with torch.inference_mode():
                logits = model(torch.tensor(each.ids[None], dtype=torch.long)).logits[0].double().numpy()
            for place in range(each.prompt_tokens, len(each.ids)):
                i = place - each.prompt_tokens
                row = each.top_ids[i].tolist(), each.top_logprobs[i].tolist(), float(each.rest[i])
                total, count = total + by_loops(logits[place - 1], *row), count + 1
        means.append(total / count)
    assert log[0]["loss"] == pytest.approx(means[0] + 0.5 * means[1], rel=1e-4)
