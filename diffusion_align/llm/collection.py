"""One epoch's completions, sampled and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.text_encoding import completion_of
from diffusion_align.data.text_rows import PromptRow
from diffusion_align.errors import TrainingError
from diffusion_align.llm.policy import LanguagePolicy, Sequences, concatenate, pad_to
from diffusion_align.llm.rollout import Completions, rollout
from diffusion_align.rewards.base import reward_name, runs_in_background
from diffusion_align.rewards.text.base import TrainerState, call_text_reward, extras_of, weighted_sum
from diffusion_align.training.collection import Calls, reward_metrics, sample_and_score
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.finite import require_finite_logits
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars


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
    policy: LanguagePolicy,
    rewards: WeightedRewards,
    rows: Sequence[PromptRow],
    *,
    own: range,
    batch_size: int,
    stream: Callable[[int], torch.Generator],
    max_completion_length: int,
    state: TrainerState | None,
    processes: Processes,
    bars: Bars,
) -> Collected:
    """Sample this process's part of the epoch and score each batch, in the background where a reward is called there.

    Args:
        policy: what samples; under ``policy.reference()`` the reference does.
        rewards: what scores.
        rows: the prompts of all N samples of the epoch.
        own: this process's part of them.
        batch_size: completions sampled at once.
        stream: global sample index -> its stream of random numbers.
        max_completion_length: tokens.
        state: what rewards may know of the run.
        processes, bars: of the run.

    Raises:
        RewardError, TrainingError, Interrupted: see ``sample_and_score``.
    """

    def sample(batch: range) -> tuple[Completions, Calls]:
        some = [rows[i] for i in batch]
        sampled = rollout(
            policy,
            [row.ids for row in some],
            [stream(i) for i in batch],
            max_new_tokens=max_completion_length,
            on_token=lambda: advance(1),
        )
        advance(max_completion_length - sampled.logp_old.shape[1])
        ids = completion_ids(sampled.sequences) if rewards.want_ids else None
        return sampled, rewards.calls(some, policy.decode(sampled.sequences), ids, state)

    with bars.task("  sampling", -(-len(own) // batch_size) * max_completion_length) as advance:
        parts, found, waited = sample_and_score(
            own,
            batch_size,
            sample,
            processes,
            check=lambda scored: rewards.total([rows[i] for i in own], scored),
        )
    own_lengths = torch.cat([part.sequences.mask.sum(1) for part in parts])
    own_finished = torch.cat([part.finished for part in parts])
    lengths, finished = (processes.accelerator.gather(x).cpu() for x in (own_lengths, own_finished))
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
        "time/score": waited,
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


def reference_log_probs(
    policy: LanguagePolicy, sequences: Sequences, *, batch_size: int, processes: Processes, bars: Bars
) -> Tensor:
    """Log-probs (B, T) of the reference for completions of this process; B may be 0.

    Raises:
        TrainingError: on every process, if they are not finite on any.
    """
    with torch.no_grad(), policy.reference():
        found = in_batches(
            sequences,
            lambda some: policy.log_probs(policy.score(some)),
            batch_size=batch_size,
            bars=bars,
            what="  reference",
        )
    failure = None
    try:
        require_finite_logits(found, what="the reference")
    except TrainingError as error:
        failure = error
    processes.raise_together(failure, TrainingError)
    return found


def in_batches(
    sequences: Sequences, compute: Callable[[Sequences], Tensor], *, batch_size: int, bars: Bars, what: str
) -> Tensor:
    """(B, T) of ``compute``'s values for batches of ``sequences``, with a progress bar; 0 beyond their ends."""
    shape = sequences.mask.shape
    parts = [torch.zeros(0, shape[1], device=sequences.ids.device)] if not len(sequences) else []
    with bars.task(what, len(sequences)) as advance:
        for rows in torch.arange(len(sequences), device=sequences.ids.device).split(batch_size) if shape[0] else ():
            parts.append(pad_to(compute(sequences[rows]), shape[1], 0.0))
            advance(len(rows))
    return torch.cat(parts)


def _joined(parts: Sequence[Completions], pad: int) -> Completions:
    width = max(part.logp_old.shape[1] for part in parts)
    return Completions(
        concatenate([part.sequences for part in parts], pad=pad),
        torch.cat([pad_to(part.logp_old, width, 0.0) for part in parts]),
        torch.cat([part.finished for part in parts]),
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
