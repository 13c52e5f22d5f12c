"""A scheduler by which the own call of a flow-matching pipeline samples with any sampler, stochastic ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.transitions import denoise


class FlowTableScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' scheduler with the steps of ``sampler``, at the sigmas that the pipeline sets.

    Attributes:
        sampler: its number of steps does not matter, the pipeline's counts.
        noise: latents as the pipeline has them -> standard normal noise of their shape. Such pipelines give ``step`` no
            generator; torch's own serves until this is set.
    """

    sampler: SamplerConfig
    noise: Callable[[Tensor], Tensor] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        sampler = self.sampler.model_copy(update={"steps": len(self.timesteps)})
        named = FlowMatchEulerDiscreteScheduler.from_config(self.config)  # by its class, which this one's is not
        self._schedule = sampler.schedule(named, self._copy_timesteps).to(device or "cpu")
        self._noisy = set(self._schedule.stochastic_steps.tolist())

    def _copy_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.sigmas, scheduler.timesteps = self.sigmas, self.timesteps

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = False, **_: Any
    ) -> tuple[Tensor]:
        """The next latents, in the shape in which the pipeline has them: (B, C, H, W), or packed (B, N, D)."""
        if self.step_index is None:
            self._init_step_index(timestep)
        x_t, prediction = (latents.flatten(1)[:, :, None, None] for latents in (sample, model_output))
        noisy = self.step_index in self._noisy
        index = torch.full((len(sample),), self.step_index, device=sample.device)
        self._step_index += 1
        step = denoise(x_t, prediction, index, self._schedule)
        x_s = step.mean
        if noisy:
            noise = torch.randn_like(sample) if self.noise is None else self.noise(sample)
            x_s = step.sample(noise.to(x_s).view_as(x_s))
        return (x_s.view_as(sample).to(model_output.dtype),)
