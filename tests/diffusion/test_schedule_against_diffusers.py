"""The tables against diffusers' own ``step`` over the whole grid of settings, and which steps are deterministic."""

import copy
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.diffusion.transitions import denoise
from diffusion_align.errors import UserError

SPACINGS = ["leading", "linspace", "trailing"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = [4, 7]  # 7 does not divide 1000
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def settings(**varied):
    """Every combination, as keyword arguments of a scheduler."""
    return [dict(zip(varied, values)) for values in itertools.product(*varied.values())]


COMMON = {
    "prediction_type": PREDICTIONS,
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "clip_sample": [False, True],
}
DDIM = settings(**COMMON, set_alpha_to_one=[False, True])
DDPM = settings(**COMMON, variance_type=["fixed_small", "fixed_small_log", "fixed_large"])


def short(setting):
    return "-".join(str(int(v) if isinstance(v, bool) else v) for v in setting.values())


def inputs(seed=0):
    """x_t and a prediction, wide enough that a clip at 1 takes effect, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, 8, 8)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def has_no_signal(scheduler, steps):
    """Whether some step starts from pure noise, which an epsilon prediction says nothing about."""
    scheduler.set_timesteps(steps)
    return bool((scheduler.alphas_cumprod[scheduler.timesteps] <= 0).any())


def in_float64(scheduler):
    wide = copy.deepcopy(scheduler)
    wide.alphas_cumprod, wide.final_alpha_cumprod = wide.alphas_cumprod.double(), wide.final_alpha_cumprod.double()
    return wide


class ListFollowingDDIM(DDIMScheduler):
    """diffusers' step, to the next timestep of the list where its own stride leaves it (linspace)."""

    def step(self, model_output, timestep, sample, **options):
        if self.config.timestep_spacing != "linspace":
            return super().step(model_output, timestep, sample, **options)
        following = self.timesteps[self.timesteps < timestep]
        previous = int(following.max()) if len(following) else -1
        # ``step`` reads its stride from these two, and nothing else.
        steps, self.num_inference_steps = self.num_inference_steps, 1
        self.register_to_config(num_train_timesteps=int(timestep) - previous)
        try:
            return super().step(model_output, timestep, sample, **options)
        finally:
            self.num_inference_steps = steps
            self.register_to_config(num_train_timesteps=1000)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("setting", DDIM, ids=short)
def test_ddim_steps_equal_diffusers(setting, eta, steps):
    scheduler = ListFollowingDDIM(**BETAS, **setting)
    if setting["prediction_type"] == "epsilon" and has_no_signal(scheduler, steps):
        with pytest.raises(UserError, match="predicts epsilon"):
            build_schedule(scheduler, steps, eta=eta)
        return
    scheduler.set_timesteps(steps)
    schedule = build_schedule(scheduler, steps, eta=eta)
    assert torch.equal(schedule.table.timestep, scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps.tolist()):
        x_t, prediction = inputs(i)
        found = denoise(x_t, prediction, torch.tensor([i]), schedule)

        # At t = 1 a sample-predicting model's eps, (x_t - alpha_t x_0) / sigma_t, is about 30, for which diffusers'
        # float32 resolves 1 - ab_s - std² too coarsely (2e-5); the same code over float64 alphas does not.
        exact = in_float64(scheduler) if setting["prediction_type"] == "sample" and timestep == 1 else scheduler

        def step(noise, timestep=timestep, x_t=x_t, prediction=prediction, exact=exact):
            return exact.step(prediction, timestep, x_t, eta=eta, variance_noise=noise).prev_sample

        if scheduler.alphas_cumprod[timestep] == 0 and eta == 1:
            # std² is 1 - ab_s exactly and eps has no weight. diffusers takes the square root of what is left of
            # 1 - ab_s - std² after rounding to float32: up to 5e-4, or not a number.
            stride = 1000 // steps
            if setting["timestep_spacing"] == "linspace":
                stride = timestep - int(scheduler.timesteps[i + 1])
            ab_s = scheduler.alphas_cumprod[timestep - stride].double()
            x_0 = -prediction if setting["prediction_type"] == "v_prediction" else prediction
            x_0 = x_0.clamp(-1, 1) if setting["clip_sample"] else x_0
            torch.testing.assert_close(found.mean, ab_s.sqrt() * x_0, atol=1e-7, rtol=0)
            torch.testing.assert_close(found.std, (1 - ab_s).sqrt().view(1), atol=1e-12, rtol=0)
            continue
        mean = step(torch.zeros_like(x_t))
        std = (step(torch.ones_like(x_t)) - mean).mean()
        torch.testing.assert_close(found.mean, mean, **TOLERANCE)
        torch.testing.assert_close(found.std, std.view(1), **TOLERANCE)
        torch.testing.assert_close(found.sample(prediction), step(prediction), **TOLERANCE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("setting", DDPM, ids=short)
def test_ddpm_steps_equal_diffusers(setting, steps):
    scheduler = DDPMScheduler(**BETAS, **setting)
    if setting["prediction_type"] == "epsilon" and has_no_signal(scheduler, steps):
        with pytest.raises(UserError, match="predicts epsilon"):
            build_schedule(scheduler, steps, sampler="ddpm")
        return
    scheduler.set_timesteps(steps)
    schedule = build_schedule(scheduler, steps, sampler="ddpm")
    for i, timestep in enumerate(scheduler.timesteps):
        x_t, prediction = inputs(i)
        found = denoise(x_t, prediction, torch.tensor([i]), schedule)
        results, noises = [], []
        for seed in (1, 2):  # diffusers draws the noise itself: two known draws give its mean and its std
            generator = torch.Generator().manual_seed(seed)
            noises.append(torch.randn(x_t.shape, generator=generator, dtype=torch.float64))
            results.append(scheduler.step(prediction, timestep, x_t, generator=generator.manual_seed(seed)).prev_sample)
        std = ((results[1] - results[0]) / (noises[1] - noises[0])).median()
        torch.testing.assert_close(found.std, std.view(1), **TOLERANCE)
        torch.testing.assert_close(found.mean, results[0] - std * noises[0], **TOLERANCE)
        torch.testing.assert_close(found.sample(noises[1]), results[1], **TOLERANCE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("setting", settings(set_alpha_to_one=[False, True], steps_offset=[0, 1]), ids=short)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_only_a_last_ddim_step_can_be_deterministic(spacing, setting, steps):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, **setting)
    schedule = build_schedule(scheduler, steps)
    last = int(schedule.table.timestep[-1])
    reaches_x_0 = setting["set_alpha_to_one"] and (spacing == "linspace" or last - 1000 // steps < 0)  # ab_s = 1
    stands_still = last == 0  # ab_s = ab_t
    stochastic = steps - 1 if reaches_x_0 or stands_still else steps
    assert schedule.stochastic_steps.tolist() == list(range(stochastic))
    assert (schedule.table.std > 0).tolist() == [True] * stochastic + [False] * (steps - stochastic)
    assert stands_still == (spacing == "linspace" or (spacing == "leading" and not setting["steps_offset"]))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("offset", [0, 1])
def test_only_a_last_ddpm_step_can_be_deterministic(spacing, variance, offset):
    scheduler = DDPMScheduler(**BETAS, timestep_spacing=spacing, variance_type=variance, steps_offset=offset)
    schedule = build_schedule(scheduler, 5, sampler="ddpm")
    noisy_end = variance == "fixed_large" and int(schedule.table.timestep[-1]) > 0
    assert schedule.stochastic_steps.tolist() == list(range(5 if noisy_end else 4))


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance():
    """DDIM with eta 1 and ancestral sampling are one sampler where their strides agree (Song et al. 2021, §4.1)."""
    config = {**BETAS, "timestep_spacing": "leading", "clip_sample": False}
    ddim = build_schedule(DDIMScheduler(**config, set_alpha_to_one=True), 10, eta=1.0)
    ddpm = build_schedule(DDPMScheduler(**config), 10, sampler="ddpm")
    for i in range(10):
        x_t, prediction = inputs(i)
        a, b = (denoise(x_t, prediction, torch.tensor([i]), schedule) for schedule in (ddim, ddpm))
        torch.testing.assert_close(a.mean, b.mean, atol=1e-7, rtol=0)
        torch.testing.assert_close(a.std, b.std, atol=1e-7, rtol=0)


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 1000])
def test_each_latent_has_the_noise_that_the_network_is_told(sampler, spacing, steps, eta):
    """The marginal after step i is the forward process's at the timestep of step i + 1: with linspace diffusers' stride
    misses it, by up to twelve times the variance for 10 steps."""
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False)
    table = build_schedule(scheduler, steps, sampler=sampler, eta=eta).table
    ab = scheduler.alphas_cumprod.double()
    told = ab[table.timestep[1:]]
    if sampler == "ddim":
        torch.testing.assert_close(table.x_0_weight[:-1] ** 2, told, atol=0, rtol=1e-12)
        torch.testing.assert_close(table.eps_weight[:-1] ** 2 + table.std[:-1] ** 2, 1 - told, atol=0, rtol=1e-12)
        assert table.std[-1] == 0  # from timestep 0 to ab[0] again
    else:  # q(x_s | x_t, x_0) over x_t ~ q(x_t | x_0)
        alpha = table.x_0_weight + table.x_t_weight * table.alpha_t
        torch.testing.assert_close(alpha[:-1] ** 2, told, atol=0, rtol=1e-12)


