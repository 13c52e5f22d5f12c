"""Where numbers go: always ``metrics.jsonl``; TensorBoard and W&B through accelerate when asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_align.training.checkpoint import write_aside


class MetricsLog:
    """Appends JSON objects to ``metrics.jsonl`` on the main process and mirrors them to accelerate's trackers."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self._path = path
        self._accelerator = accelerator

    def rewind(self, step: int, *, unmeasured: bool = False) -> None:
        """Forget rows of epochs that ended after ``step`` (a kill may have left some behind the checkpoint).

        ``unmeasured``: also the row of the epoch that ended with ``step``, not those of its updates.
        """
        if not self._accelerator.is_main_process or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if row["step"] <= step and not (unmeasured and row["step"] == step and "time/epoch" in row):
                kept.append(line)
        write_aside(self._path, "".join(line + "\n" for line in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; ``row["step"]`` is the optimizer step."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._accelerator.log(numbers, step=row["step"])
