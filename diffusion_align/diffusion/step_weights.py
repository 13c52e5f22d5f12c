"""How much each denoising step counts when one random step stands for the sum over all of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import denoise

Weighting = Literal["exact", "uniform", "share"]


def nats_per_squared_error(schedule: DiffusionSchedule) -> Tensor:
    """(T,) float64: what a squared error of 1 in the network's output costs in nats, ``c²/(2 std²)``; inf for std = 0.

    c is the derivative of a step's mean in the output, which is affine in it (a clipped x_0 is not; the clip is not
    counted here).
    """
    one = torch.ones(len(schedule), 1, 1, 1, dtype=torch.float64)
    index = torch.arange(len(schedule))
    plain = schedule.to("cpu", torch.float64).without_clip()
    at_one, at_zero = (denoise(0 * one, output, index, plain) for output in (one, 0 * one))
    return ((at_one.mean - at_zero.mean).flatten() ** 2) / (2 * at_zero.std**2)


def share_of_signal(schedule: DiffusionSchedule) -> Tensor:
    """(T,) float64: how much ``alphas_cumprod`` rises in each step, up to 1 in the last."""
    signal = schedule.table.alpha_t.double().cpu() ** 2
    return torch.cat([signal[1:], signal.new_ones(1)]) - signal


def step_scales(schedule: DiffusionSchedule, steps: Tensor, weighting: Weighting) -> Tensor:
    """(T,) float64: what to multiply a step's nats by, for a step drawn evenly from ``steps``; 0 for the others.

    - exact: the number of steps. In expectation the sum of the nats over all of them.
    - uniform: one and the same factor for the squared error of every step's output, with the sum of the exact ones, as
      the field does (Wallace et al. 2023, arXiv:2311.12908, drop omega).
    - share: one over the step's share of the fall of ``alphas_cumprod``. Only this asks of every step the part of the
      reward that it can pay for at equal price, see docs/mathematics/diffusion_dpo.md.
    """
    scales = torch.zeros(len(schedule), dtype=torch.float64)
    if weighting == "exact":
        scales[steps] = float(len(steps))
    elif weighting == "uniform":
        weights = nats_per_squared_error(schedule)[steps]
        scales[steps] = weights.sum() / weights
    else:
        shares = share_of_signal(schedule)[steps]
        scales[steps] = shares.sum() / shares
    return scales
