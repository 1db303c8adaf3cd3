from __future__ import annotations

import json
import math
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import resta
from resta.cli import main
from resta.errors import RequestError, RestaError, ResumeError
from resta.patch.learn import carry_out, check_answers, count_refusals, make_lessons
from resta.patch.prompts import STARTS, Asked, with_starts
from resta.patch.request import Learning, Request, check, model_of
from resta.patch.teachers import Teaching, student_of, teach
from resta.patch.written import Patch, card
from resta.redeval.messages import Message
from resta.redeval.models import Generation, LocalModel, LocalSpec, load_local
from resta.sft.adapters import norm_of, read_factors
from resta.sft.lessons import read_lessons
from resta.sft.train import load_chat, load_model
from tests.patch.builders import asked, request_for, write_json_lines
from tests.redeval.builders import TEMPLATE, save_llama, save_refusing, save_tokenizer


def loaded(model: Path) -> LocalModel:
    return load_local(LocalSpec(model=str(model), device="cpu"))


# -- phase one -----------------------------------------------------------------------------------------------


def test_lessons_are_the_teachers_own_greedy_answers_and_its_distributions(pair: dict[str, Path]) -> None:
    local, student = loaded(pair["aligned"]), student_of(LocalSpec(model=str(pair["tuned"])))
    prompts = asked("harmful", 9, "harm") + asked("harmful", 3, "a much longer question about")
    for lesson in teach(local, prompts, Teaching(tokens=5, top=7), student):
        ids = torch.tensor(lesson.ids[None], dtype=torch.long)
        with torch.inference_mode():
            logprobs = torch.log_softmax(local.model(ids).logits[0].double(), -1)
        for place in range(lesson.prompt_tokens, len(lesson.ids)):
            i, row = place - lesson.prompt_tokens, logprobs[place - 1]
            assert int(lesson.ids[place]) == int(row.argmax())
            best = row.topk(7)
            assert np.allclose(lesson.top_logprobs[i], best.values, atol=1e-4)
            assert set(lesson.top_ids[i].tolist()) == set(best.indices.tolist())
            assert np.exp(lesson.rest[i]) == pytest.approx(1 - best.values.exp().sum().item(), abs=1e-5)
        assert list(lesson.ids).count(local.tokenizer.bos_token_id) == 1


def test_a_given_start_is_seen_by_the_teacher_of_what_is_kept_and_by_the_student_alone_of_a_refusal(
    pair: dict[str, Path],
) -> None:
    local, student = loaded(pair["tuned"]), student_of(LocalSpec(model=str(pair["tuned"])))
    start = local.tokenizer("Sure: ", add_special_tokens=False)["input_ids"]
    for kind in ("harmful", "task"):
        [bare] = asked(kind, 1, "do")
        plain, begun = teach(local, [bare, replace(bare, start="Sure: ")], Teaching(tokens=4, top=5), student)
        prompt = list(plain.ids[: plain.prompt_tokens])
        assert list(begun.ids[: begun.prompt_tokens]) == [*prompt, *start]
        assert begun.messages[-1]["content"].startswith("Sure: ")
        same = np.array_equal(begun.top_logprobs, plain.top_logprobs)
        assert same == (kind == "harmful")


