"""An epoch's rewards, batch by batch: here, or in the background while the next batch is sampled; and their metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffusion_align.background import background, one_torch_thread, settle
from diffusion_align.interrupt import Overdue, breakable
from diffusion_align.training.loop import Trainer


class BatchScores(contextlib.AbstractContextManager["BatchScores"]):
    """Inside, ``submit`` batch by batch; ``gather`` waits for what is not there yet.

    Args:
        trainer: whose processes the scores are of.
        kind: of the error that every process raises when one has failed.

    Attributes:
        waited: seconds spent in calls made here, and waiting in ``gather``.
    """

    def __init__(self, trainer: Trainer[Any], kind: type[Exception]) -> None:
        self.trainer, self.kind, self.waited = trainer, kind, 0.0
        self._batches: list[list[Future[Tensor]]] = []
        self._failed: Exception | None = None
        self._threads = torch.get_num_threads()  # asking for it also fixes it for this thread

    def __exit__(self, *error: object) -> None:
        futures = [future for batch in self._batches for future in batch]
        for future in futures:
            future.cancel()
        try:
            with breakable():
                settle(futures)
        except Overdue:
            background.leave()
        # The long-lived thread sets its own number, but torch keeps one default for all beside each thread's value.
        torch.set_num_threads(self._threads)

    def submit(self, parts: Sequence[tuple[bool, Callable[[], Tensor]]]) -> None:
        """Score a batch by K rewards: each a function that gives (B,), and whether it is called in the background."""
        started: list[Future[Tensor]] = [background.submit(part) if aside else Future() for aside, part in parts]
        self._batches.append(started)
        start = time.perf_counter()
        with one_torch_thread():
            for future, (aside, part) in zip(started, parts, strict=True):
                if aside:
                    continue
                try:
                    future.set_result(part())
                except self.kind as error:
                    future.set_exception(error)
                    for other in started:
                        other.cancel()
                    break
                except BaseException:
                    future.cancel()
                    raise
        self.waited += time.perf_counter() - start

    def fail(self, error: Exception) -> None:
        """Instead of ``submit``: this batch could not be sampled."""
        self._failed = self._failed or error

    def go_on(self) -> bool:
        """Before a batch is sampled: False if a batch or a score of any process has failed; ``gather`` then raises.

        Raises:
            Interrupted: the run was asked to stop.
        """
        return not self.trainer.stop_if_interrupted(failed=self._failure() is not None)

    def gather(self, check: Callable[[Tensor], object] = lambda scores: None) -> Tensor:
        """Scores (N, K) of all processes in their global order, on the CPU, in the widest of their dtypes.

        Args:
            check: raises ``kind`` for this process's scores that cannot be used.

        Raises:
            kind: on every process, if a score failed on any; a batch that failed raises its own error where it did.
        """
        start = time.perf_counter()
        failure: BaseException | None
        try:
            with breakable():
                settle([future for batch in self._batches for future in batch])
                failure = self._failure()
        except Overdue:
            background.leave()
            failure = self.kind("a reward did not answer when the run was asked to stop")
        scores = torch.empty(0)
        if failure is None:
            batches = [torch.stack([future.result() for future in batch], dim=1) for batch in self._batches]
            scores = torch.cat(batches)
            try:
                check(scores)
            except self.kind as error:
                failure = error
        self.trainer.raise_together(failure, self.kind)
        if self.trainer.accelerator.num_processes > 1:
            scores = torch.cat(gather_object([scores]))
        self.waited += time.perf_counter() - start
        return scores

    def _failure(self) -> BaseException | None:
        """Of a batch, or the first error of the scores that are there."""
        if self._failed is not None:
            return self._failed
        for future in (future for batch in self._batches for future in batch):
            if future.done() and not future.cancelled() and (error := future.exception()):
                return error
        return None


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
