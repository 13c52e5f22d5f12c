"""A callback: end a run after some hours, between two epochs, as a job on a cluster has to."""

import time
from typing import Any

from diffusion_align.extending import Callback, Trainer


class TimeLimit(Callback):
    """Ends a run after ``hours`` and logs how long it has run; resumed, it has as many again."""

    hours = 8.0

    def on_start(self, trainer: Trainer[Any]) -> None:
        self.begun = time.monotonic()

    def on_epoch_end(self, trainer: Trainer[Any], row: dict[str, Any]) -> str | None:
        """The reason to end the run, if there is one; ``row`` is this epoch's in ``metrics.jsonl``."""
        row["time/run"] = time.monotonic() - self.begun
        return f"it has run for {self.hours:g} hours" if row["time/run"] > 3600 * self.hours else None
