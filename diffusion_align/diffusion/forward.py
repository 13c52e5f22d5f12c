"""Forward-process training: a finished image is noised again, and its reward weighs the network's error there.

No step of the sampler is trained on, so it may be any, without noise and guidance, and an image needs no path. Of an
image x_0 with advantage A, noised to ``x_t = alpha_t x_0 + sigma_t eps``, the network should give ``target``, and
``err = mean |output - target|²``. Every objective (``forward_objectives``) starts from the gradient of ``A err`` and
says how far it goes; the policy that samples is ``old``, which follows the trained one with a decay.

    loss = objective(output, output_old, target, A) + kl_coef * KL(p_theta || p_ref)

KL, of the noising process undone step by step (``training_schedule``), is in nats: ``w_t |output - output_ref|²``, and
the loss is divided by what a mean squared error of 1 costs in nats, so one nat costs ``kl_coef`` in the unit of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.advantages import Advantages
from diffusion_align.diffusion.consistency import Consistency, common_share
from diffusion_align.diffusion.evaluation import ImageEvaluation
from diffusion_align.diffusion.forward_objectives import OBJECTIVES, Matching
from diffusion_align.diffusion.forward_settings import OF_FAMILY, ForwardConfig
from diffusion_align.diffusion.policy import Conditioning, DenoisingPolicy
from diffusion_align.diffusion.rollout import rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps, training_schedule
from diffusion_align.diffusion.step_draw import draw_steps, step_probabilities
from diffusion_align.diffusion.trained_steps import trained_steps
from diffusion_align.diffusion.trainer import Collected, DenoisingTrainer
from diffusion_align.diffusion.transitions import add_noise, nats_per_squared_error, network_target
from diffusion_align.errors import ConfigError, TrainingError
from diffusion_align.estimators import matching_error
from diffusion_align.models.families import check_settings
from diffusion_align.streams import print_warning
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import multiple_checks
from diffusion_align.training.context import EpochCost, Lines, Metric
from diffusion_align.training.finite import MORE_ROOM
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import equal_reward_metric, means_of, standard_error

OLD = "old"
"""The snapshot of the policy that samples."""
NOTICED = 0.1
"""The share of an image's gradient from which on a warning says that a constant reward would make it too."""
NO_STEPS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class ForwardBatch:
    """An epoch's images of one process, each noised K times; on the device.

    Attributes:
        x_0, advantages: (B, C, H, W) and (B,).
        steps: (B, K) int64, in the schedule.
        noise: (G, K, C, H, W), of G groups of images that share it.
        groups: (B,) int64, the one in ``noise`` of each image.
        conditioning: of the B images.
    """

    x_0: Tensor
    advantages: Tensor
    steps: Tensor
    noise: Tensor
    groups: Tensor
    conditioning: Conditioning