def test_kl_weight_of_stable_diffusion():
    """Sum over 50 steps of SD 1.5 of c²/2std², the weight of |Δeps|² in the KL: one late step dominates a small eta."""
    scheduler = PNDMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True)
    for eta, expected in [(1.0, 11.0), (0.2, 124.9), (0.1, 487.7)]:
        table = build_schedule(scheduler, 50, eta=eta).table
        c = table.eps_weight - table.x_0_weight * table.sigma_t / table.alpha_t
        assert (c**2 / (2 * table.std**2)).sum().item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    "scheduler",
    [PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True), EulerDiscreteScheduler(**BETAS, steps_offset=1)],
    ids=lambda s: type(s).__name__,
)
def test_other_samplers_configurations_do_not_clip(scheduler):
    """PNDM and Euler know no clip_sample; DDIM's default for it is True and would ruin latents."""
    for sampler in ("ddim", "ddpm"):
        assert build_schedule(scheduler, 5, sampler=sampler).clip_range is None


def test_the_scheduler_is_only_read():
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(3)
    build_schedule(scheduler, 7)
    assert scheduler.timesteps.tolist() == [666, 333, 0]
    assert scheduler.config == DDIMScheduler(**BETAS).config


def test_moving_to_float32_keeps_timesteps_whole():
    schedule = build_schedule(DDIMScheduler(**BETAS), 1000).to("cpu")
    assert schedule.table.timestep.dtype == torch.int64
    assert schedule.table.std.dtype == torch.float32
    assert schedule.at(torch.tensor([3, 999])).timestep.tolist() == [996, 0]
    assert schedule.at(torch.tensor([3, 999])).std.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("change", [{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}])
