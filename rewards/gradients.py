"""What a setting of image rewards tells before anything is loaded: whether it has a gradient, whether two are one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from diffusion_align.rewards.base import RewardError, no_gradient
from diffusion_align.rewards.build import IMAGES, Declared, declare
from diffusion_align.rewards.combine import Combine
from diffusion_align.rewards.settings import RewardSettings


def differentiable_checks(reward: Any) -> Iterator[str]:
    """A sentence about each reward of a setting that is known to have no gradient.

    A class of your own that says nothing may still make one that has.
    """
    for declared in _parts(reward):
        target = declared.target
        if isinstance(target, RewardSettings):
            has_gradient = target.about.get("differentiable", target.differentiable)
        else:
            has_gradient = getattr(target, "differentiable", inspect.isclass(target))
        if not has_gradient:
            yield no_gradient(declared.label)
        elif declared.offload:
            yield f"reward '{declared.label}' has no gradient with offload=true: leave offload out"


def share_a_reward(one: Any, other: Any) -> bool:
    """Whether a reward of one setting is in the other too, apart from its scale and from where and how fast it runs."""
    known = [_kind_and_options(declared) for declared in _parts(other)]
    return any(_kind_and_options(declared) in known for declared in _parts(one))


def _kind_and_options(declared: Declared) -> tuple[Any, dict[str, Any]]:
    target = declared.target
    if isinstance(target, RewardSettings):
        return type(target), target.model_dump(exclude={"dtype", "batch_size", "device"})
    return target, declared.options


def _parts(reward: Any) -> list[Declared]:
    """Those inside of a sum as well; [] of what cannot be built, which ``reward_checks`` says."""
    if reward is None:
        return []
    try:
        declared = declare(IMAGES, reward)
    except RewardError:
        return []
    if isinstance(declared.target, Combine):
        return [part for one in declared.target.rewards for part in _parts(one)]
    return [declared]
