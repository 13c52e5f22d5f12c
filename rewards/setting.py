"""A reward as a field of a configuration."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import PlainSerializer

from diffusion_align.rewards.base import reward_name
from diffusion_align.rewards.settings import RewardSettings


def _by_name(reward: Any) -> Any:
    """A function cannot be written to YAML; its name can."""
    if isinstance(reward, list | tuple):
        return [_by_name(one) for one in reward]
    if isinstance(reward, RewardSettings):  # a name and options, which resume compares
        module = type(reward).__module__
        own = not module.startswith("diffusion_align.rewards.")
        name = f"{module}:{type(reward).__qualname__}" if own else reward_name(reward)
        reward = {"name": name, **reward.model_dump(exclude_defaults=True)}
    if isinstance(reward, Mapping):
        written = {key: _by_name(value) if key in ("name", "rewards") else value for key, value in reward.items()}
        inner = written.get("name")
        return {**written, **inner} if isinstance(inner, dict) else written
    return f"{reward.__module__}:{reward_name(reward)}" if callable(reward) else reward


RewardSetting = Annotated[Any, PlainSerializer(_by_name)]
"""What ``build_reward`` takes: a name, 'module:function', a mapping with options or a function."""


def several_rewards_problems(reward: Any, weights: Sequence[float] | None) -> list[str]:
    """Sentences about a reward, or a list of them, and ``reward_weights`` that do not fit each other."""
    rewards = reward if isinstance(reward, list | tuple) else [reward]
    problems = [] if rewards else ["reward is an empty list: give at least one"]
    if weights is not None and len(weights) != len(rewards):
        problems.append(
            f"reward_weights={weights} are {len(weights)} numbers for {len(rewards)} rewards: give one for each"
        )
    return problems
