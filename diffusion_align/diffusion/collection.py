"""One epoch's pictures, sampled and scored: what every online method starts from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer
from torch import Tensor

from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.rewards.base import RewardError, call_reward, reward_name
from diffusion_align.training.loop import Trainer
from diffusion_align.training.prompts import Prompt
from diffusion_align.training.randomness import generator


def _by_name(reward: Any) -> Any:
    """A function cannot be written to YAML; its name can."""
    if isinstance(reward, dict) and callable(reward.get("name")):
        return reward | {"name": _by_name(reward["name"])}
    return f"{reward.__module__}:{reward_name(reward)}" if callable(reward) else reward


RewardSetting = Annotated[Any, PlainSerializer(_by_name)]
"""What ``build_reward`` takes, as a field of a configuration."""


@dataclass(frozen=True)
class Collected:
    """This process's trajectories and the rewards of all processes.

    Attributes:
        trajectory: B samples of this process, K decisions each.
        rewards: (N,) float32 on the CPU, of all N samples in their global order.
        metrics: ``reward``, its spread, and ``time/score``, the seconds spent waiting for rewards.
    """

    trajectory: Trajectory
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
    """Sample this process's part of ``samples``; a thread scores each batch while the next one is sampled.

    Args:
        trainer: gives the epoch, this process's part, progress and interruption.
        policy, schedule: what samples.
        reward: ``reward(images, prompts, metadata) -> (B,)``.
        samples: prompt and metadata of all N samples of the epoch.
        record: global sample index -> (K,) steps to keep.
        reduction: of the recorded log-probs.

    Raises:
        RewardError: on every process, if a reward failed on any.
        Interrupted: the run was asked to stop.
    """
    config = trainer.config
    own = trainer.local_samples
    batches = [own[i : i + config.sample_batch_size] for i in range(0, len(own), config.sample_batch_size)]
    trajectories: list[Trajectory] = []
    scores: list[Future[Tensor]] = []
    with (
        _thread_count_kept(),
        ThreadPoolExecutor(1, initializer=_one_thread) as thread,
        trainer.progress("  sampling", len(batches) * len(schedule)) as bar,
    ):
        for batch in batches:
            if trainer.stop_if_interrupted(failed=any(s.done() and s.exception() for s in scores)):
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
            images = policy.decode(trajectory.latents)
            scores.append(thread.submit(call_reward, reward, images, texts, [samples[i][1] for i in batch]))
        waiting = time.perf_counter()
        failure = next((s.exception() for s in scores if s.exception()), None)
        trainer.raise_together(failure, RewardError)
        rewards = trainer.accelerator.gather(torch.cat([s.result() for s in scores]).to(policy.device)).cpu()
        waited = time.perf_counter() - waiting
    columns = {name: torch.cat([getattr(t, name) for t in trajectories]) for name in Trajectory.__dataclass_fields__}
    return Collected(Trajectory(**columns), rewards, {**_spread(rewards), "time/score": waited})


@contextlib.contextmanager
def _thread_count_kept() -> Iterator[None]:
    """Around a worker that sets its own: torch keeps one default for all threads beside each thread's value."""
    threads = torch.get_num_threads()  # asking for it also fixes it for this thread
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one_thread() -> None:
    """For the rewards' thread: a second team of OpenMP threads would halve the sampler's speed on a small CPU."""
    torch.set_num_threads(1)
    torch.get_num_threads()


def _spread(rewards: Tensor) -> dict[str, float]:
    std = rewards.std(unbiased=len(rewards) > 1).item()
    return {
        "reward": rewards.mean().item(),
        "reward_std": std,
        "reward_stderr": std / math.sqrt(len(rewards)),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
    }
