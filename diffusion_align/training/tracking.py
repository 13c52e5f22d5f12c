"""Where numbers go: always ``metrics.jsonl``; TensorBoard and W&B through accelerate when asked for."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_align.errors import first_line
from diffusion_align.interrupt import Overdue, breakable
from diffusion_align.writing import append_line, write_text


class MetricsLog:
    """``metrics.jsonl`` of a run: one JSON object a line, of updates and of epochs; the main process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int, *, unmeasured: bool = False) -> None:
        """Forget rows of epochs that ended after ``step`` (a kill may have left some behind the checkpoint).

        ``unmeasured``: also the row of the epoch that ended with ``step``, not those of its updates.
        """
        if not self.path.exists():
            return
        kept = [
            row
            for row in self.rows()
            if row["step"] <= step and not (unmeasured and row["step"] == step and "time/epoch" in row)
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """What has been written; a row that a kill has cut off is left out."""
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.split("\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; ``row["step"]`` is the optimizer step.

        Raises:
            WriteError: it cannot be written.
        """
        append_line(self.path, json.dumps(row))


class Trackers:
    """accelerate's trackers: one that fails is dropped with one line on stderr, as nothing of the run hangs on it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def start(self, config: Mapping[str, Any]) -> None:
        """One by one, so that one which cannot start keeps none of the others from it."""
        accelerator, started = self._accelerator, []
        wanted = list(accelerator.log_with)
        for tracker in wanted:
            accelerator.log_with, accelerator.trackers = [tracker], []
            if self._tried(str(tracker), lambda: accelerator.init_trackers("diffusion-align", config=dict(config))):
                started += accelerator.trackers
        accelerator.log_with, accelerator.trackers = wanted, started

    def log(self, row: Mapping[str, Any]) -> None:
        """The numbers of a row, at its optimizer step."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        for tracker in list(self._accelerator.trackers):
            if not self._tried(tracker.name, lambda: tracker.log(numbers, step=row["step"])):  # noqa: B023 - called here
                self._accelerator.trackers.remove(tracker)

    def end(self) -> None:
        """Let the trackers finish what they have."""
        for tracker in list(self._accelerator.trackers):
            self._tried(tracker.name, tracker.finish)
        self._accelerator.trackers = []

    def _tried(self, name: str, call: Callable[[], object]) -> bool:
        """Whether a tracker did as it was told."""
        try:
            with breakable():
                call()
        except (Exception, SystemExit, Overdue) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            print(f"warning: the tracker {name} failed and gets no more ({why})", file=sys.stderr, flush=True)
            return False
        return True
