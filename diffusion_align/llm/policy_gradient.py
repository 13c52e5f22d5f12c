"""What GRPO and PPO share: completions sampled and scored, and the clipped surrogate of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion_align.errors import TrainingError
from diffusion_align.estimators import clipped_ratio_loss, importance_ratio
from diffusion_align.estimators.policy import Level
from diffusion_align.llm.collection import Collected
from diffusion_align.llm.policy import Scored
from diffusion_align.llm.settings import PolicyGradientConfig
from diffusion_align.llm.trainer import TextTrainer
from diffusion_align.training.context import EpochCost
from diffusion_align.training.statistics import first_pass_deviation, ratio_statistics

Batch = TypeVar("Batch")
MOST_DEVIATION = 1e-2
"""Of the ratio from 1 on the first pass in float32; rounding is some 1e-5."""


class PolicyGradientTrainer(TextTrainer[Batch]):
    """Trains a language model on completions that it samples itself; see ``TextTrainer`` for the arguments.

    The policy needs a reference if a nat of KL has a price.
    """

    config: PolicyGradientConfig

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """Ratios may start from a pass of their own."""
        again = config.samples_per_epoch if config.logp_old == "recomputed" else 0
        return replace(super().epoch_cost(config, steps), estimated=again)

    def collect(self) -> tuple[Collected, dict[str, float]]:
        """Sample and score this process's completions of the epoch."""
        _, collected = self.sample(self.prompts, self.config.group_size)
        if self.config.logp_old == "recomputed":
            collected = self._scored_again(collected)
        return collected, collected.metrics

    def _scored_again(self, collected: Collected) -> Collected:
        """With ``logp_old`` of a forward pass as in training instead of the sampler's, token by token with a cache.

        In narrow floats the two differ by some hundredths of a nat, which a ratio then starts from.
        """
        completions, sampled = collected.completions, collected.completions.logp_old
        sequences = completions.sequences
        logp = self.log_probs_in_batches(sequences, self.config.micro_batch_size, "  scoring").to(sampled)
        worst = torch.expm1((logp - sampled)[sequences.mask]).abs().max()
        if self.processes.count > 1:
            worst = self.accelerator.gather(worst[None]).max()
        metrics = collected.metrics | {"ratio/rollout_deviation": worst.item()}
        return replace(collected, completions=replace(completions, logp_old=logp), metrics=metrics)

    def surrogate(
        self,
        scored: Scored,
        logp: Tensor,
        logp_old: Tensor,
        advantages: Tensor,
        *,
        level: Level = "action",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B, T) of each token, and statistics of those that count: ratios, clipping, entropy.

        ``scored`` is made ``with_entropy``.
        """
        clip, mask = self.config.clip_range, scored.mask
        clip_high = clip if self.config.clip_range_high is None else self.config.clip_range_high
        ratio = importance_ratio(logp, logp_old, mask=mask, level=level)
        losses = clipped_ratio_loss(ratio, advantages, clip=clip, clip_high=clip_high, mask=mask)
        statistics = {"loss/policy": losses.detach()[mask]}
        statistics["entropy"] = self.policy.entropy(scored)[mask]
        return losses, statistics | ratio_statistics(
            ratio, logp, logp_old, advantages, clip=clip, clip_high=clip_high, mask=mask
        )

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """How far the ratio is from 1 where no weight has changed yet: only rounding should be left.

        Raises:
            TrainingError: more is, although everything is float32.
        """
        if not first or "ratio/max" not in statistics:  # a loss of one's own may have no ratio
            return {}
        deviation = first_pass_deviation(statistics)
        if deviation > MOST_DEVIATION and self.config.mixed_precision == "no" and self.config.dtype == "float32":
            again = self.config.logp_old == "recomputed"
            raise TrainingError(
                f"the ratio is {deviation:.3g} off 1 before any update although all is float32, so the model does not "
                f"score completions as it {'scored them before' if again else 'sampled them'}: use another model"
                + ("" if again else ", or logp_old=recomputed to start from its scores")
            )
        return {"ratio/first_pass_deviation": deviation}
