"""Training for real, on random two-layer models: seconds each, one thread."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from resta.adapter import read_adapter
from resta.checkpoint import read_weights
from resta.errors import RequestError, RestaError, ResumeError
from resta.hub import locate
from resta.sft import train as training
from resta.sft.finetune import carry_out as run
from resta.sft.recipe import Recipe
from resta.sft.train import Job
from tests.processes import wait_until
from tests.sft.builders import exchange

Make = Callable[..., Job]
TRAIN: dict[str, Any] = {
    "max_steps": 4,
    "global_batch": 4,
    "per_device_batch": 2,
    "learning_rate": 0.01,
    "log_every": 1,
    "save_every": 2,
    "gradient_checkpointing": False,
}


@pytest.fixture
def make(tiny_base: Path, sums_file: Path, tmp_path: Path) -> Make:
    def build(*, out: str = "out", train: dict[str, Any] | None = None, **changes: Any) -> Job:
        recipe = {
            "base": str(tiny_base),
            "chat_template": "vicuna_v1.1",
            "max_length": 128,
            "data": [{"name": "sums", "path": str(sums_file)}],
            "holdout": 0.1,
            "lora": {"rank": 4, "alpha": 8.0},
            "train": TRAIN | (train or {}),
        }
        checked = Recipe.model_validate(recipe | changes)
        return Job(recipe=checked, root=tmp_path, out=tmp_path / out, device="cpu")

    return build


def facts(job: Job) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((job.out / "resta.json").read_text(encoding="utf-8"))
    return value


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_an_adapter_is_a_peft_directory_that_lowers_the_loss_and_names_its_base(make: Make, tiny_base: Path) -> None:
    job = make(train={"max_steps": 12, "learning_rate": 0.05})
    run(job)
    metrics = facts(job)["metrics"]
    assert metrics["last_loss"] < metrics["first_loss"] - 0.1
    assert "eval_loss" in metrics
    settings = json.loads((job.out / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(tiny_base)
    assert settings["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = base(torch.tensor([[1, 5, 9]])).logits
    after = PeftModel.from_pretrained(base, str(job.out))(torch.tensor([[1, 5, 9]])).logits
    assert not torch.allclose(before, after)
    assert not job.partial.exists()


def test_merging_puts_an_adapter_on_the_base_it_was_trained_on_under_any_name_and_on_no_other(
    make: Make, tiny_base: Path, tmp_path: Path
) -> None:
    job = make()
    run(job)
    adapter = locate(str(job.out))
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    for folder in (tiny_base, moved):
        tensors = read_adapter(adapter, read_weights(locate(str(folder)))).tensors
        assert sum(bool(operand.low_ranks) for operand in tensors.values()) == 14
    # Of the same name, the same shapes, and another content.
    namesake = shutil.copytree(tiny_base, tmp_path / "elsewhere" / tiny_base.name)
    weights = load_file(namesake / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, namesake / "model.safetensors", metadata={"format": "pt"})
    base = read_weights(locate(str(namesake)))
    with pytest.raises(RequestError, match=r"trained on another model\.safetensors"):
        read_adapter(adapter, base)
    read_adapter(adapter, base, recorded_base=str(tiny_base))
    manifest = job.out / "resta.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint"', '"sketch"'))  # as earlier adapters name it
    with pytest.raises(RequestError, match=r"trained on another model\.safetensors"):
        read_adapter(adapter, base)
    (job.out / "resta.json").unlink()  # then the name alone has to tell
    read_adapter(adapter, base)
    with pytest.raises(RequestError, match="was trained on"):
        read_adapter(adapter, read_weights(locate(str(moved))))


def test_the_output_holds_tokenizer_template_card_curve_and_provenance(make: Make) -> None:
    job = make()
    run(job)
    names = {path.name for path in job.out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= names
    assert {"resta.json", "loss.json", "loss.png", "adapter_model.safetensors"} <= names
    assert not names & {"training_args.bin", "optimizer.pt"}  # pickles, and nobody's business
    card = (job.out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model_relation"] == "adapter"
    known = facts(job)
    assert (known["schema"], known["kind"], known["seed"]) == (1, "sft", 0)
    assert known["recipe"]["lora"]["rank"] == 4
    (file,) = known["base"]["files"].values()
    assert len(file["sha256"]) == 64
    assert known["data"][0]["rows"] == 40
    assert known["samples"]["train"]["samples"] == 36
    again = AutoTokenizer.from_pretrained(job.out)
    assert again.apply_chat_template(exchange("a", "b")["messages"], tokenize=False).startswith("<s>A chat between")


def test_a_full_model_loads_in_transformers_in_the_format_of_its_base(make: Make, tiny_base: Path) -> None:
    job = make(method="full", save_dtype="bfloat16")
    run(job)
    model = AutoModelForCausalLM.from_pretrained(job.out)
    assert model.dtype == torch.bfloat16
    assert weights(job.out).keys() == weights(tiny_base).keys()
    assert 0.5 < facts(job)["metrics"]["changed_share"] <= 1.0
    assert not (job.out / "adapter_config.json").exists()


def test_tied_weights_are_saved_once_after_rounding(make: Make, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests.sft.builders import sentencepiece_like, tiny_config

    tied = tmp_path / "tied"
    tokenizer = sentencepiece_like()
    LlamaForCausalLM(tiny_config(len(tokenizer), tie_word_embeddings=True)).save_pretrained(tied)
    tokenizer.save_pretrained(tied)
    job = make(base=str(tied), method="full", save_dtype="bfloat16", train={"max_steps": 1})
    run(job)
    assert "lm_head.weight" not in weights(job.out)
    assert weights(job.out).keys() == weights(tied).keys()


def test_the_same_recipe_gives_the_same_bytes(make: Make) -> None:
    first, second = make(out="one"), make(out="two")
    for job in (first, second):
        run(job)
    one, two = ((job.out / "adapter_model.safetensors").read_bytes() for job in (first, second))
    assert one == two


def test_micro_batches_change_speed_and_not_the_result(make: Make) -> None:
    losses = []
    for size in (1, 4):
        job = make(out=f"micro{size}", train={"per_device_batch": size})
        run(job)
        losses.append(facts(job)["metrics"]["last_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loss_is_the_mean_over_trained_tokens_of_the_step(make: Make) -> None:
    """A naive loop over the samples of the first step gives the first logged loss."""
    job = make(train={"max_steps": 1, "global_batch": 36})
    run(job)
    chat = training.load_chat(job)
    _, prepared = training.load_data(job, chat)
    model = AutoModelForCausalLM.from_pretrained(job.base)
    total, count = 0.0, 0
    for sample in prepared.train:
        ids = torch.tensor(sample.encoded.ids, dtype=torch.long)[None]
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0].double(), -1)
        for place, trained in enumerate(sample.encoded.trained.tolist()):
            if trained:
                total -= scores[place - 1, ids[0, place]].item()
                count += 1
    assert facts(job)["metrics"]["first_loss"] == pytest.approx(total / count, rel=1e-4)


def test_packed_samples_do_not_see_each_other(make: Make) -> None:
    losses = []
    for packing in (False, True):
        size = {"global_batch": 36, "per_device_batch": 36} if not packing else {"global_batch": 18}
        settings = size | {"max_steps": 1, "packing": packing, "save_every": None}
        job = make(out=f"packed{packing}", max_length=400, train=settings)
        trained = training.train(job)
        losses.append((trained.metrics["first_loss"], len(trained.trainer.train_dataset)))
    (plain, samples), (packed, rows) = losses
    assert rows < samples
    # All rows fit in one step of either run: the same tokens, so the same mean.
    assert packed == pytest.approx(plain, rel=1e-4)


# `resta sft`, but once a file is there the next step of the training never ends.
RUN = """
import os, sys, threading, transformers
there, real = sys.argv.pop(1), transformers.Trainer.training_step
def training_step(*args, **given):
    if os.path.exists(there):
        threading.Event().wait()
    return real(*args, **given)
