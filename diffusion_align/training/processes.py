"""What the processes of a run tell one another: who failed, who was interrupted. With one process nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from diffusion_align.errors import Interrupted, TrainingError
from diffusion_align.interrupt import InterruptFlag, waiting_for_others
from diffusion_align.writing import WriteError

T = TypeVar("T")


class Processes:
    """All processes of a run, seen from one of them. Every method must be called by all, in the same order.

    Attributes:
        flag: whether this process received an interrupt; the trainer's own while it trains.
        failed_together: whether the last failure was raised on every process, so that all can still act together.
        unfit_together: whether it was a TrainingError of any process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.flag = InterruptFlag()
        self.failed_together = self.unfit_together = False

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def index(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def gather_in_order(self, parts: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        return gather_object(parts) if self.count > 1 else parts

    def from_main(self, value: T) -> T:
        """The value that the main process has."""
        values = [value]
        if self.count > 1:
            broadcast_object_list(values)
        return values[0]

    def sum(self, value: Tensor) -> float:
        """Sum of a 0-d tensor of each process, in the widest float of its device."""
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        return float(self.accelerator.reduce(value.to(wide), reduction="sum"))

    def stop_if_interrupted(self, *, failed: bool = False) -> bool:
        """Between batches: leave the epoch if any process received an interrupt.

        Returns:
            Whether anything ``failed`` on any process.

        Raises:
            Interrupted: on every process, unless anything failed.
        """
        flags = torch.tensor([float(self.flag.raised), float(failed)], device=self.device)
        with waiting_for_others():
            interrupted, any_failed = self.accelerator.reduce(flags, reduction="sum").tolist()
        if interrupted and not any_failed:
            raise Interrupted
        return any_failed > 0

    def raise_together(self, failure: BaseException | None, kind: type[Exception]) -> None:
        """Raise on every process if any has a ``failure``: its own where it arose, elsewhere one of ``kind``.

        If any process received an interrupt, raise Interrupted instead of the failure.
        """
        interrupted, unfit = self.flag.raised, isinstance(failure, TrainingError)
        if self.count > 1:
            with waiting_for_others():
                told = gather_object([(None if failure is None else str(failure), unfit, interrupted)])
            messages = [message for message, _, _ in told if message is not None]
            failure = failure or (kind(messages[0]) if messages else None)
            interrupted = any(raised for _, _, raised in told)
            self.failed_together, self.unfit_together = bool(messages), any(unfit for _, unfit, _ in told)
        if failure is not None:
            raise Interrupted if interrupted else failure

    def on_main(self, write: Callable[[], object]) -> None:
        """Call ``write`` on the main process; if it fails there, all processes raise."""
        failure: BaseException | None = None
        if self.is_main:
            try:
                write()
            except Exception as error:
                failure = error
        if self.count > 1:
            told = self.from_main(None if failure is None else str(failure) or type(failure).__name__)
            failure = failure or (None if told is None else WriteError(told))
            self.failed_together = failure is not None
        if failure is not None:
            raise failure
