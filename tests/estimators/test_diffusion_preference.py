"""Diffusion-DPO, original and corrected: worked numbers, which gradient each has where, its usual beta in nats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_align.estimators import beta_in_nats, corrected_diffusion_dpo_loss, diffusion_dpo_loss, dpo_loss
from tests.helpers.oracles import F64, assert_same, randn, refused, tensor


def _errors(n=7):
    return [randn(n, seed=s).square() for s in range(4)]  # err_w, err_w_ref, err_l, err_l_ref


class _Step:
    """One denoising step of a small nonlinear network next to a reference, on a pair of noised samples."""

    def __init__(self, seed=0, d=3, std=0.4):
        self.x_w, self.x_l, self.target_w, self.target_l = (randn(6, d, seed=10 * seed + i) for i in range(4))
        self.std, self.d = std, d

    def network(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(self.d, 8), nn.Tanh(), nn.Linear(8, self.d)).double()

    def errors(self, network):
        pairs = ((self.x_w, self.target_w), (self.x_l, self.target_l))
        return [(target - network(x)).square().sum(1) / (2 * self.std**2) for x, target in pairs]

    def kl(self, network, reference):
        return [(network(x) - reference(x)).square().sum(1) / (2 * self.std**2) for x in (self.x_w, self.x_l)]


def _gradient(loss, network):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss.sum(), list(network.parameters()), retain_graph=True)]
    )


def test_original_value_and_gradient_by_equation_34():
    """T omega turns squared errors of the noise into nats."""
    noise_w, noise_l, predicted_w, predicted_l, reference_w, reference_l = (randn(5, 4, seed=s) for s in range(6))
    factor, beta = 0.37, 0.8
    predicted_w.requires_grad_(), predicted_l.requires_grad_()

    def error(noise, predicted):
        return factor * (noise - predicted).square().sum(1)

    loss = diffusion_dpo_loss(
        error(noise_w, predicted_w),
        error(noise_w, reference_w),
        error(noise_l, predicted_l),
        error(noise_l, reference_l),
        beta,
    )
    winner = (noise_w - predicted_w).norm(dim=1) ** 2 - (noise_w - reference_w).norm(dim=1) ** 2
    loser = (noise_l - predicted_l).norm(dim=1) ** 2 - (noise_l - reference_l).norm(dim=1) ** 2
    weight = 1 / (1 + (-beta * factor * (winner - loser)).exp())
    assert_same(loss, -(1 - weight).log())
    loss.sum().backward()
    pull = 2 * beta * factor * weight.detach().unsqueeze(1)
    assert_same(predicted_w.grad, (-pull * (noise_w - predicted_w)).detach())
    assert_same(predicted_l.grad, (pull * (noise_l - predicted_l)).detach())


def test_original_is_ln_2_at_the_reference_and_falls_as_the_winner_is_predicted_better():
    err_w, _, err_l, _ = _errors()
    start = diffusion_dpo_loss(err_w, err_w, err_l, err_l, 0.3)
    assert_same(start, torch.full((7,), math.log(2), dtype=F64))
    assert (diffusion_dpo_loss(err_w - 0.1, err_w, err_l, err_l, 0.3) < start).all()
    assert (diffusion_dpo_loss(err_w, err_w, err_l - 0.1, err_l, 0.3) > start).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_original_is_dpo_of_the_log_ratios(smoothing):
    err_w, err_w_ref, err_l, err_l_ref = _errors()
    for beta in (0.4, randn(7, seed=5).exp()):
        loss = diffusion_dpo_loss(err_w, err_w_ref, err_l, err_l_ref, beta, label_smoothing=smoothing)
        expected = dpo_loss(err_w_ref - err_w, err_l_ref - err_l, beta, label_smoothing=smoothing)
        assert torch.equal(loss, expected)


def test_log_ratios_of_a_step_are_differences_of_errors():
    x, mean, mean_ref, std = (randn(5, 4, seed=s) for s in (0, 1, 2, 3))
    std = std.abs() + 0.1
    policy, reference = (torch.distributions.Normal(m, std[:, :1]) for m in (mean, mean_ref))
    logratio = (policy.log_prob(x) - reference.log_prob(x)).sum(1)
    err, err_ref = ((x - m).square().sum(1) / (2 * std[:, 0] ** 2) for m in (mean, mean_ref))
    assert_same(err_ref - err, logratio)


def test_corrected_worked_number():
    err_w, err_l = (torch.tensor([gap**2 / (2 * 0.5**2)], dtype=F64, requires_grad=True) for gap in (0.2, -0.3))
    kl_w, kl_l = (tensor(gap**2 / (2 * 0.5**2)) for gap in (0.1, 0.2))
    loss = corrected_diffusion_dpo_loss(err_w, err_l, kl_w, kl_l, 2.0)
    assert loss.item() == pytest.approx(-0.105993, abs=5e-7)
    loss.sum().backward()
    assert err_w.grad.item() / 2.0 == pytest.approx(0.529964, abs=5e-7)  # beta times the weight
    assert err_l.grad.item() == -err_w.grad.item()


def test_corrected_value_and_gradient_by_equation_36():
    err_w, kl_w, err_l, kl_l = _errors()
    for beta in (1.7, randn(7, seed=5).exp()):
        leaves = [x.clone().requires_grad_() for x in (err_w, err_l)]
        loss = corrected_diffusion_dpo_loss(*leaves, kl_w, kl_l, beta)
        weight = 1 / (1 + (beta * kl_w - beta * kl_l).exp())
        assert_same(loss, beta * weight * (err_w - err_l))
        for gradient, sign in zip(torch.autograd.grad(loss.sum(), leaves), (1, -1)):
            assert_same(gradient, sign * beta * weight)


def test_only_the_errors_of_the_policy_have_gradients():
    for call in (diffusion_dpo_loss, corrected_diffusion_dpo_loss):
        inputs = [x.requires_grad_() for x in _errors()]
        call(*inputs, 0.3).sum().backward()
        trained = {0, 2} if call is diffusion_dpo_loss else {0, 1}
        for i, x in enumerate(inputs):
            assert (x.grad is not None and bool((x.grad != 0).all())) == (i in trained)


@pytest.mark.parametrize("seed", range(4))
def test_at_the_reference_both_have_the_same_gradient(seed):
    step, beta = _Step(seed), 0.9
    network, reference = step.network(seed), step.network(seed)
    (err_w, err_l), (ref_w, ref_l) = step.errors(network), step.errors(reference)
    original = diffusion_dpo_loss(err_w, ref_w, err_l, ref_l, beta)
    corrected = corrected_diffusion_dpo_loss(err_w, err_l, *step.kl(network, reference), beta)
    assert_same(original, torch.full((6,), math.log(2), dtype=F64))
    by_hand = _gradient(beta / 2 * (err_w - err_l), network)  # weight 1/2
    for loss in (original, corrected):
        assert_same(_gradient(loss, network), by_hand)


@pytest.mark.parametrize("seed", range(4))
def test_away_from_the_reference_log_ratios_for_weights_give_the_original_and_kl_does_not(seed):
    step, beta = _Step(seed), 0.3
    network, reference = step.network(seed), step.network(seed + 100)
    (err_w, err_l), (ref_w, ref_l) = step.errors(network), step.errors(reference)
    original = _gradient(diffusion_dpo_loss(err_w, ref_w, err_l, ref_l, beta), network)
    log_ratios = [(ref - err.detach()) for ref, err in ((ref_w, err_w), (ref_l, err_l))]
    signed = _gradient(corrected_diffusion_dpo_loss(err_w, err_l, *log_ratios, beta), network)
    assert_same(signed, original)
    literal = corrected_diffusion_dpo_loss(err_w, err_l, *step.kl(network, reference), beta)
    literal = _gradient(literal, network)
    assert (literal - original).norm() > 0.05 * original.norm()


def test_the_weight_of_the_corrected_loss_cannot_tell_a_good_change_from_a_bad_one():
    """A winner's mean moved towards its target and one moved away from it by as much: the same KL, the same weight."""
    target, zero = tensor(1.0), torch.zeros(1, dtype=F64)
    weights = {}
    for shift in (0.5, -0.5):
        err_w, err_l = ((target - shift).square() / 2).requires_grad_(), (target.square() / 2)
        kl_w = torch.full((1,), shift**2 / 2, dtype=F64)
        (corrected,) = torch.autograd.grad(corrected_diffusion_dpo_loss(err_w, err_l, kl_w, zero, 1.0).sum(), err_w)
        (original,) = torch.autograd.grad(diffusion_dpo_loss(err_w, err_l, err_l, err_l, 1.0).sum(), err_w)
        weights[shift] = corrected.item(), original.item()
    assert weights[0.5][0] == weights[-0.5][0]
    assert weights[0.5][1] < 0.5 < weights[-0.5][1]


