"""Sampling whose last steps keep their graph, from the images to the weights; what sampling by ``rollout`` is else.

The same functions take the steps, so latents are those of ``rollout`` bit for bit, for the same noise and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy, PreparedConditioning
from diffusion_align.diffusion.rollout import noise_in_turn, normal_noise
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import add_noise, clean_and_noise, denoise


class Visit(NamedTuple):
    """One pass of the network that has a graph.

    Attributes:
        x_t: (B, C, H, W); without a graph in the first pass of a tail.
        steps: (B,) int64, the index in the schedule.
        output: (B, C, H, W) of the network.
    """

    x_t: Tensor
    steps: Tensor
    output: Tensor


class Tail(NamedTuple):
    """The end of B paths.

    Attributes:
        latents: (B, C, H, W), x_0 with a graph.
        visits: the passes it goes through, in their order.
    """

    latents: Tensor
    visits: list[Visit]


def sample_tail(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    first: int,
) -> Tail:
    """Sample B images' latents with a graph from step ``first`` on; the steps before it have none.

    Args:
        policy: what samples.
        schedule: on the policy's device.
        conditioning: of B samples.
        generators: B of them, as ``rollout`` takes them; each is advanced.
        first: index of a step; 0 gives every step a graph.
    """
    x_t = sample_head(policy, schedule, conditioning, generators, first)
    return take_steps(policy, schedule, x_t, conditioning, generators, range(first, len(schedule)))


@torch.no_grad()
def sample_head(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    end: int,
) -> Tensor:
    """x_t (B, C, H, W) before step ``end``, without a graph; arguments as of ``sample_tail``."""
    x_t = normal_noise(generators, policy.latent_shape, policy.device)
    if not end:
        return x_t
    with policy.weights_kept():
        return take_steps(policy, schedule, x_t, policy.prepare(conditioning), generators, range(end)).latents


def take_steps(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    x_t: Tensor,
    conditioning: Conditioning | PreparedConditioning,
    generators: Sequence[torch.Generator],
    which: range,
) -> Tail:
    """Take the steps ``which`` from ``x_t`` (B, C, H, W), with a graph unless gradients are off."""
    noisy, visits = set(schedule.stochastic_steps.tolist()).intersection(which), []
    noise = noise_in_turn(generators, len(noisy), tuple(x_t.shape[1:]), x_t.device)
    for i in which:
        steps = torch.full((len(x_t),), i, dtype=torch.int64, device=x_t.device)
        output = policy.predict(x_t, schedule.table.timestep[steps], conditioning)
        if torch.is_grad_enabled():
            visits.append(Visit(x_t, steps, output))
        step = denoise(x_t, output, steps, schedule)
        x_t = step.sample(next(noise)) if i in noisy else step.mean
    return Tail(x_t, visits)


def renoise(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    latents: Tensor,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
) -> Tail:
    """Noise finished ``latents`` (B, C, H, W) to the level of the last step, and take that step again with a graph.

    What DRaFT-LV averages the gradient over (Clark et al. 2023, arXiv:2309.17400, section 4.2).
    """
    last = len(schedule) - 1
    steps = torch.full((len(latents),), last, dtype=torch.int64, device=latents.device)
    noise = normal_noise(generators, tuple(latents.shape[1:]), latents.device)
    x_t = add_noise(latents.detach(), noise, steps, schedule)
    return take_steps(policy, schedule, x_t, conditioning, generators, range(last, last + 1))


def predict_tail(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    first: int,
) -> Tail:
    """The x_0 that one pass with a graph predicts at step ``first``; arguments as of ``sample_tail``.

    ReFL (Xu et al. 2023, arXiv:2304.05977, algorithm 1).
    """
    x_t = sample_head(policy, schedule, conditioning, generators, first)
    steps = torch.full((len(x_t),), first, dtype=torch.int64, device=x_t.device)
    output = policy.predict(x_t, schedule.table.timestep[steps], conditioning)
    return Tail(clean_and_noise(x_t, output, steps, schedule)[0], [Visit(x_t, steps, output)])


def tail_kl(
    policy: DenoisingPolicy, schedule: DiffusionSchedule, tail: Tail, conditioning: Conditioning, weights: Tensor
) -> Tensor:
    """KL to the reference (B,) in nats, summed over the passes of ``tail`` at the x_t that they met.

    Those are data here, as they are in DDPO's KL. With gradients on, a later pass of a tail, whose x_t has a graph, is
    therefore made once more without that graph.

    Args:
        weights: (T,) on the device, of each step; see ``nats_of_intervals``.
    """
    total = torch.zeros(len(tail.latents), dtype=tail.latents.dtype, device=tail.latents.device)
    for x_t, steps, output in tail.visits:
        given = x_t.detach(), schedule.table.timestep[steps], conditioning
        if torch.is_grad_enabled() and x_t.requires_grad:
            output = policy.predict(*given)
        with torch.no_grad(), policy.reference():
            reference = policy.predict(*given)
        total = total + weights[steps] * (output - reference).square().flatten(1).sum(1)
    return total
