from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resta.sft.objective import MixedOrder, Sums, step_loss, sums
from resta.sft.recipe import Objective

SCOPES = ["token", "sample"]


def objective(scope: str, **changes: float) -> Objective:
    return Objective.model_validate({"kind": "blue_red", "red_threshold_scope": scope} | changes)


def by_loops(nll: list[list[float]], mask: list[list[bool]], red: list[bool], o: Objective) -> float:
    """L_blue - lambda2 * L_red, term by term from the equations."""
    blue = [
        x for row, keep, r in zip(nll, mask, red, strict=True) if not r for x, k in zip(row, keep, strict=True) if k
    ]
    total = sum(blue) / max(1, len(blue))
    ascent, units = 0.0, 0
    for row, keep, r in zip(nll, mask, red, strict=True):
        tokens = [x for x, k in zip(row, keep, strict=True) if k]
        if not r or not tokens:
            continue
        values = tokens if o.red_threshold_scope == "token" else [sum(tokens) / len(tokens)]
        ascent += sum(v for v in values if v <= o.red_cutoff)
        units += len(values)
    return total - o.lambda2 * ascent / max(1, units)


batches = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4), min_size=n, max_size=n),
        st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


def loss_of(parts: list[Sums], o: Objective) -> float:
    blue_tokens = torch.stack([p.blue_tokens for p in parts]).sum()
    red_units = torch.stack([p.red_units for p in parts]).sum()
    return sum(step_loss(p, blue_tokens, red_units, o.lambda2).item() for p in parts)


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches)
@settings(max_examples=60, deadline=None)
def test_the_loss_is_the_equation_term_by_term(
    scope: str, batch: tuple[list[list[float]], list[list[bool]], list[bool]]
) -> None:
    nll, mask, red = batch
    o = objective(scope)
    whole = sums(torch.tensor(nll, dtype=torch.float64), torch.tensor(mask), torch.tensor(red), o)
    assert math.isclose(loss_of([whole], o), by_loops(nll, mask, red, o), abs_tol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches, cut=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_how_a_step_is_split_into_micro_batches_never_changes_the_loss(
    scope: str, batch: tuple[list[list[float]], list[list[bool]], list[bool]], cut: int
) -> None:
    nll, mask, red = (torch.tensor(x, dtype=t) for x, t in zip(batch, (torch.float64, bool, bool), strict=True))
    o = objective(scope)
    parts = [sums(nll[a], mask[a], red[a], o) for a in (slice(0, cut), slice(cut, None)) if len(nll[a])]
    assert math.isclose(loss_of(parts, o), loss_of([sums(nll, mask, red, o)], o), abs_tol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_ascent_is_off_above_the_cutoff_and_its_switch_has_no_gradient(scope: str) -> None:
    nll = torch.tensor([[0.5, 0.25], [3.0, 2.0], [0.5, 2.5]], requires_grad=True)
    red, mask = torch.tensor([False, True, True]), torch.ones(3, 2, dtype=torch.bool)
    o = objective(scope, lambda2=1.0)
    batch = sums(nll, mask, red, o)
    step_loss(batch, batch.blue_tokens, batch.red_units, o.lambda2).backward()  # type: ignore[no-untyped-call]
    assert nll.grad is not None
    # Two blue tokens share weight 1. Per token, one red token of four is below 1; per sample, neither mean
    # is.
    below = -0.25 if scope == "token" else 0.0
    assert nll.grad.tolist() == [[0.5, 0.5], [0.0, 0.0], [below, 0.0]]
    assert int(batch.red_off) == (3 if scope == "token" else 2)


def test_ascent_raises_the_red_loss_until_the_cutoff_and_then_stops() -> None:
    o = objective("token", lambda2=1.0)
    logits = torch.tensor([[3.0, 0.0]], requires_grad=True)
    for _ in range(200):
        nll = -torch.log_softmax(logits, -1)[:, :1]
        batch = sums(nll, torch.ones_like(nll, dtype=torch.bool), torch.tensor([True]), o)
        (gradient,) = torch.autograd.grad(step_loss(batch, batch.blue_tokens, batch.red_units, 1.0), logits)
        logits = (logits - 0.2 * gradient).detach().requires_grad_()
    final = -torch.log_softmax(logits, -1)[0, 0].item()
    assert 1.0 < final < 1.2


@given(blues=st.integers(1, 60), reds=st.integers(1, 60), ratio=st.floats(0.1, 4.0), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_window_of_an_epoch_holds_the_set_ratio(blues: int, reds: int, ratio: float, epoch: int) -> None:
    red = [False] * blues + [True] * reds
    order = MixedOrder(red, ratio, seed=3)
    order.set_epoch(epoch)
    items = list(order)
    assert len(items) == len(order) == blues + max(1, round(ratio * blues))
    counts = Counter(items)
    assert all(counts[i] == 1 for i in range(blues))
    red_counts = [counts[i] for i in range(blues, blues + reds)]
    assert max(red_counts) - min(red_counts) <= 1
    share = (len(items) - blues) / len(items)
    for length in (2, 4, 8):
        for start in range(0, len(items) - length + 1, length):
            found = sum(red[i] for i in items[start : start + length])
            assert abs(found - share * length) <= 2


def test_orders_differ_between_epochs_and_seeds_but_not_between_runs() -> None:
    red = [False] * 20 + [True] * 20

    def order(seed: int, epoch: int) -> list[int]:
        sampler = MixedOrder(red, 1.0, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_with_one_red_per_blue_every_pair_is_one_of_each() -> None:
    items = list(MixedOrder([False] * 10 + [True] * 10, 1.0, seed=0))
    assert all((a < 10) != (b < 10) for a, b in zip(items[::2], items[1::2], strict=True))
