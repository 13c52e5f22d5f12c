"""REINFORCE leave-one-out for language models (RLOO; Ahmadian et al. 2024, arXiv:2402.14740).

    loss = -(r_i - mean of the other rewards of its prompt) * log p(completion_i)

With updates_per_epoch=1 and inner_epochs=1, samples are on-policy and this is the exact policy gradient.
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.estimators import leave_one_out_advantages, masked_sum, score_function_loss
from diffusion_align.extending import CollectedTexts, OnlineConfig, Sequences, TextTrainer, TrainingPlan


class RLOOConfig(OnlineConfig):
    """Settings of RLOOTrainer, in addition to those of every method that samples completions."""

    advantage_clip: float = Field(10.0, gt=0, description="bound on an advantage, in the unit of the reward")


class Batch(NamedTuple):
    """This process's completions, and their advantages (B,)."""

    sequences: Sequences
    advantages: Tensor


class RLOOTrainer(TextTrainer[Batch]):
    """REINFORCE with the mean of a prompt's other completions as the baseline."""

    config: RLOOConfig
    config_class = RLOOConfig

    def collect(self) -> tuple[CollectedTexts, dict[str, float]]:
        _, collected = self.sample(self.prompts, self.config.group_size)
        return collected, collected.metrics

    def estimate(self, collected: CollectedTexts) -> tuple[Batch, TrainingPlan, dict[str, float]]:
        groups = torch.arange(len(collected.rewards)) // self.config.group_size
        clip = self.config.advantage_clip
        advantages = leave_one_out_advantages(collected.rewards, groups).clamp(-clip, clip)
        own = self.local(advantages)
        keep = advantages.nonzero().squeeze(1)  # the others have no gradient
        return Batch(collected.completions.sequences, own), TrainingPlan(keep, normalizer=len(advantages)), {}

    def loss(self, batch: Batch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sequences, advantages = batch.sequences[samples], batch.advantages[samples]
        logp = self.policy.log_probs(self.policy.score(sequences))
        losses = score_function_loss(logp, advantages[:, None].to(logp).expand_as(logp))
        return masked_sum(losses, sequences.mask, 1), {"logp": masked_sum(logp, sequences.mask, 1).detach()}
