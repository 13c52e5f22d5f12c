"""Forward-process losses: closed forms, one gradient at equal policies, what each minimises, bad input."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.special import ndtri

from diffusion_align.estimators import (
    centred_reward_loss,
    clipped_surrogate,
    group_preference_weights,
    likelihood_weight,
    matching_error,
    nft_loss,
    nft_loss_as_trust_region,
    reward_probability,
)
from tests.helpers.oracles import F64, assert_same, randn, refused, tensor, with_gradients

B, SHAPE = 8, (2, 3, 3)
IDS = torch.tensor([7, 2, 7, 2, 2, 7, 7, 2])  # two groups of four, mixed
R = tensor(0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.95, 1.0)
CLIP = 5.0


def samples():
    """output, output_old, target."""
    return [randn(B, *SHAPE, seed=s) for s in range(3)]


def centred(x):
    """x minus the mean of its group."""
    return x - torch.stack([x[i == IDS].mean() for i in IDS])


ADVANTAGES = centred(randn(B, seed=3))


def hermite(count):
    """Nodes and weights of an expectation over a standard normal."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(count))
    return nodes, weights / weights.sum()


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_matching_error_is_a_mean_over_all_dimensions_but_the_first():
    output, _, target = samples()
    value, gradient = with_gradients(lambda x: matching_error(x, target), output)
    assert_same(value, torch.stack([((o - t) ** 2).sum() / 18 for o, t in zip(output, target)]))
    assert_same(gradient, 2 * (output - target) / 18)
    assert matching_error(output[:0], target[:0]).shape == (0,)


def test_reward_probability_is_clipped():
    advantages = tensor(-9, -5, -1, 0, 2, 5, math.inf).requires_grad_()
    r = reward_probability(advantages, CLIP)
    assert_same(r, tensor(0, 0, 0.4, 0.5, 0.7, 1, 1))
    assert not r.requires_grad


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_nft_in_closed_form(beta):
    output, old, target = samples()
    value, gradient = with_gradients(lambda x: nft_loss(x, old, target, R, beta), output)
    good, bad = beta * output + (1 - beta) * old, (1 + beta) * old - beta * output
    r = R.view(-1, 1, 1, 1)
    assert_same(value, ((r * (good - target) ** 2 + (1 - r) * (bad - target) ** 2) / beta).mean((1, 2, 3)))
    assert_same(gradient, 2 * (r * (good - target) - (1 - r) * (bad - target)) / 18)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_nft_is_a_trust_region(beta):
    _, old, target = samples()
    output = old + 0.3 * randn(B, *SHAPE, seed=4)
    found = with_gradients(lambda x: nft_loss_as_trust_region(x, old, target, R, beta), output)
    assert_same(
        found, with_gradients(lambda x: nft_loss(x, old, target, R, beta), output), rtol=1e-14, atol=1e-14 / beta
    )


@pytest.mark.parametrize("beta", [0.5, 40.0])
def test_dgpo_is_dpo_of_the_good_and_the_bad_samples_of_a_group(beta):
    errors, errors_ref = randn(B, seed=5).square(), randn(B, seed=6).square()
    weights = group_preference_weights(errors.requires_grad_(), errors_ref, ADVANTAGES, IDS, beta)
    assert not weights.requires_grad
    for group in (2, 7):
        inside = group == IDS

        def preference(errors, inside=inside):
            return -logsigmoid(-(ADVANTAGES * beta * (errors - errors_ref))[inside].sum() / 4)

        loss, gradient = with_gradients(preference, errors)
        assert_same(weights[inside], (-(-loss).expm1()).expand(4))
        wanted = torch.where(inside, weights * ADVANTAGES, 0) * beta / 4
        assert_same(gradient, wanted)
    assert_same(group_preference_weights(errors, errors, ADVANTAGES, IDS, beta), torch.full((B,), 0.5, dtype=F64))


