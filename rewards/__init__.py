"""Rewards for images and text. Import it as ``diffusion_align.rewards``; the bare name belongs to your own code.

A reward for images is any callable ``reward(images, prompts, metadata)`` that returns one score per image (see
`base`). One for text is any callable ``reward(prompts, completions, **columns)`` that returns one score per completion,
or None (see `text.base`).
"""

from diffusion_align.rewards.base import Reward, RewardError, call_reward, check_reward, reward_name, scored_by
from diffusion_align.rewards.build import (
    IMAGES,
    REWARDS,
    TEXT,
    TEXT_REWARDS,
    build_reward,
    build_text_reward,
    declare,
    describe_rewards,
    describe_text_rewards,
)
from diffusion_align.rewards.settings import RewardSetting, RewardSettings
from diffusion_align.rewards.text.base import TextReward, call_text_reward, check_text_reward, text_of, weighted_sum

if __name__ == "rewards":
    raise ImportError("import diffusion_align.rewards, not rewards: the bare name is left to your own folders")

__all__ = [
    "IMAGES",
    "REWARDS",
    "TEXT",
    "TEXT_REWARDS",
    "Reward",
    "RewardError",
    "RewardSetting",
    "RewardSettings",
    "TextReward",
    "build_reward",
    "build_text_reward",
    "call_reward",
    "call_text_reward",
    "check_reward",
    "check_text_reward",
    "declare",
    "describe_rewards",
    "describe_text_rewards",
    "reward_name",
    "scored_by",
    "text_of",
    "weighted_sum",
]
