"""One epoch's images, sampled and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.rewards.base import call_reward, part_weights, reward_parts, runs_in_background
from diffusion_align.training.collection import Calls, reward_metrics, sample_and_score
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars


class Sampled(NamedTuple):
    """A batch of this process."""

    trajectory: Trajectory
    conditioning: Conditioning


@dataclass(frozen=True)
class Collected:
    """This process's trajectories and the rewards of all processes.

    Attributes:
        samples: prompt and metadata of all N samples of the epoch.
        trajectory: B samples of this process, K recorded steps each.
        conditioning: of the same samples.
        scores: (N, K) float32 or float64 on the CPU, of all N samples in their global order by each of K rewards.
        rewards: (N,) their weighted sum.
        metrics: ``reward``, its spread, ``rewards/<name>/mean`` of several, and ``time/score``, the seconds spent
            on rewards and waiting for those in the background.
    """

    samples: Sequence[Prompt]
    trajectory: Trajectory
    conditioning: Conditioning
    scores: Tensor
    rewards: Tensor
    metrics: dict[str, float]


def collect_scored(
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    reward: Callable[..., Any],
    samples: Sequence[Prompt],
    *,
    own: range,
    batch_size: int,
    stream: Callable[[int], torch.Generator],
    record: Callable[[int], Tensor],
    reduction: Reduction,
    processes: Processes,
    bars: Bars,
) -> Collected:
    """Sample this process's part of ``samples`` and score each batch, in the background where a reward is called there.

    Args:
        policy, schedule: what samples.
        reward: ``reward(images, prompts, metadata) -> (B,)``; the parts of a combined one are called one by one.
        samples: prompt and metadata of all N samples of the epoch.
        own: this process's part of them.
        batch_size: samples drawn at once.
        stream: global sample index -> its stream of noise.
        record: global sample index -> (K,) steps to keep.
        reduction: of the recorded log-probs.
        processes, bars: of the run.

    Raises:
        RewardError, TrainingError, Interrupted: see ``sample_and_score``.
    """
    parts = reward_parts(reward)

    def sample(batch: range) -> tuple[Sampled, Calls]:
        texts = [samples[i][0] for i in batch]
        conditioning = policy.encode(texts)
        trajectory = rollout(
            policy,
            schedule,
            conditioning,
            [stream(i) for i in batch],
            record=torch.stack([record(i) for i in batch]),
            reduction=reduction,
            on_step=lambda: advance(1),
        )
        arguments = policy.decode(trajectory.latents), texts, [samples[i][1] for i in batch]
        calls = [(runs_in_background(part), partial(call_reward, part, *arguments)) for part in parts.values()]
        return Sampled(trajectory, conditioning), calls

    with bars.task("  sampling", -(-len(own) // batch_size) * len(schedule)) as advance:
        sampled, scores, waited = sample_and_score(own, batch_size, sample, processes)
    rewards = (scores * part_weights(reward).to(scores)).sum(dim=1)
    metrics = {**reward_metrics(rewards), "time/score": waited}
    if scores.shape[1] > 1:
        metrics |= {f"rewards/{name}/mean": c.mean().item() for name, c in zip(parts, scores.unbind(1))}
    columns = {
        name: torch.cat([getattr(one.trajectory, name) for one in sampled]) for name in Trajectory.__dataclass_fields__
    }
    conditioning = {name: torch.cat([one.conditioning[name] for one in sampled]) for name in sampled[0].conditioning}
    return Collected(samples, Trajectory(**columns), conditioning, scores, rewards, metrics)
