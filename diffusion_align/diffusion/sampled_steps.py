"""What the methods share that train on the noisy steps they sampled: which steps those are, and how far that leads.

The trained steps are part of the sampler's stochastic ones, by ``timestep_range``, ``timestep_fraction`` or a window. A
method whose loss has no KL is compared with the reference at a few of them while it trains, by ``KLProbes``.
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
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.path_kl import choose_actions, path_kl
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, transition
from diffusion_align.diffusion.sampled_steps_settings import SampledStepsConfig
from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps
from diffusion_align.diffusion.trained_steps import outweighing_step, trained_steps
from diffusion_align.diffusion.trainer import Batch, Collected, DenoisingTrainer
from diffusion_align.diffusion.transitions import GaussianTransition, Reduction, nats_per_squared_error
from diffusion_align.diffusion.windows import mix, window
from diffusion_align.errors import ConfigError, TrainingError
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.context import EpochCost, Metric
from diffusion_align.training.finite import MORE_ROOM
from diffusion_align.training.randomness import generator


def kl_probes(config: SampledStepsConfig, steps: int, actions: int) -> int:
    """How many actions per epoch ``kl_path`` is estimated from; none where every one is compared.

    1 % of an epoch's passes, a backward pass counted as two, or, if that is more, each step once, and two for an error.
    Each costs two passes: at most 2 % of the epoch's, if not so few.

    Args:
        config: checked settings.
        steps: trained ones of a path.
        actions: of an epoch, that are trained on.
    """
    if config.has_kl_loss:
        return 0
    passes = config.samples_per_epoch * config.sampler.steps + 3 * config.inner_epochs * actions
    return max(int(0.01 * passes), steps, 2)


@dataclass
class KLProbes:
    """n actions of an epoch, of all processes, at which the policy is compared with the reference; on the CPU.

    Attributes:
        path: this process's part of the epoch.
        samples, actions: (n,) global sample, and which of its actions.
        update: (n,) before which of the epoch's updates each is looked at; -1 afterwards.
        found: step and KL of those of this process that were looked at.
        updates: so many have been made.
    """

    path: Trajectory
    samples: Tensor
    actions: Tensor
    update: Tensor
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    updates: int = 0


class SampledStepsTrainer(DenoisingTrainer[Batch]):
    """Samples groups of images and records the steps of them that are trained on; see ``DenoisingTrainer``.

    ``estimate`` calls ``watch_kl`` with what it trains on.

    Attributes:
        trained_steps: those of ``epoch``, of which a window lies elsewhere in each; ``schedule`` is noisy there.

    Raises:
        ConfigError: the sampler setting has no stochastic step.
    """

    config: SampledStepsConfig
    config_class = SampledStepsConfig
    metrics: ClassVar[Mapping[str, Metric]] = {
        "first_noisy_step": Metric(
            "First step of the window",
            "step",
            "Where the noisy steps, which alone are trained on, begin; 1 is the step from pure noise.",
        ),
    }

    def __init__(
        self,
        config: SampledStepsConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any],
        prompts: list[Prompt],
        accelerator: Accelerator | None = None,
        *,
        evaluation: ImageEvaluation | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, policy, reward, prompts, accelerator, evaluation=evaluation, callbacks=callbacks)
        self._noisy, self._nats = self.schedule, nats_per_squared_error(self.exact_schedule)
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
        name, images = every.what
        noisy = f", {count} of them noisy" if config.sampler.noisy_steps else ""
        return replace(
            every,
            what=(name, images + noisy),
            actions=actions,
            trained=every.width * actions * config.inner_epochs,
            # Of the policy and of the reference.
            probed=2 * every.width * min(kl_probes(config, count, actions), actions) if config.has_reference else 0,
            recorded=2 * actions,
        )

    def sample_steps(self, *, reduction: Reduction = "mean", record_means: bool = False) -> Collected:
        """Sample and score this process's images, recording the steps that will be trained on; see ``sample``."""
        self._place_window()
        collected = self.sample(
            group_size=self.config.group_size,
            record=self._recorded_steps,
            reduction=reduction,
            schedule=self.schedule,
            record_means=record_means,
        )
        if self.config.sampler.noisy_steps is None:
            return collected
        first = {"first_noisy_step": float(self.trained_steps[0] + 1)}
        return replace(collected, metrics=collected.metrics | first)

    def watch_kl(self, path: Trajectory, samples: Tensor) -> None:
        """Look at the KL of some actions during the epoch's updates, unless the loss has that of every one.

        Args:
            path: this process's part of the epoch.
            samples: (K,) global indices of those that are trained on.
        """
        looks = not self.config.has_kl_loss and self.policy.has_reference and len(samples) > 0
        self._probes = self._choose_probes(path, samples) if looks else None

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Look at the KL of some actions before the step."""
        if self._probes is not None:
            self._measure_kl(self._probes, self._probes.updates)
            self._probes.updates += 1
        return {}

    def after_updates(self) -> dict[str, float]:
        """Without a KL in the loss: ``kl_path`` of the actions looked at over the epoch, and its standard error."""
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

    def reference_at(self, path: Trajectory, samples: Tensor, actions: Tensor) -> GaussianTransition:
        """The reference's n steps from where n recorded ones began, by local sample and action (n,)."""
        x_t, _, steps, conditioning = path.at(samples, actions)
        with torch.no_grad(), self.policy.reference():
            return transition(self.policy, self.schedule, x_t, steps, conditioning)

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

    def _choose_probes(self, path: Trajectory, keep: Tensor) -> KLProbes:
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
        return KLProbes(path, keep[rows], columns, updates)

    @torch.no_grad()
    def _measure_kl(self, probes: KLProbes, update: int | None) -> None:
        """Compare the policy as it is now with the reference, at this process's actions of ``update`` or all left."""
        path, own = probes.path, self.local_samples
        due = probes.update >= 0 if update is None else probes.update == update
        wanted = due & (probes.samples >= own.start) & (probes.samples < own.stop)
        probes.update[wanted] = -1
        if not wanted.any():  # split() would give one part, an empty one
            return
        for places in wanted.nonzero().squeeze(1).split(self.config.micro_batch_size):
            samples = (probes.samples[places] - own.start).to(self.processes.device)
            actions = probes.actions[places].to(self.processes.device)
            x_t, _, steps, conditioning = path.at(samples, actions)
            now = transition(self.policy, self.schedule, x_t, steps, conditioning)
            probes.found.append((steps, now.kl(self.reference_at(path, samples, actions))))
