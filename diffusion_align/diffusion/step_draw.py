"""How a method that trains on random steps draws them: evenly, or most often in the middle of the schedule.

A draw is a prior over steps. What it draws is trained on as it is, without an importance weight, so that an objective
``loss(step)`` becomes ``sum_s p_s loss(s)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.diffusion.sampler_settings import StepDraw


def step_probabilities(draw: StepDraw, steps: Tensor, length: int) -> Tensor:
    """(S,) float64: how likely each of ``steps`` (S,), of a schedule of ``length`` steps, is to be drawn.

    - uniform: all alike.
    - logit_normal: step i is drawn where ``length * sigmoid(z)``, z ~ N(0, 1), lies between i and i + 1, given that
      this is one of ``steps`` (Esser et al. 2024, arXiv:2403.03206, §3.1, with location 0 and scale 1, at the places
      of the schedule: a shift s of its times moves the location of their logit by log s).
    """
    if draw == "uniform":
        return torch.full((len(steps),), 1 / len(steps), dtype=torch.float64)
    edges = torch.special.ndtr(torch.logit(torch.arange(length + 1, dtype=torch.float64) / length))
    inside = edges.diff()[steps]
    return inside / inside.sum()


def draw_steps(steps: Tensor, draw: str, probabilities: Tensor, places: Tensor) -> Tensor:
    """(K,) of ``steps`` (S,), one from each of K parts of equal probability.

    Args:
        draw: "uniform", where all are equally likely, or any other.
        probabilities: (S,) those of ``step_probabilities``, or others.
        places: (K,) in [0, 1), where in its part each of them lies.
    """
    count = len(places)
    parts = torch.arange(count) + places
    if draw == "uniform":
        index = (parts * len(steps) / count).long()
    else:
        index = torch.searchsorted(probabilities.cumsum(0), parts.double() / count, right=True)
    return steps[index.clamp(max=len(steps) - 1)]
