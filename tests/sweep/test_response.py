"""The response over scale, against curves whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from resta.sweep.response import DRAWS, Seen, fit

SCALES = [i / 10 for i in range(11)]


def truth(scale: float, slope: float, end: float = 0.02) -> float:
    return end + (0.9 - end) / (1 + math.exp(slope * (scale - 0.4)))


def sample(slope: float, questions: int, rng: np.random.Generator) -> tuple[Seen, ...]:
    return tuple(
        Seen(scale=x, share=rng.binomial(questions, truth(x, slope)) / questions, questions=questions) for x in SCALES
    )


@pytest.mark.parametrize("slope", [8, 15])
@pytest.mark.parametrize("questions", [96, 400])
def test_the_rate_at_every_scale_lies_in_its_interval_as_often_as_that_says(slope: float, questions: int) -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        found = fit(sample(slope, questions, rng), 1.0)
        bounds = np.array([np.quantile(found.draws(x), [0.025, 0.975]) for x in SCALES])
        actual = np.array([truth(x, slope) for x in SCALES])
        inside.append((bounds[:, 0] <= actual) & (actual <= bounds[:, 1]))
    assert np.mean(inside) >= 0.9  # of nominal 0.95


def test_scales_that_were_not_asked_are_read_from_the_curve_and_less_is_known_of_them() -> None:
    seen = tuple(s for s in sample(15, 400, np.random.default_rng(1)) if s.scale in (0.0, 0.2, 0.6, 1.0))
    found = fit(seen, 1.0)
    low, high = np.quantile(found.draws(0.4), [0.005, 0.995])
    assert low < truth(0.4, 15) < high
    assert np.std(found.draws(0.4)) > 2 * np.std(found.draws(0.6))


def test_a_rising_rate_is_the_same_curve() -> None:
    rising = tuple(Seen(scale=x, share=1 - truth(x, 8, 0.0), questions=400) for x in SCALES)
    found = fit(rising, 1.0)
    assert found.smooth
    assert found.mean(0.1) < found.mean(0.4) < found.mean(0.9)


def test_what_lies_on_no_such_curve_is_not_smoothed() -> None:
    hill = tuple(Seen(scale=x, share=y, questions=96) for x, y in ((0.0, 0.9), (0.5, 0.0), (1.0, 0.8)))
    found = fit(hill, 1.0)
    assert not found.smooth
    assert found.mean(0.5) < 0.02
    assert found.mean(1.0) == pytest.approx(0.8, abs=0.03)
    assert 0.3 < found.mean(0.7) < 0.7  # nobody asked: anything may be


def test_the_same_counts_give_the_same_draws() -> None:
    seen = sample(8, 96, np.random.default_rng(2))
    one = fit(seen, 1.0).draws(0.5)
    fit.cache_clear()
    two = fit(seen, 1.0).draws(0.5)
    assert len(one) == DRAWS
    assert np.array_equal(one, two)