def test_a_loser_needs_more_than_twice_beta_if_the_weight_follows_the_policy():
    """One pair, its winner at its target, its loser at -1, beta 1, std 1, kl_old of the policy itself: without the KL
    term the loser's mean runs off, at kl_coef = 2 beta it still does, at a steady pace; above, it comes to rest."""
    kl_coef = tensor(0.0, 1.9, 2.0, 2.2, 4.0)
    zero = torch.zeros(5, dtype=F64)
    mean, rate = zero, 0.1
    for _ in range(1000):
        mean = mean.detach().requires_grad_()
        kl = mean.square() / 2
        loss = corrected_diffusion_dpo_loss(zero, (mean + 1).square() / 2, zero, kl, 1.0) + kl_coef * kl / 2
        (gradient,) = torch.autograd.grad(loss.sum(), mean)
        mean = mean - rate * gradient
    assert mean[0] > 1e30
    assert mean[1] > 1e3
    assert gradient[2].item() == pytest.approx(-1.0, rel=1e-6)
    assert mean[2].item() == pytest.approx(1000 * rate, rel=0.1)
    assert gradient[3:].abs().max() < 1e-3
    weight = torch.sigmoid(mean.detach()[3:].square() / 2)
    assert_same(mean[3:], weight / (kl_coef[3:] / 2 - weight), rtol=1e-2, atol=0)
    assert mean.tolist()[3:] == pytest.approx([10.0, 0.346789], rel=1e-2)


