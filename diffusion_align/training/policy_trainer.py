"""What trainers of policies share, for images and text: held-out evaluation, stop rules, previews, ``final/``."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor

from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.evaluation import SUMMARY, Evaluation, write_summary
from diffusion_align.training.settings import StopConfig
from diffusion_align.training.trainer import Trainer

Batch = TypeVar("Batch")


class PolicyTrainer(Trainer[Batch]):
    """A trainer of something that samples.

    A subclass gives ``previews``, ``sample_held_out`` and ``write_weights`` beside what ``Trainer`` wants.

    Args:
        config: checked settings; its ``stop_when`` holds the rules that end the run early.
        evaluation: the held-out reward and fixed prompts, if anything is to be evaluated.
        accelerator, callbacks: see ``Trainer``.
    """

    previews: Previews[Any]

    def __init__(
        self,
        config: TrainingConfig,
        *,
        evaluation: Evaluation | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, accelerator, callbacks=callbacks)
        self.evaluation = evaluation

    @property
    @abstractmethod
    def rules(self) -> StopConfig:
        """``config.stop_when``."""

    @abstractmethod
    def sample_held_out(self, evaluation: Evaluation, indices: range) -> dict[str, Tensor]:
        """Sample and score the evaluation's samples ``indices``; see ``Evaluation.measure``."""

    @abstractmethod
    def write_weights(self, folder: Path) -> None:
        """Write the trained weights, as diffusers or transformers with peft load them."""

    def write_card(self) -> None:
        """Write the model card of ``final/``."""

    def show(self, name: str) -> None:
        samples, folder = self.previews.sample(), self.folder / "samples"
        self.previews.write(samples, folder / f"{name}{self.previews.suffix}")
        if self.epoch == 0 and self.previews.reference is None:
            self.previews.keep(samples, folder)

    def finish(self) -> None:
        """Write ``final/`` and its card, and the samples before and after."""
        if self.evaluation is not None or self.stopped or (self.folder / SUMMARY).exists():
            write_summary(self.folder, self.evaluation, self.stopped)
        pair = self.previews.before_after(
            self.folder / "samples"
        )  # before anything is written: these weights may give no finite samples
        self.write_weights(self.folder / "final")
        if pair is not None:
            self.previews.write_pairs(*pair, self.folder / "samples" / f"before_after{self.previews.suffix}")
        self.write_card()

    def measure_first(self) -> dict[str, float]:
        return self._evaluate(self.evaluation) if self.evaluation is not None else {}

    def measure(self) -> dict[str, float]:
        """The evaluation, where it is due; ``best/`` holds the weights with the highest held-out reward so far."""
        evaluation = self.evaluation
        return self._evaluate(evaluation) if evaluation and evaluation.due(self.epoch, self.config.epochs) else {}

    def stop_reason(self, row: Mapping[str, float]) -> str | None:
        return "; ".join(self.rules.broken(row, self.evaluation)) or None

    def checkpoint_wanted(self) -> bool:
        """So that a resumed run knows what ``best/`` holds."""
        best = self.evaluation.best if self.evaluation is not None else None
        return best is not None and best[0] == self.epoch

    def extra_state(self) -> dict[str, Any]:
        return {"gold": self.evaluation.history} if self.evaluation is not None else {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.evaluation is not None:
            self.evaluation.history = [(epoch, score) for epoch, score in state.get("gold", ())]

    def _evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        with self.ema_weights():
            measured = evaluation.measure(
                lambda indices: self.sample_held_out(evaluation, indices),
                epoch=self.epoch,
                batch_size=self.config.sample_batch_size,
                processes=self.processes,
                bars=self.bars,
            )
        best = evaluation.best
        if best is not None and best[0] == self.epoch > 0:
            with self.ema_weights():
                self.processes.on_main(lambda: self.write_weights(self.folder / "best"))
        return measured


Samples = TypeVar("Samples")
PREVIEWED = 16
"""How many of the prompts are shown where none are named."""


class Previews(ABC, Generic[Samples]):
    """Samples of a run's fixed prompts; a subclass says of what kind, and how they are written.

    Args:
        reference: context in which the policy is its reference; None where it has none.
    """

    suffix: ClassVar[str]

    def __init__(self, reference: Callable[[], contextlib.AbstractContextManager] | None) -> None:
        self.reference = reference

    @abstractmethod
    def sample(self) -> Samples:
        """One sample per prompt, as the policy is now; each depends on its prompt, its place and the seed only."""

    @abstractmethod
    def write(self, samples: Samples, path: Path) -> None:
        """Write samples to ``path``, whose name ends in ``suffix``."""

    @abstractmethod
    def write_pairs(self, before: Samples, after: Samples, path: Path) -> None:
        """Write samples of the reference and of the policy, with the reward of each where it can say."""

    def keep(self, samples: Samples, folder: Path) -> None:
        """Keep samples of the untrained policy, which has no reference that could give them later."""

    def kept(self, folder: Path) -> Samples | None:
        """What ``keep`` has kept; None if that is nothing."""
        return None

    def before_after(self, folder: Path) -> tuple[Samples, Samples] | None:
        """Samples of the reference and of the policy; without a reference those kept in ``folder``, None if not."""
        if self.reference is None:
            before = self.kept(folder)
            return None if before is None else (before, self.sample())
        after = self.sample()
        with self.reference():
            return self.sample(), after
