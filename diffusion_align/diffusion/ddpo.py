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
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.advantages import Advantages
from diffusion_align.diffusion.ddpo_settings import EVERY_LATER_STEP, DDPOConfig
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.path_kl import choose_actions, path_kl
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, replay, transition
from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps
from diffusion_align.diffusion.trained_steps import outweighing_step, trained_steps
from diffusion_align.diffusion.trainer import Collected, DenoisingTrainer
from diffusion_align.diffusion.transitions import GaussianTransition, nats_per_squared_error
from diffusion_align.diffusion.windows import mix, window
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
from diffusion_align.training.finite import MORE_ROOM
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
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


def kl_probes(config: DDPOConfig, steps: int, actions: int) -> int:
    """How many actions per epoch ``kl_path`` is estimated from; none where every one is compared.

    1 % of an epoch's passes, a backward pass counted as two, or, if that is more, each step once, and two for an error.
    Each costs two passes: at most 2 % of the epoch's, if not so few.

    Args:
        config: checked settings.
        steps: trained ones of a path.
        actions: of an epoch, that are trained on.
    """
    if config.kl_coef > 0:
        return 0
    passes = config.samples_per_epoch * config.sampler.steps + 3 * config.inner_epochs * actions
    return max(int(0.01 * passes), steps, 2)


@dataclass
class KLProbes:
    """n actions of an epoch, of all processes, at which the policy is compared with the reference; on the CPU.

    Attributes:
        batch: this process's part of the epoch.
        samples, actions: (n,) global sample, and which of its actions.
        update: (n,) before which of the epoch's updates each is looked at; -1 afterwards.
        found: step and KL of those of this process that were looked at.
        updates: so many have been made.
    """

    batch: DDPOBatch
    samples: Tensor
    actions: Tensor
    update: Tensor
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    updates: int = 0


