"""Windows of noisy steps: only a few steps in a row are stochastic and trained on, all others are the ODE's.

Li et al. 2025, MixGRPO (arXiv:2507.21802). As a step is what its row of the schedule says, a window is a schedule that
takes some rows from the sampler with noise and the rest from the sampler without.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from diffusion_align.diffusion.sampler_settings import NoisyOrder
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.step import Step
from diffusion_align.training.randomness import generator


def window(steps: Tensor, count: int, *, order: NoisyOrder, seed: int, epoch: int) -> Tensor:
    """(count,) those of ``steps``, in a row, that are noisy in ``epoch``; it depends on the arguments alone.

    "random": each of the S - count + 1 places is equally likely. "progressive": it moves by one step per epoch from
    noise to image, then begins again, which is MixGRPO's slide at an interval of one epoch.

    Args:
        steps: (S,) int64, in order, those in which a window may lie.
        count: its width, from 1 to S.
        order: how it is placed.
        seed, epoch: of the run.

    Raises:
        ValueError: the window is wider than ``steps``.
    """
    places = len(steps) - count + 1
    if count < 1 or places < 1:
        raise ValueError(f"count={count} must be from 1 to the {len(steps)} steps that there are")
    if order == "progressive":
        first = epoch % places
    else:
        first = int(torch.randint(places, (), generator=generator(seed, "window", epoch)))
    return steps[first : first + count]


def mix(noisy: DiffusionSchedule, quiet: DiffusionSchedule, steps: Tensor) -> DiffusionSchedule:
    """Rows ``steps`` (W,) of ``noisy``, all other rows of ``quiet``; both are on one device.

    Raises:
        ValueError: the two do not visit the same noise levels, so that their steps do not fit together.
    """
    for name in ("timestep", "alpha_t", "sigma_t"):
        if not torch.equal(getattr(noisy.table, name), getattr(quiet.table, name)):
            raise ValueError(f"noisy and quiet differ in {name}: they must be one sampler with and without noise")
    chosen = torch.zeros_like(noisy.table.std, dtype=torch.bool)
    chosen[steps.to(chosen.device)] = True
    columns = {f.name: (getattr(noisy.table, f.name), getattr(quiet.table, f.name)) for f in fields(Step)}
    return replace(noisy, table=Step(**{name: torch.where(chosen, *pair) for name, pair in columns.items()}))
