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

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.errors import short
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
from diffusion_align.llm.policy_gradient import PolicyGradientConfig, PolicyGradientTrainer
from diffusion_align.llm.trainer import LossType, kl_metrics, per_sample
from diffusion_align.training.aliases import other_words
from diffusion_align.training.config import OrInfinite
from diffusion_align.training.context import EpochCost
from diffusion_align.training.statistics import equal_reward_metric
from diffusion_align.training.trainer import TrainingPlan

KLForm = Literal[
    "k1_reward",
    "k2_reward",
    "k3_reward",
    "k3_gradient_reward",
    "k1_loss",
    "k2_loss",
    "k3_loss",
    "full_vocabulary",
]


class GRPOConfig(PolicyGradientConfig):
    """Settings of GRPOTrainer; see ``PolicyGradientConfig`` for the others."""

    method: str = Field("grpo", description="the training method")
    inner_epochs: int = Field(
        1,
        ge=1,
        le=MOST,
        validation_alias=AliasChoices("inner_epochs", "num_iterations"),
        description="passes over an epoch's samples; `num_iterations` is the same",
    )

    ratio_level: Annotated[Literal["token", "sequence"], other_words(decision="token")] = Field(
        "token", description="one ratio per token, or per completion (sequence)"
    )
    loss_type: LossType = Field("dapo", description="mean over tokens (dapo), samples' means (grpo), or sums (dr_grpo)")

    advantages: Literal["group", "leave_one_out"] = Field(
        "group",
        description="reward minus its group's mean, divided by what scale_rewards says; or minus the mean of "
        "the rest of its group, undivided (RLOO)",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="whose std the rewards are divided by"
    )
    clip_std: tuple[OrInfinite, OrInfinite] = Field(
        (0.0, math.inf), description="bounds on the std that rewards are divided by"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="of several rewards: the advantage of their sum, or the sum of each one's"
    )
    mask_truncated_completions: bool = Field(False, description="leave completions without an end out of the loss")

    beta: float = Field(0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference; 0 for none")
    kl: KLForm = Field("k1_reward", description="where the KL stands and how it is estimated")
    kl_gradient: Literal["unbiased", "direct"] = Field("unbiased", description="of the KL as a loss, see `kl_loss`")
    credit: Literal["step", "to_go"] = Field("step", description="k1_reward: to_go charges a token with later ones' KL")

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or super().needs_reference

    @property
    def logs_kl(self) -> bool:
        return self.needs_reference or self.lora is not None

    @property
    def compared(self) -> int:
        """Completions of an epoch whose KL to the reference is measured.

        Without a price of it only some, to see how far the policy has gone: 2 % of the epoch's passes (a backward pass
        counts as two), or four.
        """
        every = self.samples_per_epoch
        return every if self.beta > 0 else min(every, max(4, round(0.02 * every * (1 + 3 * self.inner_epochs))))

    def cross_checks(self) -> Iterator[str]:
        if self.num_generations < 2:
            yield "num_generations=1 leaves nothing to compare a completion with: use 2 or more"
        if not 0 <= self.clip_std[0] <= self.clip_std[1]:
            yield f"clip_std={list(self.clip_std)} must be two numbers 0 <= low <= high"
        if self.beta == 0 and (self.kl != "k1_reward" or self.reference_model is not None):
            setting = f"kl={self.kl}" if self.kl != "k1_reward" else f"reference_model={short(self.reference_model)}"
            yield f"{setting} has no effect while beta=0: set beta above 0, or leave it out"
        if self.advantages == "leave_one_out" and (self.scale_rewards == "batch" or self.clip_std != (0.0, math.inf)):
            setting = "scale_rewards=batch" if self.scale_rewards == "batch" else "clip_std"
            yield f"{setting} is of a std by which advantages=leave_one_out does not divide: leave one out"
        elif self.scale_rewards == "none" and self.clip_std != (0.0, math.inf):
            yield "clip_std bounds a std by which scale_rewards=none does not divide: leave one out"
        if self.credit == "to_go" and self.kl != "k1_reward":
            yield f"credit=to_go belongs to kl=k1_reward, not {self.kl}: change one of them"
        if self.kl_gradient == "direct" and not self.kl.endswith("_loss"):
            yield f"kl_gradient=direct belongs to a KL as a loss, not kl={self.kl}: change one of them"


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
    """Train a language model towards rewards, each completion compared with the others of its prompt.

    See ``PolicyGradientTrainer`` for the arguments.
    """

    config: GRPOConfig
    config_class = GRPOConfig
    needs_every_reward = False  # the advantage of a completion without one is 0

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """The reference looks at some completions where a nat of KL has no price."""
        return replace(super().epoch_cost(config, steps), reference=config.compared if config.logs_kl else 0)

    def estimate(self, collected: Collected) -> tuple[GRPOBatch, TrainingPlan, dict[str, float]]:
        """Group advantages over all processes, less the KL where it stands in the reward."""
        config, rewards = self.config, collected.rewards
        sequences, logp_old = collected.completions.sequences, collected.completions.logp_old
        groups = torch.arange(len(rewards)) // config.num_generations
        estimator: Callable[..., Tensor] = leave_one_out_advantages
        if config.advantages == "group":
            estimator = partial(group_advantages, scale=config.scale_rewards, clip_std=config.clip_std)
        scores, weights = rewards[:, None], None
        if config.multi_objective_aggregation == "normalize_then_sum":
            assert self.rewards is not None
            scores, weights = collected.scores, self.rewards.weights
        of_group = multi_reward_advantages(scores, groups, weights, estimator=estimator)
        metrics = equal_reward_metric(rewards, config.num_generations)

        advantages = self.local(of_group.to(logp_old.dtype))[:, None].expand(sequences.mask.shape)
        logp_ref, found = self._reference(sequences, logp_old)
        if logp_ref is not None and config.kl.endswith("_reward"):
            advantages = advantages - config.beta * self._kl_in_reward(logp_old, logp_ref, sequences.mask)
        included = collected.finished if config.mask_truncated_completions else torch.ones_like(collected.finished)
        # Without an advantage there is no policy gradient; with a KL term there still is that one.
        used = included & ((of_group != 0) | torch.tensor(config.beta > 0))
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
        scored = policy.score(sequences)
        logp = policy.log_probs(scored)
        losses, statistics = self.surrogate(
            scored, logp, logp_old, advantages, level="sequence" if config.ratio_level == "sequence" else "action"
        )
        if config.beta > 0 and not config.kl.endswith("_reward"):
            penalty = self._kl_as_loss(batch, samples, sequences, scored, logp, logp_old)
            statistics["loss/kl"] = penalty.detach()[mask]
            losses = losses + config.beta * penalty
        means = per_sample(
            losses,
            mask,
            config.loss_type,
            mean_length=batch.mean_length,
            max_length=config.max_completion_length,
        )
        return means, statistics

    def loss_coefficients(self) -> dict[str, float]:
        return {"beta": self.config.beta}

    def _reference(self, sequences: Sequences, logp_old: Tensor) -> tuple[Tensor | None, dict[str, float]]:
        """The reference's log-probs (B, T), None where a nat of KL has no price, and metrics of the KL."""
        if not self.policy.has_reference:
            return None, {}
        config = self.config
        rows = self.local_indices(torch.arange(config.compared) * config.samples_per_epoch // config.compared)
        some = sequences[rows]
        logp_ref = self.reference_log_probs(some)
        metrics = kl_metrics(logp_old[rows, : some.mask.shape[1]], logp_ref, some.mask, self.processes)
        return (pad_to(logp_ref, logp_old.shape[1], 0.0) if config.beta > 0 else None), metrics

    def _kl_in_reward(self, logp_old: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
        """(B, T) what is subtracted from the advantage, times beta."""
        kind = self.config.kl.removesuffix("_reward")
        if kind == "k3_gradient":
            return kl_gradient_coefficient(logp_old, logp_ref, "k3", mask=mask)
        penalty = kl_reward(logp_old, logp_ref, kind, mask=mask, allow_biased=True)  # type: ignore[arg-type]
        return reward_to_go(penalty, mask) if self.config.credit == "to_go" else penalty

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
                reference = self.policy.score(sequences)
            exact = categorical_kl(scored.logits, reference.logits, temperature=self.policy.temperature)
            return scored.of_tokens(exact)
        assert batch.logp_ref is not None
        return kl_loss(
            logp,
            batch.logp_ref[samples, : mask.shape[1]],
            logp_old=logp_old if config.kl_gradient == "unbiased" else None,
            kind=config.kl.removesuffix("_loss"),  # type: ignore[arg-type]
            gradient=config.kl_gradient,
            mask=mask,
            allow_biased=True,  # the recipe names the form; math and docs say what is wrong with it
        )
