"""Ratio, score-function and value losses: values, gradients, clamps, masks, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import F64, assert_same, identical, randn, refused, tensor

from diffusion_align.estimators import importance_ratio, score_function_loss, value_loss


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), (0, 4), (0,)])
def test_ratio_is_exp_of_the_difference_and_its_own_gradient(shape):
    logp, logp_old = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    ratio = importance_ratio(logp, logp_old)
    assert_same(ratio, torch.exp(logp - logp_old))
    ratio.sum().backward()
    assert_same(logp.grad, ratio.detach())
    assert logp_old.grad is None


def test_ratio_of_equal_policies_is_exactly_one():
    assert (importance_ratio(randn(3, 4), randn(3, 4)) == 1).all()
    assert (importance_ratio(randn(3, 4), randn(3, 4), level="sequence") == 1).all()


@pytest.mark.parametrize("log_clamp", [0.5, 3.0])
@pytest.mark.parametrize("log_ratio", [-1e9, -100.0, 100.0, 1e9, math.inf, -math.inf])
def test_clamp_bounds_the_value_and_keeps_the_gradient(log_ratio, log_clamp):
    logp = torch.tensor([log_ratio], requires_grad=True)
    ratio = importance_ratio(logp, torch.zeros(1), log_clamp=log_clamp)
    bound = math.exp(math.copysign(log_clamp, log_ratio))
    assert ratio.item() == pytest.approx(bound, rel=1e-6)
    ratio.sum().backward()
    assert logp.grad.item() == pytest.approx(bound, rel=1e-6)


def test_default_clamp_is_twenty_nats():
    ratio = importance_ratio(tensor(19.0, 21.0), torch.zeros(2, dtype=F64))
    assert_same(ratio.log(), tensor(19.0, 20.0))


def test_sequence_ratio_is_the_geometric_mean_over_what_counts():
    logp, logp_old = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    ratio = importance_ratio(logp, logp_old, mask=mask, level="sequence")
    difference = (logp - logp_old).detach()
    rows = torch.stack([difference[0].mean(), difference[1, [0, 2]].mean(), torch.tensor(0.0, dtype=F64)]).exp()
    assert_same(ratio, rows[:, None].expand(3, 4))
    ratio[:, 0].sum().backward()
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    assert_same(logp.grad, rows[:, None] * share)
    no_mask = importance_ratio(logp, logp_old, level="sequence")
    assert_same(no_mask[:, 0], difference.mean(1).exp())


@pytest.mark.parametrize("level", ["decision", "sequence"])
@pytest.mark.parametrize("fill", [1e9, -1e9, math.inf, math.nan])
def test_masked_entries_change_neither_value_nor_gradient(level, fill):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    results = []
    for filler in (0.0, fill):
        logp = torch.where(mask, randn(2, 3), filler).requires_grad_()
        ratio = importance_ratio(logp, randn(2, 3, seed=1), mask=mask, level=level)
        ratio[mask].sum().backward()
        results.append((ratio.detach(), logp.grad))
        assert (logp.grad[~mask] == 0).all()
    assert identical(*results)
    if level == "decision":
        assert (results[0][0][~mask] == 1).all()


def test_score_function_loss_and_its_gradient():
    logp, advantages = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    loss = score_function_loss(logp, advantages)
    assert_same(loss, -advantages * logp)
    loss.sum().backward()
    assert_same(logp.grad, -advantages.detach())
    assert advantages.grad is None


def test_value_loss_by_hand():
    values, old = torch.tensor([1.0, 1.0, 0.2, 2.0]).requires_grad_(), torch.zeros(4).requires_grad_()
    returns = torch.tensor([2.0, 0.0, 1.0, 0.4]).requires_grad_()
    loss = value_loss(values, old, returns)
    torch.testing.assert_close(loss, torch.tensor([0.5, 0.5, 0.32, 1.28]))
    # Clipped to ±0.5: 0.5, 0.5, 0.2, 0.5; the larger error counts, and a clipped one has no gradient.
    clipped = value_loss(values, old, returns, clip=0.5)
    torch.testing.assert_close(clipped, torch.tensor([1.125, 0.5, 0.32, 1.28]))
    clipped.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -0.8, 1.6]))
    assert old.grad is None
    assert returns.grad is None


@pytest.mark.parametrize("clip", [0.0, 0.3, math.inf])
def test_clipped_value_loss_equals_its_formula_and_has_its_gradient(clip):
    values, old, returns = (randn(200, seed=s) for s in range(3))
    values.requires_grad_()
    moved = [min(max(v - o, -clip), clip) for v, o in zip(values.tolist(), old.tolist())]
    free = (values.detach() - returns) ** 2 / 2
    bound = (old + torch.tensor(moved, dtype=F64) - returns) ** 2 / 2
    loss = value_loss(values, old, returns, clip=clip)
    assert_same(loss.detach(), torch.maximum(free, bound))
    loss.sum().backward()
    # A clipped value is old ± clip: where that error is the larger, nothing can be done about it here.
    within = (values.detach() - old).abs() <= clip
    slope = torch.where(within | (free > bound), values.detach() - returns, 0.0)
    assert_same(values.grad, slope)


LOSSES = {
    "score function": (score_function_loss, 2),
    "value": (value_loss, 3),
    "clipped value": (lambda *args, **mask: value_loss(*args, clip=0.3, **mask), 3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fill", [1e9, -1e9, math.inf, -math.inf, math.nan])
def test_masked_losses_are_zero_and_change_neither_value_nor_gradient(name, fill):
    call, count = LOSSES[name]
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
    clean = [randn(3, 3, seed=s) for s in range(count)]
    for filled in (*([i] for i in range(count)), range(count)):  # each input alone, then all
        results = []
        for filler in (0.0, fill):
            inputs = [torch.where(mask, x, filler) if i in filled else x.clone() for i, x in enumerate(clean)]
            inputs[0].requires_grad_()
            loss = call(*inputs, mask=mask)
            loss.sum().backward()
            results.append((loss.detach(), inputs[0].grad))
            assert (loss[~mask] == 0).all()
            assert (inputs[0].grad[~mask] == 0).all()
        assert identical(*results)
        inputs = [x.clone() for x in clean]
        inputs[0].requires_grad_()
        dense = call(*inputs)
        dense[mask].sum().backward()
        assert torch.equal(results[0][0][mask], dense.detach()[mask])
        assert torch.equal(results[0][1], inputs[0].grad)


@pytest.mark.parametrize("name", LOSSES)
def test_masks_that_are_not_bool_or_of_another_shape_are_named(name):
    call, count = LOSSES[name]
    inputs = [torch.zeros(2, 3)] * count
    for dtype in (torch.float32, torch.int64, torch.uint8):
        refused("mask must be a bool", call, *inputs, mask=torch.ones(2, 3, dtype=dtype))
    for shape in ((2, 1), (3,), (1, 3), (), (2, 3, 1)):
        refused(r"\(2, 3\), mask \(", call, *inputs, mask=torch.ones(shape, dtype=torch.bool))


def test_half_precision_becomes_float32():
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    for result in (
        importance_ratio(half, half),
        score_function_loss(half, half),
        value_loss(half, half, half, clip=0.1),
    ):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("level", ["decision", "sequence"])
def test_half_precision_log_probs_are_subtracted_in_float32(level):
    logp, logp_old = ((40 * randn(2, 50, seed=s) - 100).to(torch.bfloat16) for s in range(2))
    wide = importance_ratio(logp.float(), logp_old.float(), level=level)
    assert torch.equal(importance_ratio(logp, logp_old, level=level), wide)


def test_wrong_shapes_and_settings_are_named():
    x, column = torch.zeros(2, 3), torch.zeros(2, 1)
    for call in (
        importance_ratio,
        score_function_loss,
        lambda a, b: value_loss(a, a, b),
        lambda a, b: value_loss(a, b, a),
    ):
        refused(r"\(2, 3\).*\(2, 1\)", call, x, column)
    refused(r"mask \(2, 1\)", importance_ratio, x, x, mask=column.bool())
    refused("mask must be a bool", importance_ratio, x, x, mask=torch.ones(2, 3))
    refused("level='token'", importance_ratio, x, x, level="token")
    refused(r"2 dimension.*\(3,\)", importance_ratio, x[0], x[0], level="sequence")
    assert importance_ratio(x, x, log_clamp=80).tolist() == [[1.0] * 3] * 2
    for bad in (0, -1, 80.5, math.inf, math.nan):
        refused(f"log_clamp={bad}", importance_ratio, x, x, log_clamp=bad)
    refused("clip=-1", value_loss, x, x, x, clip=-1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), max_size=6),
    st.sampled_from(["decision", "sequence"]),
)
def test_extreme_log_ratios_stay_finite(pairs, level):
    logp, logp_old = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 1, 2).unbind(-1)
    logp = logp.clone().requires_grad_()
    ratio = importance_ratio(logp, logp_old, level=level)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert logp.grad.isfinite().all()
    assert (logp.grad > 0).all()
