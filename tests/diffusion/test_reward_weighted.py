"""Reward-weighted regression: its weights, loss and gradient by hand, what it costs and measures, and resume."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from diffusion_align import RWRConfig, RWRTrainer
from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.rollout import rollout, transition
from diffusion_align.diffusion.trainer import Collected
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import run
from tests.helpers.hard_runs import assert_same_run, rows_of

PROMPTS = ["red apple", "a cat"]
REWARDS = [1.0, 3.0, 10.0, 14.0]
F64 = {"dtype": torch.float64}


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


SETTINGS = {
    "prompts": PROMPTS,
    "reward": redness,
    "sampler": {"steps": 4, "guidance_scale": 1.0},
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 5,
    "group_size": 2,
    "updates_per_epoch": 2,
    "grid_every": 0,
    "num_threads": 1,
}


@pytest.fixture
def epoch(make_policy, streams, tmp_path):
    """``epoch(**settings)``: a trainer, in float64, and what it would have collected with REWARDS."""

    def make(**settings):
        policy = make_policy("tiny_sd", noise=0.05)
        config = RWRConfig(**SETTINGS | {"model": "emoji-sd", "output_dir": tmp_path / "run"} | settings)
        trainer = RWRTrainer(config, policy, redness, [(p, {}) for p in PROMPTS])
        texts = [text for text in PROMPTS for _ in range(2)]
        record = torch.stack([trainer._recorded_steps(i) for i in range(4)])
        path = rollout(policy, trainer.schedule, policy.encode(texts), streams(4), record=record)
        policy.pipeline.unet.double()
        trainer.schedule = trainer.exact_schedule
        conditioning = {name: value.double() for name, value in path.conditioning.items()}
        path = replace(path, x_t=path.x_t.double(), x_s=path.x_s.double(), conditioning=conditioning)
        rewards = torch.tensor(REWARDS, **F64)
        return trainer, Collected([(text, {}) for text in texts], path, rewards[:, None], rewards, {})

    return make


def by_hand(temperature, groups):
    """n exp(z/T) / sum exp(z/T) of each of the groups of REWARDS."""
    rows = torch.tensor(REWARDS, **F64).view(groups, -1)
    exponentials = ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True) / temperature).exp()
    return (rows.shape[1] * exponentials / exponentials.sum(1, keepdim=True)).flatten()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("over", "groups"), [("epoch", 1), ("group", 2)])
def test_weights_loss_and_gradient_are_the_formula(epoch, over, groups, temperature):
    """-w log N(x_s; mu, sigma), whose gradient is -w (x_s - mu)/sigma² dmu, in means over dimensions."""
    trainer, collected = epoch(softmax_over=over, temperature=temperature)
    batch, plan, metrics = trainer.estimate(collected)
    weights = by_hand(temperature, groups)
    torch.testing.assert_close(batch.weights.double(), weights, atol=1e-6, rtol=0)
    assert plan.sample_indices.tolist() == [0, 1, 2, 3]
    assert (plan.steps_per_sample, plan.normalizer) == (4, None)
    assert metrics["effective_samples"] == pytest.approx(16 / weights.square().sum().item(), rel=1e-6)
    assert metrics["frac_reward_zero_std"] == 0

    batch = replace(batch, weights=weights)
    samples, actions = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    losses, statistics = trainer.loss(batch, samples, actions)
    x_t, x_s, steps, conditioning = batch.path.at(samples, actions)
    mean = transition(trainer.policy, trainer.schedule, x_t, steps, conditioning).mean
    std = trainer.exact_schedule.table.std[steps].view(-1, 1, 1, 1)
    logp = Normal(mean, std).log_prob(x_s).mean(dim=(1, 2, 3))
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, -weights[samples] * logp, atol=0, rtol=1e-9)
    torch.testing.assert_close(statistics["logp"], logp.detach(), atol=0, rtol=1e-9)

    parameters = list(trainer.trainable.values())
    slope = -(weights[samples].view(-1, 1, 1, 1) * ((x_s - mean) / std**2).detach()) / mean[0].numel() / len(samples)
    found = torch.autograd.grad(losses.mean(), parameters)
    expected = torch.autograd.grad(mean, parameters, grad_outputs=slope)
    assert max(g.abs().max() for g in found) > 1e-6
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-8)


def test_an_epoch_costs_that_of_ddpo_without_a_kl():
    settings = SETTINGS | {"model": "emoji-sd", "output_dir": "run", "timestep_fraction": 0.5}
    for sampler in ({"steps": 10, "guidance_scale": 2.0}, {"steps": 10, "noisy_steps": 3}):
        changed = {"sampler": sampler, "timestep_fraction": 1.0 if "noisy_steps" in sampler else 0.5}
        costs = [
            trainer.epoch_cost(config(**settings | changed))
            for trainer, config in ((RWRTrainer, RWRConfig), (DDPOTrainer, DDPOConfig))
        ]
        assert costs[0] == costs[1]
        assert costs[0].reference == 0


SHORT = {name: value for name, value in SETTINGS.items() if name != "reward"} | {
    "method": "rwr",
    "reward": "jpeg_compressibility",
    "epochs": 3,
    "learning_rate": 1e-3,
    "checkpoint_every": 1,
    "softmax_over": "group",
    "timestep_fraction": 0.5,
    "lora": {"rank": 2},
}


def test_a_resumed_run_is_the_uninterrupted_one_and_knows_how_far_it_went(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    settings = SHORT | {"model": str(tiny_sd)}
    for name, epochs in (("whole", [3]), ("parts", [1, 3])):
        for until in epochs:
            given = settings | {"output_dir": str(tmp_path / name), "epochs": until, "resume": until != epochs[0]}
            run(check_config(given))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    paths = [row["kl_path"] for row in rows if "kl_path" in row]
    assert paths[0] >= 0
    assert paths[-1] > 0
    assert all("logp" in row for row in rows if "loss" in row)
    assert all(1 <= row["effective_samples"] <= 4 for row in rows if "effective_samples" in row)


def test_a_window_is_what_is_sampled_with_noise_and_trained_on(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    window = {"steps": 4, "guidance_scale": 1.0, "noisy_steps": 2, "noisy_order": "progressive"}
    given = SHORT | {"model": str(tiny_sd), "output_dir": str(tmp_path / "run"), "sampler": window}
    trainer = run(check_config(given | {"timestep_fraction": 1.0, "epochs": 2}))
    assert trainer.trained_steps.tolist() == [1, 2]
    assert [row["first_noisy_step"] for row in rows_of(tmp_path / "run") if "first_noisy_step" in row] == [1, 2]
