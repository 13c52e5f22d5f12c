"""What the evaluation of images adds to that of every policy: how far they are from one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.data.prompts import PromptsConfig
from diffusion_align.rewards.settings import RewardSetting
from diffusion_align.training.evaluation import Evaluation, EvaluationConfig, StopConfig


class ImageEvaluationConfig(EvaluationConfig):
    """Images of fixed prompts, sampled from fixed noise every few epochs and scored by what is not trained on."""

    reward: RewardSetting = Field(None, description="the held-out reward; null measures diversity alone")
    prompts: PromptsConfig | None = Field(None, description="as for training; the prompts of the training if null")
    pictures: int = Field(32, ge=2, le=MOST, description="how many images; the prompts take turns")
    diversity: str = Field(
        "clip", description="distance between two images: pixels, the CLIP that suits the model (clip) or another one"
    )


class ImageStopConfig(StopConfig):
    """Also when images come to be all alike."""

    diversity_below: float | None = Field(None, gt=0, le=LARGEST, description="in the unit of evaluation.diversity")

    def evaluation_problems(self, evaluation: EvaluationConfig | None) -> list[str]:
        problems = super().evaluation_problems(evaluation)
        if not problems and self.diversity_below is not None and evaluation is None:
            problems.append("stop_when.diversity_below looks at evaluations: set evaluation, or leave it out")
        return problems

    def broken(self, row: Mapping[str, Any], evaluation: Evaluation | None) -> list[str]:
        reasons = super().broken(row, evaluation)
        diversity, least = row.get("diversity"), self.diversity_below
        if least is not None and diversity is not None and diversity < least:
            reasons.append(f"the diversity is {diversity:.4g}, below stop_when.diversity_below={least:g}")
        return reasons


@dataclass
class ImageEvaluation(Evaluation):
    """Of images; ``prompts`` are texts with their metadata, ``gold`` is ``reward(images, prompts, metadata)``.

    Args:
        embed: images (B, 3, H, W) in [0, 1] -> unit embeddings (B, D); None for distances of pixels.
    """

    embed: Callable[[Tensor], Tensor] | None = None

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """``diversity`` of ``features``: embeddings, or the images themselves."""
        return {"diversity": mean_pairwise_distance(found["features"])}


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean distance of the N (N - 1) / 2 pairs of rows of ``features`` (N, D).

    Rows of unit length (embeddings): ``1 - cosine``, between 0 and 2. Images (N, C, H, W) in [0, 1]: the root mean
    square of the difference of their pixels, between 0 and 1.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"features {tuple(features.shape)} must be of at least two images")
    rows = features.double().flatten(1)
    if features.ndim == 2:  # sum_ij <a_i, a_j> = |sum_i a_i|^2
        return (1 - (rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))).item()
    return (torch.pdist(rows).mean() / math.sqrt(rows.shape[1])).item()
