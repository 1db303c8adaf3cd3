"""What the finished directory says of itself, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resta.engine import merge
from resta.recipe import load_recipe
from tests.builders import lora_models


@pytest.mark.parametrize("anchored", [True, False])
def test_no_file_of_the_output_says_where_an_input_lay(
    anchored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "users" / "alice" / "unreleased"
    home.mkdir(parents=True)
    models: dict[str, Any] = lora_models(home)
    lora = home / "lora" / "adapter_config.json"
    recorded = "models-of-alice/base-0" if anchored else "/users/alice/base-0"
    lora.write_text(json.dumps(json.loads(lora.read_text()) | {"base_model_name_or_path": recorded}))
    models["tuned"]["recorded_base"] = recorded
    if not anchored:
        models = {
            "base": "unreleased/base",
            "aligned": "./unreleased/../unreleased/aligned",
            "tuned": {**models["tuned"], "source": "unreleased/lora"},
        }
    monkeypatch.chdir(home.parent)
    terms = [{"delta": "aligned - base", "scale": 0.5}]
    Path("recipe.yaml").write_text(json.dumps({"models": models, "start": "tuned", "terms": terms}))
    recipe = load_recipe(Path("recipe.yaml"))
    out = merge(recipe, tmp_path / "out").out
    for file in out.iterdir():
        content = file.read_bytes()
        assert not any(part in content for part in (b"alice", b"unreleased", str(tmp_path).encode())), file.name
    manifest = json.loads((out / "resta.json").read_text())
    assert {name: facts["source"] for name, facts in manifest["inputs"].items()} == {
        "base": "base",
        "aligned": "aligned",
        "tuned": "lora",
    }
    assert manifest["recipe"]["models"]["tuned"]["recorded_base"] == "base-0"
    assert manifest["recipe_digest"] == recipe.digest
