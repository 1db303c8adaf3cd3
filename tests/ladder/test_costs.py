"""What a ladder will take, against what it took."""

from __future__ import annotations

from pathlib import Path

import click.testing

from resta.cli import main
from resta.ladder import Choices, Restoration
from resta.ladder.costs import VERIFYING_ROW, expected_costs
from resta.ladder.request import read_ladder
from tests.ladder.builders import POLICY, exam


def test_no_rung_asks_more_than_was_said(
    restored: Restoration, trio: dict[str, Path], bank: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    models: dict[str, str | None] = {"tuned": str(trio["tuned"]), "aligned": str(trio["aligned"]), "base": None}
    choices = Choices(settings={"device": "cpu"})
    ladder = read_ladder(models, tmp_path / "policy.yaml", exam(bank), tmp_path / "out", choices, None)
    said = {each.rung: each for each in expected_costs(ladder)}
    assert list(said) == ["nothing", "weights", "stochastic", "float32", VERIFYING_ROW]
    asked = {cost.rung: cost.answers for cost in restored.costs}
    assert (said["nothing"].answers, said[VERIFYING_ROW].answers) == (asked["nothing"], asked["verifying"])
    assert 0 < asked["weights"] <= said["weights"].answers
    assert all(each.seconds > 0 for each in said.values())
    size = (trio["tuned"] / "model.safetensors").stat().st_size
    assert 0.9 * size < said["weights"].bytes <= size
    assert not (tmp_path / "out.records").exists()


def test_a_dry_run_says_what_each_rung_takes_and_writes_nothing(
    trio: dict[str, Path], bank: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    words = ["restore", trio["tuned"], "--aligned", trio["aligned"], "--base", trio["base"], "--bank", bank]
    words += ["--policy", tmp_path / "policy.yaml", "--template", "standard", "--no-utility", "--device", "cpu"]
    done = click.testing.CliRunner().invoke(main, [*map(str, words), "--dry-run", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for rung in ("nothing", "weights", "stochastic", "float32", VERIFYING_ROW):
        assert rung in done.output
    assert "patch" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.yaml"]