def test_with_a_fixed_weight_twice_beta_is_enough():
    """The least curvature of beta w (err_w - err_l) + lam (KL_w + KL_l)/2 in a mean: lam/2 - beta w, over std²."""
    for kl_old_l in (0.0, 1.0, 5.0):
        for kl_coef, bounded in ((4.0, True), (0.9, False)):
            mean = torch.tensor([0.3], dtype=F64, requires_grad=True)
            kl = mean.square() / 2
            old = tensor(kl_old_l)
            loss = corrected_diffusion_dpo_loss(0 * kl, (mean + 1).square() / 2, 0 * old, old, 2.0) + kl_coef * kl / 2
            (slope,) = torch.autograd.grad(loss.sum(), mean, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), mean)
            weight = 1 / (1 + math.exp(-2 * kl_old_l))
            assert curvature.item() == pytest.approx(kl_coef / 2 - 2 * weight, rel=1e-10)
            assert (curvature.item() > 0) == bounded


def _sd15_weights():
    """c²/(2 var) of the DDPM steps t -> t - 1 of Stable Diffusion 1.5: nats per squared error of the noise."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=F64).square()
    alphas = (1 - betas).cumprod(0)
    ab_s, ab_t = alphas[:-1], alphas[1:]
    var = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    c = (1 - ab_s - var).sqrt() - (ab_s * (1 - ab_t) / ab_t).sqrt()
    return c.square() / (2 * var)


def test_the_fields_beta_in_nats():
    weight_sum = _sd15_weights().sum().item()
    assert weight_sum == pytest.approx(6.527743, abs=5e-7)
    for beta_dpo, nats in ((2000, 0.009350), (5000, 0.023375)):
        assert beta_in_nats(beta_dpo, dimensions=16_384, weight_sum=weight_sum) == pytest.approx(nats, abs=5e-7)


def test_mean_squared_errors_with_the_fields_beta_are_nats_with_ours_where_all_weights_are_equal():
    steps, weight, beta_dpo, d = 50, 0.13, 40.0, 12
    noise_w, noise_l, reference_w, reference_l = (randn(5, d, seed=s) for s in range(4))
    beta = beta_in_nats(beta_dpo, dimensions=d, weight_sum=steps * weight)
    results = []
    for scale, coefficient in ((1 / d, beta_dpo / 2), (steps * weight, beta)):  # one step stands for all of them
        leaves = [randn(5, d, seed=s).requires_grad_() for s in (4, 5)]
        err_w, err_l = (scale * (n - p).square().sum(1) for n, p in zip((noise_w, noise_l), leaves))
        ref_w, ref_l = (scale * (n - p).square().sum(1) for n, p in ((noise_w, reference_w), (noise_l, reference_l)))
        loss = diffusion_dpo_loss(err_w, ref_w, err_l, ref_l, coefficient)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    assert_same(*results)


def test_beta_in_nats_refuses_what_is_not_positive():
    assert beta_in_nats(0.5, dimensions=1, weight_sum=0.5) == pytest.approx(0.5)  # small ones are allowed
    good = {"beta_dpo": 2000.0, "dimensions": 16, "weight_sum": 1.0}
    for name in good:
        for value in (0, -1, math.nan):
            refused(f"{name}={value}", beta_in_nats, **good | {name: value})


@pytest.mark.parametrize("call", [diffusion_dpo_loss, corrected_diffusion_dpo_loss])
def test_wrong_shapes_and_settings_are_named(call):
    x = torch.zeros(3)
    for i in range(4):
        for bad in (torch.zeros(1), torch.zeros(3, 1), torch.tensor(0.0)):
            inputs = [x] * 4
            inputs[i] = bad
            refused(r"err_w \(.*err_l \(", call, *inputs, 0.1)
    refused("1 dimension", call, *[torch.zeros(3, 4)] * 4, 0.1)
    for beta in (0.0, -1.0, math.nan, math.inf, torch.ones(1), torch.ones(3, 1)):
        refused("beta", call, x, x, x, x, beta)
    if call is diffusion_dpo_loss:
        refused("label_smoothing", call, x, x, x, x, 0.1, label_smoothing=0.7)


EXTREME = st.one_of(st.sampled_from([0.0, 100.0, 1e4]), st.floats(0, 1e4, width=32))


@pytest.mark.parametrize("call", [diffusion_dpo_loss, corrected_diffusion_dpo_loss])
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[EXTREME] * 4), max_size=3), st.sampled_from([0.01, 1.0, 5000.0, "per sample"]))
def test_extreme_errors_stay_finite(call, rows, beta):
    columns = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4).unbind(1)
    beta = torch.full_like(columns[0], 2.0) if beta == "per sample" else beta
    for inputs in (columns, [columns[0]] * 4):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = call(*leaves, beta)
        loss.sum().backward()
        assert loss.shape == columns[0].shape
        assert loss.isfinite().all()
        assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("call", [diffusion_dpo_loss, corrected_diffusion_dpo_loss])
def test_half_precision_errors_are_widened_before_they_are_subtracted_and_double_stays(call):
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (F64, F64)):
        errors = [randn(6, seed=s).abs().to(dtype) + 3 for s in range(4)]
        found = call(*errors, 2.0)
        assert found.dtype == expected
        assert_same(found, call(*(e.to(expected) for e in errors), 2.0), rtol=1e-6, atol=1e-6)
