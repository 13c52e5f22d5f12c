"""Gaussian log-prob and KL: torch.distributions, closed forms, gradients, and the worked numbers of the design."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusion_align.estimators import gaussian_kl, gaussian_log_prob, score_function_loss
from tests.helpers.oracles import F64, assert_same, randn, refused, tensor


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 4, 3, 3), (0, 3)])
@pytest.mark.parametrize("kind", ["float", "0-d", "(B,)"])
def test_log_prob_and_kl_equal_torch_distributions(shape, kind):
    x, mean, mean_ref = (randn(*shape, seed=s) for s in range(3))
    batch, d = shape[0], math.prod(shape[1:])
    std = {"float": 0.7, "0-d": torch.tensor(0.7, dtype=F64), "(B,)": torch.linspace(0.3, 2.0, batch, dtype=F64)}[kind]
    std_ref = std + 0.4
    p = Normal(mean.reshape(batch, d), torch.as_tensor(std, dtype=F64).reshape(-1, 1).expand(batch, d))
    q = Normal(mean_ref.reshape(batch, d), torch.as_tensor(std_ref, dtype=F64).reshape(-1, 1).expand(batch, d))
    log_prob, kl = p.log_prob(x.reshape(batch, d)), kl_divergence(p, q)
    assert_same(gaussian_log_prob(x, mean, std), log_prob.sum(1))
    assert_same(gaussian_log_prob(x, mean, std, reduction="mean"), log_prob.mean(1))
    assert_same(gaussian_kl(mean, mean_ref, std, std_ref), kl.sum(1))
    assert_same(gaussian_kl(mean, mean_ref, std, std_ref, reduction="mean"), kl.mean(1))


def test_worked_numbers():
    log_prob = gaussian_log_prob(tensor([0.1, -0.2]), torch.zeros(1, 2, dtype=F64), 0.5)
    assert log_prob.item() == pytest.approx(-0.551583, abs=5e-7)
    kl = gaussian_kl(tensor([0.3, 0.0, 0.0]), torch.zeros(1, 3, dtype=F64), 0.5, 0.8)
    assert kl.item() == pytest.approx(0.5662609, abs=5e-8)


def test_ddpo_example_eq_30_and_the_reward_form_eq_31():
    """r = 1.5, x - mu = (.1, -.2), mu - ref = (.05, 0), std = .5, beta = .1."""
    x, mean, mean_ref = torch.tensor([[[0.15, -0.2]], [[0.05, 0.0]], [[0.0, 0.0]]], dtype=F64)
    logp, logp_ref = gaussian_log_prob(x, mean, 0.5), gaussian_log_prob(x, mean_ref, 0.5)
    constant = -2 * math.log(0.5) - math.log(2 * math.pi)
    kl = gaussian_kl(mean, mean_ref, 0.5)
    loss_30 = score_function_loss(logp - constant, torch.full((1,), 1.5)) + 0.1 * kl
    assert loss_30.item() == pytest.approx(0.1505, abs=1e-12)
    log_ratio = logp - logp_ref
    assert log_ratio.item() == pytest.approx(0.025, abs=1e-12)
    assert score_function_loss(logp - constant, 1.5 - 0.1 * log_ratio).item() == pytest.approx(0.14975, abs=1e-12)


def test_gradients_equal_the_closed_forms():
    x, mean, mean_ref = (randn(4, 3, seed=s).requires_grad_() for s in range(3))
    std = torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    col = std.detach()[:, None]
    gaussian_log_prob(x, mean, std).sum().backward()
    residual = (x - mean).detach()
    assert_same(mean.grad, residual / col**2)
    assert_same(x.grad, -residual / col**2)
    assert_same(std.grad, (residual**2 / col**3 - 1 / col).sum(1))
    mean.grad = std.grad = None
    gaussian_kl(mean, mean_ref, std).sum().backward()
    assert_same(mean.grad, (mean - mean_ref).detach() / col**2)
    std_ref = (1.5 * std).detach().requires_grad_()
    assert torch.autograd.gradcheck(gaussian_kl, (mean, mean_ref, std, std_ref))


def test_equal_std_given_twice_is_the_short_form_and_close_stds_stay_accurate():
    mean, mean_ref = randn(3, 4), randn(3, 4, seed=1)
    assert_same(gaussian_kl(mean, mean_ref, 0.5, 0.5), gaussian_kl(mean, mean_ref, 0.5))
    assert gaussian_kl(mean, mean, 0.5, 0.5).tolist() == [0.0] * 3
    # Σ over d of u²: the next term of the series is of order u³.
    u = 1e-4
    kl = gaussian_kl(torch.zeros(1, 10, dtype=F64), torch.zeros(1, 10, dtype=F64), math.exp(u), 1.0)
    assert kl.item() == pytest.approx(10 * u * u, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    x, mean = randn(2, 1000).to(dtype), randn(2, 1000, seed=1).to(dtype)
    for result, exact in (
        (gaussian_log_prob(x, mean, 0.1), gaussian_log_prob(x.double(), mean.double(), 0.1)),
        (gaussian_kl(x, mean, 0.1, 0.2), gaussian_kl(x.double(), mean.double(), 0.1, 0.2)),
    ):
        assert result.dtype == torch.float32
        assert_same(result.double(), exact, rtol=1e-5, atol=0)
    assert gaussian_kl(x.double(), mean.double(), 0.1).dtype == F64


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_half_precision_std_is_computed_with_in_float32(shape):
    x, mean = randn(2, 1000).half(), randn(2, 1000, seed=1).half()
    std, std_ref = torch.full(shape, 0.3).half(), torch.full(shape, 0.7).half()
    wide = [t.double() for t in (x, mean, std, std_ref)]
    assert_same(gaussian_log_prob(x, mean, std).double(), gaussian_log_prob(*wide[:3]), rtol=1e-5, atol=0)
    assert_same(gaussian_kl(x, mean, std, std_ref).double(), gaussian_kl(*wide), rtol=1e-5, atol=0)


def test_wrong_shapes_and_settings_are_named():
    x = torch.zeros(2, 3)
    for call in (gaussian_log_prob, gaussian_kl):
        refused(r"\(2, 3\).*\(2, 1\)", call, x, torch.zeros(2, 1), 1.0)
        refused(r"std.*\(2,\).*\(2, 3\)", call, x, x, torch.ones(2, 3))
        refused(r"std.*\(1,\)", call, x, x, torch.ones(1))
        refused(r"reduction='max'.*'sum'", call, x, x, 1.0, reduction="max")
        for bad in (0.0, -1.0, float("nan"), "1", None):
            refused("std=", call, x, x, bad)
        refused("at least one entry", call, torch.zeros(2, 0), torch.zeros(2, 0), 1.0)
        refused(r"\(B, \.\.\.\).*got \(\)", call, torch.tensor(1.0), torch.tensor(1.0), 1.0)
    refused("std_ref=", gaussian_kl, x, x, 1.0, 0.0)


@settings(deadline=None, max_examples=50)
@given(
    st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from((1, 3, 50))
)
def test_extreme_inputs_stay_finite(a, b, std, std_ref, d):
    mean, other = torch.full((2, d), a, requires_grad=True), torch.full((2, d), b)
    total = gaussian_log_prob(other, mean, std) + gaussian_kl(mean, other, std, std_ref)
    total.sum().backward()
    assert total.isfinite().all()
    assert mean.grad.isfinite().all()
    assert (gaussian_kl(mean, other, std, std_ref) >= 0).all()
