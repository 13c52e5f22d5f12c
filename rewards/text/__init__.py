"""Rewards for text: any callable ``reward(prompts, completions, **columns)``, one score a completion (see `base`)."""

from diffusion_align.rewards.text.base import (
    TextReward,
    TrainerState,
    call_text_reward,
    check_text_reward,
    extras_of,
    text_of,
    weighted_sum,
)
from diffusion_align.rewards.text.build import build_text_reward, describe_text_rewards, text_reward_problem

__all__ = [
    "TextReward",
    "TrainerState",
    "build_text_reward",
    "call_text_reward",
    "check_text_reward",
    "describe_text_rewards",
    "extras_of",
    "text_of",
    "text_reward_problem",
    "weighted_sum",
]
