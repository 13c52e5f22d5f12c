"""Ratio, clipped surrogate, score-function and value losses: values, gradients, clamps, masks, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import (
    clip_fractions,
    clipped_ratio_loss,
    clipped_ratios,
    clipped_surrogate,
    importance_ratio,
    score_function_loss,
    value_loss,
)
from tests.helpers.oracles import (
    F64,
    FILLS,
    assert_compiles,
    assert_same,
    identical,
    randn,
    refused,
    tensor,
    unmoved_by,
    with_gradients,
)


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


@pytest.mark.parametrize("level", ["action", "sequence"])
@pytest.mark.parametrize("fill", FILLS)
def test_masked_entries_change_neither_value_nor_gradient(level, fill):
    mask, old = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), randn(2, 3, seed=1)
    ratio, _ = unmoved_by(fill, mask, lambda x: importance_ratio(x, old, mask=mask, level=level), randn(2, 3))
    if level == "action":
        assert (ratio[~mask] == 1).all()


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
@pytest.mark.parametrize("fill", FILLS)
def test_masked_losses_are_zero_and_change_neither_value_nor_gradient(name, fill):
    call, count = LOSSES[name]
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
    clean = [randn(3, 3, seed=s) for s in range(count)]
    for filled in (*([i] for i in range(count)), range(count)):  # each input alone, then all
        masks = [mask if i in filled else torch.ones_like(mask) for i in range(count)]
        loss, gradient = unmoved_by(fill, masks, lambda *x: call(*x, mask=mask), *clean)
        assert (loss[~mask] == 0).all()
        assert (gradient[~mask] == 0).all()
        dense = with_gradients(lambda x: call(x, *clean[1:])[mask], clean[0])
        assert identical([loss[mask], gradient], dense)


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


@pytest.mark.parametrize("level", ["action", "sequence"])
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
    refused("level='word'", importance_ratio, x, x, level="word")
    refused(r"2 dimension.*\(3,\)", importance_ratio, x[0], x[0], level="sequence")
    assert importance_ratio(x, x, log_clamp=80).tolist() == [[1.0] * 3] * 2
    for bad in (0, -1, 80.5, math.inf, math.nan):
        refused(f"log_clamp={bad}", importance_ratio, x, x, log_clamp=bad)
    refused("clip=-1", value_loss, x, x, x, clip=-1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), max_size=6),
    st.sampled_from(["action", "sequence"]),
)
def test_extreme_log_ratios_stay_finite(pairs, level):
    logp, logp_old = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 1, 2).unbind(-1)
    logp = logp.clone().requires_grad_()
    ratio = importance_ratio(logp, logp_old, level=level)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert logp.grad.isfinite().all()
    assert (logp.grad > 0).all()


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


@pytest.mark.parametrize("level", ["action", "sequence"])
@pytest.mark.parametrize("fill", FILLS)
def test_masked_entries_have_no_loss_no_gradient_and_no_say(level, fill):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    old = randn(3, 3, seed=1)

    def call(logp, advantages):
        return clipped_surrogate(logp, old, advantages, clip=0.2, mask=mask, level=level)

    loss, _ = unmoved_by(fill, mask, call, randn(3, 3), randn(3, 3, seed=2))
    assert (loss[~mask] == 0).all()


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


def test_wrong_shapes_and_settings_of_the_surrogate_are_named():
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


@pytest.mark.parametrize("level", ["action", "sequence"])
def test_compiles_without_a_graph_break(level):
    logp, logp_old, advantages = (randn(3, 4, seed=s) * 12 for s in range(3))
    given = {"clip_high": 0.3, "dual_clip": 3.0, "mask": randn(3, 4, seed=3) > -1, "level": level}
    assert_compiles(clipped_surrogate, logp, logp_old, advantages, clip=0.2, **given)


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    logp, logp_old, advantages = (randn(3, 4, seed=s) for s in range(3))
    eager = clipped_surrogate(logp, logp_old, advantages, clip=0.2)
    compiled = torch.compile(clipped_surrogate, fullgraph=True)(logp, logp_old, advantages, clip=0.2)
    assert_same(compiled, eager)
