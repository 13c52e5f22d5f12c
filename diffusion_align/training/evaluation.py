"""What is measured but never trained on: a held-out reward on samples of fixed prompts from fixed streams of noise.

Images and text share it: a trainer samples and scores global indices, and the order, the processes, the history of the
held-out reward and the rules that end a run are here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.base import RewardError
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.training.settings import EvaluationConfig, StopConfig  # noqa: F401, their former place
from diffusion_align.training.sharing import own_batches, sample_together
from diffusion_align.writing import write_text

SUMMARY = "evaluation.json"
"""In a run folder: the best evaluation, and why the run stopped if a rule ended it."""


@dataclass
class Evaluation:
    """Which samples are evaluated, when and by what; and what was found so far.

    Args:
        prompts: of the trainer's kind, with what the held-out reward receives; sample i is of the
            ``i % len(prompts)``-th.
        samples: how many.
        every: epochs.
        reward: the held-out reward, or rewards, as the trainer calls them; None for none.

    Attributes:
        history: (epoch, held-out reward) of every evaluation so far.
    """

    prompts: Sequence[Any]
    samples: int
    every: int
    reward: Any = None
    history: list[tuple[int, float]] = field(default_factory=list, kw_only=True)

    def due(self, epoch: int, last: int) -> bool:
        """Whether to evaluate after ``epoch`` of ``last`` epochs."""
        return epoch % self.every == 0 or epoch == last

    def prompts_of(self, indices: range) -> list[Any]:
        """The prompt of each sample."""
        return [self.prompts[i % len(self.prompts)] for i in indices]

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of what ``sample`` found besides the held-out reward, of all samples in their global order."""
        return {}

    @torch.no_grad()
    def measure(
        self,
        sample: Callable[[range], dict[str, Tensor]],
        *,
        epoch: int,
        batch_size: int,
        processes: Processes,
        bars: Bars,
    ) -> dict[str, float]:
        """``gold``, ``gold_stderr``, what ``metrics`` adds and ``time/evaluation``, of samples of all processes.

        Args:
            sample: global indices of a batch of n samples -> ``gold`` (n,) if there is a held-out reward, and whatever
                ``metrics`` reads, n rows each.
            epoch: how many are finished, for ``history``.
            batch_size: samples at once.
            processes, bars: of the run.

        Raises:
            RewardError: on every process, if the held-out reward failed on any.
            TrainingError: the samples are not finite.
            Interrupted: the run received an interrupt, which is checked between batches.
        """
        started = time.perf_counter()
        own = own_batches(self.samples, batch_size, processes)
        with bars.task("  evaluating", sum(map(len, own))) as advance:
            parts = sample_together(
                self.samples,
                batch_size,
                lambda indices: {name: values.cpu() for name, values in sample(indices).items()},
                processes,
                error=RewardError,
                on_batch=advance,
                interruptible=True,
            )
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        measured = self.metrics(found)
        if "gold" in found:
            scores = found["gold"].double()
            measured |= {"gold": scores.mean().item(), "gold_stderr": scores.std().item() / math.sqrt(len(scores))}
            # One that was interrupted after this, say by a callback, is repeated on resume: it counts once.
            self.history = [(before, score) for before, score in self.history if before != epoch]
            self.history.append((epoch, measured["gold"]))
        return measured | {"time/evaluation": time.perf_counter() - started}

    @property
    def best(self) -> tuple[int, float] | None:
        """(epoch, held-out reward) of the first evaluation with the highest held-out reward."""
        return max(self.history, key=lambda seen: seen[1], default=None)

    @property
    def falling(self) -> int:
        """How many evaluations in a row, up to the last, lie below the best one."""
        best = max((score for _, score in self.history), default=0.0)
        return sum(1 for _ in takewhile(lambda seen: seen[1] < best, reversed(self.history)))


def write_summary(folder: Path, evaluation: Evaluation | None, stopped: str | None) -> None:
    """Write ``evaluation.json``: the best evaluation (after epoch 0: the model as it was) and why the run stopped."""
    best = evaluation.best if evaluation is not None else None
    found = {"best": None if best is None else {"epoch": best[0], "gold": best[1]}, "stopped": stopped}
    write_text(folder / SUMMARY, json.dumps(found, indent=1))
