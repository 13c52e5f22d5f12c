"""The KL penalty in the reward: values, and expected gradients by enumeration and by quadrature."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.estimators import gaussian_kl, gaussian_log_prob, kl, kl_reward, score_function_loss

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _softmax_gradients(kind):
    """Over all four actions: (expected policy gradient of the penalty, grad KL(pi||ref), grad KL(ref||pi))."""
    theta, logp_ref = _random(4).requires_grad_(), _random(4, seed=1).log_softmax(0)
    logp = theta.log_softmax(0)
    penalty = kl_reward(logp, logp_ref, kind, allow_biased=True)
    expected = (logp.exp().detach() * score_function_loss(logp, -penalty)).sum()
    forward = (logp.exp() * (logp - logp_ref)).sum()
    reverse = (logp_ref.exp() * (logp_ref - logp)).sum()
    return tuple(torch.autograd.grad(f, theta, retain_graph=True)[0] for f in (expected, forward, reverse))


def test_k1_in_the_reward_has_the_exact_kl_gradient():
    gradient, forward, _ = _softmax_gradients("k1")
    torch.testing.assert_close(gradient, forward, **EXACT)


def test_k3_in_the_reward_has_the_documented_bias():
    gradient, forward, reverse = _softmax_gradients("k3")
    torch.testing.assert_close(gradient, forward - reverse, **EXACT)
    assert (gradient - forward).abs().max() > 0.01


@pytest.mark.parametrize("std", [0.3, 1.0])
@pytest.mark.parametrize("gap", [-0.7, 0.05, 2.0])
def test_gaussian_k1_reward_has_the_gradient_of_the_closed_form_but_more_variance(std, gap):
    """Gauss-Hermite quadrature, exact for the polynomials at hand; relative variance d (1 + D²/4) + 1 at d = 1."""
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite.hermgauss(16))
    weights = weights / math.sqrt(math.pi)
    mean = torch.full((16, 1), 0.4, dtype=F64, requires_grad=True)
    mean_ref = mean.detach() - gap
    x = mean.detach() + math.sqrt(2) * std * nodes[:, None]
    logp, logp_ref = gaussian_log_prob(x, mean, std), gaussian_log_prob(x, mean_ref, std)
    (samples,) = torch.autograd.grad(score_function_loss(logp, -kl_reward(logp, logp_ref)).sum(), mean)
    (exact,) = torch.autograd.grad(gaussian_kl(mean, mean_ref, std).sum(), mean)
    expectation = (weights * samples[:, 0]).sum()
    torch.testing.assert_close(expectation, exact[0, 0], rtol=1e-11, atol=1e-11)
    assert expectation.item() == pytest.approx(gap / std**2, rel=1e-11)
    variance = (weights * (samples[:, 0] - expectation) ** 2).sum()
    assert (variance / expectation**2).item() == pytest.approx(2 + (gap / std) ** 2 / 4, rel=1e-9)


def test_values_and_no_gradient():
    logp_old, logp_ref = _random(2, 3).requires_grad_(), _random(2, 3, seed=1).requires_grad_()
    ratio = logp_old - logp_ref
    k1, k3 = kl_reward(logp_old, logp_ref), kl_reward(logp_old, logp_ref, "k3", allow_biased=True)
    torch.testing.assert_close(k1, ratio.detach(), **EXACT)
    torch.testing.assert_close(k3, (torch.exp(-ratio) - 1 + ratio).detach(), **EXACT)
    assert not k1.requires_grad
    assert not k3.requires_grad
    assert kl_reward(logp_old.half(), logp_ref.half()).dtype == torch.float32


def test_k3_warns_once_naming_the_bias(monkeypatch):
    monkeypatch.setattr(kl, "_warned", set())
    x = torch.zeros(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kl_reward(x, x, "k1")
        kl_reward(x, x, "k3", allow_biased=True)
        assert caught == []
        kl_reward(x, x, "k3")
        kl_reward(x, x, "k3")
    assert len(caught) == 1
    assert "grad KL(pi||ref) - grad KL(ref||pi)" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_wrong_shapes_and_kinds_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        kl_reward(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"kind='k5'.*'k1', 'k2', 'k3'"):
        kl_reward(torch.zeros(2), torch.zeros(2), "k5")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4), max_size=6))
def test_extreme_log_ratios_stay_finite_and_k3_stays_positive(log_ratios):
    x = torch.tensor(log_ratios, dtype=torch.float32)
    k3 = kl_reward(x, torch.zeros_like(x), "k3", allow_biased=True)
    assert k3.isfinite().all()
    assert (k3 >= 0).all()
    torch.testing.assert_close(kl_reward(x, torch.zeros_like(x)), x)
