"""Preference losses: worked numbers, gradients, what minimises them, masks, extremes."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from diffusion_align.estimators import (
    bradley_terry_loss,
    dpo_loss,
    fit_bradley_terry,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    rso_accept,
    simpo_loss,
    trajectory_dpo_loss,
)
from tests.helpers.oracles import F64, FILLS, assert_same, randn, refused, tensor, unmoved_by, with_gradients

FIT = 1e-9  # of a log-strength


def _odds(logp):
    return logp.exp() / (1 - logp.exp())


def one_minus_sigmoid(w, r, b):
    return 1 / (1 + (b * (w - r.detach().relu())).exp())


# Each loss of two log-ratios and a beta, and the same written another way.
PAIRED = {
    "dpo": (dpo_loss, lambda w, r, b: softplus(b * (r - w))),
    "smoothed dpo": (
        lambda w, r, b: dpo_loss(w, r, b, label_smoothing=0.2),
        lambda w, r, b: 0.8 * softplus(b * (r - w)) + 0.2 * softplus(b * (w - r)),
    ),
    "multi-negative dpo": (
        lambda w, r, b: dpo_loss(w, torch.stack([r, 3 - r], 1), b),
        lambda w, r, b: ((b * w).exp() + (b * r).exp() + (b * (3 - r)).exp()).log() - b * w,
    ),
    "robust dpo": (
        lambda w, r, b: robust_dpo_loss(w, r, b, label_smoothing=0.2),
        lambda w, r, b: (0.8 * softplus(b * (r - w)) - 0.2 * softplus(b * (w - r))) / 0.6,
    ),
    "ipo": (ipo_loss, lambda w, r, b: (w - r) ** 2 - (w - r) / b + 1 / (4 * b**2)),
    "hinge": (hinge_loss, lambda w, r, b: (1 - b * (w - r)) * (b * (w - r) < 1)),
    "simpo": (lambda w, r, b: simpo_loss(w, r, b, margin=0.7), lambda w, r, b: (1 + (0.7 - b * (w - r)).exp()).log()),
    "trajectory": (
        lambda w, r, b: trajectory_dpo_loss(torch.stack([w, r], 1), torch.stack([r, r], 1), w.detach() * 0 + 0.3, b),
        lambda w, r, b: 0.3 * softplus(b * (r - w)) + 0.7 * softplus(b * (w - r)),
    ),
    "kto": (
        lambda w, r, b: kto_loss(w, w > r, r.detach(), b, desirable_weight=2.0) + 0 * r,
        lambda w, r, b: torch.where(w > r, 2 * one_minus_sigmoid(w, r, b), 1 - one_minus_sigmoid(w, r, b)) + 0 * r,
    ),
}


@pytest.mark.parametrize("name", PAIRED)
def test_value_and_gradients_equal_another_way_of_writing_it(name):
    call, formula = PAIRED[name]
    chosen, rejected = 3 * randn(9), 3 * randn(9, seed=1)
    for beta in (randn(9, seed=2).exp(), tensor(0.7)[0]):
        assert_same(*(with_gradients(f, chosen, rejected, beta) for f in (call, formula)))
    assert_same(*(with_gradients(lambda w, r, f=f: f(w, r, 0.7), chosen, rejected) for f in (call, formula)))


EXTREME = st.one_of(st.sampled_from([-1e4, -100.0, 0.0, 100.0, 1e4]), st.floats(-1e4, 1e4, width=32))


@pytest.mark.parametrize("name", [*PAIRED, "orpo"])
@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(EXTREME, EXTREME), max_size=3), st.sampled_from([0.1, 5.0, "per sample"]))
def test_extreme_log_ratios_stay_finite(name, pairs, beta):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2).unbind(1)
    call = PAIRED[name][0] if name in PAIRED else lambda w, r, b: orpo_loss(-w.abs(), -r.abs())
    beta = torch.full_like(chosen, 0.1) if beta == "per sample" else beta
    for first, second in ((chosen, rejected), (chosen, chosen)):
        loss, *gradients = with_gradients(lambda w, r: call(w, r, beta), first, second)
        assert loss.shape == chosen.shape
        assert loss.dtype == torch.float32
        assert all(x.isfinite().all() for x in (loss, *gradients))


@pytest.mark.parametrize("call", [dpo_loss, robust_dpo_loss, ipo_loss, hinge_loss, simpo_loss])
def test_wrong_shapes_and_betas_are_named(call):
    x = torch.zeros(3)
    for bad in ((x, torch.zeros(1)), (torch.zeros(1), x), (x[:, None], x[:, None]), (x, torch.zeros(1, 3)), (x[0], x)):
        refused(r"\(1,\)|\(3, 1\)|\(1, 3\)|\(\)", call, *bad, 0.1)
    for beta in (0.0, -0.1, math.nan, math.inf):
        refused(f"beta={beta} is not allowed", call, x, x, beta)
    for beta in (torch.ones(1), torch.ones(3, 1), torch.ones(2)):
        refused(r"beta must be a float or \(3,\), got shape", call, x, x, beta)
    refused(r"\(\)", call, x[0], x[0], torch.ones(2))


def test_dpo_worked_example_with_the_gradient_of_equation_12():
    logp_w, logp_l = tensor(-10.0).requires_grad_(), tensor(-15.0).requires_grad_()
    loss = dpo_loss(logp_w - -12.0, logp_l - -14.0, 0.1)
    assert loss.item() == pytest.approx(0.554355, abs=5e-7)
    loss.sum().backward()
    weight = 0.1 * (1 - 1 / (1 + math.exp(-0.3)))
    assert (logp_w.grad.item(), logp_l.grad.item()) == pytest.approx((-weight, weight), rel=1e-12)


def test_dpo_with_many_rejected_worked_number_and_gradient():
    chosen, rejected = tensor(0.2) / 0.5, tensor([-0.1, -0.3, 0.05]) / 0.5
    loss, gradient_w, gradient_l = with_gradients(lambda w, r: dpo_loss(w, r, 0.5), chosen, rejected)
    assert loss.item() == pytest.approx(1.165665, abs=5e-7)
    chances = tensor(0.2, -0.1, -0.3, 0.05).exp()
    chances /= chances.sum()
    assert_same(gradient_w, 0.5 * (chances[:1] - 1))
    assert_same(gradient_l[0], 0.5 * chances[1:])


def test_one_rejected_is_dpo_and_equal_rewards_give_the_log_of_their_number():
    chosen, rejected = randn(6), randn(6, seed=1)
    for smoothing in (0.0, 0.3):
        columns = dpo_loss(chosen, rejected[:, None], 0.3, label_smoothing=smoothing)
        assert torch.equal(columns, dpo_loss(chosen, rejected, 0.3, label_smoothing=smoothing))
    for m in range(1, 6):
        for smoothing in (0.0, 0.3):
            loss = dpo_loss(chosen, chosen[:, None].expand(6, m), 0.3, label_smoothing=smoothing)
            assert_same(loss, torch.full((6,), math.log(1 + m), dtype=F64))


@pytest.mark.parametrize("rejected", [1, 2])
def test_the_optimum_of_dpo_is_the_optimum_of_rlhf(rejected):
    """Enumerated: preferences by exp(reward), the policy pi_ref exp(reward/beta)/Z; then no gradient is left."""
    beta, reward, logp_ref = 0.6, randn(4), randn(4, seed=1).log_softmax(0)
    optimum = logp_ref + reward / beta  # softmax divides by Z

    def expected_loss(theta):
        logratio, total = theta.log_softmax(0) - logp_ref, 0.0
        tuples = torch.cartesian_prod(*[torch.arange(4)] * (rejected + 1))
        for position in range(rejected + 1):
            order = torch.roll(tuples, -position, 1)
            chance = logp_ref.exp()[tuples].prod(1) * reward[order].softmax(1)[:, 0]
            total = total + (chance * dpo_loss(logratio[order[:, 0]], logratio[order[:, 1:]], beta)).sum()
        return total

    for theta, at_rest in ((optimum, True), (logp_ref, False)):
        (gradient,) = torch.autograd.grad(expected_loss(theta.requires_grad_()), theta)
        assert (gradient.abs().max() < 1e-14) == at_rest


def test_label_smoothing_gives_each_rejected_an_equal_part():
    chosen, rejected, beta = randn(4), randn(4, 3, seed=1), 0.8

    def formula(w, r):
        scores = beta * torch.cat([w[:, None], r], 1)
        target = tensor(0.7, 0.1, 0.1, 0.1)
        return scores.logsumexp(1) - (target * scores).sum(1)

    ours = with_gradients(lambda w, r: dpo_loss(w, r, beta, label_smoothing=0.3), chosen, rejected)
    assert_same(ours, with_gradients(formula, chosen, rejected))
    _, gradient = with_gradients(lambda w: dpo_loss(w, rejected[:, 0], beta, label_smoothing=0.5), rejected[:, 0])
    assert gradient.tolist() == pytest.approx([0.0] * 4, abs=1e-16)  # half the labels wrong: equality is the best


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("fill", FILLS)
def test_rejected_that_do_not_count_change_nothing(fill, smoothing):
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    chosen, rejected, beta = randn(4), randn(4, 3, seed=1), randn(4, seed=2).exp()
    loss, gradient_w, _, _ = unmoved_by(
        fill,
        [torch.ones(4).bool(), mask, torch.ones(4).bool()],
        lambda w, r, b: dpo_loss(w, r, b, mask=mask, label_smoothing=smoothing),
        *(chosen, rejected, beta),
        trained=3,
    )
    assert loss[2] == gradient_w[2] == 0
    for row, columns in ((0, [0, 1]), (1, [2]), (3, [0, 1, 2])):
        alone = dpo_loss(chosen[[row]], rejected[[row]][:, columns], beta[[row]], label_smoothing=smoothing)
        assert_same(loss[[row]], alone)


def test_dpo_refuses_a_bad_mask_and_label_smoothing():
    x = torch.zeros(3)
    for smoothing in (-0.1, 0.6, math.nan):
        refused(f"label_smoothing={smoothing}", dpo_loss, x, x, 0.1, label_smoothing=smoothing)
    for rejected, mask in ((x, torch.ones(3, 1)), (torch.zeros(3, 2), torch.ones(3)), (torch.zeros(3, 2), x[:2])):
        refused(r"rejected_logratio \(3.*mask", dpo_loss, x, rejected, 0.1, mask=mask.bool())
    refused("bool", dpo_loss, x, x, 0.1, mask=x)
    assert dpo_loss(x[:0], torch.zeros(0, 4), 0.1).shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.49])
def test_robust_dpo_of_swapped_labels_is_dpo_of_the_true_ones(smoothing):
    chosen, rejected = 5 * randn(9), 5 * randn(9, seed=1)

    def expected(w, r):
        kept, swapped = (robust_dpo_loss(*pair, 0.7, label_smoothing=smoothing) for pair in ((w, r), (r, w)))
        return (1 - smoothing) * kept + smoothing * swapped

    true = with_gradients(lambda w, r: dpo_loss(w, r, 0.7), chosen, rejected)
    assert_same(with_gradients(expected, chosen, rejected), true, rtol=1e-11, atol=1e-11)


def test_robust_dpo_worked_number_and_its_limits():
    loss, slope, _ = with_gradients(
        lambda w, r: robust_dpo_loss(w, r, 0.5, label_smoothing=0.25), tensor(2.0), tensor(-2.0)
    )
    assert_same(loss, tensor(-0.8730719889570274), rtol=0, atol=1e-14)
    assert slope.item() == pytest.approx(-0.30960146101105873)
    for smoothing in (-0.01, 0.5, math.nan):
        with pytest.raises(ValueError, match=rf"label_smoothing={smoothing} is not allowed: it must lie in \[0, 0.5\)"):
            robust_dpo_loss(tensor(1.0), tensor(0.0), 0.1, label_smoothing=smoothing)


def test_ipo_is_zero_at_its_target_gap():
    loss, gradient_w, gradient_l = with_gradients(lambda w, r: ipo_loss(w, r, 0.1), tensor(3.0, 6.0), tensor(0, 1))
    assert loss.tolist() == pytest.approx([4.0, 0.0], abs=1e-14)  # (3 - 1/.2)² and (5 - 1/.2)²
    assert gradient_w.tolist() == pytest.approx([-4.0, 0.0], abs=1e-14)
    assert torch.equal(gradient_l, -gradient_w)


def test_hinge_is_flat_beyond_its_margin():
    loss, gradient = with_gradients(lambda w: hinge_loss(w, torch.zeros(3), 0.5), tensor(-1, 1, 3))
    assert loss.tolist() == [1.5, 0.5, 0.0]
    assert gradient.tolist() == [-0.5, -0.5, 0.0]


def test_simpo_worked_number_and_its_margin():
    mean_w, mean_l = tensor(-6.0 / 4), tensor(-10.0 / 5)
    assert simpo_loss(mean_w, mean_l, 2.0).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)
    assert simpo_loss(mean_w, mean_l, 2.0, margin=0.4).item() == pytest.approx(math.log1p(math.exp(-0.6)), rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
def test_orpo_value_and_gradient(weight):
    def formula(w, r):
        return -w - weight * torch.log(_odds(w) / (_odds(w) + _odds(r)))  # sigmoid(log a - log b) = a/(a + b)

    chosen, rejected = -randn(8).abs() - 1e-3, -randn(8, seed=1).abs() - 1e-3
    results = [with_gradients(f, chosen, rejected) for f in (lambda w, r: orpo_loss(w, r, weight), formula)]
    assert_same(*results, rtol=1e-11, atol=1e-11)
    assert torch.equal(orpo_loss(chosen, rejected), orpo_loss(chosen, rejected, 0.1))


def test_orpo_of_a_certain_token_is_finite_and_still_has_a_gradient():
    """Its log-odds are those of -1e-6, where their slope is 1/(1 - p), about 1e6."""
    slope = -1 / math.expm1(-1e-6)
    other_odds, other_slope = -1 - math.log(-math.expm1(-1)), -1 / math.expm1(-1)
    certain, other = tensor(0.0, -1e-9), tensor(-1.0, -1.0)
    gap = certain - math.log(-math.expm1(-1e-6)) - other_odds
    wrong = 1 / (1 + gap.exp())
    loss, chosen, rejected = with_gradients(lambda w, r: orpo_loss(w, r, 0.1), certain, other)
    assert_same(loss, -certain - 0.1 * (1 - wrong).log(), rtol=1e-8, atol=1e-15)
    assert_same(chosen, -1 - 0.1 * wrong * slope, rtol=1e-8, atol=0)
    assert_same(rejected, 0.1 * wrong * other_slope, rtol=1e-8, atol=0)
    loss, chosen, rejected = with_gradients(lambda w, r: orpo_loss(w, r, 0.1), other, certain)
    assert_same(loss, -other - 0.1 * wrong.log(), rtol=1e-8, atol=0)
    assert_same(chosen, -1 - 0.1 * (1 - wrong) * other_slope, rtol=1e-8, atol=0)
    assert_same(rejected, 0.1 * (1 - wrong) * slope, rtol=1e-8, atol=0)
    single = orpo_loss(certain.float(), other.float())
    assert_same(single.double(), -certain - 0.1 * (1 - wrong).log(), rtol=0, atol=1e-6)


def test_orpo_refuses_shapes_and_weights():
    x = -torch.ones(3)
    for bad in ((x, x[:1]), (x[:, None], x[:, None]), (x, x[0])):
        refused("1 dimension", orpo_loss, *bad)
    for weight in (-0.1, math.nan):
        refused(f"weight={weight}", orpo_loss, x, x, weight)


def test_bradley_terry_value_and_gradient():
    chosen, rejected = tensor(0.0, 2.0, -1.0), tensor(0.0, 1.0, 3.0)
    loss, gradient_w, gradient_l = with_gradients(bradley_terry_loss, chosen, rejected)
    expected = tensor(math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(4)))
    assert_same(loss, expected)
    assert_same(gradient_w, -torch.sigmoid(rejected - chosen))
    assert_same(gradient_l, torch.sigmoid(rejected - chosen))
    assert_same(loss, dpo_loss(chosen, rejected, 1.0))


def test_bradley_terry_refuses_shapes_that_would_broadcast():
    for rejected in (torch.zeros(1), torch.zeros(3, 1)):
        refused(r"chosen \(3,\), rejected", bradley_terry_loss, torch.zeros(3), rejected)
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert bradley_terry_loss(torch.zeros(1).half(), torch.zeros(1).half()).dtype == torch.float32


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_bradley_terry_extreme_scores_stay_finite(a, b):
    loss, gradient = with_gradients(
        lambda w: bradley_terry_loss(w, torch.tensor([b], dtype=torch.float32)), torch.tensor([a], dtype=torch.float32)
    )
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert gradient.isfinite().all()


def test_kto_closed_form_and_gradient():
    desirable = torch.tensor([True, False, True, False])
    beta, z, logratio = 0.5, 0.4, tensor(1.0, 1.0, -2.0, -2.0)

    def call(r, reference_point):
        return kto_loss(r, desirable, reference_point, beta, desirable_weight=1.5, undesirable_weight=0.25)

    loss, gradient = with_gradients(lambda r: call(r, tensor(z)[0]), logratio)
    s = [1 / (1 + math.exp(-beta * (r - z))) for r in (1.0, -2.0)]
    expected = [1.5 * (1 - s[0]), 0.25 * s[0], 1.5 * (1 - s[1]), 0.25 * s[1]]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    slopes = [beta * x * (1 - x) for x in s]
    assert gradient.tolist() == pytest.approx(
        [-1.5 * slopes[0], 0.25 * slopes[0], -1.5 * slopes[1], 0.25 * slopes[1]], rel=1e-12
    )
    assert torch.equal(call(logratio, torch.full((4,), z, dtype=F64)), loss)
    # w_U (1 - sigmoid(beta (z - l))), as it is printed
    assert loss[1].item() == pytest.approx(0.25 * (1 - 1 / (1 + math.exp(-beta * (z - 1.0)))), rel=1e-12)


def test_kto_reference_point_is_detached_and_never_below_zero():
    logratio, desirable = randn(4).requires_grad_(), torch.tensor([True, False, True, False])
    for shape in ((), (4,)):
        z = torch.full(shape, 0.3, dtype=F64, requires_grad=True)
        kto_loss(logratio, desirable, z, 0.1).sum().backward()
        assert z.grad is None
        low, zero = (kto_loss(logratio, desirable, torch.full(shape, v, dtype=F64), 0.1) for v in (-3.0, 0.0))
        assert torch.equal(low, zero)
        assert not torch.equal(zero, kto_loss(logratio, desirable, torch.full(shape, 3.0, dtype=F64), 0.1))


def test_kto_refuses_labels_shapes_and_betas():
    x, yes, z = torch.zeros(3), torch.ones(3).bool(), torch.zeros(())
    for bad in ((x, yes.float(), z), (x, yes, torch.zeros(1)), (x, yes, torch.zeros(3, 1))):
        refused("bool desirable and a reference_point", kto_loss, *bad, 0.1)
    for bad in ((x, yes[:1], z), (x[:, None], yes[:, None], z)):
        refused("1 dimension", kto_loss, *bad, 0.1)
    for beta in (0.0, math.nan, torch.ones(1)):
        refused("beta", kto_loss, x, yes, z, beta)
    assert kto_loss(x[:0], yes[:0], z, 0.1).shape == (0,)
    for weights in ({"desirable_weight": -1.0}, {"undesirable_weight": math.nan}):
        refused("desirable_weight", kto_loss, torch.zeros(2), torch.ones(2).bool(), torch.zeros(()), 1.0, **weights)


def test_trajectory_value_and_gradient_by_a_loop():
    first, second, labels, beta = randn(4, 3), randn(4, 5, seed=1), tensor(1, 0, 0.5, 0.25), tensor(0.1, 1, 2, 3)
    masks = [randn(4, n, seed=2) > -0.5 for n in (3, 5)]
    loss, *gradients = with_gradients(
        lambda a, b: trajectory_dpo_loss(a, b, labels, beta, gamma=0.9, first_mask=masks[0], second_mask=masks[1]),
        first,
        second,
    )
    expected = [torch.zeros(4, 3, dtype=F64), torch.zeros(4, 5, dtype=F64)]
    for i in range(4):
        powers, score = [{}, {}], 0.0
        for side, (x, mask) in enumerate(zip((first, second), masks)):
            for t in [t for t in range(x.shape[1]) if mask[i, t]]:
                powers[side][t] = 0.9 ** len(powers[side])
                score += (-1) ** side * powers[side][t] * x[i, t].item()
        chance = 1 / (1 + math.exp(-beta[i].item() * score))
        y = labels[i].item()
        assert loss[i].item() == pytest.approx(-y * math.log(chance) - (1 - y) * math.log(1 - chance), rel=1e-11)
        for side in range(2):
            for t, power in powers[side].items():
                expected[side][i, t] = (-1) ** side * beta[i] * power * (chance - y)
    assert_same(gradients, expected, rtol=1e-11, atol=1e-12)


def test_undiscounted_trajectories_are_dpo_of_their_sums():
    first, second, ones = randn(5, 3), randn(5, 4, seed=1), torch.ones(5, dtype=F64)
    forward = dpo_loss(first.sum(1), second.sum(1), 0.3)
    backward = dpo_loss(second.sum(1), first.sum(1), 0.3)
    assert_same(trajectory_dpo_loss(first, second, ones, 0.3), forward)
    assert_same(trajectory_dpo_loss(first, second, 0 * ones, 0.3), backward)
    tie = trajectory_dpo_loss(first, second, 0.5 * ones, 0.3)
    assert_same(tie, (forward + backward) / 2)
    one = trajectory_dpo_loss(first[:, :1], second[:, :1], ones, 0.3, gamma=1.0)
    assert_same(one, dpo_loss(first[:, 0], second[:, 0], 0.3))
    only_first = trajectory_dpo_loss(first, second, ones, 0.3, gamma=0.0)
    assert_same(only_first, one)


def test_a_tie_is_at_rest_where_both_are_equal_and_draws_them_together_elsewhere():
    x, tie = randn(4, 3), torch.full((4,), 0.5, dtype=F64)
    loss, gradient = with_gradients(lambda a: trajectory_dpo_loss(a, x, tie, 0.3), x)
    assert_same(loss, torch.full((4,), math.log(2), dtype=F64))
    assert (gradient == 0).all()
    for shift in (1.0, -1.0):
        _, gradient = with_gradients(lambda a: trajectory_dpo_loss(a, x, tie, 0.3), x + shift)
        assert (gradient * shift > 0).all()


@pytest.mark.parametrize("fill", [0.0, *FILLS])
@pytest.mark.parametrize(
    ("columns", "others"), [([2, 3, 4], [0, 1, 2]), ([0, 1, 2], [1, 3, 6]), ([0, 4, 5], [3, 4, 5])]
)
def test_padding_before_between_and_after_does_not_change_the_discount(fill, columns, others):
    first, second, labels = randn(2, 3), randn(2, 3, seed=1), tensor(1.0, 0.3)

    def padded(x, places):
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[:, places] = True
        wide = torch.full((2, 7), fill, dtype=F64)
        wide[:, places] = x
        return wide, mask

    def loss(a, b, **masks):
        return trajectory_dpo_loss(a, b, labels, 0.3, gamma=0.7, **masks)

    dense, dense_first, dense_second = with_gradients(loss, first, second)
    (a, mask_a), (b, mask_b) = padded(first, columns), padded(second, others)
    wide, gradient_a, gradient_b = with_gradients(lambda x, y: loss(x, y, first_mask=mask_a, second_mask=mask_b), a, b)
    assert_same(wide, dense)
    assert_same(gradient_a[:, columns], dense_first)
    assert_same(gradient_b[:, others], dense_second)
    assert (gradient_a[~mask_a] == 0).all()
    assert (gradient_b[~mask_b] == 0).all()


@pytest.mark.parametrize("fill", FILLS)
def test_what_padding_holds_changes_no_bit(fill):
    masks = [torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool(), torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()]
    settings_ = {"gamma": 0.9, "first_mask": masks[0], "second_mask": masks[1]}
    clean = [randn(*mask.shape, seed=i) for i, mask in enumerate(masks)]
    unmoved_by(
        fill, masks, lambda a, b: trajectory_dpo_loss(a, b, tensor(1.0, 0.5), 0.3, **settings_), *clean, trained=2
    )


def test_trajectories_without_actions_are_undecided():
    loss = trajectory_dpo_loss(torch.zeros(2, 0), torch.zeros(2, 3), torch.ones(2), 0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert trajectory_dpo_loss(torch.zeros(0, 4), torch.zeros(0, 3), torch.ones(0), 0.1).shape == (0,)


def test_trajectory_errors():
    x, labels, mask = torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3).bool()
    for gamma in (-0.1, 1.1, math.nan):
        refused(f"gamma={gamma}", trajectory_dpo_loss, x, x, labels, 0.1, gamma=gamma)
    for bad in (-0.1, 1.1, math.nan):
        refused("labels must lie in", trajectory_dpo_loss, x, x, torch.tensor([0.5, bad]), 0.1)
    for bad in ((x, x[:1], labels), (x[0], x[0], labels), (x, x, labels[:1]), (x, x, labels[:, None])):
        refused(r"dimension|common shape", trajectory_dpo_loss, *bad, 0.1)
    for bad in (mask[:, :1], mask.float()):
        refused("mask", trajectory_dpo_loss, x, x, labels, 0.1, first_mask=bad)
        refused("mask", trajectory_dpo_loss, x, x, labels, 0.1, second_mask=bad)
    for beta in (0.0, torch.ones(3)):
        refused("beta", trajectory_dpo_loss, x, x, labels, beta)


def test_each_candidate_is_kept_with_its_probability():
    """200 000 trials a candidate; 2 % off in beta would be 7 standard errors of the least likely."""
    rewards, trials = tensor([0.3, 1.0, -0.2], [5.0, 5.0, 4.0]), 200_000
    kept = rso_accept(rewards.expand(trials, 2, 3), 0.8, generator=torch.Generator().manual_seed(0))
    chance = tensor([math.exp(-0.7 / 0.8), 1, math.exp(-1.2 / 0.8)], [1, 1, math.exp(-1 / 0.8)])
    error = (chance * (1 - chance) / trials).sqrt()
    assert ((kept.double().mean(0) - chance).abs() <= 4 * error).all()


REWARD, P_REF, BETA = tensor(0.0, 1.0, -1.0, 2.0, 0.5), tensor(0.3, 0.3, 0.2, 0.05, 0.15), 0.7


def _kept(candidates, prompts):
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(P_REF, prompts * candidates, replacement=True, generator=generator)
    samples = samples.reshape(prompts, candidates)
    return samples[rso_accept(REWARD[samples], BETA, generator=generator)]


def test_kept_samples_of_the_reference_are_samples_of_the_optimum():
    """Chi-square with 4 degrees of freedom, seed fixed; with beta 5 % off it exceeds the same bound."""
    kept = _kept(1_000_000, 1)
    counts = torch.bincount(kept, minlength=5).double()

    def chi_square(beta):
        expected = (P_REF.log() + REWARD / beta).softmax(0) * len(kept)
        return ((counts - expected).square() / expected).sum().item()

    assert len(kept) > 100_000
    assert chi_square(BETA) < 18.5  # p = .001
    assert chi_square(1.05 * BETA) > 100
    assert chi_square(0.95 * BETA) > 100


def test_of_few_candidates_too_many_are_kept():
    """The best of N stands for the best there is: the optimum is reached only where N holds that too."""
    optimum = ((P_REF.log() + REWARD / BETA).softmax(0) * REWARD).sum().item()
    attained = [REWARD[_kept(n, 200_000 // n)].mean().item() for n in (1, 4, 256)]
    assert attained[0] == pytest.approx((P_REF * REWARD).sum().item(), abs=0.02)
    assert attained[0] + 0.3 < attained[1] < optimum - 0.3
    assert attained[2] == pytest.approx(optimum, abs=0.02)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-6e4, 6e4), min_size=1, max_size=5), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_best_candidate_is_always_kept(values, beta):
    for dtype, scale in ((torch.float16, 1.0), (torch.float32, 1e30), (F64, 1e300)):
        rewards = scale * torch.tensor(values, dtype=dtype)
        kept = rso_accept(rewards, beta)
        assert kept.dtype == torch.bool
        assert kept.shape == rewards.shape
        assert kept[rewards == rewards.max()].all()


def test_candidates_far_below_the_best_of_their_row_are_never_kept():
    rewards = torch.tensor([[0.0, -1e4], [-1e4, -2e4]])
    generator = torch.Generator().manual_seed(0)
    kept = rso_accept(rewards.expand(1000, 2, 2), 1.0, generator=generator)
    assert kept[..., 0].all()
    assert not kept[..., 1].any()


def test_rejection_sampling_follows_its_generator_and_carries_no_gradient():
    rewards = randn(50, 8).requires_grad_()
    first, second = (rso_accept(rewards, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    torch.manual_seed(3)
    assert torch.equal(rso_accept(rewards, 0.5), first)


def test_rejection_sampling_errors_and_empty_batches():
    for bad in (torch.tensor(1.0), torch.tensor([0.0, math.nan]), torch.tensor([[0.0, math.inf]])):
        refused(r"must be \(..., N\) and finite", rso_accept, bad, 1.0)
    for beta in (0.0, -1.0, math.nan, math.inf, torch.ones(2)):
        refused("beta", rso_accept, torch.zeros(2), beta)
    for shape in ((0,), (0, 3), (3, 0)):
        assert rso_accept(torch.zeros(shape), 1.0).shape == shape


def _log_likelihood(wins, strengths):
    i, j = torch.cartesian_prod(*[torch.arange(len(wins))] * 2).unbind(1)
    return -(wins[i, j] * (i != j) * bradley_terry_loss(strengths[i], strengths[j])).sum()


def _error(wins, strengths):
    """About how far from the maximum the strengths are: the slope over the curvature."""
    chance = torch.sigmoid(strengths[:, None] - strengths)
    slope = (wins * chance.T - wins.T * chance).sum(1)
    return (slope.abs() / ((wins + wins.T) * chance * chance.T).sum(1)).max().item()


def _zermelo(wins, rounds):
    """The minorise-maximise iteration of Zermelo (1929), whose fixed point is the maximum."""
    alpha, games = torch.ones(len(wins), dtype=F64), wins + wins.T
    for _ in range(rounds):
        alpha = wins.sum(1) / (games / (alpha[:, None] + alpha)).sum(1)
        alpha = alpha / alpha.log().mean().exp()
    return alpha.log()


def _table(n, seed, low=0.0):
    generator = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 20, (n, n), generator=generator).double() + low
    return wins.fill_diagonal_(0.0)


def test_the_basketball_table():
    wins = tensor([0, 3, 1], [1, 0, 1], [1, 1, 0])  # A, B, C
    strengths = fit_bradley_terry(wins)
    a, b, c = (strengths - strengths[1]).exp().tolist()
    assert (a, b, c) == pytest.approx((2.314596, 1.0, 1.521380), abs=5e-7)
    assert torch.sigmoid(strengths[0] - strengths[1]).item() == pytest.approx(0.698304, abs=5e-7)
    assert _log_likelihood(wins, strengths).item() == pytest.approx(-5.135627, abs=5e-7)


@pytest.mark.parametrize("seed", range(5))
def test_fit_equals_a_slow_iteration(seed):
    wins = _table(2 + seed, seed, low=0.5)
    assert_same(fit_bradley_terry(wins), _zermelo(wins, 3000), rtol=FIT, atol=FIT)


def test_expected_counts_give_the_strengths_back():
    for n in (1, 2, 7, 30):
        known = 3 * randn(n, seed=n)
        known = known - known.mean()
        games = 1 + randn(n, n).abs()
        wins = (games + games.T) * torch.sigmoid(known[:, None] - known)
        assert_same(fit_bradley_terry(wins), known, rtol=FIT, atol=FIT)


def test_a_chain_is_fitted_pair_by_pair():
    for n in (3, 40):
        wins = torch.zeros(n, n, dtype=F64)
        for i, j in pairwise(range(n)):
            wins[i, j], wins[j, i] = 1000.0, 1.0
        strengths = fit_bradley_terry(wins)
        assert_same(-strengths.diff(), torch.full((n - 1,), math.log(1000), dtype=F64))
        assert abs(strengths.mean()) < 1e-12


def _extreme_tables():
    cycle = torch.zeros(12, 12, dtype=F64)
    for i in range(11):
        cycle[i, i + 1] = 1000.0
    cycle[11, 0] = 1.0
    lopsided = _table(6, 1) * tensor(1e3, 1, 1, 1, 1, 1e-3)[:, None]
    return {
        "cycle": cycle,
        "lopsided": lopsided,
        "large": 1e6 * _table(5, 2, low=1),
        "small": 1e-30 * _table(5, 2, low=1),
        "huge": tensor([0, 1e17, 0], [1, 0, 1e17], [0, 1, 0]),
        "wide": tensor([0, 1e12, 3], [1, 0, 1e9], [1, 1, 0]),
    }


@pytest.mark.parametrize("name", _extreme_tables())
def test_at_the_fit_of_extreme_tables_no_slope_is_left(name):
    wins = _extreme_tables()[name]
    strengths = fit_bradley_terry(wins)
    assert _error(wins, strengths) < FIT
    best = _log_likelihood(wins, strengths)
    for seed in range(20):
        assert _log_likelihood(wins, strengths + 0.05 * randn(len(wins), seed=seed)) < best


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=12, max_size=12), st.floats(1e-3, 1e3))
def test_fit_is_at_rest_and_indifferent_to_order_scale_and_diagonal(counts, scale):
    wins = torch.zeros(4, 4, dtype=F64)
    wins[~torch.eye(4, dtype=torch.bool)] = torch.tensor(counts, dtype=F64)
    try:
        strengths = fit_bradley_terry(wins)
    except ValueError:
        beaten = wins > 0
        for _ in range(4):
            beaten = beaten | (beaten.double() @ beaten.double() > 0)
        assert not (beaten | torch.eye(4, dtype=torch.bool)).all()
        return
    leaf = strengths.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_log_likelihood(wins, leaf), leaf)
    assert slope.abs().max() < FIT * wins.max()
    order = torch.tensor([2, 0, 3, 1])
    changed = scale * (wins + torch.eye(4, dtype=F64) * 7)[order][:, order]
    assert_same(fit_bradley_terry(changed), strengths[order], rtol=FIT, atol=FIT)
    assert_same(fit_bradley_terry(wins.T), -strengths, rtol=FIT, atol=FIT)


def test_only_differences_of_strengths_matter():
    wins = _table(5, 0, low=1)
    strengths = fit_bradley_terry(wins)
    assert abs(strengths.mean()) < 1e-15
    assert_same(_log_likelihood(wins, strengths + 17), _log_likelihood(wins, strengths))
    assert not fit_bradley_terry(wins.requires_grad_()).requires_grad
    assert fit_bradley_terry(torch.ones(2, 2, dtype=torch.int32)).tolist() == [0.0, 0.0]


UNDECIDED = {
    "nobody beat the first": tensor([0, 3, 3], [0, 0, 1], [0, 1, 0]),
    "the last beat nobody": tensor([0, 1, 3], [1, 0, 1], [0, 0, 0]),
    "two leagues": torch.block_diag(torch.ones(2, 2, dtype=F64), torch.ones(2, 2, dtype=F64)),
    "a weak league": torch.tensor([[0, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]).double(),
    "no games": torch.zeros(2, 2, dtype=F64),
    "nobody": torch.zeros(0, 0, dtype=F64),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_tables_without_a_finite_maximum_are_refused(name):
    refused("no finite maximum", fit_bradley_terry, UNDECIDED[name])


def test_what_is_no_table_of_wins_is_refused():
    for bad in (
        torch.ones(2, 3),
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.tensor([[0, -1.0], [1, 0]]),
        torch.tensor([[0, math.nan], [1, 0]]),
        torch.tensor([[0, math.inf], [1, 0]]),
    ):
        refused("square table of finite counts", fit_bradley_terry, bad)


@pytest.mark.parametrize("rejected", [1, 3])
def test_float32_keeps_the_gradient_of_a_pair_that_is_well_apart(rejected):
    for gap in (10.0, 15.0, 17.0, 20.0, 50.0):
        gradients = []
        for dtype in (torch.float64, torch.float32):
            chosen = torch.tensor([gap], dtype=dtype, requires_grad=True)
            others = torch.zeros(1, rejected, dtype=dtype, requires_grad=True)
            loss = dpo_loss(chosen, others, 1.0)
            gradients.append([loss.detach(), *torch.autograd.grad(loss.sum(), (chosen, others))])
            assert gradients[-1][1].item() == pytest.approx(-gradients[-1][2].sum().item(), rel=1e-6)
        assert_same([narrow.double() for narrow in gradients[1]], gradients[0], rtol=1e-5, atol=0)


def test_a_table_beyond_what_can_be_fitted_is_refused_and_tiny_counts_are_not():
    refused("wins", fit_bradley_terry, torch.tensor([[0, 1e300], [1e-300, 0]], dtype=torch.float64))
    strengths = fit_bradley_terry(torch.tensor([[0, 1e-320], [3e-320, 0]], dtype=torch.float64))
    assert (strengths[1] - strengths[0]).item() == pytest.approx(math.log(3), rel=1e-3)  # so small they are rounded


def test_a_table_on_which_newtons_full_steps_diverge_is_fitted():
    rows = ([0, 1e-5, 0, 1e-3, 1e7], [1e2, 0, 1e5, 0, 1e1], [0, 0, 0, 1, 0])
    table = tensor(*rows, [0, 1e6, 1e-5, 0, 1e2], [1e-4, 1e-1, 1e6, 0, 0])
    strengths = fit_bradley_terry(table)
    chance = torch.sigmoid(strengths[:, None] - strengths)
    surprising, expected = (table * chance.T).sum(1), (table.T * chance).sum(1)
    assert_same(surprising, expected, rtol=1e-6, atol=0)


def test_only_a_cpu_is_asked_for_the_range_of_the_labels():
    logratio, labels = torch.zeros(2, 3, device="meta"), torch.zeros(2, device="meta")
    assert trajectory_dpo_loss(logratio, logratio, labels, 1.0).shape == (2,)


def test_half_precision_is_widened_before_any_arithmetic():
    first, second = (-1.0 - torch.rand(5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    first, second, beta = first.bfloat16(), second.bfloat16(), torch.full((5,), 0.3).bfloat16()
    desirable, point = torch.tensor([True, False, True, False, True]), torch.tensor(0.11).bfloat16()
    calls = [
        bradley_terry_loss,
        lambda a, b: dpo_loss(a, b, beta.to(a.dtype)),
        lambda a, b: dpo_loss(a, torch.stack([b, a], 1), 0.3, label_smoothing=0.1),
        lambda a, b: ipo_loss(a, b, beta.to(a.dtype)),
        lambda a, b: hinge_loss(a, b, 0.3),
        lambda a, b: kto_loss(a, desirable, point.to(a.dtype), 0.3),
        lambda a, b: simpo_loss(a, b, 0.3, margin=0.1),
        lambda a, b: orpo_loss(a, b),
        lambda a, b: trajectory_dpo_loss(torch.stack([a, b], 1), torch.stack([b, a], 1), a + 2, 0.3, gamma=0.9),
    ]
    for call in calls:
        narrow = call(first, second)
        assert narrow.dtype == torch.float32
        assert_same(narrow, call(first.float(), second.float()), rtol=1e-5, atol=1e-6)


def test_more_shapes_and_the_limits_of_settings():
    zeros = torch.zeros(2)
    refused("expected chosen_logratio", dpo_loss, zeros, torch.zeros(2, 3, 1), 1.0)
    x = torch.zeros(2, 4)
    refused(r"labels \(3,\), first \(2,\)", trajectory_dpo_loss, x, x, torch.zeros(3), 1.0)
    refused(r"first \(3,\), second \(2,\)", trajectory_dpo_loss, torch.zeros(3, 4), torch.zeros(2, 4), zeros, 1.0)
    desirable = torch.tensor([True, False])
    plain = kto_loss(zeros, desirable, torch.zeros(()), 1.0)
    torch.testing.assert_close(plain, torch.full((2,), 0.5))
    none = kto_loss(zeros, desirable, torch.zeros(()), 1.0, desirable_weight=0.0, undesirable_weight=0.0)
    assert none.tolist() == [0.0, 0.0]


def test_no_discount_left_and_a_masked_first_action():
    logratio, mask = torch.tensor([[9.0, 1.0, 5.0]]), torch.tensor([[False, True, True]])
    loss = trajectory_dpo_loss(logratio, torch.zeros(1, 1), torch.ones(1), 1.0, gamma=0.0, first_mask=mask)
    torch.testing.assert_close(loss, bradley_terry_loss(torch.ones(1), torch.zeros(1)))


@pytest.fixture
def tree():
    """Three steps of two actions, each node with its own rewards and reference; the soft optimum backwards."""
    rewards = [randn(2**t, 2, seed=t) for t in range(3)]
    reference = [randn(2**t, 2, seed=10 + t).log_softmax(1) for t in range(3)]
    value, optimum = torch.zeros(8, dtype=F64), []
    for reward, ref in zip(reversed(rewards), reversed(reference)):
        q = reward + value.reshape(-1, 2)
        value = BETA * (ref + q / BETA).logsumexp(1)
        optimum.insert(0, ref + (q - value.unsqueeze(1)) / BETA)
    return rewards, reference, optimum, value


def _along(tables, path):
    node, found = 0, []
    for table, action in zip(tables, path):
        found.append(table[node, action])
        node = 2 * node + action
    return torch.stack(found)


def test_log_ratios_of_whole_trajectories_are_returns_less_the_value_of_the_start(tree):
    rewards, reference, optimum, start = tree
    for path in itertools.product(range(2), repeat=3):
        log_ratio = _along(optimum, path) - _along(reference, path)
        expected = _along(rewards, path).sum() - start[0]
        assert_same(BETA * log_ratio.sum(), expected)
    soft_advantage = BETA * (optimum[0] - reference[0])
    kl = (optimum[0].exp() * (optimum[0] - reference[0])).sum()
    assert_same((optimum[0].exp() * soft_advantage).sum(), BETA * kl)
    assert kl > 0.01


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_loss_is_stationary_exactly_at_the_optimum(tree, shift):
    rewards, reference, optimum, _ = tree
    logits = [(table + shift * randn(*table.shape, seed=20)).requires_grad_() for table in optimum]
    policy = [table.log_softmax(1) for table in logits]
    paths = list(itertools.product(range(2), repeat=3))
    first, second = zip(*itertools.combinations(paths, 2))
    log_ratios = [torch.stack([_along(policy, p) - _along(reference, p) for p in side]) for side in (first, second)]
    returns = [torch.stack([_along(rewards, p).sum() for p in side]) for side in (first, second)]
    labels = torch.sigmoid(returns[0] - returns[1])
    loss = trajectory_dpo_loss(*log_ratios, labels, BETA)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), logits)]).norm()
    assert slope < 1e-12 if shift == 0 else slope > 0.01
