"""The Gaussian step: torch.distributions, identities of its three predictions; what an error costs in nats, how often
it counts, and the posterior that it is measured against."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch.distributions import Normal, kl_divergence

from diffusion_align.diffusion.schedule import build_schedule, training_schedule
from diffusion_align.diffusion.transitions import (
    GaussianTransition,
    add_noise,
    denoise,
    nats_per_squared_error,
    posterior,
    predicted_x_0_and_eps,
    snr_shares,
    step_scales,
)
from diffusion_align.errors import UserError
from diffusion_align.estimators import beta_in_nats
from tests.helpers.oracles import F64, randn

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = BETAS | {"clip_sample": False}
KINDS = ["epsilon", "v_prediction", "sample"]
SHAPE, SMALL = (3, 4, 5, 5), (2, 3, 2, 2)
EXACT, CLOSE = {"atol": 1e-12, "rtol": 1e-12}, {"atol": 1e-10, "rtol": 1e-10}


def actions(seed=0, std=(0.5, 0.03, 2.0)):
    return GaussianTransition(randn(*SHAPE, seed=seed), torch.tensor(std, dtype=F64))


def as_torch(action):
    return Normal(action.mean, action.std.view(-1, 1, 1, 1))


def schedules(**config):
    for sampler, scheduler in (("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)):
        source = scheduler(**PLAIN, steps_offset=1, **config)
        yield build_schedule(source, 5, sampler=sampler, eta=0.7).to("cpu", F64)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("std", [(0.5, 0.03, 2.0), (0.7, 0.02, 1.0)])
def test_log_prob_kl_and_their_gradients_equal_torch_distributions(std, reduction):
    mean = randn(*SHAPE).requires_grad_()
    ours, other, x_s = GaussianTransition(mean, actions().std), actions(seed=1, std=std), randn(*SHAPE, seed=2)
    for value, each in [
        (ours.log_prob(x_s, reduction=reduction), as_torch(ours).log_prob(x_s)),
        (ours.kl(other, reduction=reduction), kl_divergence(as_torch(ours), as_torch(other))),
    ]:
        expected = each.flatten(1).sum(1) if reduction == "sum" else each.flatten(1).mean(1)
        torch.testing.assert_close(value, expected, **EXACT)
        found, wanted = (torch.autograd.grad(x.sum(), mean, retain_graph=True)[0] for x in (value, expected))
        torch.testing.assert_close(found, wanted, **EXACT)


def test_kl_of_an_action_with_itself_is_exactly_zero_with_zero_gradient():
    mean = randn(*SHAPE).requires_grad_()
    ours = GaussianTransition(mean, actions().std)
    kl = ours.kl(ours.detach())
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(torch.autograd.grad(kl.sum(), mean)[0], torch.zeros_like(mean))
    assert not ours.detach().mean.requires_grad


def test_oracle_of_the_source():
    """[000] eq. 19: x = (.1, -.2), mu = 0, sigma = .5; eq. 30 with r = 1.5, mu - ref = (.05, 0), beta = .1 -> .1505."""
    ours = GaussianTransition(torch.zeros(1, 2, 1, 1, dtype=F64), torch.tensor([0.5], dtype=F64))
    x_s = torch.tensor([0.1, -0.2], dtype=F64).view(1, 2, 1, 1)
    assert ours.log_prob(x_s).item() == pytest.approx(-0.551583, abs=5e-7)
    reference = GaussianTransition(ours.mean - torch.tensor([0.05, 0.0]).double().view(1, 2, 1, 1), ours.std)
    squares = (x_s - ours.mean).square().sum() / (2 * 0.5**2)
    assert (1.5 * squares + 0.1 * ours.kl(reference)).item() == pytest.approx(0.1505, abs=1e-9)


def test_deterministic_actions_are_their_mean():
    action = GaussianTransition(randn(*SHAPE), torch.tensor([0.5, 0.0, 0.0], dtype=F64))
    x_s = action.sample(randn(*SHAPE, seed=3))
    assert torch.equal(x_s[1:], action.mean[1:])
    torch.testing.assert_close(x_s[0] - action.mean[0], 0.5 * randn(*SHAPE, seed=3)[0], **EXACT)


@pytest.mark.parametrize("index", range(5))
def test_predictions_of_the_three_kinds_are_one_action(index):
    """eps, v and x_0 that describe the same noise give the same transition."""
    x_0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
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
    scheduler = DDIMScheduler(**PLAIN, steps_offset=1, set_alpha_to_one=False, prediction_type=kind)
    schedule = build_schedule(scheduler, 8, eta=eta)
    ab = scheduler.alphas_cumprod.double()
    for i, t in enumerate(schedule.table.timestep.tolist()):
        ab_t, ab_s = ab[t], ab[max(t - 125, 0)]
        variance = eta**2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        c = (1 - ab_s - variance).sqrt() - (ab_s * (1 - ab_t) / ab_t).sqrt()
        weight = c**2 / (2 * variance) * {"epsilon": 1, "v_prediction": ab_t, "sample": ab_t / (1 - ab_t)}[kind]
        x_t, here, there = (randn(*SHAPE, seed=s) for s in (1, 2, 3))
        index = torch.full((3,), i)
        kl = denoise(x_t, here, index, schedule).kl(denoise(x_t, there, index, schedule))
        torch.testing.assert_close(kl, weight * (here - there).square().flatten(1).sum(1), atol=1e-9, rtol=1e-9)


def test_a_clipped_x_0_is_left_out_of_the_kl():
    """Where the clip acts, x_0 no longer follows the prediction: the epsilon-space weight would be wrong there."""
    scheduler = DDPMScheduler(**PLAIN | {"clip_sample": True, "clip_sample_range": 0.5}, prediction_type="sample")
    schedule = build_schedule(scheduler, 5, sampler="ddpm")
    x_t, index = randn(*SHAPE), torch.full((3,), 2)
    prediction = torch.full(SHAPE, 0.7, dtype=F64)
    same = denoise(x_t, prediction, index, schedule).kl(denoise(x_t, prediction + 1, index, schedule))
    assert torch.equal(same, torch.zeros_like(same))
    other = denoise(x_t, prediction, index, schedule).kl(denoise(x_t, prediction - 0.5, index, schedule))
    assert (other > 0).all()


def test_mixed_timesteps_in_one_batch():
    for schedule in schedules(prediction_type="v_prediction"):
        x_t, prediction, index = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([4, 0, 2])
        together = denoise(x_t, prediction, index, schedule)
        for b in range(3):
            apart = denoise(x_t[[b]], prediction[[b]], index[[b]], schedule)
            assert torch.equal(apart.mean[0], together.mean[b])
            assert torch.equal(apart.std[0], together.std[b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_predictions_are_widened(dtype):
    schedule = next(schedules()).to("cpu")
    action = denoise(randn(*SHAPE).to(dtype), randn(*SHAPE, seed=1).to(dtype), torch.tensor([0, 1, 2]), schedule)
    assert action.mean.dtype == action.std.dtype == torch.float32


def test_different_shapes_are_refused():
    schedule = next(schedules())
    with pytest.raises(ValueError, match="must have one shape"):
        denoise(randn(3, 4, 5, 5), randn(1, 4, 5, 5), torch.tensor([0, 1, 2]), schedule)
    with pytest.raises(ValueError, match=r"index \(1,\)"):
        denoise(randn(3, 4, 5, 5), randn(3, 4, 5, 5), torch.tensor([0]), schedule)
    with pytest.raises(ValueError, match=r"index must have shape"):
        schedule.at(torch.tensor([[0]]))


def sd15(**settings):
    return PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, **settings)


def by_hand(count=1000):
    """ab_t and ab_s of every step but the last, float64, from the betas; noisiest first."""
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, count, dtype=F64) ** 2
    kept = (1 - betas).cumprod(0).flip(0)
    return kept[:-1], kept[1:]


def prediction_of(kind, x_0, eps, step):
    return {"epsilon": eps, "v_prediction": step.alpha_t * eps - step.sigma_t * x_0, "sample": x_0}[kind]


# -- nats per squared error ----------------------------------------------------------------------------------------


def schedule_of(name, kind, eta=1.0, steps=9):
    """Of a sampler, or of the noising process ("training")."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=kind)
    if name == "training":
        return training_schedule(scheduler)
    return build_schedule(scheduler, steps, sampler=name, eta=eta)


