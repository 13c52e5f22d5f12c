"""Rewards for pictures. Import this package as ``diffusion_align.rewards``; the bare name belongs to your own code.

A reward is any callable ``reward(images, prompts, metadata)`` that returns one score a picture (see `base`).
"""

from diffusion_align.rewards.base import Reward, RewardError, call_reward, check_reward, reward_name
from diffusion_align.rewards.build import REWARDS, build_reward, describe_rewards, reward_problem

if __name__ == "rewards":
    raise ImportError("import diffusion_align.rewards, not rewards: the bare name is left to your own folders")

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "build_reward",
    "call_reward",
    "check_reward",
    "describe_rewards",
    "reward_name",
    "reward_problem",
]
