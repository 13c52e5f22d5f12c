"""The KL bound and the guarded ratio: closed forms of value and gradient, expectations by quadrature, bad input.

An action is x = mean_old + std eps with delta = (mean - mean_old)/std and D = |delta|. Ratios depend on eps by
delta·eps = D z alone, so that an expectation over the action is one over a standard normal z.
"""

import math

import numpy as np
import pytest
import torch
from torch.special import ndtri

from diffusion_align.estimators import (
    clip_fractions,
    clipped_ratio_loss,
    divergence_mask,
    gaussian_kl,
    gaussian_log_prob,
    guarded_ratio,
    importance_ratio,
)
from tests.helpers.oracles import F64, assert_same, randn, refused, tensor

D = 5  # dimensions of a small action
STDS = tensor(0.05, 0.3, 0.7, 2.0)


def scored(mean, mean_old, std, x, reduction="mean"):
    """logp, logp_old and KL of actions x."""
    logp, logp_old = (gaussian_log_prob(x, m, std, reduction=reduction) for m in (mean, mean_old))
    return logp, logp_old, gaussian_kl(mean, mean_old, std, reduction=reduction)


def expectation(values, weights):
    return (values * weights).sum()


def quadrature(distance, dimensions, std):
    """weights, mean, mean_old, std and x of actions whose z are the nodes of a Gauss-Hermite rule; mean is a leaf."""
    z, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
    along = torch.zeros(len(z), dimensions, dtype=F64)
    along[:, 0] = 1
    mean_old = 0.3 + 0 * along
    mean = (mean_old + std * distance * along).requires_grad_()
    return weights / math.sqrt(2 * math.pi), mean, mean_old, std, mean_old + std * z[:, None] * along


# -- the guarded ratio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_guarded_ratio_is_centred_and_has_its_own_gradient(reduction):
    """Actions of steps with different stds in one batch: each has its own."""
    eps, mean_old = randn(4, D), randn(4, D, seed=1)
    delta = 0.3 * randn(4, D, seed=2)
    mean = (mean_old + STDS[:, None] * delta).requires_grad_()
    logp, logp_old, kl = scored(mean, mean_old, STDS, mean_old + STDS[:, None] * eps, reduction)
    ratio = guarded_ratio(logp, logp_old, kl, STDS)
    count = D if reduction == "mean" else 1
    expected = (STDS * (delta * eps).sum(1) / count).exp()
    assert_same(ratio.detach(), expected)
    (gradient,) = torch.autograd.grad(ratio.sum(), mean)
    assert_same(gradient, expected[:, None] * eps / count)
    for i in range(4):  # and not that of the batch
        alone = guarded_ratio(logp[i : i + 1], logp_old[i : i + 1], kl[i : i + 1], STDS[i : i + 1])
        assert torch.equal(alone, ratio[i : i + 1])


def test_on_the_first_pass_the_guarded_gradient_is_the_plain_one_times_std():
    mean = randn(4, D).requires_grad_()
    logp, logp_old, kl = scored(mean, mean.detach(), STDS, mean.detach() + STDS[:, None] * randn(4, D, seed=1))
    guarded, plain = guarded_ratio(logp, logp_old.detach(), kl, STDS), importance_ratio(logp, logp_old.detach())
    assert (guarded == 1).all()
    gradients = [torch.autograd.grad(ratio.sum(), mean, retain_graph=True)[0] for ratio in (guarded, plain)]
    assert_same(gradients[0], STDS[:, None] * gradients[1])


def test_no_gradient_reaches_the_old_policy_or_the_std():
    inputs = [randn(3, seed=s).requires_grad_() for s in range(3)] + [tensor(0.1, 0.2, 0.3).requires_grad_()]
    guarded_ratio(*inputs).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[2].grad is not None
    assert inputs[1].grad is inputs[3].grad is None