@pytest.mark.parametrize("beta", [0.2, 3.0])
def test_crd_matches_rewards_up_to_a_constant_per_group(beta):
    log_ratio, advantages = randn(B, seed=7), ADVANTAGES + IDS  # not centred: 7 and 2 too much
    value, gradient = with_gradients(lambda x: centred_reward_loss(x, advantages, IDS, beta), log_ratio)
    gap = beta * centred(log_ratio) - ADVANTAGES
    assert_same(value, gap**2 / (2 * beta))
    assert_same(gradient, gap)
    optimum = with_gradients(
        lambda x: centred_reward_loss(x, advantages, IDS, beta), ADVANTAGES / beta + 3.0 * (IDS == 7)
    )
    assert_same(optimum, [torch.zeros(B, dtype=F64)] * 2)


# -- one gradient at equal policies ------------------------------------------------------------------------------------


def losses(output, target):
    """Every loss at the policy itself, scaled to the gradient of the mean of A err; and that mean."""
    old = output.detach()
    error, error_old = matching_error(output, target), matching_error(old, target)
    r = reward_probability(ADVANTAGES, CLIP)
    weights = group_preference_weights(error, error_old, ADVANTAGES, IDS, 30.0)
    return {
        "A err": (ADVANTAGES * error).mean(),
        "AWM": clipped_surrogate(-error, -error_old, ADVANTAGES, clip=0.2).mean(),
        "DGPO": 2 * (weights * ADVANTAGES * error).mean(),
        "CRD": centred_reward_loss(error_old - error, ADVANTAGES, IDS, 0.4).mean(),
    } | {
        f"{form.__name__} {beta}": CLIP * form(output, old, target, r, beta).mean()
        for form in (nft_loss, nft_loss_as_trust_region)
        for beta in (0.1, 1.0, 4.0)
    }


def assert_one_gradient(output, target, parameters):
    found = {}
    for name, loss in losses(output, target).items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[name] = torch.cat([gradient.flatten() for gradient in gradients])
    wanted = found.pop("A err")
    assert wanted.norm() > 1e-3
    assert len(found) == 9
    for name, gradient in found.items():
        assert (gradient - wanted).norm() <= 1e-12 * wanted.norm(), name


def test_all_losses_have_one_gradient_at_equal_policies():
    output, _, target = samples()
    assert_one_gradient(output.requires_grad_(), target, [output])


def test_all_losses_have_one_gradient_through_a_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=4,
        norm_num_groups=2,
    ).double()
    x_t, text, target = randn(B, 2, 4, 4), randn(B, 3, 4, seed=1), randn(B, 2, 4, 4, seed=2)
    assert_one_gradient(unet(x_t, torch.arange(B) * 100, text).sample, target, list(unet.parameters()))


def test_awm_is_the_policy_gradient_of_minus_err():
    output, old, target = samples()
    error, error_old = matching_error(output, target), matching_error(old, target)
    found = with_gradients(lambda e: clipped_surrogate(-e, -error_old, ADVANTAGES, clip=math.inf), error)
    ratio = (error_old - error).exp()
    assert_same(found, [-ADVANTAGES * ratio, ADVANTAGES * ratio])


# -- what they minimise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_minimiser_of_nft(beta):
    """Over every target of one x_t, drawn with probability p and good with probability r."""
    old, targets, r = randn(1, 3), randn(5, 3, seed=1), tensor(0, 0.2, 0.5, 0.9, 1)
    p = tensor(0.1, 0.3, 0.2, 0.25, 0.15)
    rest = targets - old
    change = ((p * (2 * r - 1)).unsqueeze(1) * rest).sum(0, keepdim=True) / beta

    def expected(output):
        return (p * nft_loss(output.expand(5, 3), old.expand(5, 3), targets, r, beta)).sum()

    value, gradient = with_gradients(expected, old + change)
    assert_same(gradient, torch.zeros_like(old))
    assert_same(expected(old + change + 0.1) - value, tensor(beta * 0.01)[0])  # the mean of u²


