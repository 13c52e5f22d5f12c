"""The advantages of an epoch's images, as ``AdvantageConfig`` says, and the past rewards that some are taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.settings import AdvantageConfig
from diffusion_align.estimators import PromptStatistics, leave_one_out_advantages, multi_reward_advantages
from diffusion_align.rewards.base import part_weights


class Advantages:
    """Of images sampled in groups of ``config.group_size`` and scored by ``reward``, which may sum several.

    Attributes:
        apart: whether each reward's advantages are taken by themselves, and then summed.
        weights: (K,) of the rewards where they are apart, else (1,).
    """

    def __init__(self, config: AdvantageConfig, reward: Any) -> None:
        self.config = config
        self.apart = config.experimental.multi_objective_aggregation == "normalize_then_sum"
        self.weights = part_weights(reward) if self.apart else torch.ones(1)
        self.statistics = [PromptStatistics(config.history_size, config.history_min_count) for _ in self.weights]

    def __call__(self, samples: Sequence[Prompt], scores: Tensor, rewards: Tensor) -> Tensor:
        """(N,) on the CPU; called once per epoch, as the history takes its rewards in.

        Args:
            samples: prompt and metadata of all N samples of the epoch, groups in a row.
            scores: (N, K) by each reward.
            rewards: (N,) their weighted sum.
        """
        config = self.config
        groups = torch.arange(len(rewards)) // config.group_size
        columns = scores if self.apart else rewards[:, None]
        if config.advantages == "leave_one_out":
            advantages = multi_reward_advantages(columns, groups, self.weights, estimator=leave_one_out_advantages)
        elif config.advantages == "group":
            advantages = multi_reward_advantages(columns, groups, self.weights, clip_std=config.experimental.clip_std)
        else:
            texts = [text for text, _ in samples]
            measured = [one.update(texts, c) for one, c in zip(self.statistics, columns.unbind(1))]
            advantages = torch.stack(measured, dim=1) @ self.weights.to(columns)
        return advantages.clamp(-config.advantage_clip, config.advantage_clip)

    def state(self) -> dict[str, Any]:
        """JSON values that ``load`` takes back on resume."""
        return {"statistics": [one.state_dict() for one in self.statistics]}

    def load(self, state: Mapping[str, Any]) -> None:
        for one, saved in zip(self.statistics, state["statistics"], strict=True):
            one.load_state_dict(saved)
