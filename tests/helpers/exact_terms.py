"""Diffusion-DPO's trainer with the coefficients that its own, in float32, are rounded from."""

import functools
from dataclasses import replace

import torch

from diffusion_align.diffusion.transitions import step_scales


def in_float64(trainer):
    """Have ``trainer`` compute with schedules and scales in float64; its network is left as it is."""
    rounded, scheduler = trainer.terms, trainer.policy.pipeline.scheduler

    @functools.cache
    def exact(shape):
        terms = rounded(shape)
        schedule = trainer.trained_schedule(trainer.config, scheduler, trainer.policy.timesteps_setter(shape[1:]))
        scales = step_scales(schedule, trainer.trained_steps, trainer.config.weighting)
        torch.testing.assert_close(terms.scales.double(), scales, atol=0, rtol=1e-6)
        return replace(terms, schedule=schedule, scales=scales)

    trainer.terms, trainer.schedule = exact, trainer.exact_schedule
    return trainer
