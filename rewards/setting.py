"""A reward as a field of a configuration."""

from typing import Annotated, Any

from pydantic import PlainSerializer

from diffusion_align.rewards.base import reward_name


def _by_name(reward: Any) -> Any:
    """A function cannot be written to YAML; its name can."""
    if isinstance(reward, list | tuple):
        return [_by_name(one) for one in reward]
    if isinstance(reward, dict) and callable(reward.get("name")):
        return reward | {"name": _by_name(reward["name"])}
    return f"{reward.__module__}:{reward_name(reward)}" if callable(reward) else reward


RewardSetting = Annotated[Any, PlainSerializer(_by_name)]
"""What ``build_reward`` takes: a name, 'module:function', a mapping with options or a function."""
