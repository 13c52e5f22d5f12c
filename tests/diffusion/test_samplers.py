"""Samplers of one's own: functions that tabulate coefficients, named by reference and used wherever images are made."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_align.diffusion.ddpo import DDPOConfig
from diffusion_align.diffusion.rollout import TableScheduler, replay, rollout
from diffusion_align.diffusion.samplers import Step, ddim
from diffusion_align.diffusion.schedule import SamplerConfig, build_schedule
from diffusion_align.diffusion.transitions import denoise, posterior
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from tests.helpers.oracles import randn

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SETTINGS = {"model": "emoji-sd", "prompts": ["a"], "reward": "jpeg_compressibility", "output_dir": "runs/a"}
MINE = """
import torch
from diffusion_align.diffusion.samplers import ddim

def falling_eta(scheduler, steps, options):
    return ddim(scheduler, steps, {"eta": torch.linspace(options["eta"], options.get("last", 0.0), steps)})

def names(scheduler, steps, options):
    return {"timestep": torch.arange(steps)}

def short(scheduler, steps, options):
    return ddim(scheduler, steps - 1, options)

def negative(scheduler, steps, options):
    table = ddim(scheduler, steps, options)
    table.std.neg_()
    return table

def broken(scheduler, steps, options):
    return {}["missing"]

def late(scheduler, steps, options):
    table = ddim(scheduler, steps, options)
    table.timestep.add_(500)
    return table
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda name: f"{tmp_path / 'mine.py'}:{name}"


def test_a_sampler_of_ones_own_is_found_by_reference_and_given_its_options(mine):
    config = SamplerConfig(name=mine("falling_eta"), steps=4, eta=0.9, options={"last": 0.3})
    schedule = config.schedule(DDIMScheduler(**BETAS, steps_offset=1))
    x_t, prediction = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1)
    found = denoise(x_t, prediction, torch.arange(4), schedule)
    for i, eta in enumerate((0.9, 0.7, 0.5, 0.3)):
        plain = build_schedule(DDIMScheduler(**BETAS, steps_offset=1), 4, eta=eta)
        expected = denoise(x_t[i : i + 1], prediction[i : i + 1], torch.tensor([i]), plain)
        torch.testing.assert_close(found.mean[i : i + 1], expected.mean, atol=1e-7, rtol=0)
        torch.testing.assert_close(found.std[i : i + 1], expected.std, atol=1e-7, rtol=0)


def test_the_step_is_affine_in_x_0_eps_and_x_t():
    def affine(scheduler, steps, options):
        table = ddim(scheduler, steps, options)
        weights = torch.arange(1.0, 1 + 3 * steps, dtype=torch.float64).view(3, steps)
        return Step(table.timestep, table.alpha_t, table.sigma_t, *weights, table.std)

    schedule = build_schedule(DDIMScheduler(**BETAS), 4, sampler=affine)
    x_t, x_0, eps = (randn(2, 1, 2, 2, seed=seed) for seed in range(3))
    found = posterior(x_t, x_0, eps, torch.tensor([1, 3]), schedule)
    a, b, c = (torch.tensor(w, dtype=torch.float64).view(2, 1, 1, 1) for w in ([2, 4], [6, 8], [10, 12]))
    torch.testing.assert_close(found.mean, a * x_0 + b * eps + c * x_t, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("sampler", "unused"), [("ddim", "x_t"), ("ddpm", "eps")])
def test_what_a_sampler_never_weighs_changes_no_bit(sampler, unused):
    schedule = build_schedule(DDIMScheduler(**BETAS), 4, sampler=sampler).to("cpu")
    values = {name: torch.full((1, 1, 2, 2), -0.0) for name in ("x_0", "eps", "x_t")}
    values[unused] = torch.full((1, 1, 2, 2), torch.inf)
    mean = posterior(values["x_t"], values["x_0"], values["eps"], torch.tensor([1]), schedule).mean
    assert (mean == 0).all()
    assert mean.signbit().all()


def test_rollout_replays_and_the_pipelines_own_call_agrees(tiny_sd, mine, make_policy, streams):
    policy = make_policy("tiny_sd")
    sampler = SamplerConfig(name=mine("falling_eta"), steps=4, guidance_scale=1.0)
    schedule = sampler.schedule(policy.pipeline.scheduler).to("cpu")
    assert schedule.stochastic_steps.tolist() == [0, 1, 2]  # eta falls to 0
    conditioning = policy.encode(["red apple", "a cat"])
    path = rollout(policy, schedule, conditioning, streams(2))
    for i in range(3):
        logp, _ = replay(policy, schedule, path.x_t[:, i], path.x_s[:, i], path.steps[:, i], conditioning)
        assert torch.equal(logp, path.logp_old[:, i])
    pipe = ImageAlignmentPipeline.from_pretrained(str(tiny_sd))
    pipe.sampler = sampler
    drawn = pipe(["red apple", "a cat"], seed=0).images
    path = rollout(policy, schedule, conditioning, [torch.Generator().manual_seed(i) for i in range(2)])
    expected = policy.decode(path.latents).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([np.asarray(image) for image in drawn]) / 255 - expected).max() < 2 / 255
    assert not isinstance(pipe.pipeline.scheduler, TableScheduler)


def test_a_timestep_that_is_there_twice_has_the_numbers_of_each_step():
    def twice(scheduler, steps, options):
        table = ddim(scheduler, steps, options)
        table.timestep[1] = table.timestep[0]
        return table

    schedule = build_schedule(DDIMScheduler(**BETAS), 3, sampler=twice, eta=0.0)
    scheduler = TableScheduler(schedule, DDIMScheduler(**BETAS).config)
    scheduler.set_timesteps(3)
    x_t, prediction = randn(1, 1, 2, 2, seed=0).float(), randn(1, 1, 2, 2, seed=1).float()
    for i, timestep in enumerate(scheduler.timesteps):
        (found,) = scheduler.step(prediction, timestep, x_t, generator=[])
        expected = denoise(x_t, prediction, torch.tensor([i]), scheduler.schedule).mean
        assert torch.equal(found, expected)


def test_references_are_checked_with_the_configuration_and_made_absolute(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = {"method": "ddpo", **SETTINGS, "sampler": {"name": "mine.py:falling_eta", "options": {"last": 0.5}}}
    assert check_config(raw).sampler.name == mine("falling_eta")
    for name, message in [
        ("dim", "must be 'ddim', 'ddpm'"),
        ("other.py:falling_eta", "other.py' does not exist"),
        ("mine.py:faling_eta", "no 'faling_eta': did you mean 'falling_eta'"),
    ]:
        with pytest.raises(ConfigError, match=message) as refused:
            check_config(raw | {"sampler": {"name": name}})
        assert len(refused.value.problems) == 1
    with pytest.raises(
        ConfigError,
        match=r"^sampler.options={'last': 0.5} is for a sampler of your own, not for name=ddpm: leave it out$",
    ):
        check_config(raw | {"sampler": {"name": "ddpm", "options": {"last": 0.5}}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("names", "must return a Step, .* returned a dict"),
        ("short", "must return timestep as 4 numbers"),
        ("negative", "negative std"),
        ("late", "a timestep .* from 0 to 999"),
        ("broken", r"raised KeyError: 'missing' \(mine.py, line 20\)"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(name, message, mine):
    sampler = DDPOConfig(**SETTINGS, sampler={"name": mine(name), "steps": 4}).sampler
    with pytest.raises(UserError, match=message):
        sampler.schedule(DDIMScheduler(**BETAS))
