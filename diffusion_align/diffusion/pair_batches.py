"""What an epoch of Diffusion-DPO trains on: pairs given or judged, with a step and a noise for each decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.diffusion.collection import collect_scored
from diffusion_align.diffusion.latent_cache import LatentCache
from diffusion_align.diffusion.policy import Conditioning
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import equal_reward_metric

if TYPE_CHECKING:
    from diffusion_align.diffusion.dpo import DiffusionDPOTrainer


@dataclass
class PairBatch:
    """An epoch's pairs of one process: B samples, K steps each, R pictures; on the device.

    Of sample i, picture ``chosen[i]`` was preferred to ``rejected[i]``. ``noise`` (n, B, K, C, H, W) makes x_t of x_0
    and, for a drawn target, x_s; ``x_t`` and ``x_s`` (R, K, C, H, W) are the sampler's own where those are the target.
    """

    chosen: Tensor
    rejected: Tensor
    steps: Tensor
    conditioning: Conditioning
    keep: Tensor
    x_0: Tensor
    noise: Tensor | None = None
    x_t: Tensor | None = None
    x_s: Tensor | None = None
    reference_mean: Tensor | None = None
    implicit_reward: Tensor | None = None


def given_pairs(trainer: DiffusionDPOTrainer, latents: LatentCache) -> tuple[PairBatch, dict[str, float]]:
    """This process's part of the epoch's pairs, in a new random order each time all have been seen; metrics."""
    config, pairs = trainer.config, latents.pairs
    latents.fill(trainer)
    epoch = items_of_epoch(range(len(pairs)), config.seed, trainer.epoch, config.samples_per_epoch)
    own = [epoch[i] for i in trainer.local_samples]
    rows = torch.arange(2 * len(own), device=trainer.accelerator.device)
    batch = PairBatch(
        chosen=rows[: len(own)],
        rejected=rows[len(own) :],
        steps=torch.stack([_steps(trainer, i) for i in trainer.local_samples]).to(rows.device),
        conditioning=_conditioning(trainer, [pairs.prompts[i] for i in own]),
        keep=torch.arange(config.samples_per_epoch),
        x_0=torch.cat(latents.read(own)),
        noise=_noise(trainer),
    )
    return batch, {
        "data_epochs": (trainer.epoch + 1) * config.samples_per_epoch / len(pairs),
        "pairs": len(pairs),
        "pairs_tied": pairs.ties,
        "pairs_skipped": len(pairs.skipped),
    }


def judged_pairs(trainer: DiffusionDPOTrainer) -> tuple[PairBatch, dict[str, float]]:
    """Of every prompt's pictures, sampled now, the best and the worst; prompts whose pictures tie are left out."""
    assert trainer.reward is not None
    config, own, device = trainer.config, trainer.local_samples, trainer.accelerator.device
    groups = config.samples_per_epoch // config.group_size
    prompts = items_of_epoch(trainer.prompts, config.seed, trainer.epoch, groups)
    samples = [prompt for prompt in prompts for _ in range(config.group_size)]
    logged = config.target == "logged"
    nothing = torch.empty(0, dtype=torch.int64)
    collected = collect_scored(
        trainer,
        trainer.policy,
        trainer.drawing,
        trainer.reward,
        samples,
        record=lambda i: _steps(trainer, i // config.group_size) if logged else nothing,
        reduction="sum",
    )
    path = collected.trajectory
    scores = collected.rewards.view(groups, config.group_size)
    first = torch.arange(groups) * config.group_size
    best, worst = first + scores.argmax(1), first + scores.argmin(1)
    gaps = scores.amax(1) - scores.amin(1)
    rejected_of = torch.zeros(config.samples_per_epoch, dtype=torch.int64)
    rejected_of[best] = worst
    batch = PairBatch(
        chosen=torch.arange(len(own), device=device),
        rejected=(rejected_of[own.start : own.stop] - own.start).to(device),
        steps=torch.stack([_steps(trainer, i // config.group_size) for i in own]).to(device),
        conditioning=_conditioning(trainer, [samples[i][0] for i in own]),
        keep=best[gaps > 0],
        x_0=path.latents,
        noise=None if logged else _noise(trainer),
        x_t=path.x_t if logged else None,
        x_s=path.x_s if logged else None,
    )
    equal = equal_reward_metric(collected.rewards, config.group_size)
    return batch, collected.metrics | equal | {"reward_gap": gaps.mean().item()}


def _steps(trainer: DiffusionDPOTrainer, sample: int) -> Tensor:
    """(K,) one step at random from each of K equal parts of the trained ones."""
    count, steps = trainer.config.decisions_per_pair, trainer.trained_steps
    places = torch.rand(count, generator=generator(trainer.config.seed, "timesteps", trainer.epoch, sample))
    return steps[((torch.arange(count) + places) * len(steps) / count).long().clamp(max=len(steps) - 1)]


def _noise(trainer: DiffusionDPOTrainer) -> Tensor:
    """(n, B, K, C, H, W), shared by the two pictures of a pair; n = 2 where x_s is drawn as well."""
    config = trainer.config
    shape = (2 if config.target == "posterior_sample" else 1, config.decisions_per_pair, *trainer.policy.latent_shape)
    streams = [generator(config.seed, "pair noise", trainer.epoch, i) for i in trainer.local_samples]
    return torch.stack([torch.randn(shape, generator=s) for s in streams], dim=1).to(trainer.accelerator.device)


def _conditioning(trainer: DiffusionDPOTrainer, texts: list[str]) -> Conditioning:
    """One for both pictures of a pair, so that captions are dropped from both."""
    config = trainer.config
    for place, i in enumerate(trainer.local_samples if config.caption_dropout else ()):
        drawn = torch.rand((), generator=generator(config.seed, "caption dropout", trainer.epoch, i))
        texts[place] = "" if drawn < config.caption_dropout else texts[place]
    return trainer.policy.encode(texts)
