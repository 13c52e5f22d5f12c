"""Reward-weighted regression for images (RWR; Peters & Schaal 2007, compared with DDPO in arXiv:2305.13301, section 5).

Sample, weigh each image by a softmax over its epoch's rewards, and raise the log-prob of what was sampled by as much:

    loss = -sum_i w_i log p(x_i),    w = softmax(z / temperature),  z = (r - mean) / std of the epoch's rewards

There is no ratio, no clip and no negative weight: what scored badly is merely imitated less.
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
    """Settings of RewardWeightedTrainer, beside those of every method for images."""

    prompts: PromptsConfig = Field(description="what to sample")
    reward: RewardSetting = Field(description="what weighs the samples")
    temperature: float = Field(1.0, gt=0, description="of the weights, in standard deviations of the reward")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in an epoch: B images with K recorded steps each.

    Attributes:
        path: the images and their steps.
        weights: (B,), which sum to N over the N images of all processes.
    """

    path: Trajectory
    weights: Tensor


class RewardWeightedTrainer(DenoisingTrainer[Batch]):
    """Reward-weighted regression: imitate the images that were sampled, the better the more."""

    config: RewardWeightedConfig
    config_class = RewardWeightedConfig
    metrics: ClassVar = {"effective_samples": Metric("Effective samples", "images", "Near 1 a single image decides.")}

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
