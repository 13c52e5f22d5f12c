"""Sampling that logs the log-prob of every step, the replay of those steps, and sampling by a diffusers pipeline's own
call. One step for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy, PreparedConditioning
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.samplers import scheduler_config
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import GaussianTransition, Reduction, denoise
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.models.image_pipelines import diffusers_scheduler


@dataclass(frozen=True)
class Trajectory:
    """K recorded steps of each of B samples.

    Attributes:
        x_t, x_s: (B, K, C, H, W) float32, the latents before and after each step, as they were scored. Where the steps
            follow each other they are views of one tensor, so nothing may be written to them.
        steps: (B, K) int64, the index of each one in the schedule.
        logp_old: (B, K), log-prob of each step under the policy that sampled it.
        latents: (B, C, H, W), the finished x_0.
        conditioning: of the samples.
        mean_old: (B, K, C, H, W), the mean of each step under the policy that sampled it, if it was recorded.
    """

    x_t: Tensor
    x_s: Tensor
    steps: Tensor
    logp_old: Tensor
    latents: Tensor
    conditioning: Conditioning
    mean_old: Tensor | None = None

    def at(self, samples: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """x_t, x_s (n, C, H, W), steps (n,) and conditioning of n recorded steps, as ``replay`` takes them."""
        conditioning = {name: value[samples] for name, value in self.conditioning.items()}
        return self.x_t[samples, actions], self.x_s[samples, actions], self.steps[samples, actions], conditioning


def concatenate(paths: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of the samples of all of ``paths``."""
    columns = {field.name for field in fields(Trajectory) if isinstance(getattr(paths[0], field.name), Tensor)}
    conditioning = {name: torch.cat([path.conditioning[name] for path in paths]) for name in paths[0].conditioning}
    states = [part for path in paths if (part := _states_of(path)) is not None]
    if len(states) == len(paths):
        columns -= {"x_t", "x_s"}
        latents = _views(torch.cat(states))
    else:
        latents = {}
    joined = {name: torch.cat([getattr(path, name) for path in paths]) for name in columns}
    return Trajectory(**joined, **latents, conditioning=conditioning)


def _views(states: Tensor) -> dict[str, Tensor]:
    """``x_t`` and ``x_s`` of K steps that follow each other, of ``states`` (B, K + 1, C, H, W)."""
    return {"x_t": states[:, :-1], "x_s": states[:, 1:]}


def _states_of(path: Trajectory) -> Tensor | None:
    """That of which ``x_t`` and ``x_s`` are the ``_views``, if they are."""
    states: Tensor | None = path.x_t._base
    if states is None or states is not path.x_s._base or states.ndim != path.x_t.ndim:
        return None
    views = _views(states)
    alike = all(_place(getattr(path, name)) == _place(view) for name, view in views.items())
    return states if alike else None


def _place(part: Tensor) -> tuple[Any, ...]:
    """What of another tensor a view is."""
    return part.shape, part.stride(), part.storage_offset()