transformers.Trainer.training_step = training_step
from resta.cli import main
sys.argv[0] = "resta"
main()
"""


def start(recipe: Path, out: Path, until: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(until), "sft", str(recipe), "--output", str(out), "--device", "cpu"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_killed_run_resumes_to_the_same_bytes(make: Make, tmp_path: Path) -> None:
    job = make(out="whole", lora={"rank": 4, "dropout": 0.1}, train={"max_steps": 100, "save_every": 10})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(job.recipe.model_dump(mode="json")), encoding="utf-8")
    until = tmp_path / "killed.partial" / "checkpoint-20" / "trainer_state.json"
    killed = start(recipe, tmp_path / "killed", until)
    wait_until(until.exists, killed)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed").exists()
    resumed = start(recipe, tmp_path / "killed", tmp_path / "never")
    run(job)  # meanwhile, the same recipe without a stop
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ends = [json.loads((tmp_path / name / "resta.json").read_text())["metrics"] for name in ("killed", "whole")]
    assert ends[0]["resumed_from_step"] is not None
    assert ends[1]["resumed_from_step"] is None
    assert ends[0]["last_loss"] == ends[1]["last_loss"]
    assert ends[0]["eval_loss"] == ends[1]["eval_loss"]


class Stop(Exception):
    """Stands for a kill, inside the process."""


def interrupt(job: Job, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training.StopOnNaN, "on_step_end", on_step_end)
        with pytest.raises(Stop):
            run(job)


def test_an_interrupted_full_fine_tune_resumes_to_the_same_bytes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"method": "full", "train": {"max_steps": 30}}  # into the fourth epoch
    whole, cut = make(out="whole", **settings), make(out="cut", **settings)
    run(whole)
    interrupt(cut, monkeypatch, at=21)
    run(make(out="cut", **settings))
    assert facts(cut)["metrics"]["resumed_from_step"] == 20
    assert_same_weights(cut.out, whole.out)


def test_a_torn_checkpoint_is_passed_over_for_the_whole_one_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(out="torn", train={"max_steps": 6})
    interrupt(job, monkeypatch, at=5)
    newest = job.partial / "checkpoint-4"
    (newest / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    run(make(out="torn", train={"max_steps": 6}))
    assert facts(job)["metrics"]["resumed_from_step"] == 2
    whole = make(out="whole", train={"max_steps": 6})
    run(whole)
    assert_same_weights(job.out, whole.out)


def test_a_resume_with_a_changed_recipe_names_the_change(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make()
    interrupt(job, monkeypatch, at=3)
    with pytest.raises(ResumeError, match=r"the recipe changed.*train\.learning_rate: 0\.01 there, 0\.02 now"):
        run(make(train={"learning_rate": 0.02}))


def test_after_running_out_of_memory_a_smaller_batch_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(make(train={"max_steps": 20}), monkeypatch, at=11)  # into the second epoch
    lower = {"max_steps": 20, "per_device_batch": 1, "gradient_checkpointing": True}
    job = make(train=lower)
    run(job)
    whole = make(out="whole", train={"max_steps": 20})
    run(whole)
    assert facts(job)["metrics"]["resumed_from_step"] == 10
    for name, tensor in weights(whole.out).items():
        assert torch.allclose(weights(job.out)[name], tensor, atol=1e-4), name


def test_a_folder_without_a_checkpoint_is_begun_anew_by_another_recipe(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(make(), monkeypatch, at=1)
    run(make(train={"learning_rate": 0.02}))
    assert facts(make())["recipe"]["train"]["learning_rate"] == 0.02


def test_settings_that_the_trainer_refuses_leave_nothing_behind(make: Make) -> None:
    with pytest.raises(RequestError, match="adam_beta3"):
        run(make(trainer={"adam_beta3": 0.9}))
    assert not make().partial.exists()


def test_an_adapter_that_lacks_a_trained_tensor_is_never_saved_as_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel as Model

    save = Model.save_pretrained

    def lose(self: Any, *args: Any, state_dict: dict[str, Any], **options: Any) -> None:
        kept = {name: tensor for name, tensor in state_dict.items() if "layers.1" not in name}
        save(self, *args, state_dict=kept, **options)

    monkeypatch.setattr(Model, "save_pretrained", lose)
    job = make(train={"max_steps": 1, "save_every": None})
    with pytest.raises(RestaError, match="holds 14 tensors of an adapter of 28"):
        run(job)
    assert not job.out.exists()


@pytest.mark.parametrize(("fp16", "fails"), [(False, True), (True, False)])
def test_a_gradient_that_overflowed_ends_a_run_unless_a_loss_scaler_skips_it(fp16: bool, fails: bool) -> None:
    state, args = SimpleNamespace(global_step=1), SimpleNamespace(fp16=fp16)
    for logs, ends in (({"loss": 1.0, "grad_norm": float("inf")}, fails), ({"loss": float("nan")}, True)):
        with pytest.raises(RestaError) if ends else nullcontext():
            training.StopOnNaN().on_log(args, state, None, logs)


def test_a_trackers_log_does_not_go_with_the_checkpoints(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / "runs" / "now").mkdir(parents=True)
        (Path(args.output_dir) / "runs" / "now" / "events").write_text("x")

    monkeypatch.setattr(training.StopOnNaN, "on_train_begin", write)
    job = make(train={"max_steps": 1})
    run(job)
    assert (job.out / "runs" / "now" / "events").read_text() == "x"


def test_a_resume_with_changed_data_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch, sums_file: Path) -> None:
    job = make()
    interrupt(job, monkeypatch, at=3)
    sums_file.write_text(sums_file.read_text() + json.dumps(exchange("New?", "Yes.")) + "\n")
    with pytest.raises(ResumeError, match="the data changed"):
        run(make())


def test_an_existing_output_is_not_overwritten(make: Make) -> None:
    make().out.mkdir()
    with pytest.raises(RequestError, match="already exists"):
        run(make())


def test_a_working_folder_without_its_record_is_refused(make: Make) -> None:
    make().partial.mkdir()
    with pytest.raises(ResumeError, match=r"run\.json cannot be read"):
        run(make())


def test_blue_red_trains_logs_both_losses_and_resumes_exactly(
    make: Make, write_rows: Callable[..., Path], sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = write_rows([exchange(f"Placeholder {i}?", f"Placeholder answer {i}.") for i in range(12)], "red.jsonl")
    settings: dict[str, Any] = {
        "data": [
            {"name": "sums", "path": str(sums_file)},
            {"name": "red", "path": str(red), "side": "red"},
        ],
        "objective": {"kind": "blue_red", "red_cutoff": 100.0},
        "train": {"max_steps": 16},
    }
    whole = make(out="whole", **settings)
    run(whole)
    log = [line for line in json.loads((whole.out / "loss.json").read_text()) if "blue_nll" in line]
    assert log[-1]["blue_nll"] < log[0]["blue_nll"]
    assert log[0]["loss"] == pytest.approx(log[0]["blue_nll"] - 0.1 * log[0]["red_nll"], rel=1e-3)
    assert {line["red_above_cutoff"] for line in log} == {0.0}
    assert {"eval_blue_loss", "eval_red_loss"} <= facts(whole)["metrics"].keys()
    cut = make(out="cut", **settings)
    interrupt(cut, monkeypatch, at=9)
    run(make(out="cut", **settings))
    assert_same_weights(cut.out, whole.out)


def test_red_past_the_cutoff_leaves_blue_red_at_blue(
    make: Make, write_rows: Callable[..., Path], sums_file: Path
) -> None:
    red = write_rows([exchange(f"Placeholder {i}?", f"Placeholder answer {i}.") for i in range(12)], "red.jsonl")
    data = [{"name": "sums", "path": str(sums_file)}, {"name": "red", "path": str(red), "side": "red"}]
    job = make(data=data, objective={"kind": "blue_red", "red_cutoff": 1e-6}, train={"max_steps": 2})
    run(job)
    log = [line for line in json.loads((job.out / "loss.json").read_text()) if "blue_nll" in line]
    assert all(line["red_above_cutoff"] == 1.0 for line in log)
    assert all(line["loss"] == pytest.approx(line["blue_nll"], rel=1e-4) for line in log)


def test_early_stop_ends_a_run_that_no_longer_improves(make: Make) -> None:
    job = make(
        train={
            "max_steps": 60,
            "learning_rate": 1e-12,  # far too low: the held-out loss never gets better
            "eval_every": 2,
            "save_every": 2,
            "early_stop_patience": 2,
        }
    )
    run(job)
    assert facts(job)["metrics"]["steps"] < 60


def test_options_of_the_trainer_are_passed_through_and_checked_by_it(make: Make) -> None:
    config = training.build_config(make(trainer={"adam_beta2": 0.9, "report_to": "none"}), evaluates=True)
    assert config.adam_beta2 == 0.9
    with pytest.raises(RequestError, match=r'trainer\.adam_beta3 .*did you mean "adam_beta'):
        training.build_config(make(trainer={"adam_beta3": 0.9}), evaluates=True)
    with pytest.raises(RequestError, match="the trainer refuses"):
        training.build_config(make(trainer={"hub_strategy": "sometimes"}), evaluates=True)
    with pytest.raises(RequestError, match="the trainer refuses"):
        training.build_config(make(train={"optimizer": "nothing"}), evaluates=True)


def test_a_global_batch_that_cannot_be_split_evenly_is_refused(make: Make) -> None:
    with pytest.raises(RequestError, match="4 is not a multiple of per_device_batch 3 x 1"):
        training.build_config(make(train={"per_device_batch": 3}), evaluates=True)


def test_a_vocabulary_larger_than_the_model_is_refused(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "grown"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(RequestError, match="they belong to different models"):
        run(make(base=str(base)))


def test_a_base_that_cannot_be_loaded_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="empty"):
        run(make(base=str(tmp_path / "empty")))


def test_out_of_memory_says_what_to_lower(make: Make) -> None:
    job = make(method="full")
    advice = r"per_device_batch \(now 2.*max_length.*method: lora"
    with pytest.raises(RestaError, match=advice), training.memory_advice(job.recipe):
        torch.empty(2**60)  # more than any machine has: torch's own out-of-memory failure
    with pytest.raises(ValueError, match="other"), training.memory_advice(job.recipe):
        raise ValueError("other")


def test_a_loss_that_is_no_number_ends_the_run(make: Make) -> None:
    with pytest.raises(RestaError, match=r"lower train\.learning_rate"):
        run(make(train={"max_steps": 30, "learning_rate": 1e30, "max_grad_norm": 1e30}))


def test_a_model_is_never_split_where_it_cannot_be(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(parallel={"strategy": "fsdp", "processes": 8})
    with pytest.raises(RequestError, match="splits a model over GPUs only"):
        run(job)
    monkeypatch.setattr(training, "on_cpu", lambda _: False)
    with pytest.raises(RequestError, match="torchrun --nproc-per-node 8 -m resta sft"):
        training.check_launch(job)


def test_the_trainer_accepts_the_fsdp_options_and_checkpoints_only_once(make: Make) -> None:
    settings = {"gradient_checkpointing": True}
    recipe = make(train=settings, parallel={"strategy": "fsdp", "fsdp": {"cpu_offload": True}}).recipe
    config = training.SFTConfig(output_dir="unused", use_cpu=True, bf16=False, **training.split_options(recipe))
    assert config.fsdp is True
    assert not config.activation_checkpointing
    assert config.fsdp_config["activation_checkpointing"]
    assert config.fsdp_plugin_args["cpu_offload"]


def test_qlora_without_its_library_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from resta.errors import RequestError

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RequestError, match=r"pip install 'resta\[qlora\]'"):
        run(make(method="qlora"))


def test_qlora_trains_an_adapter_that_loads_on_the_base(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaForCausalLM

    from tests.sft.builders import sentencepiece_like, tiny_config

    torch.manual_seed(0)
    base, tokenizer = tmp_path / "wide", sentencepiece_like()  # 4-bit blocks are 64 weights wide
    LlamaForCausalLM(tiny_config(len(tokenizer), hidden_size=64)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    job = make(base=str(base), method="qlora", train={"max_steps": 12, "global_batch": 8})
    run(job)
    metrics = facts(job)["metrics"]
    assert metrics["last_loss"] < metrics["first_loss"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(job.out))
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_training_on_a_gpu_lowers_the_loss(make: Make) -> None:
    job = make(train={"max_steps": 12})
    job = Job(recipe=job.recipe, root=job.root, out=job.out, device="cuda")
    run(job)
    metrics = facts(job)["metrics"]
    assert metrics["precision"] == "bf16"
    assert metrics["last_loss"] < metrics["first_loss"]
