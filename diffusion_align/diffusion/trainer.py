"""What the trainers of diffusion models share beyond the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.collection import Collected, collect_scored
from diffusion_align.diffusion.evaluation import ImageEvaluation, ImageStopConfig
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.previews import ImagePreviews, sample_images
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.models.model_card import write_model_card
from diffusion_align.rewards.base import call_reward
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import EpochCost, Lines, Metric, RunContext
from diffusion_align.training.evaluation import Evaluation
from diffusion_align.training.policy_trainer import PolicyTrainer
from diffusion_align.training.randomness import generator
from diffusion_align.writing import new_folder

Batch = TypeVar("Batch")


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
        drawing, schedule: of sampling, and of the steps that are trained on; on the device.
    """

    config: DenoisingConfig
    config_class: ClassVar[type[TrainingConfig]] = DenoisingConfig
    model_kind = "image"
    previews: ImagePreviews
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl": Metric(
            "KL to the reference, per step",
            "nats a step",
            "How far the policy is from the reference at one step of an image.",
        ),
        "kl_path": Metric(
            "KL to the reference, a whole path",
            "nats over all trained steps",
            "How far it is summed over the steps that are trained on.",
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
        super().__init__(config, evaluation=evaluation, accelerator=accelerator, callbacks=callbacks)
        self.policy, self.reward, self.prompts = policy, reward, list(prompts)
        scheduler, device = policy.pipeline.scheduler, self.accelerator.device
        self.drawing = DenoisingTrainer.trained_schedule(config, scheduler).to(device)
        self.exact_schedule = self.trained_schedule(config, scheduler)
        self.schedule = self.exact_schedule.to(device)
        self.previews = ImagePreviews(
            policy,
            self.drawing,
            self.prompts,
            config.show_prompts,
            reward=reward,
            seed=config.seed,
            batch_size=config.sample_batch_size,
        )

    @classmethod
    def trained_schedule(cls, config: Any, scheduler: Any) -> DiffusionSchedule:
        """Of the steps that are trained on, float64 and on the CPU: as sampled. ``scheduler``: what diffusers has."""
        schedule: DiffusionSchedule = config.sampler.schedule(scheduler)
        return schedule

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """Of a method that trains on every stochastic step of what it samples and asks no reference."""
        samples, drawn = config.samples_per_epoch, config.sampler.steps
        guided = 2 if config.sampler.guidance_scale > 1 else 1
        actions = samples * (drawn if steps is None else len(steps))
        return EpochCost(
            what=("pictures an epoch", f"{samples}, each {drawn} steps"),
            units=samples,
            actions=actions,
            sampling=guided * samples * drawn,
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
        return []

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        return cls(
            run.config,
            run.policy,
            reward=run.reward,
            prompts=run.data.get("prompts", ()),
            evaluation=run.evaluation,
            accelerator=run.accelerator,
            callbacks=run.callbacks,
        )

    @property
    def rules(self) -> ImageStopConfig:
        return self.config.stop_when

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable

    def sample(
        self,
        schedule: DiffusionSchedule,
        samples: Sequence[Prompt],
        *,
        record: Callable[[int], Tensor],
        reduction: Reduction,
    ) -> Collected:
        """Sample and score this process's part of the epoch's N ``samples``; see ``collect_scored``."""
        assert self.reward is not None
        return collect_scored(
            self.policy,
            schedule,
            self.reward,
            samples,
            own=self.local_samples,
            batch_size=self.config.sample_batch_size,
            stream=partial(generator, self.config.seed, "noise", self.epoch),
            record=record,
            reduction=reduction,
            processes=self.processes,
            bars=self.bars,
        )

    def sample_held_out(self, evaluation: Evaluation, indices: range) -> dict[str, Tensor]:
        """``features`` (n, D), or the images, and ``gold`` (n,)."""
        assert isinstance(evaluation, ImageEvaluation)
        texts, metadata = zip(*evaluation.prompts_of(indices), strict=True)
        images = sample_images(
            self.policy,
            self.previews.schedule,
            texts,
            self.config.seed,
            "evaluation",
            batch_size=len(texts),
            first=indices.start,
        )
        found = {"features": images if evaluation.embed is None else evaluation.embed(images)}
        if evaluation.gold is not None:
            found["gold"] = call_reward(evaluation.gold, images.to(self.policy.device), list(texts), list(metadata))
        return found

    def write_weights(self, folder: Path) -> None:
        """Write the adapter, or the whole pipeline if all of the UNet is trained, as diffusers loads them."""
        with new_folder(folder) as aside:
            if self.policy.lora is None:
                self.policy.pipeline.save_pretrained(str(aside))
            else:
                self.policy.save_lora(aside)

    def write_card(self) -> None:
        write_model_card(self.folder, self.folder / "final", pipeline_class=type(self.policy.pipeline).__name__)
