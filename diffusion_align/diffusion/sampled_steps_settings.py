"""Settings of the methods that train on the noisy steps they sampled; they import no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from diffusion_align.diffusion.sampler_settings import TIMESTEP_RANGE, range_checks
from diffusion_align.diffusion.settings import GroupedConfig
from diffusion_align.training.section import Weight


class SampledStepsConfig(GroupedConfig):
    """Which of the sampler's steps are trained on."""

    trains_sampled_steps = True

    timestep_range: tuple[Weight, Weight] | None = Field(None, description=TIMESTEP_RANGE)
    timestep_fraction: float = Field(1.0, gt=0, le=1, description="share of those steps trained on, sampled per image")

    @property
    def has_kl_loss(self) -> bool:
        """Whether the loss has a KL to the reference, so that every action is compared with it."""
        return False

    @property
    def needs_reference(self) -> bool:
        return self.has_kl_loss or self.stop_when.kl_above is not None

    def cross_checks(self) -> Iterator[str]:
        yield from self.sampler.without_noise()
        yield from range_checks(self.timestep_range)
        if self.sampler.noisy_steps is not None:
            if self.timestep_range is not None:
                yield (
                    f"timestep_range={list(self.timestep_range)} has no effect with sampler.noisy_steps, which are all "
                    "trained on: set sampler.noisy_range instead"
                )
            if self.timestep_fraction < 1:
                yield (
                    f"timestep_fraction={self.timestep_fraction:g} has no effect with sampler.noisy_steps, which are "
                    "all trained on: lower sampler.noisy_steps instead"
                )
