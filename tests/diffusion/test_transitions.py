"""The Gaussian decision: torch.distributions, epsilon/v/x_0 identities, the epsilon-space form of the KL."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.transitions import GaussianTransition, denoise, predicted_x_0_and_eps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (3, 4, 5, 5)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decisions(seed=0, std=(0.5, 0.03, 2.0)):
    return GaussianTransition(normal(*SHAPE, seed=seed), torch.tensor(std, dtype=torch.float64))


def as_torch(decision):
    return Normal(decision.mean, decision.std.view(-1, 1, 1, 1))


def schedules(**config):
    for sampler, scheduler in (("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)):
        source = scheduler(**BETAS, steps_offset=1, **config)
        yield build_schedule(source, 5, sampler=sampler, eta=0.7).to("cpu", torch.float64)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("std", [(0.5, 0.03, 2.0), (0.7, 0.02, 1.0)])
def test_log_prob_kl_and_their_gradients_equal_torch_distributions(std, reduction):
    mean = normal(*SHAPE).requires_grad_()
    ours, other, x_s = GaussianTransition(mean, decisions().std), decisions(seed=1, std=std), normal(*SHAPE, seed=2)
    for value, each in [
        (ours.log_prob(x_s, reduction=reduction), as_torch(ours).log_prob(x_s)),
        (ours.kl(other, reduction=reduction), kl_divergence(as_torch(ours), as_torch(other))),
    ]:
        expected = each.flatten(1).sum(1) if reduction == "sum" else each.flatten(1).mean(1)
        torch.testing.assert_close(value, expected, **EXACT)
        found, wanted = (torch.autograd.grad(x.sum(), mean, retain_graph=True)[0] for x in (value, expected))
        torch.testing.assert_close(found, wanted, **EXACT)


def test_kl_of_a_decision_with_itself_is_exactly_zero_with_zero_gradient():
    mean = normal(*SHAPE).requires_grad_()
    ours = GaussianTransition(mean, decisions().std)
    kl = ours.kl(ours.detach())
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(torch.autograd.grad(kl.sum(), mean)[0], torch.zeros_like(mean))
    assert not ours.detach().mean.requires_grad


def test_oracle_of_the_source():
    """[000] eq. 19: x = (.1, -.2), mu = 0, sigma = .5; eq. 30 with r = 1.5, mu - ref = (.05, 0), beta = .1 -> .1505."""
    ours = GaussianTransition(torch.zeros(1, 2, 1, 1, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    x_s = torch.tensor([0.1, -0.2], dtype=torch.float64).view(1, 2, 1, 1)
    assert ours.log_prob(x_s).item() == pytest.approx(-0.551583, abs=5e-7)
    reference = GaussianTransition(ours.mean - torch.tensor([0.05, 0.0]).double().view(1, 2, 1, 1), ours.std)
    squares = (x_s - ours.mean).square().sum() / (2 * 0.5**2)
    assert (1.5 * squares + 0.1 * ours.kl(reference)).item() == pytest.approx(0.1505, abs=1e-9)


def test_deterministic_decisions_are_their_mean():
    decision = GaussianTransition(normal(*SHAPE), torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    x_s = decision.sample(normal(*SHAPE, seed=3))
    assert torch.equal(x_s[1:], decision.mean[1:])
    torch.testing.assert_close(x_s[0] - decision.mean[0], 0.5 * normal(*SHAPE, seed=3)[0], **EXACT)


@pytest.mark.parametrize("index", range(5))
def test_predictions_of_the_three_kinds_are_one_decision(index):
    """eps, v and x_0 that describe the same noise give the same transition."""
    x_0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    steps = torch.full((3,), index)
    for sampler in range(2):
        found = []
        for kind in ("epsilon", "v_prediction", "sample"):
            schedule = list(schedules(prediction_type=kind))[sampler]
            step = schedule.at(steps)
            x_t = step.alpha_t * x_0 + step.sigma_t * eps
            prediction = {"epsilon": eps, "v_prediction": step.alpha_t * eps - step.sigma_t * x_0, "sample": x_0}[kind]
            back = predicted_x_0_and_eps(x_t, prediction, step, kind)
            torch.testing.assert_close(back[0], x_0, atol=1e-10, rtol=0)
            torch.testing.assert_close(back[1], eps, atol=1e-10, rtol=0)
            found.append(denoise(x_t, prediction, steps, schedule).mean)
        torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(found[2], found[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_kl_in_epsilon_space(kind, eta):
    """KL = c²/2std² |Δeps|², c = sqrt(1 - ab_s - std²) - sqrt(ab_s (1 - ab_t)/ab_t); times ab_t for v, and so on."""
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, prediction_type=kind)
    schedule = build_schedule(scheduler, 8, eta=eta)
    ab = scheduler.alphas_cumprod.double()
    for i, t in enumerate(schedule.table.timestep.tolist()):
        ab_t, ab_s = ab[t], ab[max(t - 125, 0)]
        variance = eta**2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        c = (1 - ab_s - variance).sqrt() - (ab_s * (1 - ab_t) / ab_t).sqrt()
        weight = c**2 / (2 * variance) * {"epsilon": 1, "v_prediction": ab_t, "sample": ab_t / (1 - ab_t)}[kind]
        x_t, here, there = (normal(*SHAPE, seed=s) for s in (1, 2, 3))
        index = torch.full((3,), i)
        kl = denoise(x_t, here, index, schedule).kl(denoise(x_t, there, index, schedule))
        torch.testing.assert_close(kl, weight * (here - there).square().flatten(1).sum(1), atol=1e-9, rtol=1e-9)


def test_a_clipped_x_0_is_left_out_of_the_kl():
    """Where the clip acts, x_0 no longer follows the prediction: the epsilon-space weight would be wrong there."""
    scheduler = DDPMScheduler(**BETAS | {"clip_sample": True, "clip_sample_range": 0.5}, prediction_type="sample")
    schedule = build_schedule(scheduler, 5, sampler="ddpm")
    x_t, index = normal(*SHAPE), torch.full((3,), 2)
    prediction = torch.full(SHAPE, 0.7, dtype=torch.float64)
    same = denoise(x_t, prediction, index, schedule).kl(denoise(x_t, prediction + 1, index, schedule))
    assert torch.equal(same, torch.zeros_like(same))
    other = denoise(x_t, prediction, index, schedule).kl(denoise(x_t, prediction - 0.5, index, schedule))
    assert (other > 0).all()


def test_mixed_timesteps_in_one_batch():
    for schedule in schedules(prediction_type="v_prediction"):
        x_t, prediction, index = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([4, 0, 2])
        together = denoise(x_t, prediction, index, schedule)
        for b in range(3):
            apart = denoise(x_t[[b]], prediction[[b]], index[[b]], schedule)
            assert torch.equal(apart.mean[0], together.mean[b])
            assert torch.equal(apart.std[0], together.std[b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_predictions_are_widened(dtype):
    schedule = next(schedules()).to("cpu")
    decision = denoise(normal(*SHAPE).to(dtype), normal(*SHAPE, seed=1).to(dtype), torch.tensor([0, 1, 2]), schedule)
    assert decision.mean.dtype == decision.std.dtype == torch.float32


def test_different_shapes_are_refused():
    schedule = next(schedules())
    with pytest.raises(ValueError, match="must have one shape"):
        denoise(normal(3, 4, 5, 5), normal(1, 4, 5, 5), torch.tensor([0, 1, 2]), schedule)
    with pytest.raises(ValueError, match=r"index \(1,\)"):
        denoise(normal(3, 4, 5, 5), normal(3, 4, 5, 5), torch.tensor([0]), schedule)
    with pytest.raises(ValueError, match=r"index must have shape"):
        schedule.at(torch.tensor([[0]]))
