"""What preference methods share: rows given or completions judged, which make a pair, and what the reference says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_rows import PreferenceRow, TextDataConfig
from diffusion_align.estimators import rso_accept
from diffusion_align.llm.policy import Sequences, pack
from diffusion_align.llm.settings import OnlineConfig
from diffusion_align.llm.trainer import TextTrainer
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import equal_reward_metric

Batch = TypeVar("Batch")
Selection = Literal["best_worst", "best_rest", "rso"]


class PreferenceConfig(OnlineConfig):
    """Rows of a data set, or prompts whose completions a reward judges in every epoch (online).

    ``samples_per_epoch`` counts rows, or online completions.
    """

    dataset: TextDataConfig | None = Field(None, description="rows of the data: list, file, shipped list or hub id")
    num_generations: int = Field(4, ge=1, le=MOST, description="online: completions a prompt in an epoch")
    beta: float = Field(0.1, gt=0, le=LARGEST, description="price of a nat of log-ratio to the reference")

    @property
    def online(self) -> bool:
        return self.dataset is None

    @property
    def fewest_generations(self) -> int:
        """Of which judged online something can be learned."""
        return 2

    def cross_checks(self) -> Iterator[str]:
        if self.online and (self.prompts is None or self.reward is None):
            yield "give dataset, or prompts and a reward to sample and judge completions online"
        if not self.online and self.prompts is not None:
            yield "prompts are completed and judged online, dataset has completions: leave one of them out"
        if self.online and self.num_generations < self.fewest_generations:
            yield (
                f"num_generations={self.num_generations} leaves nothing to compare a completion with: "
                f"use {self.fewest_generations} or more"
            )


class PreferenceTrainer(TextTrainer[Batch]):
    """Rows, or online prompts and rewards; the reference's log-probs where a loss needs them.

    The arguments are those of ``TextTrainer``; with ``rows``, rewards score only what is shown.

    Raises:
        ConfigError: data that the method cannot use, or a prompt's completions would be divided among processes.
    """

    config: PreferenceConfig
    headline = "rewards/accuracies"

    def data_problems(self) -> list[str]:
        config = self.config
        if not config.online or len(self.local_samples) % config.num_generations == 0:
            return []
        return [
            f"samples_per_epoch={config.samples_per_epoch} must be a multiple of num_generations="
            f"{config.num_generations} x {self.accelerator.num_processes} processes"
        ]

    def given(self) -> tuple[list[int], dict[str, float]]:
        """Offline: which row each of the epoch's N samples is, in a new random order once all were seen; metrics."""
        config, count = self.config, len(self.rows)
        indices = items_of_epoch(range(count), config.seed, self.epoch, config.samples_per_epoch)
        return indices, {"data_epochs": (self.epoch + 1) * config.samples_per_epoch / count, "rows": count}

    def local(self, keep: Tensor) -> Tensor:
        """Those of the global samples ``keep`` that are this process's, counted from its first, on the device."""
        own = self.local_samples
        return (keep[(keep >= own.start) & (keep < own.stop)] - own.start).to(self.accelerator.device)

    def reference_of(self, known: Tensor | None, places: Tensor, sequences: Sequences) -> Tensor:
        """The reference's log-probs (n, T) of completions ``places``: what is ``known``, or a forward pass."""
        if known is not None:
            return known[places, : sequences.mask.shape[1]]
        with torch.no_grad(), self.policy.reference():
            return self.policy.log_probs(self.policy.score(sequences))

    def reference_of_places(self, sequences: Sequences, places: Tensor) -> Tensor:
        """Log-probs (B, T) of the reference; 0 for all but ``places``. Called on every process."""
        found = self.reference_log_probs(sequences[places])
        known = found.new_zeros(sequences.mask.shape)
        known[places, : found.shape[1]] = found
        return known


@dataclass(frozen=True)
class PreferenceBatch:
    """An epoch's preferences of one process: B samples, at most M rejected each, R completions; on the device.

    Attributes:
        sequences: the R completions.
        chosen: (B,), the place of each sample's chosen completion among the R.
        rejected: (B, M), the places of the rejected ones.
        counts: (B, M) bool, which of these there are.
        labels: (B,), the probability that the chosen one is preferred.
        keep: global indices of the samples to train on, on the CPU.
        logp_ref: (R, T) of the reference, where it is known beforehand.
        embeddings: (B, D) of the prompts and ``entropy`` (B,), by the reference, where beta depends on them.
    """

    sequences: Sequences
    chosen: Tensor
    rejected: Tensor
    counts: Tensor
    labels: Tensor
    keep: Tensor
    logp_ref: Tensor | None = None
    embeddings: Tensor | None = None
    entropy: Tensor | None = None


