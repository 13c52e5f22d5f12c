"""What the trainers of diffusion models share beyond the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.collection import Collected, collect_scored
from diffusion_align.diffusion.evaluation import SUMMARY, Evaluation, stop_reason, write_summary
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.diffusion.showing import ImageShow
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import RunContext
from diffusion_align.training.cost import EpochCost, Lines
from diffusion_align.training.randomness import generator
from diffusion_align.training.trainer import Trainer

Batch = TypeVar("Batch")
SHOWN = 16


class DenoisingTrainer(Trainer[Batch]):
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

    def __init__(
        self,
        config: DenoisingConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any] | None = None,
        prompts: Sequence[Prompt] = (),
        accelerator: Accelerator | None = None,
        *,
        evaluation: Evaluation | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, accelerator, callbacks=callbacks)
        self.policy, self.reward, self.evaluation, self.prompts = policy, reward, evaluation, list(prompts)
        scheduler, device = policy.pipeline.scheduler, self.accelerator.device
        self.drawing = DenoisingTrainer.trained_schedule(config, scheduler).to(device)
        self.exact_schedule = self.trained_schedule(config, scheduler)
        self.schedule = self.exact_schedule.to(device)
        self.show_with(self.drawing, self.prompts)

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

    def show_with(self, schedule: DiffusionSchedule, prompts: Sequence[Prompt]) -> None:
        """Draw grids and evaluations with ``schedule``; show ``config.show_prompts``, else the first of ``prompts``."""
        known = dict(prompts)
        shown = self.config.show_prompts or list(known)[:SHOWN]
        self._drawing = schedule
        pairs = [(text, known.get(text, {})) for text in shown]
        self._show = ImageShow(self.policy, schedule, pairs, self.config.seed, self.config.sample_batch_size)

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

    def show(self, name: str) -> None:
        self._show.write(self.folder / "samples" / f"{name}.png")

    def finish(self) -> None:
        """Write ``final/`` (what diffusers loads), the pictures before and after, and the report."""
        if self.evaluation is not None or self.stopped or (self.folder / SUMMARY).exists():
            write_summary(self.folder, self.evaluation, self.stopped)
        self._show.finish(self.folder, self.reward)

    def measure_first(self) -> dict[str, float]:
        return self._evaluate() if self.evaluation is not None else {}

    def measure(self) -> dict[str, float]:
        """The evaluation, where it is due; ``best/`` holds the weights with the highest gold reward so far."""
        due = self.evaluation is not None and self.evaluation.due(self.epoch, self.config.epochs)
        return self._evaluate() if due else {}

    def stop_reason(self, row: Mapping[str, float]) -> str | None:
        return stop_reason(self.config.stop_when, dict(row), self.evaluation)

    def checkpoint_wanted(self) -> bool:
        """So that a resumed run knows what ``best/`` holds."""
        best = self.evaluation.best if self.evaluation is not None else None
        return best is not None and best[0] == self.epoch

    def extra_state(self) -> dict[str, Any]:
        return {"gold": self.evaluation.history} if self.evaluation is not None else {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.evaluation is not None:
            self.evaluation.history = [(epoch, gold) for epoch, gold in state["gold"]]

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluation is not None
        with self.ema_weights():
            measured = self.evaluation.measure(
                self.policy,
                self._drawing,
                epoch=self.epoch,
                seed=self.config.seed,
                batch_size=self.config.sample_batch_size,
                processes=self.processes,
                bars=self.bars,
            )
        best = self.evaluation.best
        if best is not None and best[0] == self.epoch > 0:
            with self.ema_weights():
                self.processes.on_main(lambda: self._show.write_weights(self.folder / "best"))
        return measured