def test_narrow_log_probs_are_widened_before_they_are_subtracted():
    narrow = [(40 * randn(50, seed=s) - 100).to(torch.bfloat16) for s in range(3)] + [torch.full((50,), 1e-2)]
    ratio = guarded_ratio(*narrow)
    assert ratio.dtype == torch.float32
    assert torch.equal(ratio, guarded_ratio(*(x.float() for x in narrow)))


@pytest.mark.parametrize(("dimensions", "distance"), [(1024, 3.0), (4, 0.5), (16, 2.0)])
def test_the_joint_ratio_has_expectation_1_and_only_that_of_means_is_shifted(dimensions, distance):
    weights, mean, mean_old, std, x = quadrature(distance, dimensions, 0.5)
    logp, logp_old, kl = (v.detach() for v in scored(mean, mean_old, std, x, "sum"))
    joint = importance_ratio(logp, logp_old, log_clamp=80)
    assert expectation(joint, weights).item() == pytest.approx(1, rel=1e-12)
    logp, logp_old, kl = (v.detach() for v in scored(mean, mean_old, std, x))
    shift = -(distance**2 / (2 * dimensions)) * (1 - 1 / dimensions)
    found = expectation(importance_ratio(logp, logp_old), weights)
    assert found.item() == pytest.approx(math.exp(shift), rel=1e-12)
    stds = torch.full_like(kl, std)
    guarded = guarded_ratio(logp, logp_old, kl, stds)
    assert expectation(guarded.log(), weights).item() == pytest.approx(0, abs=1e-12)
    expected = math.exp((std * distance / dimensions) ** 2 / 2)
    assert expectation(guarded, weights).item() == pytest.approx(expected, rel=1e-12)
    if dimensions == 1024:
        assert found.item() - 1 == pytest.approx(-0.0044, abs=5e-5)


def test_a_constant_advantage_pulls_back_by_the_plain_ratio_and_away_by_the_guarded_one():
    """Of which an importance-weighted gradient has neither: -.7326 and .0625 in d = 4 dimensions, D = .5, std = .5."""
    dimensions, distance = 4, 0.5
    weights, mean, mean_old, std, x = quadrature(distance, dimensions, 0.5)
    pulls = {}
    for reduction in ("sum", "mean"):
        logp, logp_old, kl = scored(mean, mean_old, std, x, reduction)
        ratio = importance_ratio(logp, logp_old)
        (gradient,) = torch.autograd.grad(expectation(ratio, weights), mean, retain_graph=True)
        pulls[reduction] = gradient[:, 0].sum().item()
    guarded = guarded_ratio(logp, logp_old, kl, torch.full_like(kl.detach(), std))
    (gradient,) = torch.autograd.grad(expectation(guarded, weights), mean)
    pulls["guard"] = gradient[:, 0].sum().item()
    assert pulls["sum"] == pytest.approx(0, abs=1e-10)
    back = -(distance / std) * (1 - 1 / dimensions) * math.exp(-(distance**2 / 8) * 0.75)
    assert dimensions * pulls["mean"] == pytest.approx(back, rel=1e-10)
    assert back == pytest.approx(-0.7326, abs=5e-5)
    away = distance * std / dimensions
    assert dimensions * pulls["guard"] == pytest.approx(away * math.exp(away**2 / 2), rel=1e-10)
    assert away == 0.0625


