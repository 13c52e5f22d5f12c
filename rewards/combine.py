"""Several rewards as one: their weighted sum. A list of rewards in a configuration is this.

What a trainer does with the parts is its own: DDPO can also normalise each by itself before it sums
(``multi_objective_aggregation: normalize_then_sum``), which needs more than the pictures of one call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.base import Reward, RewardError, ask_reward, check_prompts
from diffusion_align.rewards.build import build_reward, reward_problem
from diffusion_align.rewards.options import is_coefficient

ABOUT = {
    "combine": {
        "model": "those of its parts",
        "range": "the weighted sum of its parts' ranges",
        "cost": "the sum of its parts'",
        "extra": None,
        "licence": "those of its parts",
        "differentiable": True,
    },
}


class Combined:
    """``sum_k weights[k] * parts[k]``; differentiable if every part is."""

    name = "combine"
    is_weighted_sum = True

    def __init__(self, parts: Sequence[Reward], weights: Sequence[float]):
        self.parts, self.weights = list(parts), [float(weight) for weight in weights]
        self.differentiable = all(getattr(part, "differentiable", False) for part in parts)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        scores = torch.stack([ask_reward(part, images, prompts, metadata) for part in self.parts], dim=1)
        return (scores * torch.tensor(self.weights, dtype=scores.dtype)).sum(dim=1)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        for part in self.parts:
            check_prompts(part, prompts, metadata)

    def to(self, device: str | torch.device) -> "Combined":
        for part in self.parts:
            if hasattr(part, "to"):
                part.to(device)
        return self


def combine(
    *,
    rewards: Sequence[Any],
    weights: Sequence[float] | None = None,
    model: str | None = None,
    device: str | torch.device = "cpu",
) -> Combined:
    """The weighted sum of several rewards, as their scores are.

    Args:
        rewards: what `build_reward` takes, each.
        weights: one for each; all 1 when not given. Scores differ in scale: a CLIP cosine varies by hundredths, a
            JPEG size by kilobytes.
        model: the diffusion model being trained.
    """
    problem = combine_problem(rewards=rewards, weights=weights)
    if problem:
        raise RewardError(problem)
    return Combined([build_reward(one, model=model, device=device) for one in rewards], weights or [1.0] * len(rewards))


def combine_problem(*, rewards: Any = (), weights: Any = None, device: Any = None) -> str | None:
    """What is wrong with these options, in one sentence, or None. Loads nothing."""
    if not isinstance(rewards, list | tuple) or not rewards:
        return f"rewards={rewards!r} must be a list of at least one reward"
    for one in rewards:
        if problem := reward_problem(one):
            return problem
    if weights is None:
        return None
    numbers = isinstance(weights, list | tuple) and all(map(is_coefficient, weights))
    if not numbers or len(weights) != len(rewards):
        return f"weights={weights!r} must be {len(rewards)} finite numbers, one for each reward"
    return None