def pack_rows(rows: Sequence[PreferenceRow], *, pad: int, device: torch.device) -> Sequences:
    """All completions, row after row, of each the chosen one first."""
    sides = [(row.ids, completion) for row in rows for completion in (row.chosen, *row.rejected)]
    prompts, completions = zip(*sides, strict=True)
    return pack(prompts, completions, pad=pad, device=device)


def places_of(rows: Sequence[PreferenceRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``pack_rows`` puts completions: chosen (B,), rejected (B, M), and which of these there are (B, M)."""
    numbers = torch.tensor([len(row.rejected) for row in rows])
    chosen = (1 + numbers).cumsum(0) - (1 + numbers)
    others = torch.arange(int(numbers.max()))
    counts = others < numbers[:, None]
    return chosen, torch.where(counts, chosen[:, None] + 1 + others, 0), counts


def given_preferences(
    rows: Sequence[PreferenceRow], keep: Tensor, *, pad: int, device: torch.device
) -> PreferenceBatch:
    """A batch of the rows that are this process's part of the epoch; ``keep`` as in ``PreferenceBatch``."""
    chosen, rejected, counts = places_of(rows)
    return PreferenceBatch(
        sequences=pack_rows(rows, pad=pad, device=device),
        chosen=chosen.to(device),
        rejected=rejected.to(device),
        counts=counts.to(device),
        labels=torch.tensor([row.label for row in rows], device=device),
        keep=keep,
    )


def judged_preferences(
    trainer: PreferenceTrainer[Any], *, by_reference: bool, selection: Selection, rso_beta: float
) -> tuple[PreferenceBatch, dict[str, float]]:
    """Of every prompt's completions, sampled now, one chosen and others rejected; ties are left out."""
    config, own, device = trainer.config, trainer.local_samples, trainer.accelerator.device
    with trainer.policy.reference() if by_reference else contextlib.nullcontext():
        _, collected = trainer.sample(trainer.prompts, config.num_generations)
    rewards = collected.rewards.view(-1, config.num_generations)
    first = torch.arange(len(rewards)) * config.num_generations
    metrics = {
        **equal_reward_metric(collected.rewards, config.num_generations),
        "reward_gap": (rewards.amax(1) - rewards.amin(1)).mean().item(),
    }
    if selection == "rso":
        streams = [generator(config.seed, "rso", trainer.epoch, group) for group in range(len(rewards))]
        accepted, chosen, rejected, counts = rso_pairs(rewards, rso_beta, streams)
        metrics["rso/accepted"] = accepted.double().mean().item()
    else:
        chosen, rejected, counts = best_against(rewards, rest=selection == "best_rest")
    metrics["frac_without_pair"] = (~counts.any(1)).double().mean().item()

    size = (config.samples_per_epoch, counts.shape[1])
    all_rejected = torch.zeros(size, dtype=torch.int64)
    all_counts = torch.zeros(size, dtype=torch.bool)
    all_rejected[first + chosen], all_counts[first + chosen] = first[:, None] + rejected, counts
    mine = slice(own.start, own.stop)
    batch = PreferenceBatch(
        sequences=collected.completions.sequences,
        chosen=torch.arange(len(own), device=device),
        rejected=torch.where(all_counts, all_rejected - own.start, 0)[mine].to(device),
        counts=all_counts[mine].to(device),
        labels=torch.ones(len(own), device=device),
        keep=(first + chosen)[counts.any(1)],
    )
    return batch, collected.metrics | metrics


def best_against(rewards: Tensor, *, rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of rewards (G, n): the best of each group (G,), its worst or all (G, M), and which of these are worse (G, M)."""
    best, worst = rewards.argmax(1), rewards.argmin(1)
    rejected = torch.arange(rewards.shape[1]).expand(rewards.shape) if rest else worst[:, None]
    return best, rejected, rewards.gather(1, rejected) < rewards.amax(1, keepdim=True)


def rso_pairs(
    rewards: Tensor, beta: float, streams: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rewards (G, n), the candidates that ``rso_accept`` keeps (G, n), and two of them at random.

    Returns:
        Accepted (G, n) bool, the better of the two (G,), the other (G, 1), and whether there is such a pair (G, 1).
    """
    accepted = torch.zeros(rewards.shape, dtype=torch.bool)
    pairs = torch.zeros(len(rewards), 2, dtype=torch.int64)
    for group, stream in enumerate(streams):
        accepted[group] = rso_accept(rewards[group], beta, generator=stream)
        found = accepted[group].nonzero().squeeze(1)
        two = found[torch.randperm(len(found), generator=stream)[:2]]
        pairs[group, : len(two)] = two
        pairs[group, len(two) :] = two[0]  # without a second one: a tie with itself
    scores = rewards.gather(1, pairs)
    pairs = torch.where(scores[:, :1] >= scores[:, 1:], pairs, pairs.flip(1))
    return accepted, pairs[:, 0], pairs[:, 1:], scores[:, :1] != scores[:, 1:]
