"""DDPO: policy-gradient training of a denoising policy towards a reward (Black et al. 2023, arXiv:2305.13301).

The actions are the Gaussian steps of the sampler. Loss of one action, with the advantage A of its image
([000] eq. 22-31, "Rethinking the Reference model in RLHF", 2025):

    ratio:            -min(rho A, clip(rho) A)     eq. 26 with PPO-2's clip, or GRPO-Guard's rho
                      -rho A, or 0                 kl_bound_nats: 0 beyond Flow-DPPO's bound
    score_function:   -A log p(x_s | x_t)          eq. 22-24
    + kl_coef * KL(p_theta || p_ref)               eq. 30, closed form; or k1 in the reward, eq. 31
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.advantages import Advantages
from diffusion_align.diffusion.ddpo_settings import EVERY_LATER_STEP, DDPOConfig
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, replay
from diffusion_align.diffusion.sampled_steps import SampledStepsTrainer
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.trainer import Collected
from diffusion_align.diffusion.transitions import GaussianTransition
from diffusion_align.errors import ConfigError, TrainingError
from diffusion_align.estimators import (
    clipped_ratio_loss,
    divergence_mask,
    guarded_ratio,
    importance_ratio,
    kl_reward,
    reward_to_go,
    score_function_loss,
)
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.context import EpochCost, Lines, Metric
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.statistics import equal_reward_metric, first_pass_deviation, ratio_statistics


@dataclass(frozen=True)
class DDPOBatch:
    """What one process trains on in an epoch: B samples with K recorded steps each, on the device.

    Attributes:
        path: the samples and their steps.
        advantages: (B, K).
        reference_mean: (B, K, C, H, W) where it is known beforehand.
    """

    path: Trajectory
    advantages: Tensor
    reference_mean: Tensor | None = None


class DDPOTrainer(SampledStepsTrainer[DDPOBatch]):
    """Trains as ``DDPOConfig`` says; see ``DenoisingTrainer`` for the arguments."""

    config: DDPOConfig
    config_class = DDPOConfig
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl_old": Metric(
            "KL to the policy that sampled, per step",
            "nats per step",
            "How far an update began from the policy that sampled its actions, on average; kl_old/max is the largest.",
        ),
        "kl_bound/dropped": Metric(
            "Actions dropped by the KL bound",
            "fraction",
            "Share of actions beyond kl_bound_nats whose update would have taken them further, so that they were left "
            "out.",
        ),
    }

    def __init__(
        self,
        config: DDPOConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any],
        prompts: list[Prompt],
        accelerator: Accelerator | None = None,
        *,
        evaluation: ImageEvaluation | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, policy, reward, prompts, accelerator, evaluation=evaluation, callbacks=callbacks)
        self.advantages = Advantages(config, reward)
        self.dimensions = math.prod(policy.latent_shape)
        self.clip, self.clip_high, self.clip_nats = config.clip_bounds(self.dimensions)
        if config.kl_bound_nats is not None:
            self.clip = self.clip_high = self.clip_nats = math.inf

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule, epoch: int = 0) -> Tensor:
        steps = super().steps_trained_on(config, schedule, epoch)
        to_go = config.experimental.credit == "to_go" and config.sampler.noisy_steps is None
        if to_go and steps[-1] < schedule.stochastic_steps[-1]:
            raise ConfigError([EVERY_LATER_STEP])
        return steps

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        cost = super().epoch_cost(config, steps)
        return replace(
            cost,
            reference=cost.width * cost.actions if config.has_kl_loss else 0,
            recorded=(3 if config.needs_old_means else 2) * cost.actions,
        )

    @classmethod
    def in_nats(cls, config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int) -> Lines:
        lines = super().in_nats(config, schedule, steps, dimensions)
        if config.objective != "ratio":
            return lines
        if config.kl_bound_nats is not None:
            bound = f"{config.kl_bound_nats:g}, of an action to the policy that sampled it; replaces the clip"
            return [*lines, ("KL bound in nats", bound)]
        *_, nats = config.clip_bounds(dimensions)
        what = f"the joint bound on an action's {dimensions} dimensions"
        if config.ratio == "guard":
            what = f"over the std of an action's step, {what}"
        return [*lines, ("clip in nats", f"{nats:.3g}, {what}")]

    def collect(self) -> tuple[Collected, dict[str, float]]:
        """Sample and score this process's images, recording the steps that will be trained on."""
        config = self.config
        collected = self.sample_steps(reduction=config.logp_reduction, record_means=config.needs_old_means)
        return collected, collected.metrics

    def estimate(self, collected: Collected) -> tuple[DDPOBatch, TrainingPlan, dict[str, float]]:
        """Advantages (global statistics) and, when they are used more than once, the reference's predictions."""
        config, path = self.config, collected.trajectory
        advantages = self.advantages(collected.samples, collected.scores, collected.rewards)
        metrics = equal_reward_metric(collected.rewards, config.group_size)

        own = self.local(advantages.to(path.logp_old.dtype))
        batch = DDPOBatch(path, own[:, None].expand_as(path.steps))
        uses_reference = config.has_kl_loss
        in_reward = uses_reference and (config.kl == "k1_reward" or config.experimental.credit == "to_go")
        if uses_reference and (in_reward or config.inner_epochs > 1):
            batch = replace(batch, reference_mean=self._reference_means(batch))
        if in_reward:
            batch = replace(batch, advantages=batch.advantages - config.kl_coef * self._kl_in_reward(batch))
        # An image without advantage has no policy gradient; with a KL term it still has that one.
        keep = torch.arange(len(advantages)) if uses_reference else advantages.nonzero().squeeze(1)
        self.watch_kl(path, keep)
        return batch, TrainingPlan(keep, path.steps.shape[1], normalizer=len(advantages)), metrics

    def loss(self, batch: DDPOBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring; both terms in the unit of ``logp_reduction``."""
        config = self.config
        recorded = batch.path.at(samples, actions)
        logp, now = replay(self.policy, self.schedule, *recorded, reduction=config.logp_reduction)
        logp_old, advantages = batch.path.logp_old[samples, actions], batch.advantages[samples, actions]
        ratio, mask, clip = importance_ratio(logp, logp_old), None, None if math.isinf(self.clip) else self.clip
        statistics: dict[str, Tensor] = {}
        if batch.path.mean_old is not None:
            old = GaussianTransition(batch.path.mean_old[samples, actions], now.std)
            moved = now.detach().kl(old)
            statistics = {"kl_old": moved, "kl_old/max": moved}
            if config.ratio == "guard":
                ratio = guarded_ratio(logp, logp_old, now.kl(old, reduction=config.logp_reduction), now.std)
            if config.kl_bound_nats is not None:
                mask = divergence_mask(logp, logp_old, advantages, moved, bound=config.kl_bound_nats)
                statistics["kl_bound/dropped"] = (~mask).float()
        if config.objective == "ratio":
            losses = clipped_ratio_loss(ratio, advantages, clip=self.clip, clip_high=self.clip_high, mask=mask)
        else:
            losses = score_function_loss(logp, advantages)
        statistics["loss/policy"] = losses.detach()
        statistics |= ratio_statistics(ratio, logp, logp_old, advantages, clip=clip, clip_high=self.clip_high)
        if config.has_kl_loss:  # without one, ``check_update`` looks how far the policy has gone
            reference = self._reference(batch, samples, actions)
            if config.kl == "closed_form":
                penalty = now.kl(reference, reduction=config.logp_reduction)
                losses = losses + config.kl_coef * penalty
            statistics["kl"] = now.detach().kl(reference)
            statistics["kl_path"] = statistics["kl"] * len(self.trained_steps)
            statistics["kl_path_stderr"] = statistics["kl_path"]
        return losses, statistics

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Refuse a setting whose replayed ratio leaves the clip range although no weight has changed."""
        super().check_update(statistics, first=first)
        if not first:
            return {}
        exactly = f"micro_batch_size={self.config.sample_batch_size} (that of sampling)"
        bound, moved = self.config.kl_bound_nats, statistics.get("kl_old/max", 0.0)
        if bound is not None and moved > bound:
            raise TrainingError(
                f"an action is {moved:.3g} nats from the policy that sampled it before any update, beyond "
                f"kl_bound_nats={bound:g}: use mixed_precision=no, a larger bound or {exactly}"
            )
        low, high = statistics["ratio/min"], statistics["ratio/max"]
        if self.config.objective == "ratio" and (low < 1 - self.clip or high > 1 + self.clip_high):
            raise TrainingError(
                f"the replayed ratio lies in [{low:.7f}, {high:.7f}] before any update, outside the clip range "
                f"[{1 - self.clip:.7f}, {1 + self.clip_high:.7f}]: use mixed_precision=no, a wider clip_range or "
                f"{exactly}"
            )
        found = {"ratio/first_pass_deviation": first_pass_deviation(statistics)}
        return found if self.config.needs_old_means else found | {"clip_nats": self.clip_nats}

    def loss_coefficients(self) -> dict[str, float]:
        return {"kl_coef": self.config.kl_coef}

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | self.advantages.state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.advantages.load(state)

    def _reference(self, batch: DDPOBatch, samples: Tensor, actions: Tensor) -> GaussianTransition:
        if batch.reference_mean is None:
            return self.reference_at(batch.path, samples, actions)
        std = self.schedule.at(batch.path.steps[samples, actions]).std.flatten()
        return GaussianTransition(batch.reference_mean[samples, actions], std)

    @torch.no_grad()
    def _reference_means(self, batch: DDPOBatch) -> Tensor:
        """(B, K, C, H, W): the reference's mean of every recorded action."""
        means = torch.empty_like(batch.path.x_t)
        pairs = torch.cartesian_prod(*(torch.arange(n, device=means.device) for n in batch.path.steps.shape))
        for samples, actions in (p.unbind(1) for p in pairs.split(self.config.micro_batch_size)):
            means[samples, actions] = self._reference(batch, samples, actions).mean
        return means

    def _kl_in_reward(self, batch: DDPOBatch) -> Tensor:
        """(B, K) nats: k1 of each recorded action, or of the later ones where the closed form covers this one.

        In nats whatever ``logp_reduction`` is: the loss it is multiplied into already carries that factor, as the
        closed form does, so both have one expected gradient.
        """
        assert batch.reference_mean is not None
        path = batch.path
        std = self.schedule.at(path.steps.flatten()).std.flatten()
        reference = GaussianTransition(batch.reference_mean.flatten(0, 1), std)
        logp_ref = reference.log_prob(path.x_s.flatten(0, 1), reduction=self.config.logp_reduction)
        k1 = kl_reward(path.logp_old, logp_ref.view_as(path.steps), "k1") * self.config.nats_in_logp(self.dimensions)
        if self.config.experimental.credit == "step":
            return k1
        # reward_to_go sums along dim 1 in the order of the steps; recorded steps are sorted.
        to_go = reward_to_go(k1)
        return to_go if self.config.kl == "k1_reward" else to_go - k1
