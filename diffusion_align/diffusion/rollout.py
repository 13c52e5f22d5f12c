"""Sampling that logs the log-prob of every step, and the replay of those steps. One code path for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import GaussianTransition, Reduction, denoise


@dataclass(frozen=True)
class Trajectory:
    """K recorded steps of each of B samples.

    Attributes:
        x_t, x_s: (B, K, C, H, W) float32, the latents before and after each step, as they were scored.
        steps: (B, K) int64, the index of each one in the schedule.
        logp_old: (B, K), log-prob of each step under the policy that sampled it.
        latents: (B, C, H, W), the finished x_0.
    """

    x_t: Tensor
    x_s: Tensor
    steps: Tensor
    logp_old: Tensor
    latents: Tensor


def transition(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    x_t: Tensor,
    steps: Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: float | None = None,
) -> GaussianTransition:
    """p(x_s | x_t, c) under the policy as it is now; ``x_t`` (B, C, H, W), ``steps`` (B,)."""
    prediction = policy.predict(x_t, schedule.table.timestep[steps], conditioning, guidance_scale=guidance_scale)
    return denoise(x_t, prediction, steps, schedule)


def replay(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    x_t: Tensor,
    x_s: Tensor,
    steps: Tensor,
    conditioning: Conditioning,
    *,
    reduction: Reduction = "mean",
) -> tuple[Tensor, GaussianTransition]:
    """Log-prob (B,) of the recorded ``x_s`` and its transition, with gradients to the policy.

    With unchanged weights and an equal batch shape the log-prob equals the recorded one exactly.
    """
    step = transition(policy, schedule, x_t, steps, conditioning)
    return step.log_prob(x_s, reduction=reduction), step


@torch.no_grad()
def rollout(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    record: Tensor | None = None,
    reduction: Reduction = "mean",
    on_step: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Sample B images' latents and record the steps ``record``.

    Every sample draws its noise from its own CPU generator, so an image does not depend on the batch, the device or
    the number of processes it is sampled with.

    Args:
        policy: the behaviour policy.
        schedule: on the policy's device.
        conditioning: of B samples.
        generators: B of them; each is advanced.
        record: (B, K) int64, steps to keep, all of them stochastic; None keeps every stochastic step.
        reduction: "mean" or "sum" over latent dimensions, for ``logp_old``.
        on_step: called after each step (progress, interruption).

    Raises:
        ValueError: shapes differ, or ``record`` names a deterministic step.
    """
    batch = len(generators)
    if record is None:
        record = schedule.stochastic_steps.expand(batch, -1)
    if record.ndim != 2 or len(record) != batch or any(len(v) != batch for v in conditioning.values()):
        shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
        raise ValueError(f"record {tuple(record.shape)} and conditioning {shapes} must hold {batch} samples")
    if not torch.isin(record, schedule.stochastic_steps).all():
        raise ValueError("record names a deterministic step (std = 0), which has no log-prob")

    device, shape = policy.device, policy.latent_shape
    has_density = set(schedule.stochastic_steps.tolist())
    states = [_noise(generators, shape, device)]
    logp = []
    for i in range(len(schedule)):
        steps = torch.full((batch,), i, dtype=torch.int64, device=device)
        step = transition(policy, schedule, states[-1], steps, conditioning)
        if i in has_density:
            states.append(step.sample(_noise(generators, shape, device)))
            logp.append(step.log_prob(states[-1], reduction=reduction))
        else:
            states.append(step.mean)
            logp.append(torch.zeros(batch, device=device))
        on_step()
    rows, record = torch.arange(batch, device=device)[:, None], record.to(device)
    path = torch.stack(states, dim=1)
    return Trajectory(
        x_t=path[rows, record],
        x_s=path[rows, record + 1],
        steps=record,
        logp_old=torch.stack(logp, dim=1)[rows, record],
        latents=states[-1],
    )


def _noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
