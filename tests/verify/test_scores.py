"""Losses and errors, of which lower is better and which have no upper bound, are gated as scores are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from resta.errors import RequestError
from resta.statistics import PairedMeans, student
from resta.verify.comparison import compare
from resta.verify.documents import Document
from resta.verify.gate import decide
from resta.verify.measurement import ROLES, Measurement, read_measurement
from resta.verify.policy import Policy
from resta.verify.scores import value_of
from tests.verify.builders import ALIGNED, RESTORED, TUNED, make_measurement, usual_study

DROP = (0.0, 1.0, -1.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    folder = tmp_path_factory.mktemp("measured")
    behaviours = {"aligned": ALIGNED, "tuned": TUNED, "restored": RESTORED["PASS"]}
    return {
        role: read_measurement(make_measurement(folder / role, role, behaviours[role], usual_study())) for role in ROLES
    }


def outcome(
    measured: dict[str, Measurement], metric: str, values: dict[str, np.ndarray], limit: float = 0.05
) -> tuple[str, float]:
    """Return what comes of the task's rule, and restored's mean, where lower is better."""
    models = {}
    for role, model in measured.items():
        documents = tuple(
            Document(task="held-out", doc_id=str(i), metric=metric, value=float(value))
            for i, value in enumerate(values[role])
        )
        models[role] = replace(model, documents=documents, utility={"tasks": {"held-out": {"higher_is_better": False}}})
    comparison = compare(models)
    [task] = comparison.utility
    policy = Policy.model_validate({"utility": {"held-out": {"max_drop": limit}}})
    [rule] = [rule for rule in decide(comparison, policy).rules if rule.name == "utility.held-out.max_drop"]
    return rule.outcome, task.means["restored"].value


def losses(seed: int, count: int, worse: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    own = rng.gamma(4, 0.7, count)
    return {
        "aligned": own + 0.1,
        "tuned": own,
        "restored": np.maximum(own + worse + rng.normal(0, 0.15, count), 0),
    }


@pytest.mark.parametrize("metric", ["word_perplexity", "slips"])
def test_a_loss_that_has_not_grown_holds_and_one_that_has_fails(measured: dict[str, Measurement], metric: str) -> None:
    values = losses(0, 400, 0.0)
    found, mean = outcome(measured, metric, values)
    assert found == "holds"
    assert mean == pytest.approx(values["restored"].mean())
    assert outcome(measured, metric, losses(1, 400, 0.3))[0] == "fails"
    assert outcome(measured, metric, losses(2, 400, -0.3))[0] == "holds"
    assert outcome(measured, metric, losses(3, 8, 0.04))[0] == "inconclusive"


def test_a_share_of_errors_is_gated_as_the_share_of_successes(measured: dict[str, Measurement]) -> None:
    rng = np.random.default_rng(0)
    own = (rng.random(2000) < 0.2).astype(float)
    more = np.where(rng.random(2000) < 0.15, 1.0, own)
    assert outcome(measured, "hallucinated", {"aligned": own, "tuned": own, "restored": own})[0] == "holds"
    assert outcome(measured, "hallucinated", {"aligned": own, "tuned": own, "restored": more})[0] == "fails"
    few = dict.fromkeys(ROLES, np.zeros(10))  # nothing seen in ten documents is no proof
    assert outcome(measured, "hallucinated", few)[0] == "inconclusive"


def test_too_few_documents_that_differ_show_nothing(measured: dict[str, Measurement]) -> None:
    own = np.full(20, 2.0)
    other = own.copy()
    other[0] = 2.1
    assert outcome(measured, "slips", {"aligned": own, "tuned": own, "restored": other})[0] == "inconclusive"
    tiny = losses(0, 4, -1.0)
    assert outcome(measured, "word_perplexity", tiny)[0] == "inconclusive"


def test_the_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (30, 3))
    found = PairedMeans(scores=scores, level=0.95).contrast(DROP)
    oracle = stats.ttest_rel(scores[:, 1], scores[:, 2]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=2e-3)


@pytest.mark.parametrize("freedom", [4, 5, 10, 30, 1000])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_quantile_is_students_within_a_hundredth(freedom: int, level: float) -> None:
    assert student(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=0.01)


def test_where_the_lower_bound_meets_the_limit_is_the_p_value() -> None:
    scores = np.random.default_rng(1).normal([0, 0.3, 0], 1, (200, 3))
    paired = PairedMeans(scores=scores, level=0.95)
    expected = stats.ttest_rel(scores[:, 1], scores[:, 2], alternative="greater").pvalue
    assert paired.p_above(DROP, 0.0) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("metric", "found", "higher", "value"),
    [
        ("acc", True, True, 1.0),
        ("exact_match,strict-match", np.float32(0.5), True, 0.5),
        ("slips", 7, False, 7.0),
        ("perplexity", -2.5, False, 2.5),
        ("word_perplexity", (-12.0, 4), False, 3.0),
        ("byte_perplexity", [-12.0, 24], False, 0.5),
        ("bits_per_byte", (-math.log(2) * 8, 4), False, 2.0),
    ],
)
def test_a_documents_value(metric: str, found: object, higher: bool, value: float) -> None:
    assert value_of(metric, found, higher_is_better=higher, where="t") == pytest.approx(value)


@pytest.mark.parametrize(
    ("metric", "found", "higher"),
    [
        ("acc", 55.0, True), ("acc", math.nan, True), ("acc", "1", True), ("acc", None, True), ("slips", -1, False),
        ("slips", math.inf, False), ("word_perplexity", -3.0, False), ("word_perplexity", (-3.0, 0), False),
        ("perplexity", math.nan, False),
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(metric: str, found: object, higher: bool) -> None:
    with pytest.raises(RequestError, match="of a document is"):
        value_of(metric, found, higher_is_better=higher, where="t")
