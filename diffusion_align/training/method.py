"""What a method supplies to the loop that all methods share: what it samples, estimates and trains."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import EpochCost, Metric
from diffusion_align.training.processes import Processes
from diffusion_align.training.randomness import stream_seed

Batch = TypeVar("Batch")
Dropout = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]
"""Inside, the adapters drop out in a forward pass, of whose rows the seeds are given, and in its backward pass."""


class TrainingPlan(NamedTuple):
    """What an epoch trains on.

    Attributes:
        sample_indices: (K,) int64 global indices of the samples worth training on.
        steps_per_sample: actions of each that are trained on together: denoising steps; 1 for a whole completion.
        normalizer: number of samples the loss is averaged over, split equally among the epoch's updates; larger than K
            when samples without a gradient were dropped, so dropping them leaves the gradient unchanged. When it is
            not given, each update averages over its own samples. Logged statistics are of the samples trained on.
    """

    sample_indices: Tensor
    steps_per_sample: int = 1
    normalizer: int | None = None


class TrainingMethod(ABC, Generic[Batch]):
    """The part of ``Trainer`` that a method fills in: it must give what is abstract, and may give the rest.

    Attributes:
        config: checked settings.
        processes: all of the run.
        epoch: finished epochs.
        step: optimizer steps, skipped ones counted.
        local_samples: this process's part of an epoch's global samples.
    """

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig  # its settings
    model_kind: ClassVar[Literal["image", "text", "classifier"] | None] = TrainingConfig.model_kind
    dataset_kind: ClassVar[Literal["preferences", "labels"]] = TrainingConfig.dataset_kind
    metrics: ClassVar[Mapping[str, Metric]] = {}  # what its own mean, beside those of the classes it comes from
    headline = "reward"  # the metric that the progress bar shows
    none_left = "equal rewards, or ties, have no gradient"  # why an epoch may have no samples to train on
    keeps: tuple[str, ...] = ()  # what in the run folder is worth keeping though nothing is trained yet
    # Whether an update needs nothing that was sampled before those of its epoch: a run then stops, and resumes, between
    # two of them. ``collect`` and ``estimate`` must give the same again with other weights, and what ``after_updates``
    # reads must be in ``extra_state``.
    updates_stand_alone: ClassVar[bool] = False

    config: TrainingConfig
    processes: Processes
    epoch: int
    step: int
    local_samples: range

    def local(self, values: Tensor) -> Tensor:
        """This process's rows of ``values`` (N, ...), which are about all of an epoch's samples, on its device."""
        return values[self.local_samples.start : self.local_samples.stop].to(self.processes.device)

    @classmethod
    def described_metrics(cls) -> dict[str, Metric]:
        """Key -> what it means, of this class and those it comes from."""
        return {key: one for kind in reversed(cls.__mro__) for key, one in vars(kind).get("metrics", {}).items()}

    @classmethod
    def epoch_cost(cls, config: Any, steps: Tensor | None = None) -> EpochCost:
        """What an epoch costs, told without a model; ``steps``: those of an image that are trained on, if known."""
        samples = config.samples_per_epoch
        what = ("samples per epoch", str(samples))
        return EpochCost(what, units=samples, actions=samples, trained=samples * config.inner_epochs)

    @property
    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained."""

    @abstractmethod
    def collect(self) -> tuple[Any, dict[str, float]]:
        """Sample and score ``local_samples`` of epoch ``self.epoch``; metrics of the whole epoch."""

    @abstractmethod
    def estimate(self, collected: Any) -> tuple[Batch, TrainingPlan, dict[str, float]]:
        """A batch of what was collected, with advantages, references and so on; what of it to train on; metrics."""

    @abstractmethod
    def loss(self, batch: Batch, samples: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (n,) and detached statistics (n,) of n actions, given local sample and action indices (n,).

        A statistic is averaged over actions; one whose name ends in ``/min`` or ``/max`` keeps its extreme.
        """

    def micro_batches(self, batch: Batch, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """``indices`` (n, 2) in parts of at most ``micro_batch_size``, each with the batch that ``loss`` is given."""
        for some in indices.split(self.config.micro_batch_size) if len(indices) else ():
            yield batch, some

    @property
    def samples_each(self) -> int:
        """Samples that each index of a plan stands for, such as those of a group."""
        return 1

    def independent(self, samples: Tensor) -> Tensor:
        """(n,) for local ``samples`` (n,) of ``loss``: equal numbers go together in standard errors, as images do that
        share their noise."""
        return samples

    @property
    def dropout(self) -> Dropout | None:
        """What switches on the dropout of the adapters that are trained, if they have one."""
        return None

    def before_finish(self) -> None:
        """What ``finish`` needs of every process; called on all of them before it."""

    @abstractmethod
    def finish(self) -> None:
        """Write ``final/``; called on the main process."""

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Metrics to add to an update's, before its step; TrainingError where training should not continue.

        ``first``: of the epoch, so the weights still equal the sampler's.
        """
        return {}

    def after_updates(self) -> dict[str, float]:
        """Metrics of what the epoch's updates looked at; called on every process."""
        return {}

    def data_lines(self) -> Sequence[str]:
        """Lines that a run starts with, about what it trains on."""
        return ()

    def measure(self) -> dict[str, float]:
        """Metrics after ``self.epoch`` epochs, such as those of held-out data; called on every process."""
        return {}

    def measure_first(self) -> dict[str, float]:
        """Like ``measure``, before the first epoch. An empty dict writes no row."""
        return {}

    def stop_reason(self, row: Mapping[str, float]) -> str | None:
        """Why the run should end now, given an epoch's metrics and those of its last update; the same everywhere."""
        return None

    def checkpoint_wanted(self) -> bool:
        """Whether to write a checkpoint of this epoch although none is due; the same everywhere."""
        return False

    def loss_coefficients(self) -> dict[str, float]:
        """Setting -> value of those that a term of the loss is multiplied by; named where the loss overflows."""
        return {}

    def show(self, name: str) -> None:
        """Write images or texts of the fixed prompts; called on every process, of which the main one writes."""

    def extra_state(self) -> dict[str, Any]:
        """JSON values a trainer needs back on resume."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``extra_state`` returned."""

    def extra_weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> name -> tensor: weights beside the trained ones that a trainer needs back on resume."""
        return {}

    def load_extra_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what ``extra_weights`` returned, from among all of a checkpoint's files."""

    def dropout_seeds(self, batch: Batch, samples: Tensor, actions: Tensor) -> list[int]:
        """For ``dropout``, one for each of the n actions of ``loss`` in this update, in whatever batch or process.

        A pass of 2n rows, such as of n chosen and n rejected ones, has them twice: one policy compares the two.
        """
        pairs = zip(samples.tolist(), actions.tolist(), strict=True)
        first = self.local_samples.start
        return [stream_seed(self.config.seed, "dropout", self.step, first + sample, action) for sample, action in pairs]
