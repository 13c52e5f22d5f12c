"""Several rewards as one: their weighted sum. A list of rewards in a configuration is this.

What a trainer does with the parts is its own: DDPO can also normalise each by itself before it sums
(``multi_objective_aggregation: normalize_then_sum``), which needs more than the images of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from diffusion_align.rewards.base import Reward, RewardError, ask_reward, check_prompts, scored_by
from diffusion_align.rewards.build import IMAGES, build_reward, declare
from diffusion_align.rewards.settings import Device, RewardSettings, weight_checks
from diffusion_align.training.section import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# pydantic 2.7 knows no strict=False of a list.
AsList = BeforeValidator(lambda given: list(given) if isinstance(given, tuple) else given)


class Combined:
    """``sum_k weights[k] * parts[k]``; differentiable if every part is."""

    name = "combine"
    is_weighted_sum = True

    def __init__(self, parts: Sequence[Reward], weights: Sequence[float]):
        self.parts, self.weights = list(parts), [float(weight) for weight in weights]
        self.differentiable = all(getattr(part, "differentiable", False) for part in parts)
        self.scorer = "; ".join(map(scored_by, parts))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        import torch

        scores = torch.stack([ask_reward(part, images, prompts, metadata) for part in self.parts], dim=1)
        return (scores * torch.tensor(self.weights, dtype=scores.dtype)).sum(dim=1)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        for part in self.parts:
            check_prompts(part, prompts, metadata)

    def to(self, device: str | torch.device) -> Combined:
        for part in self.parts:
            if hasattr(part, "to"):
                part.to(device)
        return self


class Combine(RewardSettings):
    """The weighted sum of several rewards: of their scores as they are."""

    name: ClassVar[str] = "combine"
    about: ClassVar[dict[str, Any]] = {
        "model": "those of its parts",
        "range": "the weighted sum of its parts' ranges",
        "cost": "the sum of its parts'",
        "licence": "those of its parts",
        "differentiable": True,
    }

    rewards: Annotated[list[Any], AsList] = Field(
        min_length=1, description="each is a name, a reference or has options"
    )
    # Scores differ in scale: a CLIP cosine varies by hundredths, a JPEG size by kilobytes.
    weights: Annotated[list[Weight] | None, AsList] = Field(None, description="one per reward; by default all are 1")
    device: Device = None

    @model_validator(mode="after")
    def _fit(self) -> Self:
        for one in self.rewards:
            declare(IMAGES, one)
        for problem in weight_checks(self.rewards, self.weights, name="weights"):
            raise RewardError(problem)
        return self

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Combined:
        parts = [build_reward(one, model=model, device=device) for one in self.rewards]
        return Combined(parts, self.weights or [1.0] * len(parts))
