"""Schedules of flow-matching models: sigmas and timesteps of diffusers' pipelines, which steps are trained on, what is
refused; and that UNets' tables are what they were."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.rollout import scheduler_of
from diffusion_align.diffusion.samplers import ddim
from diffusion_align.diffusion.schedule import SamplerConfig, build_schedule, training_schedule
from diffusion_align.diffusion.trained_steps import outweighing_step, trained_steps
from diffusion_align.diffusion.transitions import (
    add_noise,
    denoise,
    nats_per_squared_error,
    posterior,
    snr_shares,
)
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.models.families import family_of
from diffusion_align.models.families.flow_matching import dynamic_shift, set_linear_timesteps, set_spaced_timesteps
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from tests.helpers.flow_models import DYNAMIC, SD3_SCHEDULER
from tests.helpers.oracles import F64, assert_same, randn

SETTINGS = {"model": "emoji-sd", "prompts": ["a"], "reward": "jpeg_compressibility", "output_dir": "runs/a"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SD3 = FlowMatchEulerDiscreteScheduler(**SD3_SCHEDULER)
FLUX = partial(set_linear_timesteps, tokens=4096)


# -- sigmas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        ("tiny_sd3", {}),
        ("tiny_sd3", DYNAMIC),
        ("tiny_sd3", {"shift_terminal": 0.02}),
        ("tiny_sd3", {"use_karras_sigmas": True}),
        ("tiny_flux", {}),
        ("tiny_flux", {"time_shift_type": "linear", "shift_terminal": 0.02, "max_shift": 0.9}),
        ("tiny_schnell", {}),
    ],
)
def test_sigmas_and_timesteps_are_those_of_the_pipelines_own_call(model, changed, model_path):
    pipeline = load_pipeline(model_path(model))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config({**pipeline.scheduler.config, **changed})
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a", num_inference_steps=4, guidance_scale=1.0, height=48, width=32, output_type="latent")
    family = family_of(pipeline)
    config = getattr(pipeline, family.network).config
    size = family.latent_size(config, pipeline.vae.config, height=48, width=32)
    table = build_schedule(pipeline.scheduler, 4, set_timesteps=family.timesteps_setter(config, size)).table
    assert table.timestep.dtype == torch.float32
    assert torch.equal(table.timestep, pipeline.scheduler.timesteps)
    assert_same(table.sigma_t, pipeline.scheduler.sigmas[:-1].double())
    assert_same(table.alpha_t, 1 - pipeline.scheduler.sigmas[:-1].double())
    assert table.sigma_t.dtype == torch.float64


def test_static_and_dynamic_shift_by_their_formulas():
    steps = 10
    spaced = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), steps)
    found = build_schedule(SD3, steps).table.sigma_t.numpy()
    np.testing.assert_allclose(found, 3 * spaced / (1 + 2 * spaced), rtol=3e-7)
    printed = "1 .96013 .91335 .85769 .79037 .70728 .60215 .46488 .27805 .00893"
    assert [float(f"{value:.5f}") for value in found] == [float(value) for value in printed.split()]
    dynamic = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    assert dynamic_shift(dynamic.config, 1024) == pytest.approx(0.63, abs=1e-12)
    assert dynamic_shift(dynamic.config, 4096) == pytest.approx(1.15, abs=1e-12)
    linear = np.linspace(1, 1 / steps, steps)
    found = build_schedule(dynamic, steps, set_timesteps=partial(set_linear_timesteps, tokens=1024)).table.sigma_t
    np.testing.assert_allclose(found.numpy(), math.exp(0.63) / (math.exp(0.63) + 1 / linear - 1), rtol=3e-7)
    assert f"{build_schedule(dynamic, 28, set_timesteps=FLUX).table.sigma_t[-1].item():.4f}" == "0.1047"


def test_flux_without_shift_is_not_spaced_as_stable_diffusion_3():
    """FLUX.1-schnell: a rule by use_dynamic_shifting would end at .001."""
    plain = FlowMatchEulerDiscreteScheduler()
    assert build_schedule(plain, 4, set_timesteps=set_linear_timesteps).table.sigma_t.tolist() == [1, 0.75, 0.5, 0.25]
    assert build_schedule(plain, 4).table.sigma_t[-1].item() == pytest.approx(0.001)


def test_what_cannot_be_sampled_is_refused_with_one_sentence():
    for name in ("invert_sigmas", "stochastic_sampling"):
        with pytest.raises(UserError, match=f"the scheduler has {name}=True, which is not supported: set it to False"):
            build_schedule(FlowMatchEulerDiscreteScheduler(**{name: True}), 4)
    with pytest.raises(UserError, match="number of image tokens must be known"):
        build_schedule(FlowMatchEulerDiscreteScheduler(**DYNAMIC), 4)
    with pytest.raises(UserError, match=r"sampler\.name=ddpm is not for a flow-matching model: use flow with eta=1"):
        build_schedule(SD3, 4, sampler="ddpm")
    for name in ("flow", "flow_sde", "cps", "dance"):
        with pytest.raises(UserError, match=f"sampler.name={name} is for flow-matching models, and this is none"):
            build_schedule(DDIMScheduler(**BETAS), 4, sampler=name)
    with pytest.raises(UserError, match=r"sampler\.steps=1001 must lie between 1 and num_train_timesteps=1000"):
        build_schedule(SD3, 1001)


def test_a_unet_with_a_scheduler_of_flow_matching_is_refused(make_policy):
    policy = make_policy("tiny_sd")
    with pytest.raises(UserError, match="of flow matching, of which its family knows nothing"):
        build_schedule(SD3, 4, set_timesteps=policy.timesteps_setter())


def test_a_sampler_of_ones_own_finds_the_pipelines_sigmas():
    def halved(scheduler, steps, options):
        table = ddim(scheduler, steps, options)
        assert_same(table.sigma_t, scheduler.sigmas[:-1].double())
        table.std.mul_(0.5)
        return table

    found = build_schedule(SD3, 5, sampler=halved).table.std
    assert_same(found, 0.5 * build_schedule(SD3, 5, sampler="ddim").table.std)
    with pytest.raises(UserError, match=r"must return timestep as 5 numbers, torch\.float32"):
        build_schedule(SD3, 5, sampler=lambda *_: build_schedule(DDIMScheduler(**BETAS), 5).table)
    with pytest.raises(UserError, match="steps=4 differs from the 5 that the scheduler is set to"):
        build_schedule(SD3, 5, sampler=lambda scheduler, steps, options: ddim(scheduler, steps - 1, options))


# -- UNets -------------------------------------------------------------------------------------------------------------


def ddim_table_of_before(scheduler, steps, eta):
    """Columns of DDIM (Song et al. 2021, eq. 12 and 16) in terms of alphas_cumprod, as they were tabulated at first."""
    source = DDIMScheduler.from_config(scheduler.config)
    source.set_timesteps(steps)
    timesteps = source.timesteps
    following = torch.cat([timesteps[1:], torch.tensor([-1])])
    if source.config.timestep_spacing != "linspace":
        following = timesteps - source.config.num_train_timesteps // len(timesteps)
    cumprod = source.alphas_cumprod.double()
    ab_t = cumprod[timesteps]
    ab_s = torch.where(following >= 0, cumprod[following.clamp(min=0)], source.final_alpha_cumprod.double())
    std = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).clamp(min=0).sqrt()
    std = torch.where(std < 1e-8, 0.0, std)
    columns = ab_t.sqrt(), (1 - ab_t).sqrt(), ab_s.sqrt(), (1 - ab_s - std**2).clamp(min=0).sqrt(), 0 * std, std
    return [timesteps, *(column.float() for column in columns)]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
def test_the_tables_of_unets_are_bit_for_bit_what_they_were(spacing, rescaled, to_one):
    options = {"timestep_spacing": spacing, "rescale_betas_zero_snr": rescaled, "set_alpha_to_one": to_one}
    for kind in (BETAS, BETAS | {"beta_schedule": "squaredcos_cap_v2"}):
        scheduler = DDIMScheduler(**kind, **options, prediction_type="v_prediction")
        for steps in (1, 4, 7, 10, 50, 200):
            for eta in (0.0, 0.3, 1.0):
                table = build_schedule(scheduler, steps, eta=eta).to("cpu").table
                for found, wanted in zip(
                    vars(table).values(), ddim_table_of_before(scheduler, steps, eta), strict=True
                ):
                    assert torch.equal(found, wanted), (steps, eta)


def test_the_share_of_the_signal_is_that_of_alphas_cumprod_for_unets():
    schedule = training_schedule(DDIMScheduler(**BETAS))
    signal = torch.cat([DDIMScheduler(**BETAS).alphas_cumprod.double().flip(0), torch.ones(1, dtype=F64)])
    assert_same(snr_shares(schedule), signal.diff())
    assert snr_shares(build_schedule(SD3, 10)).sum().item() == pytest.approx(1)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "total", "last_ten"), [(1.0, "7.3000", "51"), (3.0, "4.0695", "42")])
def test_the_training_schedule_is_the_exact_posterior_of_1000_steps(shift, total, last_ten):
    schedule = training_schedule(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert len(schedule) == 1000
    assert schedule.stochastic_steps.tolist() == list(range(999))
    weights = nats_per_squared_error(schedule)[:-1]
    assert f"{weights.sum().item():.4f}" == total
    assert f"{100 * (weights[-10:].sum() / weights.sum()).item():.0f}" == last_ten
    index = torch.tensor([0, 1, 400, 998])
    x_0, eps = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    x_t = add_noise(x_0, eps, index, schedule)
    found = posterior(x_t, x_0, eps, index, schedule)
    t, s = (schedule.table.sigma_t[place].view(-1, 1, 1, 1) for place in (index, index + 1))
    assert_same(x_t, (1 - t) * x_0 + t * eps)
    # q(x_s | x_0) = N((1-s) x_0, s^2) and x_t = r x_s + sqrt(t^2 - r^2 s^2) n with r = (1-t)/(1-s), by Bayes' rule.
    r = (1 - t) / (1 - s)
    rest = t**2 - r**2 * s**2
    precision = 1 / s**2 + r**2 / rest
    assert_same(found.std, precision.rsqrt().flatten())
    assert_same(found.mean, ((1 - s) * x_0 / s**2 + r * x_t / rest) / precision)


def test_null_leaves_out_a_flow_models_last_step_where_it_outweighs_the_rest():
    sd3 = build_schedule(SD3, 10)
    assert trained_steps(sd3, None).tolist() == list(range(8))
    assert trained_steps(sd3, (0.0, 1.0)).tolist() == list(range(9))
    assert trained_steps(sd3, (0.0, 0.5)).tolist() == list(range(4))
    assert trained_steps(build_schedule(SD3, 2), None).tolist() == [0]
    mild = build_schedule(FlowMatchEulerDiscreteScheduler(), 40, set_timesteps=set_linear_timesteps)
    assert trained_steps(mild, None).tolist() == list(range(39))
    unet = build_schedule(DDIMScheduler(**BETAS, set_alpha_to_one=False), 10)
    assert torch.equal(trained_steps(unet, None), unet.stochastic_steps)
    assert len(trained_steps(training_schedule(SD3), None)) == 999


def test_a_step_that_outweighs_the_rest_is_named():
    sd3 = build_schedule(SD3, 10)
    assert outweighing_step(sd3, trained_steps(sd3, (0.0, 1.0))) == (
        "step 9 of 10 holds 99.8 % of the KL that equal errors of the network make in the 9 trained steps, so ratio "
        "and KL are mostly its own: leave it out with timestep_range, or take more steps"
    )
    assert "step 8 of 10 holds 67.1 %" in outweighing_step(sd3, trained_steps(sd3, None))
    assert outweighing_step(sd3, trained_steps(sd3, (0.0, 1.0)), "uniform") is None
    assert outweighing_step(sd3, torch.tensor([7, 8])) is None
    long = build_schedule(SD3, 40)
    assert outweighing_step(long, trained_steps(long, None)) is None


def test_doctor_and_the_run_name_it(tmp_path, make_policy, capsys):
    policy = make_policy("tiny_sd")
    settings = SETTINGS | {"output_dir": tmp_path / "run", "sampler": {"steps": 4}, "epochs": 1}
    settings |= {"samples_per_epoch": 4, "sample_batch_size": 4}
    config = DDPOConfig(**settings)
    trainer = DDPOTrainer(config, policy, lambda images, *_: images.mean((1, 2, 3)), [("a", {})])
    sentence = outweighing_step(trainer.exact_schedule, trainer.trained_steps)
    lines = DDPOTrainer.in_nats(config, trainer.exact_schedule, trainer.trained_steps, 64)
    assert ("heaviest step", sentence) in lines
    trainer.train()
    assert f"warning: {sentence}\n" in capsys.readouterr().err


def test_credit_to_go_needs_the_last_step_too():
    config = DDPOConfig(**SETTINGS, experimental={"credit": "to_go"}, kl_coef=0.1, kl="k1_reward")
    with pytest.raises(ConfigError, match="needs the KL of every later step"):
        DDPOTrainer.steps_trained_on(config, build_schedule(SD3, 10))
    whole = config.model_copy(update={"timestep_range": (0.0, 1.0)})
    assert len(DDPOTrainer.steps_trained_on(whole, build_schedule(SD3, 10))) == 9


def test_one_step_alone_leaves_nothing_to_train_on():
    config = DDPOConfig(**SETTINGS, sampler={"steps": 1})
    with pytest.raises(ConfigError, match=r"sampler\.steps=1 leaves no stochastic step to train on"):
        DDPOTrainer.steps_trained_on(config, config.sampler.schedule(SD3))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"name": "flow", "noise_level": 0.3}, "noise_level=0.3 is for name=flow_sde, cps, dance, not for name=flow"),
        ({"noise_level": 0.3}, "not for name=null: set one of them, or leave noise_level out"),
        ({"name": "cps", "noise_level": 1.5}, "noise_level=1.5 is more than 1"),
        ({"name": "dance", "eta": 0.5}, "eta=0.5 has no effect with name=dance"),
        ({"name": "flow", "options": {"a": 1}}, "is for a sampler of your own, not for name=flow"),
        ({"name": "flow", "eta": 0}, "sampler.eta=0 makes every step deterministic"),
        ({"eta": 0}, "sampler.eta=0 makes every step deterministic"),
        ({"name": "flow_sde", "noise_level": 0}, "sampler.noise_level=0 makes every step deterministic"),
        ({"name": "cps", "steps": 1}, "sampler.steps=1 is the last step only"),
    ],
)
def test_samplers_that_are_refused_before_a_model_loads(sampler, said):
    with pytest.raises(ConfigError) as caught:
        DDPOConfig(**SETTINGS, sampler=sampler)
    assert any(said in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        (
            "emoji-sd",
            "flow_sde",
            "sampler.name=flow_sde is for flow-matching models, and this is none: use ddim or ddpm",
        ),
        ("emoji-flow", "ddpm", "sampler.name=ddpm is not for a flow-matching model: use flow with eta=1"),
    ],
)
def test_a_sampler_of_another_kind_of_model_is_refused_before_the_model_loads(model, name, said):
    with pytest.raises(ConfigError) as caught:
        check_config(SETTINGS | {"model": model, "sampler": {"name": name}})
    assert [problem[: len(said)] for problem in caught.value.problems] == [said]


def test_noise_level_has_the_default_of_its_source():
    for name, noise in {"flow_sde": 0.7, "cps": 0.7, "dance": 0.3}.items():
        found, wanted = (
            SamplerConfig(name=name, steps=5, **given).schedule(SD3).table.std for given in ({}, {"noise_level": noise})
        )
        assert torch.equal(found, wanted)
        assert not torch.equal(found, SamplerConfig(name=name, steps=5, noise_level=0.2).schedule(SD3).table.std)


def test_what_is_null_is_decided_by_the_models_scheduler():
    unet, flow = SimpleNamespace(config=BETAS), SD3
    for config in (
        DDPOConfig(**SETTINGS),
        DiffusionDPOConfig(model="emoji-sd", pairs="emoji_style", output_dir="a", beta=1.0),
    ):
        assert (config.sampler.name, config.timestep_range) == (None, None)
        decided = config.decided_by(unet)
        assert (decided.sampler.name, decided.timestep_range) == ("ddim", (0.0, 1.0))
        decided = config.decided_by(flow)
        assert (decided.sampler.name, decided.timestep_range) == ("flow", None)
        assert decided.decided_by(unet).sampler.name == "flow"
    window = DDPOConfig(**SETTINGS | {"sampler": {"steps": 5, "noisy_steps": 2}}).decided_by(unet)
    assert DDPOConfig.model_validate(window.model_dump(mode="json")) == window  # as config.yaml is read


# -- the pipeline's own call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4, 6, 4), (2, 6, 16)])
@pytest.mark.parametrize("name", ["flow", "ddim", "flow_sde", "cps", "dance"])
def test_the_pipelines_scheduler_takes_the_steps_of_the_table(name, shape):
    """Also of packed latents, and at sigmas of the pipeline's own."""
    dynamic = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    scheduler = scheduler_of(SamplerConfig(name=name, steps=50), dynamic)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=0.63, device="cpu")
    schedule = build_schedule(
        dynamic, 6, sampler=name, options={}, set_timesteps=partial(set_linear_timesteps, tokens=1024)
    ).to("cpu")
    assert torch.equal(scheduler.timesteps, schedule.table.timestep)
    noises = iter(randn(6, *shape, seed=3).float())
    given = copy.copy(noises)
    scheduler.noise = lambda x_t: next(given)
    x = wanted = randn(*shape).float()
    for i, t in enumerate(scheduler.timesteps):
        step = denoise(wanted.view(2, 4, 6, -1), wanted.sin().view(2, 4, 6, -1), torch.full((2,), i), schedule)
        wanted = (step.sample(next(noises).view(2, 4, 6, -1)) if step.std.any() else step.mean).view(shape)
        x = scheduler.step(x.sin(), t, x, return_dict=False)[0]
        assert x.shape == shape
        torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)


def test_without_noise_the_scheduler_is_diffusers_own():
    for sampler in (SamplerConfig(eta=0.0), SamplerConfig(name="dance", noise_level=0.0)):
        scheduler = scheduler_of(sampler, SD3)
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler
        assert scheduler.config == SD3.config


def test_a_pipeline_that_samples_by_noise_level_refuses_eta(model_path):
    pipeline = load_pipeline(model_path("tiny_sd3"))
    aligned = ImageAlignmentPipeline(pipeline, model=None, sampler=SamplerConfig(name="dance"))
    with pytest.raises(UserError, match="eta=0 has no effect with name=dance, whose noise is noise_level"):
        aligned("a", eta=0.0)


def test_spaced_timesteps_shift_by_tokens_where_the_scheduler_says_so():
    """Stable Diffusion 3's pipeline gives mu alone."""
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    set_spaced_timesteps(scheduler, 4, 1024)
    linear = np.linspace(1, 0.001, 4)
    wanted = math.exp(0.63) / (math.exp(0.63) + 1 / linear - 1)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), wanted, rtol=1e-6)