def test_every_coefficient_is_finite(change):
    for steps, eta in itertools.product([1, 2, 50, 333, 999], [0.0, 1e-3, 1.0]):
        scheduler = DDIMScheduler(**BETAS, **{"prediction_type": "v_prediction"} | change)
        table = build_schedule(scheduler, steps, eta=eta).table
        for column in (table.x_0_weight, table.eps_weight, table.std):
            assert column.isfinite().all()
            assert (column >= 0).all()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"sampler": "euler"}, "sampler='euler'"),
        ({}, {"eta": -0.1}, "eta=-0.1"),
        ({}, {"eta": 1.5}, "eta=1.5"),
        ({}, {"eta": math.nan}, "eta=nan"),
        ({}, {"steps": 0}, "steps=0"),
        ({}, {"steps": 1001}, "steps=1001"),
        ({"steps_offset": 1}, {"steps": 1000}, "steps=1000"),
        ({"thresholding": True}, {}, "thresholding"),
        ({"prediction_type": "flow_prediction"}, {}, "flow_prediction"),
    ],
)
def test_settings_without_a_schedule_are_refused(config, arguments, message):
    with pytest.raises((UserError, ValueError), match=message):
        build_schedule(DDIMScheduler(**BETAS, **config), **({"steps": 5} | arguments))


@pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_large_log"])
def test_variances_without_a_schedule_are_refused(variance):
    with pytest.raises(UserError, match=f"variance_type='{variance}'"):
        build_schedule(DDPMScheduler(**BETAS, variance_type=variance), 5, sampler="ddpm")
