"""One epoch's completions, sampled and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.text_encoding import as_completion_message
from diffusion_align.data.text_rows import PromptRow
from diffusion_align.llm.rollout import Completions
from diffusion_align.rewards.base import reward_name, runs_in_background
from diffusion_align.rewards.text.base import TrainerState, call_text_reward, extras_of, weighted_sum
from diffusion_align.training.collection import reward_metrics
from diffusion_align.training.config import TrainingConfig


@dataclass(frozen=True)
class WeightedRewards:
    """K text rewards and the weight of each.

    ``may_be_silent``: a completion about which none has anything to say has no reward (nan), instead of an error.
    """

    functions: Sequence[Callable[..., Any]]
    weights: Tensor
    may_be_silent: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the rewards; a repeated name gets a number."""
        names = [reward_name(function) for function in self.functions]
        return [name + (f"_{names[:i].count(name) + 1}" if name in names[:i] else "") for i, name in enumerate(names)]

    @property
    def want_ids(self) -> bool:
        """Whether any of the rewards names ``completion_ids``."""
        return any("completion_ids" in extras_of(function) for function in self.functions)

    def scores(
        self,
        rows: Sequence[PromptRow],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]] | None = None,
        state: TrainerState | None = None,
    ) -> Tensor:
        """(B, K) on the CPU, nan where a reward has nothing to say; see ``call_text_reward``.

        Args:
            rows, completions: B prompts with their columns, and the texts that complete them.
            ids: the tokens of the completions, if ``want_ids``.
            state: of the run; None where nothing is trained.
        """
        return torch.stack([call() for _, call in self.calls(rows, completions, ids, state)], dim=1)

    def calls(
        self,
        rows: Sequence[PromptRow],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]] | None = None,
        state: TrainerState | None = None,
    ) -> list[tuple[bool, Callable[[], Tensor]]]:
        """For each reward: whether it is called in the background, and a function that returns its scores (B,)."""
        prompts = [row.prompt for row in rows]
        answers = [as_completion_message(text, row.prompt) for text, row in zip(completions, rows, strict=True)]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        extras: dict[str, Any] = {"completion_ids": ids, "trainer_state": state}
        return [
            (runs_in_background(f), partial(call_text_reward, f, prompts, answers, columns, **extras))
            for f in self.functions
        ]

    def total(self, rows: Sequence[PromptRow], scores: Tensor) -> Tensor:
        """(B,) the weighted sum of scores (B, K) of completions of ``rows``."""
        prompts = [row.prompt for row in rows]
        return weighted_sum(scores, self.weights, prompts=prompts, may_be_silent=self.may_be_silent)


@dataclass(frozen=True)
class Collected:
    """This process's B completions, and the scores of all N of the epoch.

    Attributes:
        completions: of this process, on the device.
        finished: (N,) bool on the CPU, False where the length limit cut the completion off.
        scores: (N, K) float32 or float64 on the CPU, nan where a reward has nothing to say.
        rewards: (N,) their weighted sum; nan where none has anything to say and that is allowed.
        metrics: rewards, lengths and ``time/score``, the seconds spent on rewards and waiting for those in
            the background.
    """

    completions: Completions
    finished: Tensor
    scores: Tensor
    rewards: Tensor
    metrics: dict[str, float]


def completion_metrics(
    names: Sequence[str], rewards: Tensor, scores: Tensor, lengths: Tensor, finished: Tensor
) -> dict[str, float]:
    """Metrics of an epoch's rewards (N,), made of scores (N, K) by ``names``, and its lengths; without nan rewards."""
    silent, lengths = rewards.isnan(), lengths.double()
    metrics = reward_metrics(rewards[~silent]) | {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": (~finished).double().mean().item(),
        "completions/tokens": lengths.sum().item(),
    }
    if silent.any():
        metrics["frac_without_reward"] = silent.double().mean().item()
    metrics |= {f"rewards/{name}/mean": column.nanmean().item() for name, column in zip(names, scores.unbind(1))}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def trainer_state(config: TrainingConfig, *, step: int = 0, epoch: int = 0) -> TrainerState:
    """What rewards may know of a run after so many optimizer steps and epochs."""
    return TrainerState(step, float(epoch), config.epochs * config.updates_per_epoch * config.inner_epochs)
