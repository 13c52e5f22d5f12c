"""Rewards computed in a thread while the next batch is sampled, and what is logged of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from diffusion_align.interrupt import Overdue, breakable
from diffusion_align.training.loop import Trainer


class BackgroundScores(contextlib.AbstractContextManager["BackgroundScores"]):
    """Inside, ``submit`` work batch by batch; ``gather`` waits for it.

    Args:
        trainer: whose processes the scores are of.
        kind: of the error that every process raises when one has failed.

    Attributes:
        waited: seconds spent waiting in ``gather``.
    """

    def __init__(self, trainer: Trainer[Any], kind: type[Exception]) -> None:
        self.trainer, self.kind, self.waited = trainer, kind, 0.0
        self._scores: list[Future[Tensor]] = []
        self._failure: Exception | None = None
        self._threads = torch.get_num_threads()  # asking for it also fixes it for this thread
        self._pool = ThreadPoolExecutor(1, initializer=_one_thread)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=error[0] is not None)
        with contextlib.suppress(Overdue), breakable():
            wait([score for score in self._scores if not score.cancelled()])  # a cancelled one is never "done"
        # The worker sets its own number of threads, but torch keeps one default for all beside each thread's value.
        torch.set_num_threads(self._threads)

    def submit(self, function: Callable[..., Tensor], *arguments: Any) -> None:
        """Score a batch: ``function(*arguments)`` gives (B, ...)."""
        self._scores.append(self._pool.submit(function, *arguments))

    def fail(self, error: Exception) -> None:
        """Instead of ``submit``: this batch could not be sampled."""
        self._failure = self._failure or error

    def go_on(self) -> bool:
        """Before a batch is sampled: False if a batch or a score of any process has failed; ``gather`` then raises.

        Raises:
            Interrupted: the run was asked to stop.
        """
        failed = self._failure is not None or any(s.done() and s.exception() for s in self._scores)
        return not self.trainer.stop_if_interrupted(failed=failed)

    def gather(self) -> Tensor:
        """Scores (N, ...) of all processes in their global order, on the CPU.

        Raises:
            kind: on every process, if a score failed on any; a batch that failed raises its own error where it did.
        """
        start = time.perf_counter()
        failure: BaseException | None
        try:
            with breakable():
                failure = self._failure or next((s.exception() for s in self._scores if s.exception()), None)
        except Overdue:
            failure = self.kind("a reward did not answer when the run was asked to stop")
        self.trainer.raise_together(failure, self.kind)
        accelerator = self.trainer.accelerator
        scores = accelerator.gather(torch.cat([s.result() for s in self._scores]).to(accelerator.device)).cpu()
        self.waited = time.perf_counter() - start
        return scores


def reward_metrics(rewards: Tensor) -> dict[str, float]:
    """Mean, spread and extremes of rewards (N,)."""
    std = rewards.std(unbiased=len(rewards) > 1).item()
    return {
        "reward": rewards.mean().item(),
        "reward_std": std,
        "reward_stderr": std / math.sqrt(len(rewards)),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
    }


def _one_thread() -> None:
    """A second team of OpenMP threads would halve the sampler's speed on a small CPU."""
    torch.set_num_threads(1)
    torch.get_num_threads()