class ForwardTrainer(DenoisingTrainer[ForwardBatch]):
    """Trains as ``ForwardConfig`` says; see ``DenoisingTrainer`` for the arguments.

    Raises:
        ConfigError: the settings leave no noise level, do not fit the number of processes, or the model is
            guidance-distilled.
    """

    config: ForwardConfig
    config_class = ForwardConfig
    metrics: ClassVar[Mapping[str, Metric]] = {
        "error": Metric(
            "Matching error",
            "mean squared error",
            "How far the network is from the images that it is trained on, on average over noise levels.",
        ),
        "kl_old": Metric(
            "KL to the old policy",
            "nats over all trained steps",
            "How far an update began from the policy that sampled the images.",
        ),
        "self_consistency": Metric(
            "Gradient that any reward would make",
            "share",
            "0 where the model is the velocity of its own samples; near 1 all images pull alike, whatever the reward.",
        ),
    }

    def __init__(
        self,
        config: ForwardConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any],
        prompts: list[Prompt],
        accelerator: Accelerator | None = None,
        *,
        evaluation: ImageEvaluation | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, policy, reward, prompts, accelerator, evaluation=evaluation, callbacks=callbacks)
        for problem in multiple_checks(config, "group_size", self.accelerator.num_processes):
            raise ConfigError([problem])
        check_settings(policy.family, policy.network.config, OF_FAMILY)
        self.advantages = Advantages(config, reward)
        steps, weights = self.trained_steps, nats_per_squared_error(self.exact_schedule)
        own = weights[steps]
        self.nats, self.dimensions = float(own.sum()), math.prod(policy.latent_shape)
        if config.weighting == "exact":
            self.probabilities = own / self.nats
        else:
            self.probabilities = step_probabilities(config.weighting, steps, len(self.exact_schedule))
        # A drawn step stands for all of them, of which each counts with its own weight in the KL.
        importance = torch.zeros_like(weights)
        importance[steps] = own / self.nats / self.probabilities
        self._importance = importance.to(self.accelerator.device, torch.float32)
        self.guidance_scale = config.sampler.guidance_scale if policy.family.guidance == "embedded" else 1.0
        self._probes: ForwardBatch | None = None  # the epoch's images, where the KL is looked at after its updates
        policy.snapshots.take(OLD)
        self._steps_at_old = 0 if config.old_decay == 0 else -1  # optimizer steps at which ``old`` is the policy

    @classmethod
    def trained_schedule(
        cls, config: Any, scheduler: Any, set_timesteps: SetTimesteps | None = None
    ) -> DiffusionSchedule:
        """The noising process; without a range, a density only down to the last level at which the sampler calls."""
        whole = training_schedule(scheduler, set_timesteps)
        if config.timestep_range is not None:
            return whole
        last = super().trained_schedule(config, scheduler, set_timesteps).table.sigma_t[-1]
        std = whole.table.std.where(whole.table.sigma_t >= last * (1 - 1e-6), 0.0)
        return replace(whole, table=replace(whole.table, std=std))

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule) -> Tensor:
        steps = trained_steps(schedule, config.timestep_range or (0.0, 1.0))
        if len(steps) < config.steps_per_image:
            ranged = config.timestep_range is not None
            steps_each = f"sampler.steps={config.sampler.steps}"
            within = f"timestep_range={list(config.timestep_range)}" if ranged else steps_each
            each = f"steps_per_image={config.steps_per_image}"
            remedy = "use a wider range" if ranged else "set timestep_range, use more steps, or lower steps_per_image"
            raise ConfigError([f"{within} leaves {len(steps)} of the noise levels, fewer than {each}: {remedy}"])
        return steps

    @staticmethod
    def outweighing_step(config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None) -> str | None:
        """None: no loss here is a sum over steps of a path."""
        return None

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        every = super().epoch_cost(config, NO_STEPS)
        actions = config.samples_per_epoch * config.steps_per_image
        updates = config.inner_epochs * config.updates_per_epoch
        current = 1 if config.old_decay == 0 else 0  # updates before which the old policy is the current one
        return replace(
            every,
            units=config.samples_per_epoch // config.members,
            actions=actions,
            trained=actions * config.inner_epochs,
            old=actions * config.inner_epochs * (updates - current) // updates,
            reference=actions * config.inner_epochs if config.kl_coef > 0 else 0,
            probed=2 * probes_of(config) if config.has_reference and config.kl_coef == 0 else 0,
            width=1,  # a micro-batch is of images, and nothing is guided
            recorded=config.samples_per_epoch + actions // config.group_size,
            snapshots=1,
        )

    @classmethod
    def in_nats(cls, config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int) -> Lines:
        if schedule is None or steps is None:
            return []
        sigma = schedule.table.sigma_t[steps]
        cost = dimensions * float(nats_per_squared_error(schedule)[steps].sum())
        return [
            ("noise levels", f"{len(steps)}, sigma {float(sigma[0]):.3g} to {float(sigma[-1]):.3g}"),
            ("a mean squared error of 1", f"{cost:.3g} nats, over all of them"),
        ]

    # -- an epoch ----------------------------------------------------------------------------------------------------

    def measure_first(self) -> dict[str, float]:
        found = self.self_consistency()
        if found is None:
            return super().measure_first()
        if self.processes.is_main and (warning := consistency_warning(found)):
            print_warning(warning)
        measured = {"self_consistency": found.share, "self_consistency_stderr": found.stderr}
        return super().measure_first() | measured

    def self_consistency(self) -> Consistency | None:
        """Of ``consistency_images`` images of the policy as it is; every process looks at all of them."""
        config, count = self.config, self.config.consistency_images
        if not count:
            return None

        def gradients() -> Iterator[Sequence[Tensor]]:
            parameters = list(self.policy.trainable.values())
            with self.bars.task("  self-consistency", count) as advance:
                for first in range(0, count, config.sample_batch_size):
                    self.processes.stop_if_interrupted()
                    part = range(first, min(first + config.sample_batch_size, count))
                    texts = [self.prompts[i % len(self.prompts)][0] for i in part]
                    streams = [generator(config.seed, "consistency", i) for i in part]
                    nothing = torch.empty(len(part), 0, dtype=torch.int64)
                    path = rollout(
                        self.policy, self.sampling_schedule, self.policy.encode(texts), streams, record=nothing
                    )
                    # Each with noise of its own: what images share would be common to their gradients as well.
                    batch = self._noised(path.latents, torch.zeros(len(part)), path.conditioning, "consistency", part)
                    for row in range(len(part)):
                        every = torch.arange(config.steps_per_image, device=self.processes.device)
                        output, target = self._predicted(batch, torch.full_like(every, row), every)
                        error = matching_error(output, target).mean()
                        yield self.optimization.gradients(error, parameters)
                        advance(1)

        return common_share(gradients())

    def collect(self) -> tuple[Collected, dict[str, float]]:
        """Sample and score this process's images by the old policy; their paths are not kept."""
        current = self.optimization.steps == self._steps_at_old
        collected = self.sample(
            group_size=self.config.group_size, record=lambda _: NO_STEPS, snapshot=None if current else OLD
        )
        return collected, collected.metrics

    def estimate(self, collected: Collected) -> tuple[ForwardBatch, TrainingPlan, dict[str, float]]:
        """Advantages (global statistics), and the noise levels of each image with their noise."""
        config, path = self.config, collected.trajectory
        advantages = self.advantages(collected.samples, collected.scores, collected.rewards)
        own = self.local(advantages.to(path.latents.dtype))
        # Those of one prompt share levels and noise: what these have in common then cancels, as advantages do.
        groups = [image // config.group_size for image in self.local_samples]
        batch = self._noised(path.latents, own, path.conditioning, self.epoch, groups)
        units = advantages.view(-1, config.members)
        keep = torch.arange(len(units))
        if config.kl_coef == 0 and config.objective in ("awm", "dgpo"):  # the others hold an image at the old policy
            keep = units.any(dim=1).nonzero().squeeze(1)
        plan = TrainingPlan(keep * config.members, config.steps_per_image, normalizer=len(units))
        self._probes = batch if config.kl_coef == 0 and self.policy.has_reference else None
        return batch, plan, equal_reward_metric(collected.rewards, config.group_size)

    @property
    def samples_each(self) -> int:
        return self.config.members

    def independent(self, samples: Tensor) -> Tensor:
        """Images of one group share levels and noise."""
        return samples // self.config.group_size

    def micro_batches(self, batch: ForwardBatch, indices: Tensor) -> Iterator[tuple[ForwardBatch, Tensor]]:
        """Of at most ``micro_batch_size`` images, whole groups."""
        for some in indices.split(max(1, self.config.micro_batch_size // self.config.members)) if len(indices) else ():
            yield batch, some

    def loss(self, batch: ForwardBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the module docstring; ``samples`` are images, or the first ones of groups."""
        config, members = self.config, self.config.members
        groups = torch.arange(len(samples), device=samples.device).repeat_interleave(members)
        beside = torch.arange(members, device=samples.device).repeat(len(samples))
        samples, actions = samples[groups] + beside, actions[groups]
        steps = batch.steps[samples, actions]
        old = None
        if self.optimization.steps != self._steps_at_old:
            with self.policy.as_snapshot(OLD):
                old, _ = self._predicted(batch, samples, actions)
        output, target = self._predicted(batch, samples, actions)
        old = output.detach() if old is None else old
        found = Matching(output, old, target, batch.advantages[samples], groups, self.dimensions, self.nats)
        losses = OBJECTIVES[config.objective](found, config)
        statistics = {
            "loss/policy": losses.detach(),
            "error": found.error.detach(),
            "kl_old": found.in_nats * self._moved(output.detach(), old, steps),
        }
        if config.kl_coef > 0:
            kl = self._moved(output, self._reference(batch, samples, actions), steps)
            losses = losses + config.kl_coef * kl
            path = found.in_nats * kl.detach()
            statistics |= {"kl": path / len(self.trained_steps), "kl_path": path, "kl_path_stderr": path}
        losses, *values = (value.view(-1, members).mean(1) for value in (losses, *statistics.values()))
        return losses, dict(zip(statistics, values, strict=True))

    def after_updates(self) -> dict[str, float]:
        """``kl_path`` of a few of the epoch's images where no KL is paid for; then the old policy follows."""
        measured = self._measure_kl(self._probes) if self._probes is not None else {}
        self._probes = None
        self.policy.snapshots.blend(OLD, self.config.old_decay)
        if self.config.old_decay == 0:
            self._steps_at_old = self.optimization.steps
        return measured

    def loss_coefficients(self) -> dict[str, float]:
        return {"kl_coef": self.config.kl_coef, "beta": self.config.strength}

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | self.advantages.state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.advantages.load(state)

    def extra_weights(self) -> dict[str, dict[str, Tensor]]:
        return self.policy.snapshots.weights()

    def load_extra_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.policy.snapshots.load(weights, [OLD])
        if self.config.old_decay == 0:
            self._steps_at_old = self.optimization.steps

    # -- noised images -------------------------------------------------------------------------------------------------

    def _noised(
        self, x_0: Tensor, advantages: Tensor, conditioning: Conditioning, epoch: int | str, streams: Sequence[int]
    ) -> ForwardBatch:
        """Images of an epoch with K noise levels each; those of one of the ``streams`` share levels and noise."""
        config, steps, noise = self.config, [], []
        places = {group: place for place, group in enumerate(dict.fromkeys(streams))}
        for group in places:
            stream = generator(config.seed, "timesteps", epoch, group)
            drawn = torch.rand(config.steps_per_image, generator=stream, dtype=torch.float64)
            steps.append(draw_steps(self.trained_steps, config.weighting, self.probabilities, drawn))
            stream = generator(config.seed, "forward noise", epoch, group)
            noise.append(torch.randn((config.steps_per_image, *x_0.shape[1:]), generator=stream))
        device = self.processes.device
        groups = torch.tensor([places[group] for group in streams], device=device)
        levels = torch.stack(steps).to(device)[groups]
        return ForwardBatch(x_0, advantages.to(device), levels, torch.stack(noise).to(device), groups, conditioning)

    def _predicted(self, batch: ForwardBatch, samples: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output for n noised images, and what it should be; (n, C, H, W)."""
        steps = batch.steps[samples, actions]
        x_0, eps = batch.x_0[samples], batch.noise[batch.groups[samples], actions]
        x_t = add_noise(x_0, eps, steps, self.schedule)
        conditioning = {name: value[samples] for name, value in batch.conditioning.items()}
        timestep = self.schedule.table.timestep[steps]
        output = self.policy.predict(x_t, timestep, conditioning, guidance_scale=self.guidance_scale)
        return output, network_target(x_0, eps, self.schedule.at(steps), self.schedule.prediction_type)

    @torch.no_grad()
    def _reference(self, batch: ForwardBatch, samples: Tensor, actions: Tensor) -> Tensor:
        with self.policy.reference():
            return self._predicted(batch, samples, actions)[0]

    def _moved(self, output: Tensor, other: Tensor, steps: Tensor) -> Tensor:
        """(n,) the KL over all levels, as drawn ``steps`` (n,) tell it, in units of ``Matching.in_nats``."""
        return self._importance[steps] * matching_error(output, other)

    @torch.no_grad()
    def _measure_kl(self, batch: ForwardBatch) -> dict[str, float]:
        """Of a few of the noised images, any of their levels, after the epoch's updates."""
        config, own, levels = self.config, self.local_samples, self.config.steps_per_image
        count = config.samples_per_epoch * levels
        chosen = torch.randperm(count, generator=generator(config.seed, "kl", self.epoch))
        chosen = chosen[: probes_of(config)].sort().values
        mine = chosen[(chosen >= own.start * levels) & (chosen < own.stop * levels)] - own.start * levels
        found = []
        for some in mine.to(self.processes.device).split(config.micro_batch_size) if len(mine) else ():
            images, actions = some // levels, some % levels
            output, _ = self._predicted(batch, images, actions)
            moved = self._moved(output, self._reference(batch, images, actions), batch.steps[images, actions])
            found.append((self.nats * self.dimensions * moved).cpu().double())
        kl = torch.cat(self.processes.gather_in_order(found))
        path = kl.mean().item()
        if not math.isfinite(path):
            raise TrainingError(f"the KL to the reference is {path} after step {self.step}: {MORE_ROOM}")
        error = standard_error(means_of(self.independent(chosen // levels), kl))
        found_kl = {"kl": path / len(self.trained_steps), "kl_path": path}
        return found_kl | ({} if error is None else {"kl_path_stderr": error})


def probes_of(config: ForwardConfig) -> int:
    """Noised images per epoch at which ``kl_path`` is measured where it is not paid for: 1 % of its passes, or two."""
    passes = config.samples_per_epoch * (config.sampler.steps + 3 * config.steps_per_image * config.inner_epochs)
    return min(config.samples_per_epoch * config.steps_per_image, max(2, passes // 200))


def consistency_warning(found: Consistency) -> str | None:
    """What a self-consistency means where it is not near 0."""
    if found.share - 2 * found.stderr < NOTICED:
        return None
    return (
        f"{100 * found.share:.0f} % (± {200 * found.stderr:.0f}) of the gradient of an image is what a constant reward "
        "would make too: the model is not the velocity of what this sampler makes of it, so training also moves it "
        "where no reward does. Use more sampler.steps and guidance_scale=1, or, for a distilled model, ddpo"
    )