SD, MODES, SHARES = 0.2, tensor(-1, 1), tensor(0.7, 0.3)


def posterior(x_t, t):
    """x_0 (N, 6) of the mixture of two Gaussians given x_t, three nodes per mode, and their probabilities."""
    variance = (1 - t) ** 2 * SD**2 + t**2
    off = x_t.unsqueeze(1) - (1 - t) * MODES
    shares = (SHARES.log() - off**2 / (2 * variance)).softmax(1)
    nodes, weights = hermite(3)  # exact for squares
    x_0 = (MODES + (1 - t) * SD**2 / variance * off).unsqueeze(2) + SD * t / math.sqrt(variance) * nodes
    return x_0.flatten(1), (shares.unsqueeze(2) * weights).flatten(1)


def best_velocity(x_t, t, beta):
    """The minimiser of the expected NFT loss with r = [x_0 > 0]: a Newton step, as the loss is quadratic."""
    x_0, probabilities = posterior(x_t, t)
    target = (x_t.unsqueeze(1) - x_0) / t
    old = (probabilities * target).sum(1)
    output = old.clone().requires_grad_()
    many = [x.unsqueeze(1).expand_as(target).reshape(-1, 1) for x in (output, old)]
    loss = nft_loss(*many, target.reshape(-1, 1), (x_0 > 0).to(F64).flatten(), beta)
    (gradient,) = torch.autograd.grad((probabilities.flatten() * loss).sum(), output)
    return old - gradient / (2 * beta)


@pytest.mark.parametrize(
    ("beta", "share", "mean"),
    [(4.0, 0.408, 1.005), (1.0, 0.676, 1.076), (0.5, 0.864, 1.18)],
)
def test_one_iteration_of_nft_on_two_modes(beta, share, mean):
    """P(x_0 > 0), .3 before, and how far a small beta moves the good mode, at 1, off the data."""
    count, steps = 1000, 200
    x = ndtri((torch.arange(count, dtype=F64) + 0.5) / count)
    for step in range(steps, 0, -1):
        x = x - best_velocity(x, step / steps, beta) / steps
    assert abs((x > 0).double().mean().item() - share) < 0.005
    assert abs(x[x > 0].mean().item() - mean) < 0.01


@pytest.mark.parametrize("s", [1.0, 0.5, 0.1, 0.02])
def test_the_likelihood_weight_gives_the_score_and_a_uniform_one_pi_s_half_of_it(s):
    """-d/dm of the expected error of N(m, s²)'s velocity, by Gauss-Legendre in t and Gauss-Hermite in eps."""
    x_0, m = 0.7, tensor(0.2).requires_grad_()
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(300))
    t, eps, weights_t, weights_eps = (nodes + 1) / 2, *hermite(2)[:1], weights / 2, hermite(2)[1]
    t, eps = (x.flatten() for x in torch.meshgrid(t, eps, indexing="ij"))
    off = (1 - t) * x_0 + t * eps - (1 - t) * m
    variance = (1 - t) ** 2 * s**2 + t**2
    velocity = t / variance * off - (m + (1 - t) * s**2 / variance * off)
    errors = matching_error(velocity.unsqueeze(1), (eps - x_0).unsqueeze(1))
    measure = torch.outer(weights_t, weights_eps).flatten()
    exact, uniform = (
        -torch.autograd.grad((measure * w * errors).sum(), m, retain_graph=True)[0] for w in (likelihood_weight(t), 1)
    )
    score = (x_0 - m.detach()) / s**2
    assert_same(exact, score, rtol=1e-10)
    assert_same(uniform, score * math.pi * s / 2, rtol=1e-10)


def test_likelihood_weight():
    assert_same(likelihood_weight(tensor(0.2, 0.5, 1.0)), tensor(4, 1, 0))


# -- all of them -------------------------------------------------------------------------------------------------------


