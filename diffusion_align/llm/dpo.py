"""DPO and its family: a language model learns from completions preferred to others (Rafailov et al. 2023,
arXiv:2305.18290; [001] F. Sun, "Direct preference optimisation", 2025).

With l = log pi - log pi_ref of a whole completion, or of a token (l_t), and h = l_chosen - l_rejected:

    sigmoid      dpo_loss(l, l), any number of rejected; label_smoothing is conservative DPO
    robust       robust_dpo_loss: unbiased where label_smoothing of the labels are swapped
    ipo, hinge   ipo_loss, hinge_loss of h; sums over tokens, not means
    trajectory   trajectory_dpo_loss of l_t with the discount gamma and the row's label
    simpo, orpo  of the mean log-prob per token; the reference is not used

    + sft_weight * -(mean log-prob of the chosen one's tokens)       [002] §5; RPO, arXiv:2404.19733
    + the penalties of beta(x), with dynamic_beta                    [003] §5

Preferences come from a dataset, or are sampled and judged by rewards in every epoch (online).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.estimators import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kl_value,
    masked_mean,
    masked_sum,
    orpo_loss,
    robust_dpo_loss,
    rso_accept,
    simpo_loss,
    trajectory_dpo_loss,
)
from diffusion_align.llm.dynamic_beta import DynamicBeta, prompt_features
from diffusion_align.llm.preferences import PreferenceBatch, PreferenceTrainer, given_preferences
from diffusion_align.llm.reference_file import ReferenceFile
from diffusion_align.llm.settings import DPOConfig
from diffusion_align.training.context import EpochCost, Metric
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import agreement, equal_reward_metric


class DPOTrainer(PreferenceTrainer[PreferenceBatch]):
    """Trains as ``DPOConfig`` says; see ``PreferenceTrainer`` for the arguments.

    Raises:
        ConfigError: rows that the loss cannot use, or settings that do not fit the number of processes.
    """

    config: DPOConfig
    config_class = DPOConfig
    keeps = ("reference.safetensors",)
    metrics = {  # noqa: RUF012
        "beta/mean": Metric(
            "Beta of the prompts, mean", "per nat", "With dynamic_beta: the price of a nat per prompt."
        ),
    }
    rows: Sequence[PreferenceRow]

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """Both completions of a row; online, the sampled ones that make pairs. ``dynamic_beta`` reads prompts too."""
        every = super().epoch_cost(config, steps)
        pairs = config.samples_per_epoch // (config.group_size if config.online else 1)
        compared = 2 * pairs if config.pair_selection == "best_worst" else config.samples_per_epoch
        reference = compared if every.reference else 0
        looks = pairs if config.experimental.dynamic_beta is not None and not config.precompute_ref_log_probs else 0
        return replace(every, trained=compared * config.inner_epochs, reference=reference, estimated=looks)

    def data_checks(self) -> Iterator[str]:
        yield from super().data_checks()
        loss_type = self.config.loss_type
        several = next((i for i, row in enumerate(self.rows) if len(row.rejected) > 1), None)
        if several is not None and loss_type != "sigmoid":
            yield (
                f"dataset: row {several} has {len(self.rows[several].rejected)} rejected, and loss_type={loss_type} "
                "compares with one: use loss_type=sigmoid"
            )
        unsure = next((i for i, row in enumerate(self.rows) if row.label != 1), None)
        if unsure is not None and loss_type != "trajectory":
            yield (
                f"dataset: row {unsure} has the label {self.rows[unsure].label:g}, and loss_type={loss_type} takes "
                "every chosen for preferred: use loss_type=trajectory, or leave the column out"
            )

    @functools.cached_property
    def dynamic_beta(self) -> DynamicBeta | None:
        """The beta of each prompt, if it is trained."""
        config, policy = self.config, self.policy
        if config.experimental.dynamic_beta is None:
            return None
        with policy.reference() if policy.has_reference else contextlib.nullcontext():
            size = policy.hidden_size  # of the model whose states are the embeddings
        return DynamicBeta(
            config.experimental.dynamic_beta, dimensions=size, beta=config.beta, seed=config.seed, device=policy.device
        )

    @functools.cached_property
    def reference_file(self) -> ReferenceFile | None:
        """The reference's log-probs of all rows, where they are computed beforehand."""
        if not self.config.precompute_ref_log_probs:
            return None
        path = self.folder / "reference.safetensors"
        return ReferenceFile(
            path, self.rows, self.policy, with_features=self.config.experimental.dynamic_beta is not None
        )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable | (self.dynamic_beta.trainable if self.dynamic_beta is not None else {})

    def collect(self) -> tuple[PreferenceBatch, dict[str, float]]:
        """This process's preferences of the epoch: given, or sampled and judged."""
        return self._judged() if self.config.online else self._given()

    def estimate(self, batch: PreferenceBatch) -> tuple[PreferenceBatch, TrainingPlan, dict[str, float]]:
        """What the reference says, where it is needed more than once or of the prompts."""
        config, own = self.config, self.local_indices(batch.keep)
        if config.inner_epochs > 1 and batch.logp_ref is None and not config.reference_free:
            places = torch.cat([batch.chosen[own], batch.rejected[own][batch.counts[own]]])
            batch = replace(batch, logp_ref=self.reference_of_places(batch.sequences, places))
        if self.dynamic_beta is not None and batch.embeddings is None and len(own):
            batch = self._with_prompt_features(batch, own)
        return batch, TrainingPlan(batch.keep), {}

    def dropout_seeds(self, batch: PreferenceBatch, samples: Tensor, actions: Tensor) -> list[int]:
        """All completions of a sample share a mask."""
        seeds = super().dropout_seeds(batch, samples, actions)
        return [*seeds, *(seeds[i] for i in batch.counts[samples].nonzero()[:, 0].tolist())]

    def loss_coefficients(self) -> dict[str, float]:
        return {name: getattr(self.config, name) for name in ("beta", "orpo_weight", "sft_weight", "simpo_margin")}

    def loss(self, batch: PreferenceBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring; one forward pass over all completions of the samples.

        ``rewards/`` are beta l (simpo: beta times the mean log-prob, orpo: that) without a discount, of several
        rejected their mean; accuracy is the share of them that the chosen one beats, ties 1/2, and as likely as the
        label says. ``drift`` is k3 of KL(pi_ref||pi) a token, as far as the completions are the reference's.
        """
        config, n = self.config, len(samples)
        counts = batch.counts[samples]
        places = torch.cat([batch.chosen[samples], batch.rejected[samples][counts]])
        sequences = batch.sequences[places]
        mask = sequences.mask
        logp = self.policy.log_probs(self.policy.score(sequences))
        beta: float | Tensor = config.beta
        penalty: Tensor | None = None
        statistics: dict[str, Tensor] = {}
        if self.dynamic_beta is not None:
            assert batch.embeddings is not None
            assert batch.entropy is not None
            beta, penalty, statistics = self.dynamic_beta(batch.embeddings[samples], batch.entropy[samples])

        if config.reference_free:
            compared = masked_mean(logp, mask, 1)
        else:
            logp_ref = self.reference_of(batch.logp_ref, places, sequences)
            compared = masked_sum(logp - logp_ref, mask, 1)
            statistics["drift"] = kl_value(logp_ref, logp, "k3", mask=mask)[mask]
        chosen, rejected = _sides(compared, counts)
        labels = batch.labels[samples].to(compared)
        if config.loss_type == "trajectory":
            tokens = logp - logp_ref
            losses = trajectory_dpo_loss(
                tokens[:n],
                tokens[n:],
                labels,
                beta,
                gamma=config.gamma,
                first_mask=mask[:n],
                second_mask=mask[n:],
            )
        else:
            losses = self.pair_losses(chosen, rejected, counts, beta)

        scale = 1.0 if config.loss_type == "orpo" else beta.detach() if isinstance(beta, Tensor) else beta
        reward_w, reward_l = scale * chosen.detach(), scale * masked_mean(rejected.detach(), counts, 1)
        ahead = chosen.detach()[:, None] - rejected.detach()
        logp_w, logp_l = _sides(masked_sum(logp.detach(), mask, 1), counts)
        statistics |= {
            "loss/preference": losses.detach(),
            "rewards/chosen": reward_w,
            "rewards/rejected": reward_l,
            "rewards/margins": reward_w - reward_l,
            "rewards/accuracies": masked_mean(agreement(ahead, labels[:, None]), counts, 1),
            "logps/chosen": logp_w,
            "logps/rejected": masked_mean(logp_l, counts, 1),
        }
        if config.sft_weight > 0:
            imitation = -masked_mean(logp[:n], mask[:n], 1)
            statistics["loss/sft"] = imitation.detach()
            losses = losses + config.sft_weight * imitation
        return losses if penalty is None else losses + penalty, statistics

    def pair_losses(self, chosen: Tensor, rejected: Tensor, counts: Tensor, beta: float | Tensor) -> Tensor:
        """(n,) from log-ratios of the chosen (n,) and rejected (n, M), which is 1 but for sigmoid; yours to override.

        Args:
            counts: (n, M) bool, which of the rejected a sample has.
            beta: of each sample (n,) where it is dynamic.
        """
        config, first = self.config, rejected[:, 0]
        match config.loss_type:
            case "sigmoid":
                return dpo_loss(chosen, rejected, beta, label_smoothing=config.label_smoothing, mask=counts)
            case "robust":
                return robust_dpo_loss(chosen, first, beta, label_smoothing=config.label_smoothing)
            case "ipo":
                return ipo_loss(chosen, first, beta)
            case "hinge":
                return hinge_loss(chosen, first, beta)
            case "simpo":
                return simpo_loss(chosen, first, beta, margin=config.simpo_margin)
            case _:
                return orpo_loss(chosen, first, config.orpo_weight)

    def _given(self) -> tuple[PreferenceBatch, dict[str, float]]:
        indices, metrics = self.given()
        own = [indices[i] for i in self.local_samples]
        rows, keep = [self.rows[i] for i in own], torch.arange(len(indices))
        batch = given_preferences(rows, keep, pad=self.policy.pad, device=self.accelerator.device)
        if self.reference_file is not None:
            self.reference_file.fill(
                self.identity,
                untrained=self.step == 0,
                batch_size=self.config.sample_batch_size,
                processes=self.processes,
                bars=self.bars,
            )
            batch = self.reference_file.put_into(batch, own)
        return batch, metrics

    def _judged(self) -> tuple[PreferenceBatch, dict[str, float]]:
        """Sample completions of every prompt: one is chosen, others are rejected; ties are left out."""
        config, own, device = self.config, self.local_samples, self.accelerator.device
        by_reference = config.experimental.sample_from == "reference"
        with self.policy.reference() if by_reference else contextlib.nullcontext():
            _, collected = self.sample(self.prompts, config.group_size)
        rewards = collected.rewards.view(-1, config.group_size)
        first = torch.arange(len(rewards)) * config.group_size
        metrics = {
            **equal_reward_metric(collected.rewards, config.group_size),
            "reward_gap": (rewards.amax(1) - rewards.amin(1)).mean().item(),
        }
        if config.pair_selection == "rso":
            streams = [generator(config.seed, "rso", self.epoch, group) for group in range(len(rewards))]
            accepted, chosen, rejected, counts = rso_pairs(rewards, config.experimental.rso_beta, streams)
            metrics["rso/accepted"] = accepted.double().mean().item()
        else:
            chosen, rejected, counts = best_against(rewards, rest=config.pair_selection == "best_rest")
        metrics["frac_without_pair"] = (~counts.any(1)).double().mean().item()

        size = (config.samples_per_epoch, counts.shape[1])
        all_rejected = torch.zeros(size, dtype=torch.int64)
        all_counts = torch.zeros(size, dtype=torch.bool)
        all_rejected[first + chosen], all_counts[first + chosen] = first[:, None] + rejected, counts
        batch = PreferenceBatch(
            sequences=collected.completions.sequences,
            chosen=torch.arange(len(own), device=device),
            rejected=self.local(torch.where(all_counts, all_rejected - own.start, 0)),
            counts=self.local(all_counts),
            labels=torch.ones(len(own), device=device),
            keep=(first + chosen)[counts.any(1)],
        )
        return batch, collected.metrics | metrics

    def _with_prompt_features(self, batch: PreferenceBatch, samples: Tensor) -> PreferenceBatch:
        """With the reference's features of the prompts of ``samples``."""
        with self.policy.reference():
            parts = [
                prompt_features(self.policy, batch.sequences[batch.chosen[some]])
                for some in samples.split(self.config.sample_batch_size)
            ]
        embeddings, entropy = (torch.cat(found) for found in zip(*parts, strict=True))
        size = len(batch.chosen)
        return replace(
            batch,
            embeddings=embeddings.new_zeros(size, embeddings.shape[1]).index_copy(0, samples, embeddings),
            entropy=entropy.new_zeros(size).index_copy(0, samples, entropy),
        )


def _sides(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Values (R,) of the chosen and then the rejected: (n,), and (n, M) with 0 where none counts."""
    chosen, rejected = x[: len(counts)], x[len(counts) :]
    return chosen, torch.zeros(counts.shape, dtype=x.dtype, device=x.device).masked_scatter(counts, rejected)


def best_against(rewards: Tensor, *, rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For rewards (G, n): the best of each group (G,), its worst or all (G, M), and which of these are worse (G, M)."""
    best, worst = rewards.argmax(1), rewards.argmin(1)
    rejected = torch.arange(rewards.shape[1]).expand(rewards.shape) if rest else worst[:, None]
    return best, rejected, rewards.gather(1, rejected) < rewards.amax(1, keepdim=True)


def rso_pairs(
    rewards: Tensor, beta: float, streams: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For rewards (G, n): the candidates that ``rso_accept`` keeps (G, n), and two of them at random.

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
