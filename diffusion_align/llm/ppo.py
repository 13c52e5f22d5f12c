"""PPO: a language model with a value head (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al., arXiv:2203.02155).

The actions are tokens. With the reward r of a completion, the reward of token t is ([002] eq. 20)

    r 1[t = last] - kl_coef log(pi_old/pi_ref)

whose generalised advantages A and returns R give the loss, a mean over all tokens,

    -min(rho A, clip(rho) A) + value_coef value_loss(V, R)

V is linear in the policy's last hidden state. ``kl_target`` moves kl_coef so that the KL of a completion comes to be
that many nats (Ziegler et al. 2019, arXiv:1909.08593, §2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.estimators import gae, kl_reward, masked_whiten, value_loss
from diffusion_align.llm.collection import Collected
from diffusion_align.llm.policy import Scored, Sequences, pad_to
from diffusion_align.llm.policy_gradient import PolicyGradientTrainer
from diffusion_align.llm.settings import PPOConfig
from diffusion_align.llm.trainer import kl_metrics, per_sample
from diffusion_align.training.context import EpochCost, Metric
from diffusion_align.training.method import TrainingPlan


@dataclass(frozen=True)
class PPOBatch:
    """What one process trains on in an epoch: B completions of at most T tokens, (B, T) each; on the device."""

    sequences: Sequences
    logp_old: Tensor
    values_old: Tensor
    advantages: Tensor
    returns: Tensor
    mean_length: float


class PPOTrainer(PolicyGradientTrainer[PPOBatch]):
    """Trains as ``PPOConfig`` says; see ``PolicyGradientTrainer`` for the arguments."""

    config: PPOConfig
    config_class = PPOConfig
    metrics = {  # noqa: RUF012
        "value/mean": Metric("Value, mean", "reward", "What the value head expects; it should follow the return."),
        "returns/mean": Metric("Return, mean", "reward", "The reward still to come, less the price of the KL."),
    }

    @cached_property
    def kl_coef(self) -> float:
        """The price of one nat of KL now; ``kl_target`` moves it."""
        return self.config.kl_coef

    @cached_property
    def value_head(self) -> nn.Linear:
        """It begins with 0 for every token, and uses no random numbers."""
        head = nn.utils.skip_init(nn.Linear, self.policy.hidden_size, 1, device=self.policy.device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """Values take a pass of their own."""
        every = super().epoch_cost(config, steps)
        return replace(every, estimated=every.estimated + config.samples_per_epoch)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        head = {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}
        return self.policy.trainable | head

    @torch.no_grad()
    def estimate(self, collected: Collected) -> tuple[PPOBatch, TrainingPlan, dict[str, float]]:
        """Values, rewards of tokens, advantages and returns; and the next epoch's ``kl_coef``."""
        config, completions = self.config, collected.completions
        sequences, logp_old, mask = completions.sequences, completions.logp_old, completions.sequences.mask
        penalty = config.missing_eos_penalty * (~completions.finished).float()
        own = self.local(collected.rewards.to(logp_old.dtype)) - penalty
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        rewards = torch.where(last, own[:, None], 0.0)
        metrics: dict[str, float] = {}
        if config.kl_coef > 0:
            logp_ref = self.reference_log_probs(sequences)
            rewards = rewards - self.kl_coef * kl_reward(logp_old, logp_ref, "k1", mask=mask)
            metrics = {"kl_coef": self.kl_coef, **kl_metrics(logp_old, logp_ref, mask, self.processes)}
        values = self.in_batches(sequences, lambda some: self._values(self.policy.hidden(some)), "  values")
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        metrics["value/mean"] = self._mean(values, mask)
        metrics["returns/mean"] = self._mean(returns, mask)
        if config.whiten_advantages:
            advantages = self._whitened(advantages, mask)
        mean_length = max(self.processes.sum(mask.sum()) / config.samples_per_epoch, 1.0)
        if config.experimental.kl_target is not None:
            self.kl_coef = adapted(
                self.kl_coef,
                metrics["kl_path"],
                config.experimental.kl_target,
                config.samples_per_epoch / config.experimental.kl_horizon,
            )
        batch = PPOBatch(sequences, logp_old, values, advantages, returns, mean_length)
        return batch, TrainingPlan(torch.arange(config.samples_per_epoch)), metrics

    def loss(self, batch: PPOBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring."""
        config, policy = self.config, self.policy
        sequences = batch.sequences[samples]
        mask = sequences.mask
        logp_old, advantages, values_old, returns = (
            x[samples, : mask.shape[1]] for x in (batch.logp_old, batch.advantages, batch.values_old, batch.returns)
        )
        scored = policy.score(sequences, with_hidden=True, with_entropy=True)
        logp, values = policy.log_probs(scored), self._values(scored)
        policy_losses, statistics = self.surrogate(scored, logp, logp_old, advantages)
        value_losses = value_loss(values, values_old, returns, clip=config.value_clip, mask=mask)
        statistics["loss/value"] = value_losses.detach()[mask]
        losses = per_sample(
            policy_losses + config.value_coef * value_losses,
            mask,
            "dapo",
            mean_length=batch.mean_length,
            max_length=config.max_completion_length,
        )
        return losses, statistics

    def loss_coefficients(self) -> dict[str, float]:
        return {"value_coef": self.config.value_coef, "kl_coef": self.kl_coef}

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {"kl_coef": self.kl_coef}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.kl_coef = state["kl_coef"]

    def _values(self, scored: Scored) -> Tensor:
        """V (B, T) of the state in which each token was chosen, 0 where the mask is False."""
        assert scored.hidden is not None
        return scored.of_tokens(self.value_head(scored.hidden.to(self.value_head.weight.dtype)).squeeze(-1))

    def _mean(self, x: Tensor, mask: Tensor) -> float:
        return self.processes.sum(x[mask].sum()) / max(self.processes.sum(mask.sum()), 1)

    def _whitened(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        if self.processes.count == 1:
            return masked_whiten(x, mask, (0, 1))
        parts = self.processes.gather_in_order([(x.cpu(), mask.cpu())])
        width = max(part.shape[1] for part, _ in parts)
        all_x = torch.cat([pad_to(part, width, 0.0) for part, _ in parts])
        all_mask = torch.cat([pad_to(counts, width, False) for _, counts in parts])
        return self.local(masked_whiten(all_x, all_mask, (0, 1)))[:, : x.shape[1]].to(x)


def adapted(kl_coef: float, kl: float, target: float, share: float) -> float:
    """The coefficient after ``share`` of a horizon in which the KL was ``kl`` nats instead of ``target``.

    ``kl_coef (1 + share clip(kl/target - 1, -0.2, 0.2))``, share at most 1; Ziegler et al. 2019, §2.2.
    """
    return kl_coef * (1 + min(share, 1.0) * min(max(kl / target - 1, -0.2), 0.2))
