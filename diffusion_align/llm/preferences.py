"""What preference methods share: rows given or completions judged, batches of them, and what the reference says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.llm.policy import Sequences, pack
from diffusion_align.llm.settings import PreferenceConfig
from diffusion_align.llm.trainer import TextTrainer
from diffusion_align.training.config import multiple_checks

Batch = TypeVar("Batch")


class PreferenceTrainer(TextTrainer[Batch]):
    """Rows, or online prompts and rewards; the reference's log-probs where a loss needs them.

    The arguments are those of ``TextTrainer``; with ``rows``, rewards score only what is shown.

    Raises:
        ConfigError: data that the method cannot use, or a prompt's completions would be divided among processes.
    """

    config: PreferenceConfig
    headline = "rewards/accuracies"

    def data_checks(self) -> Iterator[str]:
        config = self.config
        if config.online:
            yield from multiple_checks(config, "group_size", self.accelerator.num_processes)

    def given(self) -> tuple[list[int], dict[str, float]]:
        """Offline: which row each of the epoch's N samples is, in a new random order once all were seen; metrics."""
        config, count = self.config, len(self.rows)
        indices = items_of_epoch(range(count), config.seed, self.epoch, config.samples_per_epoch)
        return indices, {"data_epochs": (self.epoch + 1) * config.samples_per_epoch / count, "rows": count}

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


def given_preferences(
    rows: Sequence[PreferenceRow], keep: Tensor, *, pad: int, device: torch.device
) -> PreferenceBatch:
    """A batch of ``rows``; their completions stand row after row, of each the chosen one first."""
    sides = [(row.ids, completion) for row in rows for completion in (row.chosen, *row.rejected)]
    prompts, completions = zip(*sides, strict=True)
    numbers = torch.tensor([len(row.rejected) for row in rows])
    chosen = (1 + numbers).cumsum(0) - (1 + numbers)
    others = torch.arange(int(numbers.max()))
    counts = others < numbers[:, None]
    return PreferenceBatch(
        sequences=pack(prompts, completions, pad=pad, device=device),
        chosen=chosen.to(device),
        rejected=torch.where(counts, chosen[:, None] + 1 + others, 0).to(device),
        counts=counts.to(device),
        labels=torch.tensor([row.label for row in rows], device=device),
        keep=keep,
    )
