"""What the trainers of diffusion models share beyond the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

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
        evaluation: the held-out reward and fixed prompts, if anything is to be evaluated.
        accelerator, callbacks: see ``Trainer``.
    """

    config: DenoisingConfig
    config_class: ClassVar[type[TrainingConfig]] = DenoisingConfig
    model_kind = "image"

    def __init__(
        self,
        config: DenoisingConfig,
        policy: DenoisingPolicy,
        reward: Callable[..., Any] | None,
        *,
        evaluation: Evaluation | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, accelerator, callbacks=callbacks)
        self.policy, self.reward, self.evaluation = policy, reward, evaluation

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
