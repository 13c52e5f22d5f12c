"""A callback that ends a run after some hours, between two epochs, as jobs on a cluster must."""

import time
from typing import Any

from diffusion_align.extending import Callback, Trainer


class TimeLimit(Callback):
    """Ends a run after ``hours`` and logs how long it has run; a resumed run starts counting again."""

    hours = 8.0

    def on_start(self, trainer: Trainer[Any]) -> None:
        self.begun = time.monotonic()

    def on_epoch_end(self, trainer: Trainer[Any], row: dict[str, Any]) -> str | None:
        """The reason to end the run, or None; ``row`` is this epoch's row of ``metrics.jsonl``."""
        row["time/run"] = time.monotonic() - self.begun
        return f"it has run for {self.hours:g} hours" if row["time/run"] > 3600 * self.hours else None
