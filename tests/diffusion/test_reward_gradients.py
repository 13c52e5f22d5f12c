"""Gradients of a reward through the last steps of a sampler and the decoder: their bits, their size, their KL."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import build_schedule, training_schedule
from diffusion_align.diffusion.tail import predict_tail, renoise, sample_head, sample_tail, tail_kl, take_steps
from diffusion_align.diffusion.transitions import nats_of_intervals, nats_per_squared_error, x_0_per_output
from diffusion_align.models.memory import checkpoint_activations, keep_activations
from tests.helpers.flow_models import noisy_policy

PROMPTS = ["red apple", "a cat"]
FAMILIES = ["tiny_sd", "tiny_sd2", "tiny_sd3"]


@pytest.fixture(scope="module")
def made(model_path, make_policy):
    """``made(name, steps, eta, dtype)``: a policy whose adapters are not 0, its schedule and conditioning."""

    @functools.cache
    def make(name, steps=4, eta=0.0, dtype=torch.float64, noise=0.1, **settings):
        if name == "tiny_sd3":
            policy = noisy_policy(model_path(name), noise=noise, **settings)
        else:
            policy = make_policy(name, noise=noise, **settings)
        policy.network.to(dtype)
        policy.pipeline.vae.to(dtype)
        setter = policy.timesteps_setter()
        schedule = build_schedule(policy.pipeline.scheduler, steps, eta=eta, set_timesteps=setter).to("cpu", dtype)
        return SimpleNamespace(policy=policy, schedule=schedule, conditioning=policy.encode(PROMPTS))

    return make


def smooth_reward(images):
    """(B,) of images; not symmetric in anything."""
    weights = torch.linspace(0.2, 1.3, images[0].numel(), dtype=images.dtype).view(images.shape[1:])
    return (weights * images.sin()).mean(dim=(1, 2, 3))


def gradient(policy, value):
    parts = torch.autograd.grad(value, list(policy.trainable.values()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(parts, policy.trainable.values())]


def assert_slope(policy, gradients, value):
    """That ``gradients`` of ``value()`` along a fixed direction of the trained weights is its central difference.

    diffusers computes the norms in Stable Diffusion 3 in float32, so that its steps are larger.
    """
    narrow = policy.family.network == "transformer"
    step, tolerance = (1e-4, 1e-3) if narrow else (1e-5, 1e-5)
    stream = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=stream).to(p.dtype) for p in policy.trainable.values()]
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(policy.trainable.values(), direction):
                p.add_(sign * step * d)
            found.append(value())
            for p, d in zip(policy.trainable.values(), direction):
                p.sub_(sign * step * d)
    wanted = (found[0] - found[1]) / (2 * step)
    assert abs(wanted) > 1e-6
    torch.testing.assert_close(sum((g * d).sum() for g, d in zip(gradients, direction)), wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("eta", "first"), [(0.0, 2), (1.0, 1)])
def test_the_gradient_is_that_of_finite_differences(name, eta, first, made, streams):
    """Through the last steps and the decoder, guidance included; what comes before them is data."""
    one = made(name, eta=eta, guidance_scale=2.0)
    head = sample_head(one.policy, one.schedule, one.conditioning, streams(2), first)

    def value(generators):
        x_t = head
        for generator in generators:  # where the head left them
            torch.randn((1 + (first if eta else 0), *head.shape[1:]), generator=generator)
        tail = take_steps(one.policy, one.schedule, x_t, one.conditioning, generators, range(first, 4))
        return smooth_reward(one.policy.decode(tail.latents, grad=torch.is_grad_enabled())).sum()

    tail = sample_tail(one.policy, one.schedule, one.conditioning, streams(2), first)
    assert len(tail.visits) == 4 - first
    assert not tail.visits[0].x_t.requires_grad
    reward = smooth_reward(one.policy.decode(tail.latents, grad=True)).sum()
    assert torch.equal(reward, value(streams(2)))
    assert_slope(one.policy, gradient(one.policy, reward), lambda: value(streams(2)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latents_are_those_of_a_rollout_bit_for_bit(name, eta, made, streams):
    one = made(name, eta=eta, dtype=torch.float32, guidance_scale=2.0)
    path = rollout(one.policy, one.schedule, one.conditioning, streams(2), record=torch.empty(2, 0, dtype=torch.int64))
    for first in (0, 2, 3):
        tail = sample_tail(one.policy, one.schedule, one.conditioning, streams(2), first)
        assert torch.equal(tail.latents, path.latents)
        assert tail.latents.requires_grad
        assert [int(visit.steps[0]) for visit in tail.visits] == list(range(first, 4))


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3"])
def test_decoding_with_a_graph_is_decoding(name, made, streams):
    """Values the clamp cuts off have no gradient, every other one has; checkpointing changes nothing."""
    one = made(name, dtype=torch.float32)
    latents = (3 * torch.randn(2, *one.policy.latent_shape, generator=streams(1)[0])).requires_grad_()
    plain, images = one.policy.decode(latents), one.policy.decode(latents, grad=True)
    assert torch.equal(plain, images)
    assert not plain.requires_grad
    (all_of_it,) = torch.autograd.grad(images.sum(), latents, retain_graph=True)
    raw = one.policy.family.decode(one.policy.pipeline, latents)
    inside = (raw.abs() <= 1).float()
    assert 0.01 < inside.mean() <= 1
    (wanted,) = torch.autograd.grad((raw * inside).sum() / 2, latents)
    torch.testing.assert_close(all_of_it, wanted, rtol=1e-4, atol=1e-5)
    checkpoint_activations(one.policy.pipeline.vae)
    again = one.policy.decode(latents, grad=True)
    assert torch.equal(again, images)
    (recomputed,) = torch.autograd.grad(again.sum(), latents)
    assert torch.equal(recomputed, all_of_it)
    keep_activations(one.policy.pipeline.vae)


def test_the_last_step_is_taken_again_from_new_noise(made, streams):
    """DRaFT-LV: from x_0 noised to the last step's level, with gradients to the weights and none to the x_0 before."""
    one = made("tiny_sd")
    tail = sample_tail(one.policy, one.schedule, one.conditioning, streams(2), 3)
    again = renoise(one.policy, one.schedule, tail.latents, one.conditioning, streams(2, seed=1))
    step = one.schedule.at(torch.full((2,), 3))
    noise = torch.stack([torch.randn(tail.latents.shape[1:], generator=g) for g in streams(2, seed=1)])
    x_t = step.alpha_t * tail.latents.detach() + step.sigma_t * noise
    torch.testing.assert_close(again.visits[0].x_t, x_t, rtol=0, atol=1e-12)
    assert not again.visits[0].x_t.requires_grad
    wanted = step.x_0_weight * (x_t - step.sigma_t * again.visits[0].output) / step.alpha_t
    wanted = wanted + step.eps_weight * again.visits[0].output
    torch.testing.assert_close(again.latents, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_predicts_x_0(name, made, streams):
    """ReFL, by the textbook's x_0 of each kind of output."""
    one = made(name)
    tail = predict_tail(one.policy, one.schedule, one.conditioning, streams(2), 2)
    (visit,), step = tail.visits, one.schedule.at(torch.full((2,), 2))
    head = sample_head(one.policy, one.schedule, one.conditioning, streams(2), 2)
    assert torch.equal(visit.x_t, head)
    wanted = {
        "tiny_sd": (head - step.sigma_t * visit.output) / step.alpha_t,
        "tiny_sd2": step.alpha_t * head - step.sigma_t * visit.output,
        "tiny_sd3": head - step.sigma_t * visit.output,
    }[name]
    torch.testing.assert_close(tail.latents, wanted, rtol=0, atol=1e-12)
    assert tail.latents.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kl_is_exactly_zero_at_the_start_and_that_of_the_outputs_later(name, made, streams):
    one = made(name, dtype=torch.float32, noise=0.0, guidance_scale=2.0)
    weights = nats_of_intervals(one.schedule, training_schedule(one.policy.pipeline.scheduler)).float()
    assert weights[2:].min() >= 0
    assert weights.sum() > 0
    tail = sample_tail(one.policy, one.schedule, one.conditioning, streams(2), 2)
    assert torch.equal(tail_kl(one.policy, one.schedule, tail, one.conditioning, weights), torch.zeros(2))

    one = made(name, guidance_scale=2.0)
    weights = weights.double()
    tail = sample_tail(one.policy, one.schedule, one.conditioning, streams(2), 2)
    found, value = tail_kl(one.policy, one.schedule, tail, one.conditioning, weights), 0.0

    def outputs(visit):
        return one.policy.predict(visit.x_t.detach(), one.schedule.table.timestep[visit.steps], one.conditioning)

    for visit in tail.visits:
        with one.policy.reference():
            difference = visit.output - outputs(visit)
        value = value + weights[visit.steps] * (difference**2).flatten(1).sum(1)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
    assert (found > 0).all()
    with torch.no_grad(), one.policy.reference():
        references = [outputs(visit) for visit in tail.visits]

    def at_those_x_t():
        pairs = zip(tail.visits, references)
        return sum((weights[v.steps] * (outputs(v) - r).square().flatten(1).sum(1)).sum() for v, r in pairs)

    assert_slope(one.policy, gradient(one.policy, found.sum()), at_those_x_t)


SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_nats_of_a_step_are_those_of_its_noise_at_eta_1_and_of_all_levels_that_it_passes(name, made):
    scheduler = SD3 if name == "tiny_sd3" else made(name).policy.pipeline.scheduler
    noisy = build_schedule(scheduler, 10, sampler="ddim", eta=1.0)
    fine = training_schedule(scheduler)
    found, exact = nats_of_intervals(noisy, fine), nats_per_squared_error(noisy)
    noisy_to_data = noisy.table.std > 0
    noisy_to_data[-1] = False  # of which alphas_cumprod[0] is the end, where the model's own training has more steps
    torch.testing.assert_close(found[noisy_to_data], exact[noisy_to_data], rtol=1e-9, atol=0)
    assert torch.equal(found, nats_of_intervals(build_schedule(scheduler, 10, eta=0.0), fine))
    per_x_0 = nats_per_squared_error(fine)[:-1] / x_0_per_output(fine)[:-1] ** 2
    whole = (found / x_0_per_output(noisy) ** 2).sum()
    passed = fine.table.sigma_t[:-1] <= noisy.table.sigma_t[0] + 1e-9
    torch.testing.assert_close(whole, per_x_0[passed].sum(), rtol=1e-9, atol=0)
