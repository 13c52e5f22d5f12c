"""What is measured but never trained on: a gold reward and the diversity of pictures of fixed prompts and noise."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.settings import StopConfig
from diffusion_align.diffusion.showing import sample_images
from diffusion_align.errors import TrainingError
from diffusion_align.rewards.base import RewardError, call_reward
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import write_text

SUMMARY = "evaluation.json"
"""In a run folder: the best evaluation, and why the run stopped if a rule ended it."""


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean distance of the N (N - 1) / 2 pairs of rows of ``features`` (N, D).

    Rows of unit length (embeddings): ``1 - cosine``, between 0 and 2. Pictures (N, C, H, W) in [0, 1]: the root mean
    square of the difference of their pixels, between 0 and 1.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"features {tuple(features.shape)} must be of at least two pictures")
    rows = features.double().flatten(1)
    if features.ndim == 2:  # sum_ij <a_i, a_j> = |sum_i a_i|^2
        return (1 - (rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))).item()
    return (torch.pdist(rows).mean() / math.sqrt(rows.shape[1])).item()


@dataclass
class Evaluation:
    """Draws, judges and remembers.

    Args:
        prompts: texts with their metadata; picture i is of the ``i % len(prompts)``-th.
        pictures: how many.
        every: epochs.
        gold: the held-out reward; None to measure diversity alone.
        embed: pictures (B, 3, H, W) in [0, 1] -> unit embeddings (B, D); None for distances of pixels.

    Attributes:
        history: (epoch, gold) of every evaluation so far.
    """

    prompts: Sequence[Prompt]
    pictures: int
    every: int
    gold: Callable[..., Any] | None
    embed: Callable[[Tensor], Tensor] | None
    history: list[tuple[int, float]] = field(default_factory=list)

    def due(self, epoch: int, last: int) -> bool:
        """Whether to evaluate after ``epoch`` of ``last`` epochs."""
        return epoch % self.every == 0 or epoch == last

    @torch.no_grad()
    def measure(
        self,
        policy: DenoisingPolicy,
        schedule: DiffusionSchedule,
        *,
        epoch: int,
        seed: int,
        batch_size: int,
        processes: Processes,
        bars: Bars,
    ) -> dict[str, float]:
        """``gold``, ``gold_stderr``, ``diversity`` and ``time/evaluation``, of images sampled by all processes.

        Args:
            policy, schedule: what samples.
            epoch: how many are finished, for ``history``.
            seed: of the run.
            batch_size: images sampled at once.
            processes, bars: of the run.

        Raises:
            RewardError: on every process, if the held-out reward failed on any.
            TrainingError: the images are not finite.
        """
        started = time.perf_counter()
        share = [round(self.pictures * k / processes.count) for k in range(processes.count + 1)]
        own = range(share[processes.index], share[processes.index + 1])
        scores, features = [], []
        failure: Exception | None = None
        with bars.task("  evaluating", len(own)) as advance:
            for start in range(own.start, own.stop, batch_size):
                places = range(start, min(start + batch_size, own.stop))
                some = [self.prompts[i % len(self.prompts)] for i in places]
                texts, metadata = [text for text, _ in some], [notes for _, notes in some]
                try:
                    images = sample_images(
                        policy, schedule, texts, seed, "evaluation", batch_size=len(texts), first=start
                    )
                    features.append((images if self.embed is None else self.embed(images)).cpu())
                    if self.gold is not None:
                        scores.append(call_reward(self.gold, images.to(policy.device), texts, metadata))
                except (RewardError, TrainingError) as error:
                    failure = error
                    break
                advance(len(some))
        processes.raise_together(failure, RewardError)
        measured = {"diversity": mean_pairwise_distance(torch.cat(processes.gather_in_order(features)))}
        if self.gold is not None:
            golds = torch.cat(processes.gather_in_order(scores)).double()
            measured |= {"gold": golds.mean().item(), "gold_stderr": golds.std().item() / math.sqrt(len(golds))}
            self.history.append((epoch, measured["gold"]))
        return measured | {"time/evaluation": time.perf_counter() - started}

    @property
    def best(self) -> tuple[int, float] | None:
        """(epoch, gold) of the first evaluation with the highest gold reward."""
        return max(self.history, key=lambda seen: seen[1], default=None)

    @property
    def falling(self) -> int:
        """How many evaluations in a row, up to the last, lie below the best one."""
        best = max((gold for _, gold in self.history), default=0.0)
        return sum(1 for _ in takewhile(lambda seen: seen[1] < best, reversed(self.history)))


def write_summary(folder: Path, evaluation: Evaluation | None, stopped: str | None) -> None:
    """Write ``evaluation.json``: the best evaluation (after epoch 0: the model as it was) and why the run stopped."""
    best = evaluation.best if evaluation is not None else None
    found = {"best": None if best is None else {"epoch": best[0], "gold": best[1]}, "stopped": stopped}
    write_text(folder / SUMMARY, json.dumps(found, indent=1))


def stop_reason(rules: StopConfig, row: dict[str, Any], evaluation: Evaluation | None) -> str | None:
    """Which of the rules an epoch's metrics break, as a sentence, or None."""
    reasons = []
    kl, error, diversity = row.get("kl_path"), row.get("kl_path_stderr", 0.0), row.get("diversity")
    if rules.kl_above is not None and kl is not None and kl - 2 * error > rules.kl_above:
        known = f"{kl:.4g} nats" + (f" (standard error {error:.2g})" if error else "")
        reasons.append(f"the KL to the reference is {known}, above stop_when.kl_above={rules.kl_above:g}")
    best = None if evaluation is None else evaluation.best
    if rules.gold_falling is not None and evaluation is not None and best and evaluation.falling >= rules.gold_falling:
        epoch, gold = best
        reasons.append(
            f"the gold reward has been below its best, {gold:.4g} after epoch {epoch}, in the last "
            f"{evaluation.falling} evaluations (stop_when.gold_falling={rules.gold_falling})"
        )
    if rules.diversity_below is not None and diversity is not None and diversity < rules.diversity_below:
        reasons.append(f"the diversity is {diversity:.4g}, below stop_when.diversity_below={rules.diversity_below:g}")
    return "; ".join(reasons) or None
