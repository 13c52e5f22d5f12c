"""A schedule as the scheduler of a diffusers pipeline, whose own call then samples as training does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.samplers import scheduler_config
from diffusion_align.diffusion.schedule import DiffusionSchedule, SamplerConfig
from diffusion_align.diffusion.transitions import denoise


def scheduler_of(sampler: SamplerConfig, scheduler: Any) -> Any:
    """What samples as ``sampler`` does with the configuration of ``scheduler``: diffusers' own class where it can."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if kind := {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}.get(sampler.name):
        return kind.from_config(scheduler_config(scheduler))
    return TableScheduler(sampler.schedule(scheduler), scheduler.config)


class TableScheduler:
    """What a diffusers text-to-image pipeline asks of its scheduler, answered from a ``DiffusionSchedule``.

    Args:
        schedule: the steps, as many as the pipeline is asked for.
        config: of the scheduler that it stands in for.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, schedule: DiffusionSchedule, config: Any) -> None:
        self.schedule, self.config = schedule, config
        self.timesteps = schedule.table.timestep
        self._next = 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.schedule = self.schedule.to(device or "cpu")
        self.timesteps = self.schedule.table.timestep
        self._next = 0

    def scale_model_input(self, x_t: Tensor, timestep: Any) -> Tensor:
        return x_t

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        x_t: Tensor,
        *,
        generator: list[torch.Generator],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The next latents (B, C, H, W), each with noise of its own generator."""
        # Counted, as a table may hold a timestep more than once.
        index = torch.full((len(x_t),), self._next, device=self.timesteps.device)
        self._next += 1
        step = denoise(x_t, prediction, index, self.schedule)
        if not bool(step.std[0] > 0):
            return (step.mean.to(x_t.dtype),)
        noise = torch.stack([torch.randn(x_t.shape[1:], generator=g) for g in generator])
        return (step.sample(noise.to(x_t.device)).to(x_t.dtype),)