@pytest.mark.parametrize(
    ("distance", "bound", "above", "below"), [(2.0, 1.0, 0.067, 0.69), (4.0, 6.55, 0.0001, 0.64), (1.0, 6.55, 0.0, 0.0)]
)
def test_a_symmetric_clip_in_nats_takes_out_few_above_and_many_below(distance, bound, above, below):
    """On 100 000 quantiles of the normal distribution."""
    z = ndtri((torch.arange(100_000, dtype=F64) + 0.5) / 100_000)
    log_ratio = distance * z - distance**2 / 2
    low, high = clip_fractions(log_ratio, 0 * z, clip=-math.expm1(-bound), clip_high=math.expm1(bound))
    assert high.double().mean().item() == pytest.approx(above, abs=5e-4 if above > 0.01 else 5e-5)
    assert low.double().mean().item() == pytest.approx(below, abs=5e-3)


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_what_is_beyond_the_bound_and_moves_on_is_dropped_and_nothing_else():
    logp = tensor(1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 0.0)
    advantages = tensor(2.0, -2.0, 2.0, -2.0, 2.0, 0.0, 2.0)
    kl = tensor(0.6, 0.6, 0.6, 0.6, 0.5, 0.6, 0.6)
    mask = divergence_mask(logp, 0 * logp, advantages, kl, bound=0.5)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [False, True, True, False, True, True, True]  # at the bound is not beyond it
    assert divergence_mask(logp, 0 * logp, advantages, kl, bound=math.inf).all()
    assert divergence_mask(logp, logp, advantages, 0 * kl, bound=0.0).all(), "the first pass"


def test_a_shift_of_the_mean_drops_exactly_the_actions_beyond_the_bound():
    """Six actions at KLs of .1 to .6 nats, each in the direction of its advantage."""
    kls, std, bound = torch.arange(1, 7, dtype=F64) / 10, 0.4, 0.35
    eps, mean_old = randn(6, D), randn(6, D, seed=1)
    direction = torch.nn.functional.normalize(randn(6, D, seed=2), dim=1)
    mean = (mean_old + std * (2 * kls).sqrt()[:, None] * direction).requires_grad_()
    x = mean_old + std * eps
    logp, logp_old, kl = scored(mean, mean_old, std, x, "sum")
    assert_same(kl.detach(), kls)
    advantages = (logp - logp_old).detach().sign()
    mask = divergence_mask(logp, logp_old, advantages, kl, bound=bound)
    assert mask.tolist() == [True] * 3 + [False] * 3
    assert divergence_mask(logp, logp_old, -advantages, kl, bound=bound).all(), "those that move back"
    ratio = importance_ratio(logp, logp_old)
    losses = clipped_ratio_loss(ratio, advantages, clip=math.inf, mask=mask)
    assert_same(losses.detach(), torch.where(mask, -(logp - logp_old).exp() * advantages, 0).detach())
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    expected = -(ratio * advantages)[:, None] * (x - mean) / std**2
    assert_same(gradient, torch.where(mask[:, None], expected, 0).detach())


def test_with_a_bound_of_0_nats_nothing_is_trained_after_a_step_in_every_actions_own_direction():
    mean = randn(6, D).requires_grad_()
    mean_old, std, advantages = mean.detach().clone(), 0.4, randn(6, seed=1)
    x = mean_old + std * randn(6, D, seed=2)
    optimizer, moved = torch.optim.SGD([mean], lr=1e-3), []
    for _ in range(3):
        before = mean.detach().clone()
        logp, logp_old, kl = scored(mean, mean_old, std, x, "sum")
        mask = divergence_mask(logp, logp_old, advantages, kl, bound=0.0)
        optimizer.zero_grad()
        clipped_ratio_loss(importance_ratio(logp, logp_old), advantages, clip=math.inf, mask=mask).sum().backward()
        optimizer.step()
        moved.append((mean.detach() != before).any(dim=1).tolist())
    assert moved == [[True] * 6, [False] * 6, [False] * 6]


def test_no_gradient_flows_through_the_mask():
    logp = randn(3).requires_grad_()
    assert not divergence_mask(
        logp, randn(3, seed=1), randn(3, seed=2), randn(3, seed=3).abs(), bound=0.1
    ).requires_grad


def test_bad_input_is_named():
    good, odd = [randn(2, 3)] * 4, randn(3, 2)
    for i in range(4):
        changed = [*good[:i], odd, *good[i + 1 :]]
        refused("shape", divergence_mask, *changed, bound=1.0)
        refused("shape", guarded_ratio, *changed)
    for bound in (-0.1, math.nan):
        refused(f"bound={bound}", divergence_mask, *good, bound=bound)