def transition(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    x_t: Tensor,
    steps: Tensor,
    conditioning: Conditioning | PreparedConditioning,
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
    record_means: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Sample B images' latents and record the steps ``record``.

    Every sample takes its noise from its own CPU generator, so an image does not depend on the batch, the device or
    the number of processes it is sampled with.

    Args:
        policy: the behaviour policy.
        schedule: on the policy's device.
        conditioning: of B samples.
        generators: B of them; each is advanced.
        record: (B, K) int64, steps to keep, all of them stochastic; None keeps every stochastic step.
        reduction: "mean" or "sum" over latent dimensions, for ``logp_old``.
        record_means: also keep ``mean_old``.
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

    device = policy.device
    has_density = set(schedule.stochastic_steps.tolist())
    noise = noise_in_turn(generators, 1 + len(has_density), policy.latent_shape, device)
    scored = record.unique().tolist()
    kept = sorted({state for step in scored for state in (step, step + 1)})
    x_t = next(noise)
    states, logp, means = [x_t] if 0 in kept else [], [], []
    with policy.weights_kept():
        given = policy.prepare(conditioning)
        for i in range(len(schedule)):
            steps = torch.full((batch,), i, dtype=torch.int64, device=device)
            step = transition(policy, schedule, x_t, steps, given)
            x_t = step.sample(next(noise)) if i in has_density else step.mean
            if i + 1 in kept:
                states.append(x_t)
            if i in scored:
                logp.append(step.log_prob(x_t, reduction=reduction))
                if record_means:
                    means.append(step.mean)
            on_step()

    def of_each(values: Sequence[Tensor], known: Sequence[int], wanted: Tensor, empty: Tensor) -> Tensor:
        """(B, K, ...) those at ``wanted`` (B, K) of ``values``, (B, ...) at each of the places ``known``."""
        columns = torch.searchsorted(torch.tensor(known, dtype=torch.int64), wanted.contiguous()).to(device)
        rows = torch.arange(batch, device=device)[:, None]
        return torch.stack(list(values), dim=1)[rows, columns] if values else empty[:, None][:, :0]

    in_a_row = 0 < record.shape[1] == len(kept) - 1 and bool((record.diff(dim=1) == 1).all())
    return Trajectory(
        **(
            _views(torch.stack(states, dim=1))
            if in_a_row
            else {"x_t": of_each(states, kept, record, x_t), "x_s": of_each(states, kept, record + 1, x_t)}
        ),
        steps=record.to(device),
        logp_old=of_each(logp, scored, record, x_t.flatten(1)[:, 0]),
        latents=x_t,
        conditioning=conditioning,
        mean_old=of_each(means, scored, record, x_t) if record_means else None,
    )


def normal_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, *shape) from B generators, which draw on the CPU and are advanced."""
    return next(noise_in_turn(generators, 1, shape, device))


def noise_in_turn(
    generators: Sequence[torch.Generator], count: int, shape: tuple[int, ...], device: torch.device
) -> Iterator[Tensor]:
    """``count`` draws (B, *shape) of ``normal_noise`` in a row, all of them made at the first.

    For a GPU they are in pinned memory, so that no copy makes the host wait.
    """
    drawn = torch.stack([_draws(generator, count, shape) for generator in generators], dim=1)
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    for noise in drawn:
        yield noise.to(device, non_blocking=True)


def _draws(generator: torch.Generator, count: int, shape: tuple[int, ...]) -> Tensor:
    """(count, *shape) with the bits of ``count`` calls of ``randn``, by a single one where that gives the same.

    It does where torch's blocks of 16 numbers end with each draw; a block that is cut short is drawn anew.
    """
    if math.prod(shape) % 16 == 0:
        return torch.randn((count, *shape), generator=generator)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


def scheduler_of(sampler: SamplerConfig, scheduler: Any) -> Any:
    """What samples as ``sampler`` does with the configuration of ``scheduler``: diffusers' own class where it can."""
    import diffusers

    if is_flow(scheduler.config):
        from diffusion_align.diffusion.flow_scheduler import FlowTableScheduler

        if sampler.is_deterministic:
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        table = FlowTableScheduler.from_config(scheduler.config)
        table.sampler = sampler
        return table
    if kind := diffusers_scheduler(sampler.name, scheduler.config):
        return getattr(diffusers, kind).from_config(scheduler_config(scheduler))
    return TableScheduler(sampler.schedule(scheduler), scheduler.config)


class TableScheduler:
    """What a diffusers text-to-image pipeline needs from its scheduler, taken from a ``DiffusionSchedule``.

    Args:
        schedule: the steps, as many as the pipeline is called with.
        config: of the scheduler that it stands in for.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, schedule: DiffusionSchedule, config: Any) -> None:
        self.schedule, self.config = schedule, config
        self.timesteps = schedule.table.timestep
        self._noisy: set[int] = set()
        self._next = 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.schedule = self.schedule.to(device or "cpu")
        self.timesteps = self.schedule.table.timestep
        self._noisy = set(self.schedule.stochastic_steps.tolist())
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
        noisy = self._next in self._noisy
        index = torch.full((len(x_t),), self._next, device=self.timesteps.device)
        self._next += 1
        step = denoise(x_t, prediction, index, self.schedule)
        if not noisy:
            return (step.mean.to(x_t.dtype),)
        noise = normal_noise(generator, tuple(x_t.shape[1:]), x_t.device)
        return (step.sample(noise).to(x_t.dtype),)
