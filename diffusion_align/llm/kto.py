"""KTO: a language model learns from completions that are desirable or not, without pairs (Ethayarajh et al. 2024,
arXiv:2402.01306).

With l = log pi - log pi_ref of a completion, ``kto_loss``: w_D (1 - sigmoid(beta (l - z))) if it is desirable, else
w_U (1 - sigmoid(beta (z - l))). The reference point z is the mean of l over *mismatched* pairs, at least 0: each
completion with the next prompt of the epoch that is another one. It is estimated once, before an epoch's first update,
over the samples of all processes, so that neither loss nor gradient depend on batches or on how the work is divided;
the paper and TRL estimate it anew in every batch.

Labels come from a dataset, or from rewards of completions sampled in every epoch (online).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.text_rows import LabelledRow
from diffusion_align.estimators import kl_value, kto_loss, masked_sum
from diffusion_align.llm.policy import Sequences, pack, widest_float
from diffusion_align.llm.preferences import PreferenceTrainer
from diffusion_align.llm.settings import KTOConfig
from diffusion_align.training.context import EpochCost, Metric
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.statistics import agreement, equal_reward_metric


@dataclass(frozen=True)
class KTOBatch:
    """An epoch's completions of one process; on the device.

    Attributes:
        sequences: B completions.
        desirable: (B,) bool.
        keep: global indices of the samples to train on, on the CPU.
        mismatched: this process's completions after other prompts, or None; all have ``pairs`` of them.
        reference_point: 0-d, z before it is raised to 0.
        logp_ref: (B, T) of the reference, where it is known beforehand.
    """

    sequences: Sequences
    desirable: Tensor
    keep: Tensor
    mismatched: Sequences | None
    pairs: int
    reference_point: Tensor
    logp_ref: Tensor | None = None


class KTOTrainer(PreferenceTrainer[KTOBatch]):
    """Trains as ``KTOConfig`` says; see ``PreferenceTrainer`` for the arguments.

    Raises:
        ConfigError: data with one prompt only, or settings that do not fit the number of processes.
    """

    config: KTOConfig
    config_class = KTOConfig
    dataset_kind = KTOConfig.dataset_kind
    metrics = {  # noqa: RUF012
        "reference_point": Metric(
            "Reference point",
            "nats per completion",
            "The log-ratio above which a completion counts as preferred: that of completions after other prompts.",
        ),
        "desirable": Metric(
            "Desirable completions", "fraction of completions", "Near 0 or 1 one side has hardly any examples."
        ),
    }
    rows: Sequence[LabelledRow]

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """The mismatched pairs take a pass of the policy and one of the reference."""
        every, mismatched = (
            super().epoch_cost(config, steps),
            min(config.experimental.kl_samples, config.samples_per_epoch),
        )
        return replace(every, reference=every.reference + mismatched, estimated=mismatched)

    def data_checks(self) -> Iterator[str]:
        yield from super().data_checks()
        if len({tuple(row.ids) for row in self.rows} | {tuple(row.ids) for row in self.prompts}) <= 1:
            source = "prompts" if self.config.online else "dataset"
            yield f"{source} holds one prompt, and KTO's reference point needs two or more: add some"

    def collect(self) -> tuple[KTOBatch, dict[str, float]]:
        """This process's completions of the epoch with their labels: given, or sampled and judged."""
        return self._judged() if self.config.online else self._given()

    def estimate(self, batch: KTOBatch) -> tuple[KTOBatch, TrainingPlan, dict[str, float]]:
        """The reference point, and the reference's log-probs where they are needed more than once."""
        total = torch.zeros((), dtype=widest_float(self.policy.device), device=self.policy.device)
        if batch.mismatched is not None:
            with torch.no_grad():
                total += self.in_batches(batch.mismatched, self._log_ratios, "  reference point").to(total).sum()
        mean = self.processes.sum(total) / max(batch.pairs, 1)
        batch = replace(batch, reference_point=total.new_tensor(mean))
        if self.config.inner_epochs > 1:
            batch = replace(batch, logp_ref=self.reference_of_places(batch.sequences, self.local_indices(batch.keep)))
        return batch, TrainingPlan(batch.keep), {"reference_point": max(mean, 0.0), "reference_point_raw": mean}

    def loss_coefficients(self) -> dict[str, float]:
        return {name: getattr(self.config, name) for name in ("beta", "desirable_weight", "undesirable_weight")}

    def loss(self, batch: KTOBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring.

        ``rewards/chosen`` is beta l of the desirable, ``rewards/rejected`` of the others; accuracy is the share of
        those on their side of z, ties 1/2. ``drift`` as in DPO.
        """
        config = self.config
        sequences, desirable = batch.sequences[samples], batch.desirable[samples]
        mask = sequences.mask
        logp = self.policy.log_probs(self.policy.score(sequences))
        logp_ref = self.reference_of(batch.logp_ref, samples, sequences)
        ratio = masked_sum(logp - logp_ref, mask, 1)
        losses = kto_loss(
            ratio,
            desirable,
            batch.reference_point.to(ratio),
            config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        above = ratio.detach() - batch.reference_point.to(ratio).clamp(min=0)
        statistics = {
            "rewards/accuracies": agreement(above, desirable.to(above)),
            "drift": kl_value(logp_ref, logp, "k3", mask=mask)[mask],
        }
        for name, which in (("chosen", desirable), ("rejected", ~desirable)):
            if which.any():
                statistics[f"rewards/{name}"] = config.beta * ratio.detach()[which]
                statistics[f"logps/{name}"] = masked_sum(logp.detach(), mask, 1)[which]
        return losses, statistics

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        if not {"rewards/chosen", "rewards/rejected"} <= statistics.keys():
            return {}
        return {"rewards/margins": statistics["rewards/chosen"] - statistics["rewards/rejected"]}

    def _given(self) -> tuple[KTOBatch, dict[str, float]]:
        indices, metrics = self.given()
        epoch, device = [self.rows[i] for i in indices], self.accelerator.device
        own = [epoch[i] for i in self.local_samples]
        sequences = pack([row.ids for row in own], [row.completion for row in own], pad=self.policy.pad, device=device)
        desirable = torch.tensor([row.desirable for row in epoch])
        batch = self._batch([row.ids for row in epoch], sequences, desirable, torch.arange(len(epoch)))
        return batch, metrics | {"desirable": desirable.double().mean().item()}

    def _judged(self) -> tuple[KTOBatch, dict[str, float]]:
        rows, collected = self.sample(self.prompts, self.config.group_size)
        groups = collected.rewards.double().view(-1, self.config.group_size)
        limit = self.config.desirable_above
        # Measured from the first, equal rewards are exactly at their mean.
        spread = groups - groups[:, :1]
        above = (spread - spread.mean(1, keepdim=True) if limit is None else groups - limit).flatten()
        keep = above.nonzero().squeeze(1)
        batch = self._batch([row.ids for row in rows], collected.completions.sequences, above > 0, keep)
        metrics = collected.metrics | equal_reward_metric(groups.flatten(), self.config.group_size)
        return batch, metrics | {"desirable": (above > 0).double().mean().item()}

    def _batch(self, prompts: Sequence[list[int]], sequences: Sequences, desirable: Tensor, keep: Tensor) -> KTOBatch:
        """The batch of this process's ``sequences``; prompts and labels are of the whole epoch."""
        device, own = self.accelerator.device, self.local_samples
        pairs = mismatched_prompts(prompts, self.config.experimental.kl_samples)
        here = [(i - own.start, prompt) for i, prompt in pairs if i in own]
        mismatched = None
        if here:
            lengths = sequences.mask.sum(1).tolist()
            completions = [sequences.completions[i, : lengths[i]].tolist() for i, _ in here]
            most = self.policy.context_length
            fitting = [
                prompt if most is None else prompt[-max(most - len(completion), 1) :]
                for (_, prompt), completion in zip(here, completions, strict=True)
            ]
            mismatched = pack(fitting, completions, pad=self.policy.pad, device=device)
        return KTOBatch(
            sequences=sequences,
            desirable=self.local(desirable),
            keep=keep,
            mismatched=mismatched,
            pairs=len(pairs),
            reference_point=torch.zeros((), device=device),
        )

    def _log_ratios(self, sequences: Sequences) -> Tensor:
        logp = self.policy.log_probs(self.policy.score(sequences))
        with self.policy.reference():
            return logp - self.policy.log_probs(self.policy.score(sequences))


def mismatched_prompts(prompts: Sequence[list[int]], most: int) -> list[tuple[int, list[int]]]:
    """For at most ``most`` samples, evenly spread: the index, and the next different prompt (cyclically)."""
    count, found = len(prompts), []
    for i in (torch.arange(min(most, count)) * count // min(most, count)).tolist():
        others = (prompts[(i + step) % count] for step in range(1, count))
        other = next((prompt for prompt in others if prompt != prompts[i]), None)
        if other is not None:
            found.append((i, other))
    return found
