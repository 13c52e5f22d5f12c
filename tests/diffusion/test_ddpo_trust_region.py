"""DDPO with a bound on the KL to the policy that sampled, and with GRPO-Guard's ratio; by hand on recorded epochs."""

import math
from dataclasses import replace

import pytest
import torch

from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
from diffusion_align.diffusion.rollout import concatenate, rollout, transition
from diffusion_align.diffusion.trainer import Collected
from diffusion_align.errors import TrainingError

PROMPTS = ["red apple", "a cat"]


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


@pytest.fixture
def make_trainer(make_policy, tmp_path):
    def make(**settings):
        defaults = {
            "model": "emoji-sd",
            "output_dir": tmp_path / "run",
            "prompts": PROMPTS,
            "reward": redness,
            "sampler": {"steps": 4, "guidance_scale": 1.0},
            "samples_per_epoch": 4,
            "sample_batch_size": 4,
            "micro_batch_size": 4,
            "group_size": 2,
            "advantages": "group",
        }
        config = DDPOConfig(**(defaults | settings))
        return DDPOTrainer(config, make_policy("tiny_sd", noise=0.05), redness, [(p, {}) for p in PROMPTS])

    return make


@pytest.fixture
def recorded(streams):
    """``recorded(trainer)``: a batch of its rollout, and the samples and actions of all 16 steps."""

    def make(trainer):
        texts = [PROMPTS[i // 2] for i in range(4)]
        path = rollout(
            trainer.policy,
            trainer.schedule,
            trainer.policy.encode(texts),
            streams(4),
            reduction=trainer.config.logp_reduction,
            record_means=trainer.config.needs_old_means,
        )
        scores = torch.tensor([1.0, 3.0, 2.0, 6.0])
        batch, *_ = trainer.estimate(Collected([(text, {}) for text in texts], path, scores[:, None], scores, {}))
        return batch, *torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)

    return make


def shifted(trainer, batch, deltas):
    """The batch as if its policy had been ``deltas`` (4, 4) stds per dimension away when it sampled the same actions,
    in a direction that takes the log-prob of each up or down with its sign; and log-ratios and KLs in nats, float64."""
    path = batch.path
    std = trainer.schedule.table.std[path.steps].double()
    eps = (path.x_s.double() - path.mean_old.double()) / std[..., None, None, None]
    old_eps = eps + deltas[..., None, None, None] * eps.sign()  # of mean_old - std * delta
    mean_old = (path.x_s.double() - std[..., None, None, None] * old_eps).float()
    log_ratio = (old_eps.square() - eps.square()).flatten(2).sum(2) / 2
    count = trainer.dimensions if trainer.config.logp_reduction == "mean" else 1
    path = replace(path, mean_old=mean_old, logp_old=(path.logp_old.double() - log_ratio / count).float())
    return replace(batch, path=path), log_ratio, trainer.dimensions * deltas.square() / 2, eps, std


def test_means_are_recorded_only_where_they_are_needed(make_trainer, recorded):
    plain, bounded = make_trainer(), make_trainer(kl_bound_nats=0.1)
    assert recorded(plain)[0].path.mean_old is None
    path = recorded(bounded)[0].path
    with torch.no_grad():
        for k in range(4):
            step = transition(bounded.policy, bounded.schedule, path.x_t[:, k], path.steps[:, k], path.conditioning)
            assert torch.equal(path.mean_old[:, k], step.mean)
    assert concatenate([path, path]).mean_old.shape[0] == 8
    assert concatenate([recorded(plain)[0].path] * 2).mean_old is None
    costs = [DDPOTrainer.epoch_cost(trainer.config).recorded for trainer in (plain, bounded)]
    assert costs[1] == 1.5 * costs[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_shift_of_the_mean_drops_exactly_the_actions_beyond_the_bound(reduction, make_trainer, recorded):
    trainer = make_trainer(kl_bound_nats=0.5, logp_reduction=reduction)
    batch, samples, actions = recorded(trainer)
    size = torch.linspace(0.02, 0.12, 16, dtype=torch.float64).view(4, 4)  # .05 to 1.84 nats, in mixed steps
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).repeat(4, 1).T  # of log-ratios, one per sample
    batch, log_ratio, kl, _, _ = shifted(trainer, batch, size * sign)
    advantages = batch.advantages.double()
    dropped = (kl > 0.5) & (advantages * log_ratio > 0)
    assert (kl - 0.5).abs().min() > 0.01
    assert 0 < dropped.sum() < (kl > 0.5).sum() < 16
    losses, statistics = trainer.loss(batch, samples, actions)
    torch.testing.assert_close(statistics["kl_old"].double().view(4, 4), kl, rtol=1e-3, atol=1e-4)
    assert torch.equal(statistics["kl_bound/dropped"].bool().view(4, 4), dropped)
    count = trainer.dimensions if reduction == "mean" else 1
    expected = torch.where(dropped, 0, -advantages * (log_ratio / count).exp())
    torch.testing.assert_close(losses.detach().double().view(4, 4), expected, rtol=2e-3, atol=1e-5)
    assert "clip_ratio/region_mean" not in statistics
    some = dropped.flatten()
    gradients = torch.autograd.grad(losses[some].sum(), trainer.trainable.values(), retain_graph=True)
    assert all((gradient == 0).all() for gradient in gradients)
    gradients = torch.autograd.grad(losses[~some].sum(), trainer.trainable.values())
    assert any((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_guarded_loss_is_the_formula_in_batches_of_mixed_steps(reduction, make_trainer, recorded):
    """log rho_g = std delta·eps, over d with means, with the std of each action's own step."""
    trainer = make_trainer(ratio="guard", logp_reduction=reduction, clip_range=0.9)
    batch, samples, actions = recorded(trainer)
    size = torch.linspace(0.01, 0.03, 16, dtype=torch.float64).view(4, 4) / (10 if reduction == "sum" else 1)
    batch, _, _, eps, std = shifted(trainer, batch, size)
    assert std.unique().numel() == 4
    # Seen from the policy that sampled: its mean is -delta away, and x is old_eps from it.
    delta = size[..., None, None, None] * eps.sign()
    delta_eps = (delta * (eps + delta)).flatten(2)
    count = trainer.dimensions if reduction == "mean" else 1
    expected = -batch.advantages.double() * (std * delta_eps.sum(2) / count).exp()
    losses, statistics = trainer.loss(batch, samples, actions)
    torch.testing.assert_close(losses.detach().double().view(4, 4), expected, rtol=1e-3, atol=1e-5)
    assert {"kl_old", "clip_ratio/region_mean"} <= statistics.keys()
    # Not that of the batch: an action alone has the same loss.
    alone = torch.cat([trainer.loss(batch, *pair)[0] for pair in zip(samples.split(1), actions.split(1), strict=True)])
    torch.testing.assert_close(alone, losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"kl_bound_nats": 0.0}, {"ratio": "guard"}])
def test_on_the_first_pass_every_action_counts(settings, make_trainer, recorded):
    trainer, plain = make_trainer(**settings), make_trainer()
    (batch, *_), rows = recorded(trainer), torch.arange(4)
    for column in range(4):  # the batch shape of sampling, so equal to the last bit
        losses, statistics = trainer.loss(batch, rows, torch.full((4,), column))
        assert (statistics["ratio/mean"] == 1).all()
        assert (statistics["kl_old"] == 0).all()
        assert not statistics.get("kl_bound/dropped", torch.zeros(1)).any()
        gradient = torch.autograd.grad(losses.sum(), trainer.trainable.values())
        usual = plain.loss(recorded(plain)[0], rows, torch.full((4,), column))[0].sum()
        usual = torch.autograd.grad(usual, plain.trainable.values())
        factor = float(trainer.schedule.table.std[column]) if "ratio" in settings else 1.0
        for a, b in zip(gradient, usual, strict=True):
            torch.testing.assert_close(a, factor * b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_metrics_and_what_is_refused_before_any_update(make_trainer):
    bounded, guarded = make_trainer(kl_bound_nats=0.1), make_trainer(ratio="guard")
    ratios = {"ratio/min": 0.5, "ratio/max": 1.5}
    found = bounded.check_update(ratios | {"kl_old/max": 0.1}, first=True)
    assert found == {"ratio/first_pass_deviation": 0.5}
    with pytest.raises(TrainingError, match=r"0.11 nats from the policy .* beyond kl_bound_nats=0.1: use mixed_prec"):
        bounded.check_update(ratios | {"kl_old/max": 0.11}, first=True)
    with pytest.raises(TrainingError, match="outside the clip range"):
        guarded.check_update(ratios | {"kl_old/max": 0.0}, first=True)
    (line,) = DDPOTrainer.in_nats(bounded.config, None, None, 256)
    assert line == ("KL bound in nats", "0.1, of an action to the policy that sampled it; replaces the clip")
    (line,) = DDPOTrainer.in_nats(guarded.config, None, None, 256)
    assert line[1].startswith(f"{256 * math.log1p(1e-4):.3g}, over the std of an action's step")
