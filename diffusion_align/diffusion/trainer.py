"""What the methods for diffusion models share beyond the loop: settings, an epoch's images, previews, evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import Prompt, items_of_epoch
from diffusion_align.diffusion.evaluation import ImageEvaluation, ImagePreviews, sample_images
from diffusion_align.diffusion.pass_times import is_measured, measure_policy
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.rollout import Trajectory, concatenate, rollout
from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps
from diffusion_align.diffusion.settings import DenoisingConfig, ImageStopConfig
from diffusion_align.diffusion.trained_steps import outweighing_step
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.models.image_pipelines import save_pipeline
from diffusion_align.models.model_card import facts_of, write_model_card
from diffusion_align.rewards.base import call_reward, part_weights, reward_parts, runs_in_background
from diffusion_align.streams import print_warning
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.collection import Calls, reward_metrics, sample_and_score
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import EpochCost, Lines, Metric, RunContext
from diffusion_align.training.evaluation import Evaluation
from diffusion_align.training.launch import kept_sizes, measured
from diffusion_align.training.method import Dropout
from diffusion_align.training.policy_trainer import PolicyTrainer
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import UpdateStatistics
from diffusion_align.writing import new_folder

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Collected:
    """One epoch's images: this process's trajectories and the rewards of all processes.

    Attributes:
        samples: prompt and metadata of all N samples of the epoch.
        trajectory: B samples of this process, K recorded steps each.
        scores: (N, K) float32 or float64 on the CPU, of all N samples in their global order by each of K rewards.
        rewards: (N,) their weighted sum.
        metrics: ``reward``, its spread, ``rewards/<name>/mean`` of several, and ``time/score``, the seconds spent
            on rewards and waiting for those in the background.
    """

    samples: Sequence[Prompt]
    trajectory: Trajectory
    scores: Tensor
    rewards: Tensor
    metrics: dict[str, float]


class DenoisingTrainer(PolicyTrainer[Batch]):
    """A policy, a reward (if any), what is shown and what is evaluated of them.

    Args:
        config: checked settings.
        policy: the model with its adapter, on ``accelerator.device``.
        reward: ``reward(images, prompts, metadata) -> (B,)``, already checked.
        prompts: texts with the metadata that the reward receives.
        evaluation: the held-out reward and fixed prompts, if anything is to be evaluated.
        accelerator, callbacks: see ``Trainer``.

    Attributes:
        sampling_schedule, schedule: of previews and evaluations, and of the steps that are trained on; on the device.
        trained_steps: (S,) on the CPU, those of ``schedule`` that are trained on.
    """

    config: DenoisingConfig
    config_class: ClassVar[type[TrainingConfig]] = DenoisingConfig
    model_kind = DenoisingConfig.model_kind
    previews: ImagePreviews
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric(
            "KL to the reference, per step",
            "nats per step",
            "How far the policy is from the reference at one step of an image.",
        ),
        "kl_path": Metric(
            "KL to the reference, all trained steps",
            "nats over all trained steps",
            "The same, summed over the steps that are trained on.",
        ),
    }

    def __init__(
        self,
        config: DenoisingConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any] | None = None,
        prompts: Sequence[Prompt] = (),
        accelerator: Accelerator | None = None,
        *,
        evaluation: ImageEvaluation | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        config = kept_sizes(config)
        super().__init__(config, evaluation=evaluation, accelerator=accelerator, callbacks=callbacks)
        self.policy, self.reward, self.prompts = policy, reward, list(prompts)
        if is_measured(self.config):  # of a policy made in Python
            texts, unmeasured = [text for text, _ in prompts], self.config
            measure = partial(measure_policy, unmeasured, type(self), policy, texts, self.processes.count)
            self.config = measured(unmeasured, measure)
        config = self.config
        scheduler, device = policy.pipeline.scheduler, self.accelerator.device
        setter = policy.timesteps_setter()
        self.sampling_schedule = config.sampler.preview.schedule(scheduler, setter).to(device)
        self.exact_schedule = self.trained_schedule(config, scheduler, setter)
        self.schedule = self.exact_schedule.to(device)
        self.trained_steps = self.steps_trained_on(config, self.exact_schedule)
        self.previews = ImagePreviews(
            policy,
            self.sampling_schedule,
            self.prompts,
            config.show_prompts,
            reward=reward,
            seed=config.seed,
            batch_size=config.sample_batch_size,
        )

    @classmethod
    def trained_schedule(
        cls, config: Any, scheduler: Any, set_timesteps: SetTimesteps | None = None
    ) -> DiffusionSchedule:
        """The schedule of the trained steps, as sampled; float64, on the CPU.

        Args:
            config: settings.
            scheduler: the diffusers one.
            set_timesteps: see ``build_schedule``.
        """
        schedule: DiffusionSchedule = config.sampler.schedule(scheduler, set_timesteps)
        return schedule

    @classmethod
    def steps_trained_on(cls, config: Any, schedule: DiffusionSchedule) -> Tensor:
        """(S,) those of ``trained_schedule``; ConfigError where they are too few."""
        return schedule.stochastic_steps

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """For a method that trains on every stochastic step of its samples and needs no reference."""
        samples, steps_each = config.samples_per_epoch, config.sampler.steps
        guided = config.sampler.passes
        actions = samples * (steps_each if steps is None else len(steps))
        return EpochCost(
            what=("images per epoch", f"{samples}, each {steps_each} steps"),
            units=samples,
            actions=actions,
            sampling=guided * samples * steps_each,
            trained=guided * actions * config.inner_epochs,
            decoded=samples,
            width=guided,
            recorded=2 * actions,  # x_t and x_s
        )

    @classmethod
    def in_nats(cls, config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int) -> Lines:
        """What ``doctor`` says of settings that mean something else at another resolution or noise schedule.

        Args:
            config: settings, some of which may not be allowed.
            schedule, steps: ``trained_schedule`` and which of its steps are trained on, if known.
            dimensions: numbers in a latent.
        """
        outweighing = cls.outweighing_step(config, schedule, steps)
        return [] if outweighing is None else [("heaviest step", outweighing)]

    @staticmethod
    def outweighing_step(config: Any, schedule: DiffusionSchedule | None, steps: Tensor | None) -> str | None:
        """A sentence about one of the trained steps that outweighs the others together, if one is known to do so."""
        if schedule is None or steps is None:
            return None
        return outweighing_step(schedule, steps, getattr(config, "weighting", "exact"))

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        return cls(
            run.config,
            run.policy,
            reward=run.reward,
            accelerator=run.accelerator,
            evaluation=run.evaluation,
            callbacks=run.callbacks,
            **run.data,
        )

    def train(self) -> Path:
        """See ``Trainer.train``; afterwards the text encoders are where the network is."""
        outweighing = self.outweighing_step(self.config, self.exact_schedule, self.trained_steps)
        resumes = self.config.resume and self.run_folder.checkpoints
        if outweighing is not None and self.processes.is_main and not resumes:  # which have named it
            print_warning(outweighing)
        try:
            return super().train()
        finally:
            with contextlib.suppress(torch.OutOfMemoryError):  # of which the run may have failed
                self.policy.return_text_encoders()

    @property
    def rules(self) -> ImageStopConfig:
        return self.config.stop_when

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable

    @property
    def dropout(self) -> Dropout | None:
        return self.policy.dropout

    def accumulate(
        self, batch: Batch, indices: Tensor, normalizer: float, on_actions: Callable[[int], object] = lambda count: None
    ) -> UpdateStatistics:
        with self.policy.weights_cast_once():
            return super().accumulate(batch, indices, normalizer, on_actions)

    def sample(
        self,
        *,
        group_size: int = 1,
        record: Callable[[int], Tensor] | None = None,
        reduction: Reduction = "mean",
        schedule: DiffusionSchedule | None = None,
        record_means: bool = False,
        snapshot: str | None = None,
    ) -> Collected:
        """Sample this process's part of an epoch and score each batch, in the background where a reward runs there.

        Args:
            group_size: samples in a row of each of the epoch's prompts.
            record: global sample index -> (K,) steps of the schedule to keep; None keeps all stochastic ones.
            reduction: of the recorded log-probs.
            schedule: on the device; None is ``sampling_schedule``.
            record_means: see ``rollout``.
            snapshot: of the policy's, that samples; None is the policy as it is.

        Raises:
            RewardError, TrainingError, Interrupted: see ``sample_and_score``.
        """
        assert self.reward is not None
        config, own, parts = self.config, self.local_samples, reward_parts(self.reward)
        prompts = items_of_epoch(self.prompts, config.seed, self.epoch, config.samples_per_epoch // group_size)
        samples = [prompt for prompt in prompts for _ in range(group_size)]
        schedule = self.sampling_schedule if schedule is None else schedule

        def sample(batch: range) -> tuple[Trajectory, Calls]:
            texts = [samples[i][0] for i in batch]
            with contextlib.nullcontext() if snapshot is None else self._as_snapshot(snapshot):
                path = rollout(
                    self.policy,
                    schedule,
                    self.policy.encode(texts),
                    [generator(config.seed, "noise", self.epoch, i) for i in batch],
                    record=None if record is None else torch.stack([record(i) for i in batch]),
                    reduction=reduction,
                    record_means=record_means,
                    on_step=lambda: advance(1),
                )
            # The parts of a combined reward are called one by one.
            arguments = self.policy.decode(path.latents), texts, [samples[i][1] for i in batch]
            calls = [(runs_in_background(part), partial(call_reward, part, *arguments)) for part in parts.values()]
            return path, calls

        batches = -(-len(own) // config.sample_batch_size)
        with self.bars.task("  sampling", batches * len(schedule)) as advance:
            paths, scores, waited = sample_and_score(own, config.sample_batch_size, sample, self.processes)
        rewards = (scores * part_weights(self.reward).to(scores)).sum(dim=1)
        metrics = {**reward_metrics(rewards), "time/score": waited}
        if scores.shape[1] > 1:
            metrics |= {f"rewards/{name}/mean": c.mean().item() for name, c in zip(parts, scores.unbind(1))}
        return Collected(samples, concatenate(paths), scores, rewards, metrics)

    @contextlib.contextmanager
    def _as_snapshot(self, name: str) -> Iterator[None]:
        """Inside, the policy is its snapshot ``name``, and no checkpoint is written of it."""
        with self._savepoint.withheld(), self.policy.as_snapshot(name):
            yield

    def sample_held_out(self, evaluation: Evaluation, indices: range) -> dict[str, Tensor]:
        """``features`` (n, D), or the images, and ``gold`` (n,)."""
        assert isinstance(evaluation, ImageEvaluation)
        texts, metadata = zip(*evaluation.prompts_of(indices), strict=True)
        images = sample_images(
            self.policy,
            self.sampling_schedule,
            texts,
            self.config.seed,
            "evaluation",
            batch_size=len(texts),
            first=indices.start,
        )
        found = {"features": images if evaluation.embed is None else evaluation.embed(images)}
        if evaluation.reward is not None:
            found["gold"] = call_reward(evaluation.reward, images.to(self.policy.device), list(texts), list(metadata))
        return found

    def write_weights(self, folder: Path) -> None:
        """Write the adapter, or the whole pipeline if all of the network is trained, as diffusers loads them."""
        with new_folder(folder) as temporary:
            if self.policy.lora is None:
                save_pipeline(self.policy.pipeline, temporary)
            else:
                self.policy.save_lora(temporary)

    def write_card(self) -> None:
        write_model_card(self.folder, self.folder / "final", pipeline=facts_of(self.policy.pipeline))
