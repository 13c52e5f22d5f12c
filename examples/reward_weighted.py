"""Reward-weighted regression for images (RWR; Peters & Schaal 2007, compared with DDPO in arXiv:2305.13301, section 5).

Sample images, weight them by a softmax over the epoch's rewards, and maximise their weighted log-prob:

    loss = -sum_i w_i log p(x_i),    w = softmax(z / temperature),  z = (r - mean) / std of the epoch's rewards

There is no ratio, no clip and no negative weight: an image with a low reward is only imitated less.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.extending import (
    CollectedImages,
    DenoisingConfig,
    DenoisingTrainer,
    Metric,
    PromptsConfig,
    RewardSetting,
    TrainingPlan,
    Trajectory,
    replay,
)


class RewardWeightedConfig(DenoisingConfig):
    """Settings of RewardWeightedTrainer, in addition to those of every method for images."""

    prompts: PromptsConfig = Field(description="prompts to sample images for")
    reward: RewardSetting = Field(description="reward that determines the weights")
    temperature: float = Field(1.0, gt=0, description="temperature of the softmax, in stds of the reward")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in an epoch: B images with K recorded steps each.

    Attributes:
        path: the images and their steps.
        weights: (B,); over the N images of all processes they sum to N.
    """

    path: Trajectory
    weights: Tensor


class RewardWeightedTrainer(DenoisingTrainer[Batch]):
    """Reward-weighted regression: imitate the sampled images, better ones more."""

    config: RewardWeightedConfig
    config_class = RewardWeightedConfig
    metrics: ClassVar = {"effective_samples": Metric("Effective samples", "images", "Near 1, one image dominates.")}

    def collect(self) -> tuple[CollectedImages, dict[str, float]]:
        """Sample this process's images, record every step that has a density, and score them."""
        collected = self.sample()
        return collected, collected.metrics

    def estimate(self, collected: CollectedImages) -> tuple[Batch, TrainingPlan, dict[str, float]]:
        """Weights from the rewards of all processes; every image and every recorded step is trained on."""
        path, rewards = collected.trajectory, collected.rewards.double()
        deviations = (rewards - rewards.mean()) / rewards.std().clamp(min=1e-8)
        weights = len(rewards) * torch.softmax(deviations / self.config.temperature, dim=0)
        batch = Batch(path, self.local(weights.to(path.x_t.dtype)))
        plan = TrainingPlan(torch.arange(len(weights)), steps_per_sample=path.steps.shape[1])
        return batch, plan, {"effective_samples": (weights.sum() ** 2 / weights.square().sum()).item()}

    def loss(self, batch: Batch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the weighted log-prob of n recorded steps, nats per latent dimension."""
        logp, _ = replay(self.policy, self.schedule, *batch.path.at(samples, actions), reduction="mean")
        return -batch.weights[samples] * logp, {"logp": logp.detach()}
