"""One epoch's pictures, sampled and scored: what every online method starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.errors import TrainingError
from diffusion_align.rewards.base import RewardError, call_reward, part_weights, reward_parts, runs_in_background
from diffusion_align.training.loop import Trainer
from diffusion_align.training.randomness import generator
from diffusion_align.training.scoring import BatchScores, reward_metrics


@dataclass(frozen=True)
class Collected:
    """This process's trajectories and the rewards of all processes.

    Attributes:
        trajectory: B samples of this process, K decisions each.
        scores: (N, K) float32 or float64 on the CPU, of all N samples in their global order by each of K rewards.
        rewards: (N,) their weighted sum.
        metrics: ``reward``, its spread, ``rewards/<name>/mean`` of several, and ``time/score``, the seconds spent
            on rewards and waiting for those in the background.
    """

    trajectory: Trajectory
    scores: Tensor
    rewards: Tensor
    metrics: dict[str, float]


def collect_scored(
    trainer: Trainer[Any],
    policy: DenoisingPolicy,
    schedule: DiffusionSchedule,
    reward: Callable[..., Any],
    samples: Sequence[Prompt],
    *,
    record: Callable[[int], Tensor],
    reduction: Reduction,
) -> Collected:
    """Sample this process's part of ``samples`` and score each batch, in the background where a reward is called there.

    Args:
        trainer: gives the epoch, this process's part, progress and interruption.
        policy, schedule: what samples.
        reward: ``reward(images, prompts, metadata) -> (B,)``; the parts of a combined one are asked one by one.
        samples: prompt and metadata of all N samples of the epoch.
        record: global sample index -> (K,) steps to keep.
        reduction: of the recorded log-probs.

    Raises:
        RewardError: on every process, if a reward failed on any.
        TrainingError: latents or images are not finite; a RewardError that says so on the other processes.
        Interrupted: the run was asked to stop.
    """
    config = trainer.config
    own = trainer.local_samples
    batches = [own[i : i + config.sample_batch_size] for i in range(0, len(own), config.sample_batch_size)]
    parts = reward_parts(reward)
    trajectories: list[Trajectory] = []
    with (
        BatchScores(trainer, RewardError) as scoring,
        trainer.progress("  sampling", len(batches) * len(schedule)) as bar,
    ):
        for batch in batches:
            if not scoring.go_on():
                break
            texts = [samples[i][0] for i in batch]
            trajectory = rollout(
                policy,
                schedule,
                policy.encode(texts),
                [generator(config.seed, "noise", trainer.epoch, i) for i in batch],
                record=torch.stack([record(i) for i in batch]),
                reduction=reduction,
                on_step=lambda: trainer.advance(bar),
            )
            trajectories.append(trajectory)
            try:
                images = policy.decode(trajectory.latents)
            except TrainingError as error:
                scoring.fail(error)
                continue
            arguments = images, texts, [samples[i][1] for i in batch]
            scoring.submit(
                [(runs_in_background(part), partial(call_reward, part, *arguments)) for part in parts.values()]
            )
        scores = scoring.gather()
    columns = {name: torch.cat([getattr(t, name) for t in trajectories]) for name in Trajectory.__dataclass_fields__}
    rewards = (scores * part_weights(reward).to(scores)).sum(dim=1)
    metrics = {**reward_metrics(rewards), "time/score": scoring.waited}
    if scores.shape[1] > 1:
        metrics |= {f"rewards/{name}/mean": c.mean().item() for name, c in zip(parts, scores.unbind(1))}
    return Collected(Trajectory(**columns), scores, rewards, metrics)
