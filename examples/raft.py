"""RAFT for images: reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767).

Sample a group of images of each prompt and maximise the log-prob of the best of them:

    loss = -log p(x_s | x_t) of each recorded step of an image that is among the best of its group

The other images are left out; nothing is trained away from them. The paper's next step is supervised fine-tuning on the
best images, while here the steps that led to them are imitated.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.extending import (
    CollectedImages,
    DenoisingTrainer,
    GroupedConfig,
    Metric,
    TrainingPlan,
    Trajectory,
    replay,
)


class RAFTConfig(GroupedConfig):
    """Settings of RAFTTrainer, in addition to prompts, reward and those of every method for images."""

    group_size: int = Field(4, ge=2, description="images per prompt per epoch")
    best: int = Field(1, ge=1, description="how many of them are imitated")

    def cross_checks(self) -> Iterator[str]:
        if self.best >= self.group_size:
            yield f"best={self.best} leaves none out of group_size={self.group_size}: lower it"


class RAFTTrainer(DenoisingTrainer[Trajectory]):
    """Reward-ranked fine-tuning: imitate the best image of each group."""

    config: RAFTConfig
    config_class = RAFTConfig
    metrics: ClassVar = {
        "reward_best": Metric("Reward of the imitated images", "reward", "What the policy is pulled towards.")
    }

    def collect(self) -> tuple[CollectedImages, dict[str, float]]:
        """Sample this process's images, record every step that has a density, and score them."""
        collected = self.sample(group_size=self.config.group_size)
        return collected, collected.metrics

    def estimate(self, collected: CollectedImages) -> tuple[Trajectory, TrainingPlan, dict[str, float]]:
        """The best images of each group, of all processes; the plan lists them in their order."""
        path, rewards = collected.trajectory, collected.rewards
        groups = rewards.view(-1, self.config.group_size)
        ranked = groups.argsort(dim=1, descending=True, stable=True)[:, : self.config.best]
        first = self.config.group_size * torch.arange(len(groups))
        chosen = (first[:, None] + ranked).flatten().sort().values
        return path, TrainingPlan(chosen, path.steps.shape[1]), {"reward_best": rewards[chosen].mean().item()}

    def loss(self, path: Trajectory, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the log-prob of n recorded steps, nats per latent dimension."""
        logp, _ = replay(self.policy, self.schedule, *path.at(samples, actions), reduction="mean")
        return -logp, {"logp": logp.detach()}
