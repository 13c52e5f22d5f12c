"""One epoch's completions, sampled and scored: what every online text method starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_encoding import completion_of
from diffusion_align.data.text_rows import PromptRow
from diffusion_align.errors import TrainingError
from diffusion_align.llm.policy import LanguagePolicy, Sequences, concatenate, widened
from diffusion_align.llm.rollout import Completions, rollout
from diffusion_align.rewards.base import RewardError, reward_name, runs_in_background
from diffusion_align.rewards.text.base import TrainerState, call_text_reward, extras_of, weighted_sum
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.finite import require_finite_logits
from diffusion_align.training.loop import Trainer
from diffusion_align.training.randomness import generator
from diffusion_align.training.scoring import BatchScores, reward_metrics


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
        """Of the rewards; a second one of a name is told from the first by a number."""
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
        """Of each reward whether it is called in the background, and a function that gives its scores (B,)."""
        prompts = [row.prompt for row in rows]
        answers = [completion_of(text, row.prompt) for text, row in zip(completions, rows, strict=True)]
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


def collect_scored(
    trainer: Trainer[Any],
    policy: LanguagePolicy,
    rewards: WeightedRewards,
    rows: Sequence[PromptRow],
    *,
    max_completion_length: int,
) -> Collected:
    """Sample this process's part of the epoch and score each batch, in the background where a reward is called there.

    Args:
        trainer: gives the epoch, this process's part, progress and interruption.
        policy: what samples; under ``policy.reference()`` the reference does.
        rewards: what scores.
        rows: the prompts of all N samples of the epoch.

    Raises:
        RewardError: on every process, if a reward failed on any.
        Interrupted: the run was asked to stop.
    """
    config, own = trainer.config, trainer.local_samples
    batches = [own[i : i + config.sample_batch_size] for i in range(0, len(own), config.sample_batch_size)]
    parts: list[Completions] = []
    state = trainer_state(config, step=trainer.step, epoch=trainer.epoch)
    with (
        BatchScores(trainer, RewardError) as scores,
        trainer.progress("  sampling", len(batches) * max_completion_length) as bar,
    ):
        for batch in batches:
            if not scores.go_on():
                break
            some = [rows[i] for i in batch]
            try:
                sampled = rollout(
                    policy,
                    [row.ids for row in some],
                    [generator(config.seed, "tokens", trainer.epoch, i) for i in batch],
                    max_new_tokens=max_completion_length,
                    on_token=lambda: trainer.advance(bar),
                )
            except TrainingError as error:
                scores.fail(error)
                continue
            trainer.advance(bar, max_completion_length - sampled.logp_old.shape[1])
            parts.append(sampled)
            ids = completion_ids(sampled.sequences) if rewards.want_ids else None
            scores.submit(rewards.calls(some, policy.decode(sampled.sequences), ids, state))
        found = scores.gather(lambda scored: rewards.total([rows[i] for i in own], scored))
    own_lengths = torch.cat([part.sequences.mask.sum(1) for part in parts])
    own_finished = torch.cat([part.finished for part in parts])
    lengths, finished = (trainer.accelerator.gather(x).cpu() for x in (own_lengths, own_finished))
    total = rewards.total(rows, found)
    silent = total.isnan()
    if silent.all():  # of no sample at all: an error after all
        replace(rewards, may_be_silent=False).total(rows, found)
    metrics = reward_metrics(total[~silent]) | {
        "completions/mean_length": lengths.double().mean().item(),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": (~finished).double().mean().item(),
        "completions/tokens": float(lengths.sum()),
        "time/score": scores.waited,
    }
    if silent.any():
        metrics["frac_without_reward"] = silent.double().mean().item()
    for name, column in zip(rewards.names, found.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
    return Collected(_joined(parts, policy.pad), finished, found, total, _finite(metrics))


def trainer_state(config: TrainingConfig, *, step: int = 0, epoch: int = 0) -> TrainerState:
    """What rewards may know of a run after so many optimizer steps and epochs."""
    return TrainerState(step, float(epoch), config.epochs * config.updates_per_epoch * config.inner_epochs)


def completion_ids(sequences: Sequences) -> list[list[int]]:
    """The tokens of each completion as sampled, up to and with the first end."""
    rows = zip(sequences.completions.tolist(), sequences.mask.sum(1).tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def sample_groups(
    trainer: Trainer[Any], policy: LanguagePolicy, prompts: Sequence[PromptRow], rewards: WeightedRewards
) -> tuple[list[PromptRow], Collected]:
    """Each of the epoch's prompts ``num_generations`` times, N rows, and their completions as in ``collect_scored``."""
    config: Any = trainer.config
    chosen = items_of_epoch(prompts, config.seed, trainer.epoch, config.samples_per_epoch // config.num_generations)
    rows = [row for row in chosen for _ in range(config.num_generations)]
    return rows, collect_scored(trainer, policy, rewards, rows, max_completion_length=config.max_completion_length)


@torch.no_grad()
def reference_log_probs(trainer: Trainer[Any], policy: LanguagePolicy, sequences: Sequences) -> Tensor:
    """Log-probs (B, T) of the reference for completions of this process, in batches as they are sampled."""
    with policy.reference():
        found = in_batches(trainer, "  reference", sequences, lambda some: policy.log_probs(policy.score(some)))
    require_finite_reference(trainer, found)
    return found


def require_finite_reference(trainer: Trainer[Any], logp: Tensor) -> None:
    """TrainingError on every process, at the same place, if the reference's log-probs are not finite on any."""
    failure = None
    try:
        require_finite_logits(logp, what="the reference")
    except TrainingError as error:
        failure = error
    trainer.raise_together(failure, TrainingError)


def in_batches(
    trainer: Trainer[Any], what: str, sequences: Sequences, compute: Callable[[Sequences], Tensor]
) -> Tensor:
    """(B, T) of ``compute``'s values for batches of ``sequences``, with a progress bar; 0 beyond their ends."""
    parts = []
    with trainer.progress(what, len(sequences)) as bar:
        for rows in torch.arange(len(sequences), device=sequences.ids.device).split(trainer.config.sample_batch_size):
            parts.append(widened(compute(sequences[rows]), sequences.mask.shape[1], 0.0))
            trainer.advance(bar, len(rows))
    return torch.cat(parts)


def _joined(parts: Sequence[Completions], pad: int) -> Completions:
    width = max(part.logp_old.shape[1] for part in parts)
    return Completions(
        concatenate([part.sequences for part in parts], pad=pad),
        torch.cat([widened(part.logp_old, width, 0.0) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