def test_only_the_output_has_a_gradient_and_half_precision_is_computed_in_float32():
    output, old, target = (x.half().requires_grad_() for x in samples())
    r, advantages = R.half().requires_grad_(), ADVANTAGES.half().requires_grad_()
    error, error_ref = randn(B, seed=5).half().requires_grad_(), randn(B, seed=6).half().requires_grad_()
    for value, inputs in (
        (matching_error(output, target), (output, target)),
        (nft_loss(output, old, target, r, 0.5), (output, old, target, r)),
        (nft_loss_as_trust_region(output, old, target, r, 0.5), (output, old, target, r)),
        (centred_reward_loss(error, advantages, IDS, 0.5), (error, advantages)),
    ):
        trained, *others = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
        assert trained.abs().sum() > 0
        assert others == [None] * len(others)
        assert value.dtype == torch.float32
    for form, inputs in (
        (nft_loss, (output, old, target, r)),
        (nft_loss_as_trust_region, (output, old, target, r)),
        (centred_reward_loss, (error, advantages)),
        (group_preference_weights, (error, error_ref, advantages)),
    ):
        ids = [IDS] if len(inputs) < 4 else []
        wide = [x.detach().float() for x in inputs]
        torch.testing.assert_close(form(*inputs, *ids, 0.3), form(*wide, *ids, 0.3), rtol=1e-6, atol=1e-6)
    for value in (
        group_preference_weights(error, error_ref, advantages, IDS, 2.0),
        reward_probability(advantages, 1.0),
    ):
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert likelihood_weight(torch.tensor([0.5]).half()).dtype == torch.float32


@pytest.mark.parametrize("by_group", [group_preference_weights, centred_reward_loss])
def test_groups_must_be_whole_and_their_order_does_not_matter(by_group):
    extra = [] if by_group is centred_reward_loss else [randn(B, seed=6)]
    inputs = [randn(B, seed=5), *extra, ADVANTAGES, IDS]
    order = torch.tensor([3, 1, 0, 7, 6, 2, 5, 4])
    assert_same(by_group(*(x[order] for x in inputs), 2.0), by_group(*inputs, 2.0)[order])
    refused("groups of 3 and 4 sample.* are incomplete", by_group, *(x[1:] for x in inputs), 2.0)
    refused("groups of 1 sample.* are incomplete", by_group, *(x[:2] for x in inputs), 2.0)
    refused("integers", by_group, *inputs[:-1], IDS.double(), 2.0)
    for i, x in enumerate(inputs):
        refused("common shape", by_group, *inputs[:i], x[:1], *inputs[i + 1 :], 2.0)
    refused("common shape", by_group, *(x.unsqueeze(1) for x in inputs), 2.0)
    for beta in (0.0, -1.0, math.nan, math.inf):
        refused("beta", by_group, *inputs, beta)
    assert by_group(*(x[:0] for x in inputs), 2.0).shape == (0,)


def test_bad_input():
    output, old, target = samples()
    refused("common shape", matching_error, output, target[:1])
    refused("at least one dimension", matching_error, R, R)
    for form in (nft_loss, nft_loss_as_trust_region):
        refused("common shape", form, output[:1], old, target, R, 1.0)
        refused("common shape", form, output, old[:1], target, R, 1.0)
        refused("common shape", form, output, old, target[:1], R, 1.0)
        refused("reward_probability must have the shape", form, output, old, target, R[:1], 1.0)
        for wrong in (R - 0.1, R + 0.1, R * math.nan):
            refused("must lie in", form, output, old, target, wrong, 1.0)
        for beta in (0.0, -1.0, math.nan):
            refused("beta", form, output, old, target, R, beta)
    for clip in (0.0, -1.0, math.nan, math.inf):
        refused("clip", reward_probability, R, clip)
    for t in (0.0, -0.1, 1.1, math.nan):
        refused("t must lie in", likelihood_weight, tensor(0.5, t))