class DDPOTrainer(DenoisingTrainer[DDPOBatch]):
    """Trains as ``DDPOConfig`` says; see ``DenoisingTrainer`` for the arguments.

    Raises:
        ConfigError: the sampler setting has no stochastic step.
    """

    config: DDPOConfig
    config_class = DDPOConfig
    metrics: ClassVar[Mapping[str, Metric]] = {
        "first_noisy_step": Metric(
            "First step of the window",
            "step",
            "Where the noisy steps, which alone are trained on, begin; 1 is the step from pure noise.",
        ),
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
        self._noisy, self._nats = self.schedule, nats_per_squared_error(self.exact_schedule)
        self.dimensions = math.prod(policy.latent_shape)
        self.clip, self.clip_high, self.clip_nats = config.clip_bounds(self.dimensions)
        if config.kl_bound_nats is not None:
            self.clip = self.clip_high = self.clip_nats = math.inf
        self._probes: KLProbes | None = None
        self._place_window()

    @classmethod
    def trained_schedule(
        cls, config: Any, scheduler: Any, set_timesteps: SetTimesteps | None = None
    ) -> DiffusionSchedule:
        sampler, schedule = config.sampler, super().trained_schedule(config, scheduler, set_timesteps)
        if sampler.noisy_steps is not None:
            quiet = sampler.quiet.schedule(scheduler, set_timesteps)
            if len(quiet.stochastic_steps):
                raise ConfigError([f"sampler.{sampler.always_noisy}"])
        return schedule

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule, epoch: int = 0) -> Tensor:
        """Those of ``epoch``, of which a window lies elsewhere in each."""
        sampler = config.sampler
        if sampler.noisy_steps is not None:
            steps = trained_steps(schedule, sampler.noisy_range)
            if len(steps) < sampler.noisy_steps:
                within = "" if sampler.noisy_range is None else f" with noisy_range={list(sampler.noisy_range)}"
                left = f"sampler.steps={sampler.steps}{within} leaves {len(steps)} of the stochastic steps"
                few = f"fewer than noisy_steps={sampler.noisy_steps}: lower it, or use more steps or a wider range"
                raise ConfigError([f"{left}, {few}"])
            return window(steps, sampler.noisy_steps, order=sampler.noisy_order, seed=config.seed, epoch=epoch)
        steps = trained_steps(schedule, config.timestep_range)
        if not len(steps):
            within = "" if config.timestep_range is None else f" with timestep_range={list(config.timestep_range)}"
            left = f"sampler.steps={config.sampler.steps}{within}"
            raise ConfigError([f"{left} leaves no stochastic step to train on: use more steps or a wider range"])
        if config.experimental.credit == "to_go" and steps[-1] < schedule.stochastic_steps[-1]:
            raise ConfigError([EVERY_LATER_STEP])
        return steps

    @staticmethod
    def outweighing_step(config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None) -> str | None:
        """See ``DenoisingTrainer``; with a window one of all the steps among which it may lie."""
        sampler = config.sampler
        if schedule is None or sampler.noisy_steps is None:
            return DenoisingTrainer.outweighing_step(config, schedule, steps)
        return outweighing_step(schedule, trained_steps(schedule, sampler.noisy_range), setting="sampler.noisy_range")

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        every = super().epoch_cost(config, steps)
        count = (config.sampler.noisy_steps or config.sampler.steps) if steps is None else len(steps)
        actions = every.units * max(1, round(config.timestep_fraction * count))
        passes = every.width * actions
        name, images = every.what
        noisy = f", {count} of them noisy" if config.sampler.noisy_steps else ""
        return replace(
            every,
            what=(name, images + noisy),
            actions=actions,
            trained=passes * config.inner_epochs,
            reference=passes if config.kl_coef > 0 else 0,
            # Of the policy and of the reference.
            probed=2 * every.width * min(kl_probes(config, count, actions), actions) if config.has_reference else 0,
            recorded=(3 if config.needs_old_means else 2) * actions,
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
        self._place_window()
        collected = self.sample(
            group_size=config.group_size,
            record=self._recorded_steps,
            reduction=config.logp_reduction,
            schedule=self.schedule,
            record_means=config.needs_old_means,
        )
        if config.sampler.noisy_steps is None:
            return collected, collected.metrics
        return collected, collected.metrics | {"first_noisy_step": float(self.trained_steps[0] + 1)}

    def estimate(self, collected: Collected) -> tuple[DDPOBatch, TrainingPlan, dict[str, float]]:
        """Advantages (global statistics) and, when they are used more than once, the reference's predictions."""
        config, path = self.config, collected.trajectory
        advantages = self.advantages(collected.samples, collected.scores, collected.rewards)
        metrics = equal_reward_metric(collected.rewards, config.group_size)

        own = self.local(advantages.to(path.logp_old.dtype))
        batch = DDPOBatch(path, own[:, None].expand_as(path.steps))
        uses_reference = config.kl_coef > 0
        in_reward = uses_reference and (config.kl == "k1_reward" or config.experimental.credit == "to_go")
        if uses_reference and (in_reward or config.inner_epochs > 1):
            batch = replace(batch, reference_mean=self._reference_means(batch))
        if in_reward:
            batch = replace(batch, advantages=batch.advantages - config.kl_coef * self._kl_in_reward(batch))
        # An image without advantage has no policy gradient; with a KL term it still has that one.
        keep = torch.arange(len(advantages)) if uses_reference else advantages.nonzero().squeeze(1)
        looks = not uses_reference and self.policy.has_reference and len(keep) > 0
        self._probes = self._choose_probes(batch, keep) if looks else None
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
        if config.kl_coef > 0:  # without one, ``check_update`` looks how far the policy has gone
            reference = self._reference(batch, samples, actions)
            if config.kl == "closed_form":
                penalty = now.kl(reference, reduction=config.logp_reduction)
                losses = losses + config.kl_coef * penalty
            statistics["kl"] = now.detach().kl(reference)
            statistics["kl_path"] = statistics["kl"] * len(self.trained_steps)
            statistics["kl_path_stderr"] = statistics["kl_path"]
        return losses, statistics

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Refuse a setting whose replayed ratio leaves the clip range although no weight has changed.

        Without a price of the KL, looks at that of some actions before the step.
        """
        if self._probes is not None:
            self._measure_kl(self._probes, self._probes.updates)
            self._probes.updates += 1
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

    def after_updates(self) -> dict[str, float]:
        """Without a price of the KL: ``kl_path`` of the actions looked at over the epoch, and its standard error."""
        probes = self._probes
        if probes is None:
            return {}
        self._measure_kl(probes, None)  # what belonged to updates without samples
        # Of all processes, in an order that does not depend on how many there are.
        found = self.processes.gather_in_order([(steps.cpu(), kl.double().cpu()) for steps, kl in probes.found])
        steps, kl = (torch.cat(column) for column in zip(*found, strict=True))
        by_kl = kl.argsort(stable=True)
        order = by_kl[steps[by_kl].argsort(stable=True)]
        path, error = path_kl(steps[order], kl[order], self.trained_steps, self._kl_weights)
        if not math.isfinite(path):
            raise TrainingError(f"the KL to the reference is {path} after step {self.step}: {MORE_ROOM}")
        return {"kl": path / len(self.trained_steps), "kl_path": path, "kl_path_stderr": error}

    def loss_coefficients(self) -> dict[str, float]:
        return {"kl_coef": self.config.kl_coef}

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | self.advantages.state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.advantages.load(state)

    def _place_window(self) -> None:
        """Where ``schedule`` is noisy in this epoch, ``trained_steps``, and in what proportion their KLs are."""
        self.trained_steps = self.steps_trained_on(self.config, self.exact_schedule, self.epoch)
        self._kl_weights = self._nats[self.trained_steps]
        if self.config.sampler.noisy_steps is not None:
            self.schedule = mix(self._noisy, self.sampling_schedule, self.trained_steps)

    def _recorded_steps(self, sample: int) -> Tensor:
        """(K,) those of the trained steps that are recorded of global ``sample`` in this epoch, sorted."""
        count = max(1, round(self.config.timestep_fraction * len(self.trained_steps)))
        stream = generator(self.config.seed, "steps", self.epoch, sample)
        chosen = torch.randperm(len(self.trained_steps), generator=stream)[:count]
        return self.trained_steps[chosen.sort().values]

    def _choose_probes(self, batch: DDPOBatch, keep: Tensor) -> KLProbes:
        """Which actions of the epoch's samples ``keep`` to look at, each before one of the updates.

        Each costs two passes, of the policy and the reference in one batch shape, so that equal weights have a KL of
        exactly 0 in every precision.
        """
        config = self.config
        steps = torch.stack([self._recorded_steps(int(i)) for i in keep])
        most = kl_probes(config, len(self.trained_steps), steps.numel())
        stream = generator(config.seed, "kl", self.epoch)
        chosen = choose_actions(steps, self.trained_steps, self._kl_weights, most, stream)
        rows, columns = chosen.unbind(1)
        updates = torch.arange(len(chosen)) % (config.inner_epochs * config.updates_per_epoch)
        return KLProbes(batch, keep[rows], columns, updates)

    @torch.no_grad()
    def _measure_kl(self, probes: KLProbes, update: int | None) -> None:
        """Compare the policy as it is now with the reference, at this process's actions of ``update`` or all left."""
        batch, own = probes.batch, self.local_samples
        due = probes.update >= 0 if update is None else probes.update == update
        wanted = due & (probes.samples >= own.start) & (probes.samples < own.stop)
        probes.update[wanted] = -1
        if not wanted.any():  # split() would give one part, an empty one
            return
        for places in wanted.nonzero().squeeze(1).split(self.config.micro_batch_size):
            samples = (probes.samples[places] - own.start).to(self.processes.device)
            actions = probes.actions[places].to(self.processes.device)
            x_t, _, steps, conditioning = batch.path.at(samples, actions)
            now = transition(self.policy, self.schedule, x_t, steps, conditioning)
            probes.found.append((steps, now.kl(self._reference(batch, samples, actions))))

    def _reference(self, batch: DDPOBatch, samples: Tensor, actions: Tensor) -> GaussianTransition:
        x_t, _, steps, conditioning = batch.path.at(samples, actions)
        if batch.reference_mean is not None:
            return GaussianTransition(batch.reference_mean[samples, actions], self.schedule.at(steps).std.flatten())
        with torch.no_grad(), self.policy.reference():
            return transition(self.policy, self.schedule, x_t, steps, conditioning)

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