@pytest.mark.parametrize("sampler", [("ddim", 1.0), ("ddim", 0.3), ("ddpm", 1.0), ("training", 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_nats_is_the_weight_times_the_squared_error(kind, sampler):
    schedule = schedule_of(sampler[0], kind, sampler[1])
    weights, index = nats_per_squared_error(schedule), schedule.stochastic_steps
    assert weights.dtype == F64
    assert weights.shape == (len(schedule),)
    x_0, eps, miss = (randn(len(index), 4, 2, 2, seed=s) for s in range(3))
    x_t = add_noise(x_0, eps, index, schedule)
    true = prediction_of(kind, x_0, eps, schedule.at(index))
    nats = posterior(x_t, x_0, eps, index, schedule).kl(denoise(x_t, true + miss, index, schedule))
    torch.testing.assert_close(nats, weights[index] * miss.square().flatten(1).sum(1), atol=0, rtol=1e-7)


def test_deterministic_steps_have_no_finite_weight():
    weights = nats_per_squared_error(training_schedule(sd15()))
    assert weights[:-1].isfinite().all()
    assert (weights[:-1] > 0).all()
    assert weights[-1] == math.inf


def test_a_clip_is_not_counted():
    """At x_t = 0 an output of 1 gives an x_0 far outside the clip, which would flatten the derivative."""
    clipped = build_schedule(DDIMScheduler(**BETAS, clip_sample=True, clip_sample_range=1e-3), 5)
    plain = build_schedule(DDIMScheduler(**BETAS, clip_sample=False), 5)
    assert clipped.clip_range == 1e-3
    torch.testing.assert_close(nats_per_squared_error(clipped), nats_per_squared_error(plain), atol=0, rtol=0)


def test_stable_diffusion_1_5_costs_6_5277_nats():
    """The sum over the 999 stochastic steps of SD 1.5's training schedule, and Diffusion-DPO's betas in nats."""
    schedule = training_schedule(sd15())
    steps = schedule.stochastic_steps
    assert steps.tolist() == list(range(999))
    weights = nats_per_squared_error(schedule)[steps]
    ab_t, ab_s = by_hand()
    variance = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    c = (1 - ab_s - variance).sqrt() - (ab_s * (1 - ab_t) / ab_t).sqrt()
    torch.testing.assert_close(weights, c**2 / (2 * variance), atol=0, rtol=1e-3)  # diffusers' table is float32
    assert weights.sum().item() == pytest.approx(6.5277, abs=1e-4)
    for beta_dpo, nats in ((2000, 0.00935), (5000, 0.0234)):
        found = beta_in_nats(beta_dpo, dimensions=16384, weight_sum=weights.sum().item())
        assert found == pytest.approx(nats, rel=3e-3)


def test_narrow_schedules_are_widened():
    schedule = training_schedule(sd15())
    narrow = nats_per_squared_error(schedule.to("cpu", torch.float32))
    assert narrow.dtype == F64
    torch.testing.assert_close(narrow, nats_per_squared_error(schedule), atol=0, rtol=1e-2)


# -- scales --------------------------------------------------------------------------------------------------------

SUBSETS = {"all": slice(None), "first half": slice(0, 500), "middle": slice(200, 731), "one": slice(998, 999)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
def test_scales_of_a_random_step(subset, kind):
    """Over an even step of the trained ones; ``nats`` are what each step of some policy costs."""
    schedule = training_schedule(DDIMScheduler(**BETAS, prediction_type=kind))
    steps = schedule.stochastic_steps[subset]
    weights, shares = nats_per_squared_error(schedule), snr_shares(schedule)
    nats = torch.zeros(1000, dtype=F64)
    nats[steps] = randn(len(steps)).square() + 0.1
    scales = {w: step_scales(schedule, steps, w) for w in ("exact", "uniform", "snr_share")}
    left_out = torch.ones(1000, dtype=torch.bool)
    left_out[steps] = False
    for scale in scales.values():
        assert scale.shape == (1000,)
        assert scale.dtype == F64
        assert (scale[left_out] == 0).all()
        assert (scale[steps] > 0).all()
        assert scale.isfinite().all()

    expectation = (scales["exact"] * nats)[steps].mean()
    torch.testing.assert_close(expectation, nats[steps].sum(), **CLOSE)
    factors = (scales["uniform"] * weights)[steps]
    torch.testing.assert_close(factors, weights[steps].sum().expand(len(steps)), **CLOSE)
    asked = (scales["snr_share"] * shares)[steps]
    torch.testing.assert_close(asked, shares[steps].sum().expand(len(steps)), **CLOSE)


def test_shares_are_the_rise_of_alphas_cumprod():
    schedule = training_schedule(sd15())
    shares = snr_shares(schedule)
    ab_t, ab_s = by_hand()
    torch.testing.assert_close(shares[:-1], ab_s - ab_t, atol=3e-7, rtol=1e-4)
    assert shares.sum().item() == pytest.approx(1 - ab_t[0].item(), abs=1e-6)
    assert shares[-1].item() == pytest.approx(1 - ab_s[-1].item(), abs=1e-6)


@pytest.mark.parametrize(("weighting", "kl"), [("exact", 1.19), ("uniform", 6.4), ("snr_share", 0.50)])
def test_only_share_asks_every_step_for_what_it_can_pay(weighting, kl):
    """The KL of the toy of docs/mathematics/diffusion_dpo.md, whose optimum has ½: Σ share_asked²/2 snr_shares."""
    schedule = training_schedule(sd15())
    steps = schedule.stochastic_steps
    asked = 1 / step_scales(schedule, steps, weighting)[steps]
    asked = asked / asked.sum()
    shares = snr_shares(schedule)[steps]
    assert (asked**2 / (2 * shares)).sum().item() == pytest.approx(kl, rel=0.02)


# -- posterior -----------------------------------------------------------------------------------------------------


def test_posterior_is_ddpms_closed_form():
    """arXiv:2006.11239 eq. 7, from betas: sqrt(ab_s) beta/(1 - ab_t) x_0 + sqrt(alpha) (1 - ab_s)/(1 - ab_t) x_t."""
    schedule = training_schedule(sd15())
    ab_t, ab_s = (ab.view(-1, 1, 1, 1) for ab in by_hand())
    x_0, eps = randn(999, *SMALL[1:]), randn(999, *SMALL[1:], seed=1)
    index = torch.arange(999)
    x_t = add_noise(x_0, eps, index, schedule)
    torch.testing.assert_close(x_t, ab_t.sqrt() * x_0 + (1 - ab_t).sqrt() * eps, atol=1e-5, rtol=1e-5)
    beta = 1 - ab_t / ab_s
    mean = ab_s.sqrt() * beta / (1 - ab_t) * x_0 + (1 - beta).sqrt() * (1 - ab_s) / (1 - ab_t) * x_t
    found = posterior(x_t, x_0, eps, index, schedule)
    torch.testing.assert_close(found.mean, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.std, ((1 - ab_s) / (1 - ab_t) * beta).sqrt().flatten(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_the_mean_of_diffusers_step(kind, monkeypatch):
    """DDPMScheduler.step fed the truth; its own draw is made 0, and 1 to see its std."""
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, prediction_type=kind)
    schedule = training_schedule(scheduler)
    x_0, eps = randn(*SMALL), randn(*SMALL, seed=1)
    draw = torch.zeros(SMALL, dtype=F64)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: draw)
    for i in (0, 1, 333, 500, 997, 998):
        index = torch.full((2,), i)
        t = int(schedule.table.timestep[i])
        assert t == 999 - i
        x_t = scheduler.add_noise(x_0, eps, torch.full((2,), t))
        torch.testing.assert_close(add_noise(x_0, eps, index, schedule), x_t, atol=1e-6, rtol=0)
        truth = prediction_of(kind, x_0, eps, schedule.at(index))
        draw.zero_()
        expected = scheduler.step(truth, t, x_t).prev_sample
        found = posterior(x_t, x_0, eps, index, schedule)
        torch.testing.assert_close(found.mean, expected, atol=1e-4, rtol=0)  # diffusers computes in float32
        draw.fill_(1)
        std = (scheduler.step(truth, t, x_t).prev_sample - expected).mean().item()
        assert found.std[0].item() == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("sampler", [("ddim", 1.0), ("ddim", 0.4), ("ddpm", 1.0), ("training", 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_prediction_denoises_to_the_posterior(kind, sampler):
    schedule = schedule_of(sampler[0], kind, sampler[1])
    index = torch.tensor([0, len(schedule) // 2, len(schedule) - 1])
    x_0, eps = randn(3, 2, 2, 2), randn(3, 2, 2, 2, seed=1)
    x_t = add_noise(x_0, eps, index, schedule)
    output = prediction_of(kind, x_0, eps, schedule.at(index)).requires_grad_()
    found, target = denoise(x_t, output, index, schedule), posterior(x_t, x_0, eps, index, schedule)
    torch.testing.assert_close(found.mean, target.mean, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found.std, target.std, atol=0, rtol=0)
    stochastic = target.std > 0
    reached = GaussianTransition(target.mean[stochastic], target.std[stochastic])
    errors = reached.kl(GaussianTransition(found.mean[stochastic], found.std[stochastic]))
    (gradient,) = torch.autograd.grad(errors.sum(), output)
    assert errors.max() < 1e-12
    assert gradient.abs().max() < 1e-5


# -- the schedule that a model was trained on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        sd15(),
        EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", use_karras_sigmas=True),
        DDIMScheduler(**BETAS, steps_offset=1, timestep_spacing="trailing", clip_sample=True),
        DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=True),
        DDPMScheduler(**BETAS, variance_type="fixed_large", timestep_spacing="trailing"),
    ],
    ids=["pndm", "euler", "karras", "trailing", "learned", "large"],
)
def test_every_timestep_is_a_step_whatever_the_sampler(scheduler):
    """One and the same schedule: all of T-1..0, the posterior's variance, no clip. The scheduler is only read."""
    before = dict(scheduler.config)
    schedule, plain = training_schedule(scheduler), training_schedule(DDPMScheduler(**BETAS, clip_sample=False))
    assert dict(scheduler.config) == before
    assert schedule.table.timestep.tolist() == list(range(999, -1, -1))
    assert schedule.stochastic_steps.tolist() == list(range(999))
    assert schedule.clip_range is None
    assert not schedule.table.eps_weight.any()
    for name in ("alpha_t", "sigma_t", "x_0_weight", "x_t_weight", "std"):
        ours, theirs = getattr(schedule.table, name), getattr(plain.table, name)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_short_noising_processes(count):
    schedule = training_schedule(DDPMScheduler(**BETAS, num_train_timesteps=count))
    assert schedule.table.timestep.tolist() == list(range(count - 1, -1, -1))
    assert len(schedule.stochastic_steps) == count - 1


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(kind):
    """The first step starts from pure noise; its weight is finite and its posterior does not need 1/alpha_t."""
    scheduler = DDIMScheduler(
        **BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=kind, clip_sample=False
    )
    schedule = training_schedule(scheduler)
    assert schedule.table.alpha_t[0] == 0
    assert schedule.table.timestep[0] == 999
    weights = nats_per_squared_error(schedule)[:-1]
    assert weights.isfinite().all()
    assert (weights > 0).all()
    for weighting in ("exact", "uniform", "snr_share"):
        scales = step_scales(schedule, schedule.stochastic_steps, weighting)
        assert scales.isfinite().all()
    index = torch.zeros(2, dtype=torch.int64)
    x_0, eps = randn(*SMALL), randn(*SMALL, seed=1)
    x_t = add_noise(x_0, eps, index, schedule)
    assert torch.equal(x_t, eps)
    output = {"v_prediction": -x_0, "sample": x_0}[kind]
    found = denoise(x_t, output, index, schedule)
    torch.testing.assert_close(found.mean, posterior(x_t, x_0, eps, index, schedule).mean, **CLOSE)
    ab_s = schedule.table.alpha_t[1].square()
    torch.testing.assert_close(found.mean, ab_s.sqrt() * x_0, atol=1e-7, rtol=1e-6)
    assert found.std[0].item() == pytest.approx((1 - ab_s).sqrt().item())


def test_zero_terminal_snr_with_epsilon_is_refused():
    with pytest.raises(UserError, match="starts without signal") as caught:
        training_schedule(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True))
    assert str(caught.value).endswith("there: use rescale_betas_zero_snr=False")  # no spacing leaves a step out here
    trailing = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UserError, match="use timestep_spacing='leading' or rescale_betas_zero_snr=False"):
        build_schedule(trailing, 10)


def test_a_scheduler_of_another_kind_is_refused_with_one_sentence():
    with pytest.raises(UserError) as caught:
        training_schedule(EDMEulerScheduler())
    assert str(caught.value) == (
        "the model's scheduler has neither a beta schedule nor flow matching's shift: use a model with a scheduler of "
        "the DDPM family or a FlowMatchEulerDiscreteScheduler"
    )
