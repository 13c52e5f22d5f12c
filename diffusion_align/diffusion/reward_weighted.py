"""Reward-weighted regression (RWR): imitate the sampled images, better ones more.

Peters & Schaal 2007; the baseline of DDPO (Black et al. 2023, arXiv:2305.13301). Loss of one recorded step:

    -w log p(x_s | x_t),    w = n softmax(z / temperature),    z = (r - mean) / std of the n images that are compared

There is no ratio, clip, reference or negative weight: an image with a low reward is only imitated less. With
``softmax_over: epoch``, as published, all images of an epoch are compared, and prompts that score high anyway take most
of the weight; with ``group``, only the images of one prompt are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_align.diffusion.reward_weighted_settings import RWRConfig
from diffusion_align.diffusion.rollout import Trajectory, replay
from diffusion_align.diffusion.sampled_steps import SampledStepsTrainer
from diffusion_align.diffusion.trainer import Collected
from diffusion_align.estimators import score_function_loss, softmax_weights
from diffusion_align.training.context import Metric
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.statistics import equal_reward_metric


@dataclass(frozen=True)
class WeightedImages:
    """What one process trains on in an epoch: B images with K recorded steps each, on the device.

    Attributes:
        path: the images and their steps.
        weights: (B,), 1 on average over the epoch.
    """

    path: Trajectory
    weights: Tensor


class RWRTrainer(SampledStepsTrainer[WeightedImages]):
    """Trains as ``RWRConfig`` says; see ``DenoisingTrainer`` for the arguments."""

    config: RWRConfig
    config_class = RWRConfig
    metrics: ClassVar[Mapping[str, Metric]] = {
        "effective_samples": Metric(
            "Effective samples",
            "images",
            "(sum of the weights)²/(sum of their squares): all of an epoch where all count alike, few where few do.",
        ),
        "logp": Metric(
            "Log-prob of the recorded steps", "nats per latent dimension", "Rises where an epoch's images are imitated."
        ),
    }

    def collect(self) -> tuple[Collected, dict[str, float]]:
        """Sample and score this process's images, recording the steps that will be trained on."""
        collected = self.sample_steps()
        return collected, collected.metrics

    def estimate(self, collected: Collected) -> tuple[WeightedImages, TrainingPlan, dict[str, float]]:
        """Weights from the rewards of all processes; every image is trained on."""
        config, path, rewards = self.config, collected.trajectory, collected.rewards
        samples = torch.arange(len(rewards))
        compared = samples // (len(rewards) if config.softmax_over == "epoch" else config.group_size)
        weights = softmax_weights(rewards, compared, temperature=config.temperature)
        self.watch_kl(path, samples)
        metrics = equal_reward_metric(rewards, config.group_size)
        metrics["effective_samples"] = (weights.sum() ** 2 / weights.square().sum()).item()
        batch = WeightedImages(path, self.local(weights.to(path.logp_old.dtype)))
        return batch, TrainingPlan(samples, path.steps.shape[1]), metrics

    def loss(self, batch: WeightedImages, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the weighted log-prob of n recorded steps, nats per latent dimension."""
        logp, _ = replay(self.policy, self.schedule, *batch.path.at(samples, actions), reduction="mean")
        return score_function_loss(logp, batch.weights[samples]), {"logp": logp.detach()}
