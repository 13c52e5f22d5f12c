"""One epoch's samples and their rewards, for images and for text: what every online method starts from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusion_align.background import background, one_torch_thread, settle
from diffusion_align.errors import TrainingError
from diffusion_align.interrupt import Overdue, breakable
from diffusion_align.rewards.base import RewardError
from diffusion_align.training.processes import Processes

Part = TypeVar("Part")
Calls = Sequence[tuple[bool, Callable[[], Tensor]]]
"""For each of K rewards: whether it is called in the background, and a function that returns its scores (B,)."""


class Scored(NamedTuple, Generic[Part]):
    """What ``sample_and_score`` gives.

    Attributes:
        parts: of this process, one for each batch.
        scores: (N, K) on the CPU, of all processes in their global order.
        waited: seconds spent on rewards and waiting for those in the background.
    """

    parts: list[Part]
    scores: Tensor
    waited: float


def sample_and_score(
    own: range,
    batch_size: int,
    sample: Callable[[range], tuple[Part, Calls]],
    processes: Processes,
    *,
    check: Callable[[Tensor], object] = lambda scores: None,
) -> Scored[Part]:
    """Sample batch by batch and score each, in the background where a reward is called there.

    Args:
        own: global indices of this process's samples.
        batch_size: samples per batch.
        sample: indices of a batch -> what was sampled, and the calls that score it.
        processes: all raise if any fails; between batches the run can be stopped.
        check: raises RewardError for this process's scores (B, K) that cannot be used.

    Raises:
        RewardError: on every process, if a reward failed on any.
        TrainingError: what was sampled is not finite; a RewardError that says so on the other processes.
        Interrupted: the run received an interrupt.
    """
    parts: list[Part] = []
    with BatchScores(processes, RewardError) as scores:
        for start in range(own.start, own.stop, batch_size):
            if not scores.go_on():
                break
            try:
                part, calls = sample(range(start, min(start + batch_size, own.stop)))
            except TrainingError as error:
                scores.fail(error)
                continue
            parts.append(part)
            scores.submit(calls)
        found = scores.gather(check)
    return Scored(parts, found, scores.waited)


class BatchScores(contextlib.AbstractContextManager["BatchScores"]):
    """Inside, ``submit`` batch by batch; ``gather`` waits for what is not there yet.

    Args:
        processes: whose scores they are.
        kind: of the error that every process raises when one has failed.

    Attributes:
        waited: seconds spent in calls made here, and waiting in ``gather``.
    """

    def __init__(self, processes: Processes, kind: type[Exception]) -> None:
        self.processes, self.kind, self.waited = processes, kind, 0.0
        self._batches: list[list[Future[Tensor]]] = []
        self._failed: Exception | None = None
        self._threads = torch.get_num_threads()  # reading it also fixes it for this thread

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

    def submit(self, parts: Calls) -> None:
        """Score a batch by K rewards."""
        started: list[Future[Tensor]] = [
            background.submit(part) if in_background else Future() for in_background, part in parts
        ]
        self._batches.append(started)
        start = time.perf_counter()
        with one_torch_thread():
            for future, (in_background, part) in zip(started, parts, strict=True):
                if in_background:
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
            Interrupted: the run received an interrupt.
        """
        return not self.processes.stop_if_interrupted(failed=self._failure() is not None)

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
            failure = self.kind("a reward did not answer when the run was interrupted")
        scores = torch.empty(0)
        if failure is None:
            batches = [torch.stack([future.result() for future in batch], dim=1) for batch in self._batches]
            scores = torch.cat(batches)
            try:
                check(scores)
            except self.kind as error:
                failure = error
        self.processes.raise_together(failure, self.kind)
        scores = torch.cat(self.processes.gather_in_order([scores]))
        self.waited += time.perf_counter() - start
        return scores

    def _failure(self) -> BaseException | None:
        """The failure of a batch, or the first error of the scores so far."""
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
