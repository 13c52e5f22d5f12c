"""What trainers of policies share, for images and text: held-out evaluation, stop rules, previews, ``final/``."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.evaluation import SUMMARY, Evaluation, write_summary
from diffusion_align.training.processes import Processes
from diffusion_align.training.settings import StopConfig
from diffusion_align.training.sharing import batches_of, sample_together
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
        self._before_after: tuple[Any, Any] | None = None
        self._last: Any = None  # samples of the fixed prompts after the last epoch

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
        samples, folder = self.previews.sample(self.processes), self.folder / "samples"
        self.processes.on_main(lambda: self._write_preview(samples, folder, name))

    def _write_preview(self, samples: Any, folder: Path, name: str) -> None:
        self.previews.write(samples, folder / f"{name}{self.previews.suffix}")
        if self.epoch == 0 and self.previews.reference is None:
            self.previews.keep(samples, folder)

    def before_finish(self) -> None:
        """Sample what ``finish`` shows, before anything is written: these weights may give no finite samples."""
        self._before_after = self.previews.before_after(self.folder / "samples", self.processes)
        if self._before_after is not None:
            self._last = self._before_after[1]
        elif self.config.grid_every:
            self._last = self.previews.sample(self.processes)

    def finish(self) -> None:
        """Write ``final/`` and its card, the samples before and after, and those of the last epoch if not there yet."""
        if self.evaluation is not None or self.stopped or (self.folder / SUMMARY).exists():
            write_summary(self.folder, self.evaluation, self.stopped)
        self.write_weights(self.folder / "final")
        samples, suffix = self.folder / "samples", self.previews.suffix
        last = samples / f"epoch_{self.epoch:04d}{suffix}"
        if self.config.grid_every and self._last is not None and not last.exists():
            self.previews.write(self._last, last)
        if self._before_after is not None:
            self.previews.write_pairs(*self._before_after, samples / f"before_after{suffix}")
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
        count: how many prompts.
        batch_size: samples at once.
    """

    suffix: ClassVar[str]

    def __init__(
        self, reference: Callable[[], contextlib.AbstractContextManager] | None, *, count: int, batch_size: int
    ) -> None:
        self.reference, self.count, self.batch_size = reference, count, batch_size

    def sample(self, processes: Processes | None = None) -> Samples:
        """One sample per prompt, as the policy is now; each depends on its prompt, its place and the seed only.

        Args:
            processes: they divide the batches, and all return every sample; this one alone if not given.
        """
        if processes is None:
            return self.join([self.sample_batch(batch) for batch in batches_of(self.count, self.batch_size)])
        return self.join(sample_together(self.count, self.batch_size, self.sample_batch, processes, error=UserError))

    @abstractmethod
    def sample_batch(self, indices: range) -> Samples:
        """Samples of the prompts ``indices``."""

    @abstractmethod
    def join(self, parts: Sequence[Samples]) -> Samples:
        """The samples of all batches."""

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

    def before_after(self, folder: Path, processes: Processes | None = None) -> tuple[Any, Samples] | None:
        """Samples of the reference and of the policy, as ``sample`` gives them; without a reference those kept in
        ``folder``, which the main process reads, None if there are none."""
        if self.reference is None:
            before = self.kept(folder) if processes is None or processes.is_main else None
            there = before is not None
            if not (there if processes is None else processes.from_main(there)):
                return None
            return before, self.sample(processes)
        after = self.sample(processes)
        with self.reference():
            return self.sample(processes), after
