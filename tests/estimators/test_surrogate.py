"""The clipped surrogate and what is logged about it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import F64, assert_same, identical, randn, refused, tensor

from diffusion_align.estimators import (
    clip_fractions,
    clipped_ratio_loss,
    clipped_ratios,
    clipped_surrogate,
    importance_ratio,
    score_function_loss,
)

NAMES = ("logp", "logp_old", "advantages")

# ratio, advantage, dual_clip, loss, gradient with respect to logp; clip 0.2, clip_high 0.3
TABLE = [
    (1.25, 1.0, None, -1.25, -1.25),  # inside
    (1.50, 1.0, None, -1.30, 0.0),  # above, rewarded: clipped
    (1.50, -1.0, None, 1.50, 1.50),  # above, punished: pulled back
    (0.50, 1.0, None, -0.50, -0.50),  # below, rewarded: pulled back
    (0.50, -1.0, None, 0.80, 0.0),  # below, punished: clipped
    (1.50, -2.0, 3.0, 3.00, 3.00),  # dual clip does not bind yet
    (5.00, -2.0, 3.0, 6.00, 0.0),  # dual clip binds
    (5.00, 2.0, 3.0, -2.60, 0.0),  # dual clip is for negative advantages only
    (5.00, 0.0, 3.0, 0.0, 0.0),
    (5.00, -2.0, math.inf, 10.0, 10.0),  # an infinite bound is none
    (5.00, 0.0, math.inf, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "dual_clip", "loss", "gradient"), TABLE)
def test_value_and_gradient_in_every_region(ratio, advantage, dual_clip, loss, gradient):
    logp = torch.tensor([math.log(ratio) - 2], dtype=F64, requires_grad=True)
    logp_old = torch.full((1,), -2.0, dtype=F64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=F64, requires_grad=True)
    result = clipped_surrogate(logp, logp_old, advantages, clip=0.2, clip_high=0.3, dual_clip=dual_clip)
    assert result.item() == pytest.approx(loss, abs=1e-12)
    result.sum().backward()
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert logp_old.grad is None
    assert advantages.grad is None


def test_clip_high_defaults_to_clip():
    logp, zeros, ones = torch.tensor([1.0]), torch.zeros(1), torch.ones(1)
    assert clipped_surrogate(logp, zeros, ones, clip=0.1).item() == pytest.approx(-1.1)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (0, 4), (0,)])
@pytest.mark.parametrize("clip", [0.0, 1e-4, 0.2])
def test_gradient_at_ratio_one_is_the_score_function_gradient(shape, clip):
    advantages = randn(*shape, seed=1)
    logp_a, logp_b = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    clipped_surrogate(logp_a, logp_a, advantages, clip=clip, dual_clip=3.0).sum().backward()
    score_function_loss(logp_b, advantages).sum().backward()
    assert_same(logp_a.grad, logp_b.grad)


def test_expected_gradient_at_ratio_one_is_minus_the_gradient_of_the_expected_reward():
    theta, reward = randn(4).requires_grad_(), randn(4, seed=1)
    logp = theta.log_softmax(0)
    expected = (logp.exp().detach() * clipped_surrogate(logp, logp, reward, clip=0.2)).sum()
    (gradient,) = torch.autograd.grad(expected, theta)
    (exact,) = torch.autograd.grad((theta.softmax(0) * reward).sum(), theta)
    assert_same(gradient, -exact)


@pytest.mark.parametrize("level", ["decision", "sequence"])
@pytest.mark.parametrize("fill", [1e9, -1e9, math.inf, math.nan])
def test_masked_entries_have_no_loss_no_gradient_and_no_say(level, fill):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    results = []
    for filler in (0.0, fill):
        logp = torch.where(mask, randn(3, 3), filler).requires_grad_()
        advantages = torch.where(mask, randn(3, 3, seed=2), filler)
        loss = clipped_surrogate(logp, randn(3, 3, seed=1), advantages, clip=0.2, mask=mask, level=level)
        loss.sum().backward()
        results.append((loss.detach(), logp.grad))
        assert (loss[~mask] == 0).all()
        assert (logp.grad[~mask] == 0).all()
    assert identical(*results)


def test_sequence_level_clips_the_whole_row():
    logp, zeros = tensor([1.0, -1.0], [1.0, 1.0]), torch.zeros(2, 2, dtype=F64)
    loss = clipped_surrogate(logp, zeros, zeros + 1, clip=0.2, level="sequence")
    assert_same(loss, tensor([-1.0, -1.0], [-1.2, -1.2]))


def test_clip_fractions_mark_exactly_the_entries_without_gradient():
    logp, logp_old, advantages = (randn(400, seed=s) for s in range(3))
    logp.requires_grad_()
    low, high = clip_fractions(logp, logp_old, clip=0.2, clip_high=0.3, advantages=advantages)
    assert low.dtype == high.dtype == torch.bool
    assert 0 < low.sum() < 400
    assert 0 < high.sum() < 400
    clipped_surrogate(logp, logp_old, advantages, clip=0.2, clip_high=0.3).sum().backward()
    assert torch.equal(low | high, logp.grad == 0)
    ratio = importance_ratio(logp, logp_old)
    assert torch.equal(low, (ratio < 0.8) & (advantages < 0))
    assert torch.equal(high, (ratio > 1.3) & (advantages > 0))
    low, high = clip_fractions(logp, logp_old, clip=0.2)
    assert torch.equal(low, ratio < 0.8)
    assert torch.equal(high, ratio > 1.2)


def test_clip_fractions_leave_the_bounds_and_advantages_of_zero_out():
    logp, zeros = torch.tensor([0.0, 3.0, -3.0]), torch.zeros(3)
    low, high = clip_fractions(logp, zeros, clip=0.0)
    assert (low.tolist(), high.tolist()) == ([False, False, True], [False, True, False])
    low, high = clip_fractions(logp, zeros, clip=0.2, advantages=zeros)
    assert not (low | high).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_fractions_of_a_sequence_ask_only_the_entries_that_count(sign):
    """Rows of mean log-ratio ±3 and 0, but for the masked entries."""
    logp = sign * torch.tensor([[4.0, 2.0, -99.0], [1.0, -1.0, 99.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    low, high = clip_fractions(logp, torch.zeros(2, 3), clip=0.2, mask=mask, level="sequence")
    outside, inside = [[True, True, False], [False] * 3], [[False] * 3] * 2
    assert (low.tolist(), high.tolist()) == ((inside, outside) if sign > 0 else (outside, inside))


def test_clip_fractions_leave_masked_entries_out():
    logp, zeros = torch.tensor([[9.0, 9.0, -9.0, math.nan]]), torch.zeros(1, 4)
    mask = torch.tensor([[True, False, False, False]])
    low, high = clip_fractions(logp, zeros, clip=0.2, mask=mask)
    assert (low.tolist(), high.tolist()) == ([[False] * 4], [[True, False, False, False]])
    low, high = clip_fractions(logp.nan_to_num(), zeros, clip=0.2, mask=mask, level="sequence")
    assert (low.sum().item(), high.tolist()) == (0, [[True, False, False, False]])


def test_wrong_shapes_and_settings_are_named():
    x, column = torch.zeros(2, 3), torch.zeros(2, 1)
    for call in (clipped_surrogate, lambda a, b, c, **kw: clip_fractions(a, b, advantages=c, **kw)):
        for bad in ((column, x, x), (x, column, x), (x, x, column)):
            shapes = [rf"{name} \({x.shape[0]}, {x.shape[1]}\)" for name, x in zip(NAMES, bad)]
            refused(", ".join(shapes), call, *bad, clip=0.2)
        refused(r"logp \(2, 3\), .*advantages \(2, 3\), mask \(2, 1\)", call, x, x, x, clip=0.2, mask=column.bool())
        bad_settings = ({"clip": -0.1}, {"clip": 0.1, "clip_high": -0.1}, {"clip": -0.1, "clip_high": 0.1})
        for settings_ in (*bad_settings, {"clip": math.nan}):
            refused("clip=", call, x, x, x, **settings_)
    refused("dual_clip=1", clipped_surrogate, x, x, x, clip=0.2, dual_clip=1.0)
    for of_ratio in (clipped_ratio_loss, lambda a, b, **kw: clipped_ratios(a, advantages=b, **kw)):
        for ratio, advantages, mask in ((column, x, None), (x, column, None), (x, x, column.bool())):
            refused(r"ratio \(2, \d\), advantages \(2, \d\)", of_ratio, ratio, advantages, clip=0.2, mask=mask)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(-1e6, 1e6)), max_size=6),
    st.sampled_from([None, 1.5]),
    st.sampled_from([None, math.inf]),
)
def test_extreme_inputs_stay_finite(pairs, dual_clip, clip_high):
    logp, advantages = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2).unbind(-1)
    logp = logp.clone().requires_grad_()
    loss = clipped_surrogate(logp, -logp, advantages, clip=0.2, clip_high=clip_high, dual_clip=dual_clip)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("level", ["decision", "sequence"])
def test_compiles_without_a_graph_break(level):
    logp, logp_old, advantages = (randn(3, 4, seed=s) * 12 for s in range(3))
    mask = randn(3, 4, seed=3) > -1
    results = []
    for call in (clipped_surrogate, torch.compile(clipped_surrogate, backend="aot_eager", fullgraph=True)):
        leaf = logp.clone().requires_grad_()
        loss = call(leaf, logp_old, advantages, clip=0.2, clip_high=0.3, dual_clip=3.0, mask=mask, level=level)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    assert_same(*results)


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    logp, logp_old, advantages = (randn(3, 4, seed=s) for s in range(3))
    eager = clipped_surrogate(logp, logp_old, advantages, clip=0.2)
    compiled = torch.compile(clipped_surrogate, fullgraph=True)(logp, logp_old, advantages, clip=0.2)
    assert_same(compiled, eager)
