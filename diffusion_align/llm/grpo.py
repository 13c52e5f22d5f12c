"""GRPO: group-relative policy optimisation of a language model (Shao et al. 2024, arXiv:2402.03300).

The actions are tokens. Loss of token t of a completion with group advantage A ([002] "Rethinking KL Divergence in
RLHF", 2025, §4), rho = pi/pi_old, r = pi_ref/pi_old, beta the price of one nat:

    -min(rho R, clip(rho) R)
    k1_reward:           R = A - beta log(1/r)              eq. 39, the default
    k2_, k3_reward:      R = A - beta (k2 or k3 of r)       biased, for comparison
    k3_gradient_reward:  R = A - beta (1 - r)               eq. 35, k3's gradient moved into the reward; biased
    k1_, k2_, k3_loss:   R = A, + beta kl_loss              k2 "unbiased" is exact, also off-policy
    full_vocabulary:     R = A, + beta sum_a pi log(pi/pi_ref)    eq. 22
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_align.estimators import (
    categorical_kl,
    group_advantages,
    kl_gradient_coefficient,
    kl_loss,
    kl_reward,
    leave_one_out_advantages,
    multi_reward_advantages,
    reward_to_go,
)
from diffusion_align.llm.collection import Collected
from diffusion_align.llm.policy import Scored, Sequences, pad_to
from diffusion_align.llm.policy_gradient import PolicyGradientTrainer
from diffusion_align.llm.settings import GRPOConfig
from diffusion_align.llm.trainer import kl_metrics, per_sample
from diffusion_align.training.context import EpochCost
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.statistics import equal_reward_metric


@dataclass(frozen=True)
class GRPOBatch:
    """What one process trains on in an epoch: B completions of at most T tokens; on the device.

    Attributes:
        sequences: the completions.
        logp_old, advantages: (B, T).
        mean_length: of the epoch's completions, tokens.
        logp_ref: (B, T) of the reference, where a nat of KL has a price.
    """

    sequences: Sequences
    logp_old: Tensor
    advantages: Tensor
    mean_length: float
    logp_ref: Tensor | None = None


class GRPOTrainer(PolicyGradientTrainer[GRPOBatch]):
    """Trains as ``GRPOConfig`` says; see ``PolicyGradientTrainer`` for the arguments."""

    config: GRPOConfig
    config_class = GRPOConfig
    needs_every_reward = False  # the advantage of a completion without one is 0

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """The reference scores each completion once, with ``kl=full_vocabulary`` beside every training pass as well;
        where a nat of KL has no price, it scores some.
        """
        every = super().epoch_cost(config, steps)
        beside = every.trained if config.kl_coef > 0 and config.kl == "full_vocabulary" else 0
        return replace(every, reference=(config.compared if config.logs_kl else 0) + beside)

    def estimate(self, collected: Collected) -> tuple[GRPOBatch, TrainingPlan, dict[str, float]]:
        """Group advantages over all processes, less the KL where it stands in the reward."""
        config, rewards = self.config, collected.rewards
        sequences, logp_old = collected.completions.sequences, collected.completions.logp_old
        groups = torch.arange(len(rewards)) // config.group_size
        estimator: Callable[..., Tensor] = leave_one_out_advantages
        if config.advantages == "group":
            estimator = partial(group_advantages, scale=config.scale_rewards, clip_std=config.experimental.clip_std)
        scores, weights = rewards[:, None], None
        if config.experimental.multi_objective_aggregation == "normalize_then_sum":
            assert self.rewards is not None
            scores, weights = collected.scores, self.rewards.weights
        of_group = multi_reward_advantages(scores, groups, weights, estimator=estimator)
        metrics = equal_reward_metric(rewards, config.group_size)

        advantages = self.local(of_group.to(logp_old.dtype))[:, None].expand(sequences.mask.shape)
        logp_ref, found = self._reference(sequences, logp_old)
        if logp_ref is not None and config.kl.endswith("_reward"):
            advantages = advantages - config.kl_coef * self._kl_in_reward(logp_old, logp_ref, sequences.mask)
        included = collected.finished if config.mask_truncated_completions else torch.ones_like(collected.finished)
        # Without an advantage there is no policy gradient; with a KL term there still is that one.
        used = included & ((of_group != 0) | torch.tensor(config.kl_coef > 0))
        tokens = self.processes.sum(sequences.mask[self.local(included)].sum())
        mean_length = max(tokens / max(int(included.sum()), 1), 1.0)
        # A mean over tokens is of those that count; a mean over completions is of all, those left out adding 0.
        among = included if config.loss_type == "dapo" else torch.ones_like(included)
        cut = "every completion was cut off at max_completion_length, and mask_truncated_completions leaves those out"
        self.none_left = super().none_left if included.any() else cut
        batch = GRPOBatch(sequences, logp_old, advantages, mean_length, logp_ref)
        return batch, TrainingPlan(used.nonzero().squeeze(1), normalizer=int(among.sum())), metrics | found

    def loss(self, batch: GRPOBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring."""
        config, policy = self.config, self.policy
        sequences = batch.sequences[samples]
        mask = sequences.mask
        logp_old, advantages = (x[samples, : mask.shape[1]] for x in (batch.logp_old, batch.advantages))
        every_token = config.kl_coef > 0 and config.kl == "full_vocabulary"
        scored = policy.score(sequences, with_entropy=True, with_logits=every_token)
        logp = policy.log_probs(scored)
        losses, statistics = self.surrogate(
            scored, logp, logp_old, advantages, level="sequence" if config.ratio_level == "sequence" else "action"
        )
        if config.kl_coef > 0 and not config.kl.endswith("_reward"):
            penalty = self._kl_as_loss(batch, samples, sequences, scored, logp, logp_old)
            statistics["loss/kl"] = penalty.detach()[mask]
            losses = losses + config.kl_coef * penalty
        means = per_sample(
            losses,
            mask,
            config.loss_type,
            mean_length=batch.mean_length,
            max_length=config.max_completion_length,
        )
        return means, statistics

    def loss_coefficients(self) -> dict[str, float]:
        return {"kl_coef": self.config.kl_coef}

    def _reference(self, sequences: Sequences, logp_old: Tensor) -> tuple[Tensor | None, dict[str, float]]:
        """The reference's log-probs (B, T), None where a nat of KL has no price, and metrics of the KL."""
        if not self.policy.has_reference:
            return None, {}
        config = self.config
        rows = self.local_indices(torch.arange(config.compared) * config.samples_per_epoch // config.compared)
        some = sequences[rows]
        logp_ref = self.reference_log_probs(some)
        metrics = kl_metrics(logp_old[rows, : some.mask.shape[1]], logp_ref, some.mask, self.processes)
        return (pad_to(logp_ref, logp_old.shape[1], 0.0) if config.kl_coef > 0 else None), metrics

    def _kl_in_reward(self, logp_old: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
        """(B, T) what is subtracted from the advantage, times beta."""
        kind = self.config.kl.removesuffix("_reward")
        if kind == "k3_gradient":
            return kl_gradient_coefficient(logp_old, logp_ref, "k3", mask=mask)
        penalty = kl_reward(logp_old, logp_ref, kind, mask=mask, allow_biased=True)  # type: ignore[arg-type]
        return reward_to_go(penalty, mask) if self.config.experimental.credit == "to_go" else penalty

    def _kl_as_loss(
        self,
        batch: GRPOBatch,
        samples: Tensor,
        sequences: Sequences,
        scored: Scored,
        logp: Tensor,
        logp_old: Tensor,
    ) -> Tensor:
        """(B, T) nats, with a gradient."""
        config, mask = self.config, sequences.mask
        if config.kl == "full_vocabulary":
            with torch.no_grad(), self.policy.reference():
                reference = self.policy.score(sequences, with_logits=True)
            exact = categorical_kl(scored.logits, reference.logits, temperature=self.policy.temperature)
            return scored.of_tokens(exact)
        assert batch.logp_ref is not None
        return kl_loss(
            logp,
            batch.logp_ref[samples, : mask.shape[1]],
            logp_old=logp_old if config.experimental.kl_gradient == "unbiased" else None,
            kind=config.kl.removesuffix("_loss"),  # type: ignore[arg-type]
            gradient=config.experimental.kl_gradient,
            mask=mask,
            allow_biased=True,  # the recipe names the form; math and docs say what is wrong with it
        )
