"""What is called at fixed points of a run: the project's own logs, previews and report, and whatever a user adds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import ConfigError, UserError, short
from diffusion_align.foreign import foreign_code
from diffusion_align.references import resolve
from diffusion_align.training.config import dump_config
from diffusion_align.training.tracking import MetricsLog, Trackers
from diffusion_align.writing import write_text

if TYPE_CHECKING:
    from diffusion_align.training.trainer import Trainer

Row = dict[str, Any]


class Callback:
    """Subclass it and override what you need; every method is called on every process.

    An epoch's ``row`` may be added to: what is in it after the last callback is written to ``metrics.jsonl``.
    """

    def on_start(self, trainer: Trainer[Any]) -> None:
        """Before the first epoch, or after a checkpoint was loaded."""

    def on_update(self, trainer: Trainer[Any], row: Row) -> None:
        """After an optimizer step, with its metrics."""

    def on_epoch_end(self, trainer: Trainer[Any], row: Row) -> str | None:
        """After an epoch was trained and measured, with its metrics; a returned reason ends the run."""

    def on_end(self, trainer: Trainer[Any]) -> None:
        """After ``final/`` was written; not called where the run fails or is interrupted."""

    def on_close(self, trainer: Trainer[Any]) -> None:
        """The last call, also where the run is interrupted."""


def named_callbacks(references: Sequence[Any]) -> list[Callback]:
    """The callbacks that ``module:name`` or ``file.py:name``, each an object or a class without arguments, stand for.

    Raises:
        ConfigError: one sentence for each that cannot be had.
    """
    found, problems = [], []
    for reference in references:
        try:
            one = resolve(reference, "callback", noun="Class")
            if isinstance(one, type):
                with foreign_code(f"callback {short(reference)} cannot be made (", ")"):
                    one = one()
            if not isinstance(one, Callback):
                raise UserError(f"callback {short(reference)} is no Callback: write a subclass of it")
            found.append(one)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return found


class DescribeMetrics(Callback):
    """``metrics.json``: what the method's metrics mean, for whoever reads the run without its code."""

    def on_start(self, trainer: Trainer[Any]) -> None:
        described = {key: one._asdict() for key, one in trainer.described_metrics().items()}
        text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
        trainer.processes.on_main(lambda: write_text(trainer.folder / "metrics.json", text))


class WriteMetrics(Callback):
    """Rows go to ``metrics.jsonl``."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def on_update(self, trainer: Trainer[Any], row: Row) -> None:
        trainer.processes.on_main(lambda: self.log.write(row))

    def on_epoch_end(self, trainer: Trainer[Any], row: Row) -> None:
        self.on_update(trainer, row)


class Track(Callback):
    """Rows go to accelerate's trackers (TensorBoard, W&B)."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_start(self, trainer: Trainer[Any]) -> None:
        self.trackers.start({"config": dump_config(trainer.config)})

    def on_update(self, trainer: Trainer[Any], row: Row) -> None:
        if trainer.processes.is_main:
            self.trackers.log(row)

    def on_epoch_end(self, trainer: Trainer[Any], row: Row) -> None:
        self.on_update(trainer, row)

    def on_close(self, trainer: Trainer[Any]) -> None:
        self.trackers.end()


class Preview(Callback):
    """Every ``grid_every`` epochs, and before the first: what the fixed prompts give."""

    def on_start(self, trainer: Trainer[Any]) -> None:
        if not trainer.resumed:
            self._show(trainer)

    def on_epoch_end(self, trainer: Trainer[Any], row: Row) -> None:
        started = time.perf_counter()
        self._show(trainer)
        row["time/grid"] = time.perf_counter() - started
        row["time/epoch"] += row["time/grid"]

    def _show(self, trainer: Trainer[Any]) -> None:
        every = trainer.config.grid_every
        if every and trainer.epoch % every == 0:
            with trainer.ema_weights():
                trainer.processes.on_main(lambda: trainer.show(f"epoch_{trainer.epoch:04d}"))


class Report(Callback):
    """``report.html`` at the end."""

    def on_end(self, trainer: Trainer[Any]) -> None:
        from diffusion_align.report import write_report

        trainer.processes.on_main(lambda: write_report(trainer.folder))