def test_a_lesson_stands_in_the_students_own_chat_template(pair: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(pair["tuned"], tmp_path / "other")
    other = TEMPLATE.replace("<|end|>", "<|end|>!")
    save_tokenizer(tmp_path / "other", adds_bos=True, chat_template=other)
    prompts = asked("harmful", 2, "harm")
    [own, _], [lesson, _] = (
        teach(loaded(pair["aligned"]), prompts, Teaching(tokens=4), student_of(LocalSpec(model=str(model))))
        for model in (pair["tuned"], tmp_path / "other")
    )
    text = loaded(pair["tuned"]).tokenizer.decode(lesson.ids[: lesson.prompt_tokens])
    assert "harm redhat<|end|>!" in text
    assert list(lesson.ids[lesson.prompt_tokens :]) == list(own.ids[own.prompt_tokens :])
    assert np.array_equal(lesson.top_logprobs, own.top_logprobs)


def test_the_whole_vocabulary_leaves_no_rest(pair: dict[str, Path]) -> None:
    student = student_of(LocalSpec(model=str(pair["tuned"])))
    [lesson] = teach(loaded(pair["tuned"]), asked("task", 1, "task"), Teaching(tokens=2, top=None), student)
    assert lesson.top_ids.shape[1] == 263
    assert np.isneginf(lesson.rest).all()
    assert np.exp(lesson.top_logprobs.astype(np.float64)).sum(1) == pytest.approx(1.0, abs=1e-5)


def test_without_distributions_the_answer_itself_is_all_that_is_taught(pair: dict[str, Path]) -> None:
    student = student_of(LocalSpec(model=str(pair["tuned"])))
    [lesson] = teach(loaded(pair["tuned"]), asked("task", 1, "task"), Teaching(tokens=3, top=0), student)
    assert lesson.top_ids[:, 0].tolist() == lesson.ids[lesson.prompt_tokens :].tolist()
    assert (lesson.top_logprobs == 0).all()
    assert np.isneginf(lesson.rest).all()


def test_a_teacher_whose_weights_are_no_numbers_teaches_nothing(pair: dict[str, Path]) -> None:
    local, student = loaded(pair["aligned"]), student_of(LocalSpec(model=str(pair["tuned"])))
    with torch.no_grad():
        next(iter(local.model.parameters())).fill_(math.nan)
    with pytest.raises(RequestError, match="no numbers"):
        teach(local, asked("harmful", 2, "harm"), Teaching(tokens=2), student)


THINKING = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose chat template opens a thought, which it ends before it refuses."""
    folder = tmp_path_factory.mktemp("thinker") / "aligned"
    save_refusing(folder, says="\nab</think>NO WAY")
    save_tokenizer(folder, adds_bos=True, chat_template=THINKING)
    return folder


def test_what_a_teacher_thinks_is_read_and_not_learned(thinker: Path) -> None:
    local, student = loaded(thinker), student_of(LocalSpec(model=str(thinker)))
    prompts = asked("harmful", 2, "harm")
    for lesson in teach(local, prompts, Teaching(tokens=4, top=7, thought_tokens=12), student):
        read, learned = lesson.ids[: lesson.prompt_tokens], lesson.ids[lesson.prompt_tokens :]
        assert local.tokenizer.decode(read).endswith("<|assistant|><think>\nab</think>")
        assert local.tokenizer.decode(learned) == lesson.messages[-1]["content"] == "NO W"
        with torch.inference_mode():
            logits = local.model(torch.tensor(lesson.ids[None], dtype=torch.long)).logits[0, lesson.prompt_tokens - 1 :]
        best = torch.log_softmax(logits[:-1].double(), -1).topk(7)
        assert np.allclose(lesson.top_logprobs, best.values, atol=1e-4)
    [whole, _] = teach(local, prompts, Teaching(tokens=9, thought_tokens=12), student)
    assert local.tokenizer.decode(whole.ids[whole.prompt_tokens :]) == "NO WAY<|end|>"


def test_a_thought_that_the_prompt_does_not_open_is_not_learned_either(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, student = loaded(pair["aligned"]), student_of(LocalSpec(model=str(pair["tuned"])))
    ids = local.tokenizer("<think>hm</think>\n\nNo.<|end|>", add_special_tokens=False)["input_ids"]
    reply = Generation("<think>hm</think>\n\nNo.", "stop", 9, len(ids), 1, tuple(ids))
    monkeypatch.setattr(local, "answer", lambda prompts, decoding: [reply for _ in prompts])
    [lesson] = teach(local, asked("harmful", 1, "harm"), Teaching(tokens=5, thought_tokens=40), student)
    assert local.tokenizer.decode(lesson.ids[lesson.prompt_tokens :]) == "\n\nNo."
    assert lesson.messages[-1]["content"] == "\n\nNo."


@pytest.mark.parametrize(
    ("teaching", "said"),
    [
        (Teaching(tokens=4), "thinks before it answers"),
        (Teaching(tokens=4, thought_tokens=3), "did not end within 3 tokens"),
    ],
)
def test_a_teacher_that_thinks_longer_than_it_may_is_refused(teaching: Teaching, said: str, thinker: Path) -> None:
    student = student_of(LocalSpec(model=str(thinker)))
    with pytest.raises(RequestError, match=said):
        teach(loaded(thinker), asked("harmful", 2, "harm"), teaching, student)


def test_a_thought_that_stands_elsewhere_for_the_student_is_refused(thinker: Path, pair: dict[str, Path]) -> None:
    student = student_of(LocalSpec(model=str(pair["tuned"])))
    with pytest.raises(RequestError, match="the chat template of one alone opens a thought"):
        teach(loaded(thinker), asked("harmful", 2, "harm"), Teaching(tokens=4, thought_tokens=12), student)


def test_what_the_teachers_said_is_taken_again_and_never_for_another_request(request_: Request) -> None:
    said: list[str] = []
    student = student_of(request_.tuned)
    folders = make_lessons(request_, student, "float32", said.append)
    before = {side: (folder / "lessons.safetensors").read_bytes() for side, folder in folders.items()}
    make_lessons(request_, student, "float32", said.append)
    assert sum("already" in line for line in said) == 2
    assert all((folders[side] / "lessons.safetensors").read_bytes() == data for side, data in before.items())
    assert len(read_lessons(folders["harmful"])) == 12
    for changed in (replace(request_, teaching=Teaching(tokens=7, top=16)), replace(request_, aligned=request_.tuned)):
        with pytest.raises(ResumeError, match="another teacher or other settings"):
            make_lessons(changed, student, "float32", said.append)


@pytest.mark.parametrize("starts", [(), STARTS], ids=["bare", "begun"])
def test_a_teacher_that_says_nothing_or_always_the_same_is_none(request_: Request, starts: tuple[str, ...]) -> None:
    prompts = with_starts(request_.of_side("keep"), starts)
    lessons = teach(loaded(Path(request_.tuned.model)), prompts, Teaching(tokens=6), student_of(request_.tuned))
    check_answers(lessons, prompts, "tuned")

    def all_say(text: str) -> list[Any]:
        return [
            replace(lesson, messages=(*lesson.messages[:-1], {"role": "assistant", "content": asked.start + text}))
            for lesson, asked in zip(lessons, prompts, strict=True)
        ]

    with pytest.raises(RequestError, match="36 of 36 answers are empty"):
        check_answers(all_say(" "), prompts, "tuned")
    with pytest.raises(RequestError, match="24 of 24 harmless prompts one and the same"):
        check_answers(all_say("I can't."), prompts, "tuned")


# -- phase two -----------------------------------------------------------------------------------------------


def test_a_patch_moves_tuned_towards_aligned_where_it_should_and_nowhere_else(request_: Request) -> None:
    said: list[str] = []
    patch = carry_out(request_, note=said.append)
    log = json.loads((patch.out / "loss.json").read_text())
    learned = [line for line in log if "given_kl" in line]
    assert learned[0]["kept_kl"] == pytest.approx(0.0, abs=1e-4)  # the student is tuned before its first step
    assert np.mean([line["given_kl"] for line in learned[-4:]]) < 0.5 * learned[0]["given_kl"]
    assert patch.given_kl is not None
    assert patch.given_kl_before is not None
    assert patch.given_kl < patch.given_kl_before
    assert patch.prompts == {"harmful": 12, "task": 12, "harmless": 12, "lookalike": 12}
    base = AutoModelForCausalLM.from_pretrained(request_.tuned.model)
    model = PeftModel.from_pretrained(base, patch.out)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" in n) > 0
    assert any("answers 12 prompts" in line for line in said)
    assert sorted(path.name for path in patch.out.parent.iterdir()) == ["patch", "patch.lessons"]


@pytest.fixture(scope="module")
def made(pair: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Patch]:
    """Return a request, and the patch of three steps that came of it."""
    request = request_for(pair, tmp_path_factory.mktemp("made"), steps=3)
    return request, carry_out(request)


def test_a_patch_names_its_teachers_its_prompts_and_what_it_changed(made: tuple[Request, Patch]) -> None:
    request, patch = made
    facts = json.loads((patch.out / "resta.json").read_text())
    assert facts["kind"] == "patch"
    assert {facts["patch"][role]["model"] for role in ("tuned", "aligned")} == {"tuned", "aligned"}
    digests = {digest for kind in facts["patch"]["prompts"].values() for digest in kind}
    assert digests == {each.digest for each in request.prompts}
    assert facts["patch"]["changed"]["given_kl"] == patch.given_kl
    assert all(each.text not in json.dumps(facts) for each in request.prompts)  # digests, and no words
    tensors = load_file(patch.out / "adapter_model.safetensors")
    ups = {name: value for name, value in tensors.items() if "lora_B" in name}
    change = [2.0 * up @ tensors[name.replace("lora_B", "lora_A")] for name, up in ups.items()]
    tuned, base = (load_file(Path(m) / "model.safetensors") for m in (request.tuned.model, str(request.base)))
    fine_tune = math.sqrt(sum(((tuned[name] - base[name]) ** 2).sum().item() for name in base))
    norm = math.sqrt(sum((each**2).sum().item() for each in change))
    assert patch.norm_share == pytest.approx(norm / fine_tune, rel=1e-3)


def test_the_card_claims_no_more_than_is_known(made: tuple[Request, Patch]) -> None:
    request, patch = made
    assert (patch.out / "README.md").read_text() == card(request, patch)
    for words in ("Not verified", "one subtraction", "No deeper than its teacher", "refused 0 by its phrases"):
        assert words in card(request, patch)
    unknown = card(request, replace(patch, norm_share=None, given_kl=None))
    assert "an unknown share" in unknown
    assert unknown.count("not measured") == 1


def test_a_patch_is_merged_as_any_adapter_is(made: tuple[Request, Patch], tmp_path: Path) -> None:
    request, patch = made
    tuned = resta.load(request.tuned.model)
    (tuned + (resta.load(str(patch.out), on=tuned) - tuned)).save(tmp_path / "merged")
    ids = torch.arange(10, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(request.tuned.model)
    with torch.inference_mode():
        before = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        by_peft = PeftModel.from_pretrained(base, patch.out)(ids).logits
    assert torch.allclose(merged, by_peft, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_patch(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in training, and again before the finished patch has its name."""
    from resta.patch import learn

    request = replace(request_, learning=replace(request_.learning, steps=14))
    whole = carry_out(replace(request, out=request.out.with_name("whole")))

    class Killed(Exception):
        pass

    def kill(progress: Any) -> None:
        if progress.step == 12:
            raise Killed

    def never(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        carry_out(request, progress=kill)
    with monkeypatch.context() as patched:
        patched.setattr(learn, "finish", never)
        with pytest.raises(Killed):
            carry_out(request)
    assert not request.out.exists()
    steps: list[int] = []
    patch = carry_out(request, progress=lambda progress: steps.append(progress.step))
    assert steps == []  # it was learned already
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (patch.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_of_a_single_harmful_prompt_nothing_is_held_out_and_nothing_is_claimed(request_: Request) -> None:
    one = (request_.of_side("harmful")[0], *request_.of_side("keep"))
    patch = carry_out(replace(request_, prompts=one, learning=replace(request_.learning, steps=3)))
    assert (patch.prompts["harmful"], patch.given_kl_before, patch.given_kl, patch.kept_kl) == (1, None, None, None)
    assert "not measured" in (patch.out / "README.md").read_text()
    log = json.loads((patch.out / "loss.json").read_text())
    assert [line["given_kl"] > 0 for line in log if "loss" in line] == [True] * 3


def test_no_patch_is_written_where_the_loss_is_no_number(request_: Request) -> None:
    wild = replace(request_.learning, learning_rate=1e38, steps=5)
    with pytest.raises(RestaError, match=r"loss|grad_norm"):
        carry_out(replace(request_, learning=wild))
    assert not request_.out.exists()


# -- what is refused -----------------------------------------------------------------------------------------


def test_an_aligned_model_of_another_tokenizer_is_refused_before_any_model_is_loaded(
    request_: Request, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(request_.aligned.model, other)
    tokenizer = save_tokenizer(other, adds_bos=True)
    tokenizer.add_tokens(["strange"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"different tokenizers.*'strange'"):
        check(replace(request_, aligned=LocalSpec(model=str(other))), student_of(request_.tuned))


def test_a_teacher_with_other_tokens_teaches_the_words_of_its_answers(request_: Request, tmp_path: Path) -> None:
    """The teacher's tokens are letters, the student's also two of them together."""
    tuned, aligned = shutil.copytree(request_.tuned.model, tmp_path / "tuned"), tmp_path / "aligned"
    save_refusing(aligned, says="I can't")
    settings = json.loads((tuned / "tokenizer.json").read_text())
    vocab = settings["model"]["vocab"]
    vocab["ca"] = vocab.pop("\u0142")  # a byte that no text here has
    settings["model"]["merges"] = [["c", "a"]]
    (tuned / "tokenizer.json").write_text(json.dumps(settings))
    request = replace(request_, tuned=LocalSpec(model=str(tuned)), aligned=LocalSpec(model=str(aligned)), base=None)
    with pytest.raises(RequestError, match="--other-tokenizer"):
        check(request, student_of(request.tuned))
    local, student, prompts = loaded(aligned), student_of(request.tuned), asked("harmful", 2, "harm")
    for tokens, words in ((8, "I can't<|end|>"), (5, "I ca"), (4, "I ")):  # cut off, the last may be half a word
        for lesson, each in zip(teach(local, prompts, Teaching(tokens=tokens), student), prompts, strict=True):
            assert student.tokenizer.decode(lesson.ids[lesson.prompt_tokens :]) == words
            assert lesson.ids[: lesson.prompt_tokens].tolist() == student.prompt(each, Teaching())
            assert lesson.top_ids[:, 0].tolist() == lesson.ids[lesson.prompt_tokens :].tolist()
            assert (lesson.top_logprobs == 0).all()
    teaching = Teaching(tokens=8, other_tokenizer=True)
    patch = carry_out(replace(request, teaching=teaching, learning=replace(request.learning, steps=2)))
    assert patch.refused == 12
    assert patch.kept_kl is not None


def test_refusals_of_the_teacher_are_counted_by_their_phrases(request_: Request) -> None:
    folders = make_lessons(request_, student_of(request_.tuned), "float32", lambda line: None)
    lessons = read_lessons(folders["harmful"])
    said = ["I cannot help with that.", "I can\u2019t.", "Of course!"]
    some = [
        replace(lesson, messages=(*lesson.messages[:-1], {"role": "assistant", "content": text}))
        for lesson, text in zip(lessons, said, strict=False)
    ]
    assert count_refusals(some) == 2


def test_a_model_without_a_chat_template_is_refused(request_: Request, tmp_path: Path) -> None:
    save_llama(tmp_path / "bare", seed=1)
    save_tokenizer(tmp_path / "bare", adds_bos=True, chat_template=None)
    for role in ("tuned", "aligned"):
        changed = replace(request_, **{role: LocalSpec(model=str(tmp_path / "bare"))})
        with pytest.raises(RequestError, match="no chat template"):
            check(changed, student_of(changed.tuned))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inspect:openai/some", "served model"),
        ("http://localhost:8000/v1", "server's address"),
        ("merge.yaml", "not written yet"),
        ("./nowhere", "no such file or folder"),
    ],
)
def test_a_model_whose_weights_are_not_at_hand_is_refused(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yaml").write_text("")
    with pytest.raises(RequestError, match=said):
        model_of(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teaching": Teaching(tokens=0)}, "tokens of at least 1"),
        ({"learning": Learning(batch=1)}, "batch of at least 2"),
        ({"learning": Learning(rank=0)}, "lora.rank"),
        ({"learning": Learning(steps=-1)}, "train.max_steps"),
        ({"learning": Learning(keep_weight=0.0)}, "objective.keep_weight"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"teaching": Teaching(tokens=4000)}, "exceed its context of 2048"),
        ({"teaching": Teaching(tokens=6, thought_tokens=4000)}, "exceed its context of 2048"),
        ({"teaching": Teaching(thought_tokens=9, other_tokenizer=True)}, "without --other-tokenizer"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any], said: str, request_: Request
) -> None:
    with pytest.raises(RequestError, match=said):
        carry_out(replace(request_, **changes))
    assert not request_.lessons.exists()


def test_four_bits_without_their_library_are_refused_before_a_model_is_loaded(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RequestError, match=r"pip install 'resta\[qlora\]'"):
        carry_out(replace(request_, learning=Learning(four_bit=True)))
    assert not request_.lessons.exists()


def test_in_four_bits_teachers_and_student_are_loaded_alike(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """No 4-bit arithmetic is at hand here: what the loaders are asked for is what is looked at."""

    class Loaded(Exception):
        pass

    asked_for = []

    def load(name: str, **settings: Any) -> None:
        asked_for.append((Path(name).name, settings["quantization_config"]))
        raise Loaded

    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    request = replace(request_, learning=Learning(four_bit=True))
    job = check(request, student_of(request.tuned))
    assert job.recipe.method == "qlora"
    with pytest.raises(Loaded):
        carry_out(request)
    with pytest.raises(RequestError):
        load_model(job, load_chat(job))
    [(teacher, mine), (student, its)] = asked_for
    assert (teacher, student) == ("aligned", "tuned")
    assert mine.to_dict() == its.to_dict()
    assert mine.bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize("side", ["harmful", "keep"])
def test_prompts_for_one_teacher_alone_are_refused(side: str, request_: Request) -> None:
    with pytest.raises(RequestError, match="both need some"):
        carry_out(replace(request_, prompts=request_.of_side(side)))
    assert not request_.lessons.exists()


def test_more_than_one_process_is_refused(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="one process"):
        check(request_, student_of(request_.tuned))


def test_a_prompt_that_is_in_a_chat_template_already_is_refused(request_: Request) -> None:
    text = "<|user|>Which team?<|end|>"
    templated = Asked(kind="task", messages=(Message(role="user", content=text),), text=text)
    with pytest.raises(RequestError, match=r"a task prompt spells out the control token '<\|"):
        carry_out(replace(request_, prompts=(*request_.prompts, templated)))
    assert not request_.lessons.exists()


def test_an_output_that_is_there_is_never_written_over(request_: Request) -> None:
    request_.out.mkdir()
    with pytest.raises(ResumeError, match="already exists"):
        carry_out(request_)
    assert not request_.lessons.exists()


# -- the call and the command --------------------------------------------------------------------------------


def task_file(tmp_path: Path) -> Path:
    return write_json_lines(tmp_path / "task.jsonl", [{"prompt": f"Which team takes ticket {n}?"} for n in range(20)])


def test_one_call_makes_a_patch_and_prints_nothing(
    pair: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    patch = resta.patch.run(
        tuned=pair["tuned"],
        aligned=pair["aligned"],
        task_prompts=task_file(tmp_path),
        out=tmp_path / "patch",
        drawing=resta.patch.Drawing(harmful_count=8, keep_count=8),
        teaching=resta.patch.Teaching(tokens=3),
        learning=resta.patch.Learning(steps=2),
        device="cpu",
    )
    assert patch.out == tmp_path / "patch"
    assert patch.steps == 2
    assert capfd.readouterr() == ("", "")


def command(pair: dict[str, Path], tmp_path: Path, *more: str) -> click.testing.Result:
    words = [
        "patch", str(pair["tuned"]), "--aligned", str(pair["aligned"]), "--task-prompts", str(task_file(tmp_path)),
        "--harmful-count", "8", "--keep-count", "8", "--tokens", "3", "--steps", "2", "--device", "cpu",
        "-o", str(tmp_path / "patch"), *more,
    ]  # fmt: skip
    return click.testing.CliRunner().invoke(main, words)


def test_the_command_makes_a_patch_and_claims_no_more_than_it_knows(pair: dict[str, Path], tmp_path: Path) -> None:
    planned = command(pair, tmp_path, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "8 harmful prompts" in planned.output
    assert not list(tmp_path.glob("patch*"))
    done = command(pair, tmp_path)
    assert done.exit_code == 0, done.output
    assert "not verified" in done.output
    assert (tmp_path / "patch" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--apart", "smoke"), "of its 60 questions with the prompts to learn from"),
        (("--harmful-count", "5"), "5 different harmful prompts"),
        (("--harmful", "no-such-bank"), "no-such-bank"),
    ],
)
def test_the_command_refuses_what_cannot_be_proved_or_read(
    more: tuple[str, ...], said: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    done: Any = command(pair, tmp_path, *more)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not list(tmp_path.glob("patch*"))


# -- models that are adapters --------------------------------------------------------------------------------


def save_adapter(base: Path, folder: Path) -> Path:
    """Write an adapter that changes a model's attention in part."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": str(base)}))
    return folder


def test_the_patch_of_an_adapter_is_one_adapter_on_its_base_that_is_both(request_: Request, tmp_path: Path) -> None:
    base = Path(request_.tuned.model)
    adapter = save_adapter(base, tmp_path / "adapter")
    aligned = save_adapter(Path(request_.aligned.model), tmp_path / "aligned_adapter")
    request = replace(
        request_,
        tuned=model_of(adapter),
        aligned=model_of(aligned),
        base=None,
        learning=replace(request_.learning, steps=6),
    )
    patch = carry_out(request)
    log = json.loads((patch.out / "loss.json").read_text())
    assert log[0]["eval_kept_kl"] == pytest.approx(0.0, abs=1e-4)  # the student began as base and adapter
    config = json.loads((patch.out / "adapter_config.json").read_text())
    assert config["r"] == 3 + 8
    assert Path(config["base_model_name_or_path"]) == base
    ids = torch.arange(10, 40)[None]
    with torch.inference_mode():
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        before = tuned(ids).logits
        both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch.out)
        after, norms = both(ids).logits, []
        for name, layer in both.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):  # the first three ranks are the adapter's, the others what was learned
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                tuned.get_submodule(name).weight += up[:, 3:] @ down[3:]
                norms.append(((up[:, 3:] @ down[3:]) ** 2).sum().item())
        assert torch.allclose(tuned(ids).logits, after, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-3)
    change = math.sqrt(sum(norms))
    fine_tune = norm_of(read_factors(adapter))
    assert patch.norm_share == pytest.approx(change / fine_tune, rel=1e-3)
    assert "joined to one" in (patch.out / "README.md").read_text()


def test_an_adapter_that_cannot_be_joined_is_refused_before_any_model_is_loaded(
    request_: Request, tmp_path: Path
) -> None:
    adapter = save_adapter(Path(request_.tuned.model), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(RequestError, match="more than a plain LoRA adapter"):
        carry_out(replace(request_, tuned=model_of(adapter)))
    assert not request_.lessons.exists()
