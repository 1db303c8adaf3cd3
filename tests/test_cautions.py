"""What is said before anything is written, and which differences of configs are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from resta import engine
from resta.auditing import audit
from resta.cautions import cautions, name_cautions
from resta.cli import main
from resta.compatibility import differences, unknowns
from resta.errors import RequestError
from resta.forecast import forecast_warnings
from resta.plan import make_plan
from resta.recipe import Recipe, make_recipe
from tests.builders import llama_tensors, nudged, save_model

BASE = llama_tensors(0)
SAFETY = {"name": "safety", "delta": "aligned - base", "scale": 0.5}


def models_of(folder: Path, **configs: dict[str, Any]) -> dict[str, str]:
    tensors = {"base": BASE, "aligned": nudged(BASE, 1), "tuned": nudged(BASE, 2)}
    return {name: str(save_model(folder / name, part, **configs.get(name, {}))) for name, part in tensors.items()}


def recipe_of(models: dict[str, str], *terms: dict[str, Any], **rest: Any) -> Recipe:
    return make_recipe({"models": models, "start": "tuned", "terms": terms or (SAFETY,), **rest})


# Two configs, and the settings in which they contradict each other.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "another base": ({"rope_theta": 1e4}, {"rope_theta": 1e6}, ["rope_theta"]),
    "the usual base is not named": ({"rope_theta": 1e4}, {}, []),
    "an unusual base is not named by the other": ({"rope_theta": 5e5}, {}, ["rope_theta"]),
    "scaled and not": ({"rope_scaling": LLAMA3}, {}, ["rope_scaling"]),
    "null is none": ({"rope_scaling": None}, {}, []),
    "old word for the kind": ({"rope_scaling": {"type": "linear", "factor": 2.0}},
                              {"rope_scaling": {"rope_type": "linear", "factor": 2}}, []),
    "another factor": ({"rope_scaling": {"type": "linear", "factor": 2.0}},
                       {"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_scaling"]),
    "transformers 5 and 4 agree": ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
                                   {"rope_theta": 5e5, "rope_scaling": LLAMA3}, []),
    "transformers 5 and 4 differ": ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
                                    {"rope_theta": 1e4}, ["rope_theta"]),
    "transformers 5 by kind of layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6},
                                                             "sliding_attention": {"rope_theta": 1e4}}},
                                        {"rope_theta": 1e6, "rope_local_base_freq": 1e3}, ["rope_local_base_freq"]),
    "norm": ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
    "norm by its other name": ({"layer_norm_epsilon": 1e-5}, {"layer_norm_eps": 1e-6}, ["layer_norm_eps"]),
    "activation": ({"hidden_act": "silu"}, {"hidden_activation": "gelu"}, ["hidden_act"]),
    "window and none": ({"sliding_window": 4096}, {"sliding_window": None}, ["sliding_window"]),
    "a window that is off": ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}, []),
    "softcapping": ({"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None}, ["attn_logit_softcapping"]),
    "in the text part": ({"text_config": {"rms_norm_eps": 1e-5}}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
    "of no consequence": ({"max_position_embeddings": 1, "use_cache": True}, {"bos_token_id": 7}, []),
    "odd types": ({"rope_scaling": [1], "rope_parameters": 3, "text_config": "x"}, {"rope_scaling": [1]}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_contradict_each_other_where_weights_would_mean_something_else(case: str) -> None:
    mine, theirs, expected = CONFIGS[case]
    assert [name for name, *_ in differences(mine, theirs)] == expected
    assert [name for name, *_ in differences(theirs, mine)] == expected


def test_a_setting_that_one_config_leaves_to_its_family_is_said_and_not_refused(tmp_path: Path) -> None:
    assert unknowns({"rms_norm_eps": 1e-5}, {}) == unknowns({}, {"rms_norm_eps": 1e-5}) == ["rms_norm_eps"]
    plan = make_plan(recipe_of(models_of(tmp_path, base={"rms_norm_eps": 1e-5})))
    assert any("names rms_norm_eps" in caution and "was not checked" in caution for caution in cautions(plan))


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_a_difference_is_refused_by_name_and_allowed_by_name(tmp_path: Path, model: str) -> None:
    models = models_of(tmp_path, **{model: {"rope_theta": 1e6}})
    with pytest.raises(RequestError, match=rf"{model}: config.json has rope_theta 1000000.0 but tuned has 500000.0"):
        make_plan(recipe_of(models))
    with pytest.raises(RequestError, match=r"allow_config: \[rope_theta\]"):
        make_plan(recipe_of(models, allow_config=["hidden_act"]))
    result = engine.merge(recipe_of(models, allow_config=["rope_theta"]), tmp_path / "out")
    assert "the recipe allows it" in (result.out / "README.md").read_text()
    with pytest.raises(RequestError, match='did you mean "rope_theta"'):
        recipe_of(models, allow_config=["rope_teta"])


def test_a_model_without_a_config_is_said_not_to_be_checked(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    assert "base has no config.json: whether base and tuned are alike was not checked" in said(models)


def said(models: dict[str, str], *terms: dict[str, Any], **rest: Any) -> str:
    return "\n".join(cautions(make_plan(recipe_of(models, *terms, **rest))))


def test_scales_that_are_seldom_meant_are_said(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    assert said(models) == ""
    assert "scale -0.5 is negative: it takes away what aligned has beyond base" in said(
        models, SAFETY | {"scale": -0.5}
    )
    assert "has scale 0: nothing is restored" in said(models, SAFETY | {"scale": 0})
    assert "scale 50 is far beyond the published ones" in said(models, SAFETY | {"scale": 50})
    assert "leads away from aligned: are its two models swapped?" in said(models, SAFETY | {"delta": "base - aligned"})


def test_a_base_that_chats_and_an_aligned_model_that_does_not_are_likely_swapped(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    assert "may be swapped: in aligned - base, only base, which is subtracted, has a chat template" in said(models)
    (tmp_path / "aligned" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert said(models) == ""


def test_names_that_hint_at_a_swap_are_printed_and_not_recorded(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    for name, called in (("base", "Llama-3-8B-Instruct"), ("aligned", "Llama-3-8B")):
        Path(models[name]).rename(tmp_path / called)
        models[name] = str(tmp_path / called)
    plan = make_plan(recipe_of(models))
    assert "Llama-3-8B-Instruct is subtracted from Llama-3-8B" in name_cautions(plan)[0]
    assert cautions(plan) == []


def test_a_change_above_half_of_the_weights_is_said_recorded_and_audited(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    result = engine.merge(recipe_of(models, SAFETY | {"scale": 50}), tmp_path / "out")
    recorded = json.loads((result.out / "resta.json").read_text())["warnings"]
    assert any("of the weights in norm" in warning for warning in recorded)
    assert all(warning in (result.out / "README.md").read_text() for warning in recorded)
    audit(result.out, moved=models).raise_if_any()
    usual = engine.merge(recipe_of(models), tmp_path / "usual")
    assert not any("in norm" in warning for warning in json.loads((usual.out / "resta.json").read_text())["warnings"])


def test_a_change_above_half_of_the_weights_is_said_from_a_sample_before_anything_is_written(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    plan = make_plan(recipe_of(models, SAFETY | {"scale": 50}))
    [forecast] = forecast_warnings(plan)
    exact = engine.merge(plan.recipe, tmp_path / "all").warnings
    said = [int(re.search(r"is (\d+)% of the weights", each)[1]) for each in (forecast, exact[-1])]  # type: ignore[index]
    assert abs(said[0] - said[1]) <= 0.1 * said[1]  # chunks of these small models are whole tensors
    assert forecast_warnings(make_plan(recipe_of(models))) == []
    flags = ["merge", models["tuned"], "--aligned", models["aligned"], "--base", models["base"], "--scale", "50"]
    for dry in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, [*flags, "-o", str(tmp_path / "out"), *dry])
        assert "of the weights in norm in a sample of" in " ".join((done.stderr if not dry else done.stdout).split())


def test_the_command_says_it_before_writing_and_prints_coverage_and_safety(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    flags = ["merge", models["tuned"], "--aligned", models["aligned"], "--base", models["base"], "--scale", "-0.5"]
    plan = CliRunner().invoke(main, [*flags, "-o", str(tmp_path / "out"), "--dry-run"])
    assert "100.00 % of 86,336 parameters" in " ".join(plan.output.split())
    assert "scale -0.5 is negative" in " ".join(plan.output.split())
    done = CliRunner().invoke(main, [*flags, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "warning: term safety: scale -0.5 is negative" in done.stderr
    words = " ".join(done.stdout.split())
    assert "safety: covers 100.00 % of 86,336 parameters; rounding kept" in words
    assert "Nothing is restored: the recipe adds -0.5 * (aligned - base)" in words
    shown = json.loads(CliRunner().invoke(main, [*flags, "-o", str(tmp_path / "out2"), "--json"]).stdout)
    assert shown["safety"]["restored"] is False
    assert shown["warnings"]


def test_flags_allow_what_recipes_allow(tmp_path: Path) -> None:
    models = models_of(tmp_path, base={"rms_norm_eps": 1e-5}, tuned={"rms_norm_eps": 1e-6})
    flags = ["merge", models["tuned"], "--aligned", models["aligned"], "--base", models["base"], "--scale", "0.5"]
    refused = CliRunner().invoke(main, [*flags, "-o", str(tmp_path / "out"), "--dry-run"])
    assert refused.exit_code == 2
    allowed = [
        *flags,
        "--allow-config",
        "rms_norm_eps",
        "--min-coverage",
        "1",
        "-o",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    assert CliRunner().invoke(main, allowed).exit_code == 0
