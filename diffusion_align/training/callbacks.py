"""What is called at fixed points of a run: the project's own logs, previews and report, and whatever a user adds."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from diffusion_align.errors import (
    ConfigError,
    Interrupted,
    UserError,
    describe_exception,
    first_line,
    foreign_code,
    short,
)
from diffusion_align.interrupt import Overdue, breakable
from diffusion_align.invocation import RESUME_WITH
from diffusion_align.references import resolve
from diffusion_align.streams import print_warning
from diffusion_align.training.reading import dump_config
from diffusion_align.writing import append_line, write_text

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


def plain_row(row: Mapping[str, Any]) -> Row:
    """``row`` as JSON holds it: a tensor or array of no dimension becomes its number.

    Raises:
        UserError: JSON has no such value.
    """
    plain = {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in row.items()}
    for key, value in plain.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise UserError(f"the metric {key!r} is a {type(value).__name__}{shape}: give one number") from None
    return plain


def call_each(trainer: Trainer[Any], method: str, *row: Row) -> tuple[list[Any], Exception | None]:
    """What a trainer's callbacks return, one after the other: one that fails on a process fails on all, none waits.

    Those that leave ``method`` as it is are skipped, which saves one gather per update and callback.

    Returns:
        What they returned, and the first failure of a user's after an update, which is not raised here.
    """
    given: list[Any] = []
    failed_update: Exception | None = None
    for callback in trainer.callbacks:
        call = getattr(callback, method)
        if getattr(call, "__func__", None) is getattr(Callback, method):
            continue
        users, failure = not type(callback).__module__.startswith("diffusion_align."), None
        name = f"callback {type(callback).__name__}.{method}"
        try:
            with foreign_code(f"{name} raised ") if users else contextlib.nullcontext():
                given.append(call(trainer, *row))
            for added_to in row if users else ():
                added_to.update(plain_row(added_to))
        except Exception as error:
            failure = error
        if trainer.processes.count > 1:
            try:
                trainer.processes.raise_together(failure, UserError)
            except Exception as error:
                failure = error
        if failure is not None and users and method == "on_update":
            failed_update = failed_update or failure
        elif failure is not None:
            raise failure
    return given, failed_update


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
                raise UserError(f"callback {short(reference)} is not a Callback: write a subclass of it")
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


class MetricsLog(Callback):
    """``metrics.jsonl`` of a run: one JSON object per line, of updates and of epochs; the main process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_update(self, trainer: Trainer[Any], row: Row) -> None:
        trainer.processes.on_main(lambda: self.write(row))

    on_epoch_end = on_update

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

    def rows(self) -> list[Row]:
        """What has been written; a row that a kill has cut off is left out."""
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.split("\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def write(self, row: Row) -> None:
        """Append one row; ``row["step"]`` is the optimizer step.

        Raises:
            WriteError: it cannot be written.
        """
        append_line(self.path, json.dumps(row))


class Trackers(Callback):
    """Rows go to accelerate's trackers (TensorBoard, W&B): one that fails is dropped with one line on stderr, as
    nothing of the run hangs on it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_start(self, trainer: Trainer[Any]) -> None:
        """One by one, so that one which cannot start keeps none of the others from it."""
        accelerator, started = self._accelerator, []
        wanted, config = list(accelerator.log_with), {"config": dump_config(trainer.config)}
        for tracker in wanted:
            accelerator.log_with, accelerator.trackers = [tracker], []
            if self._tried(str(tracker), lambda: accelerator.init_trackers("diffusion-align", config=config)):
                started += accelerator.trackers
        accelerator.log_with, accelerator.trackers = wanted, started

    def on_update(self, trainer: Trainer[Any], row: Row) -> None:
        """The numbers of a row, at its optimizer step."""
        if not trainer.processes.is_main:
            return
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        for tracker in list(self._accelerator.trackers):
            if not self._tried(tracker.name, lambda: tracker.log(numbers, step=row["step"])):  # noqa: B023 - called here
                self._accelerator.trackers.remove(tracker)

    on_epoch_end = on_update

    def on_close(self, trainer: Trainer[Any]) -> None:
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
            print_warning(f"the tracker {name} failed and is not used any more ({why})")
            return False
        return True


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
                trainer.show(f"epoch_{trainer.epoch:04d}")


class Report(Callback):
    """``status.json`` and ``report.html``: how the run stands while it runs, and after whatever ended it.

    The main process writes them after an epoch if all writing so far stays within ``share`` of the run's time, and
    always at the start and the end. If that fails, one warning is printed, as nothing in the run depends on it.

    Attributes:
        share: of the run's time.
    """

    share = 0.02

    def __init__(self) -> None:
        self._began: float | None = None  # by the clock on the wall
        self._started = self._spent = self._last = 0.0  # seconds, of ``time.perf_counter``
        self._failed = False

    def begin(self, trainer: Trainer[Any]) -> None:
        """The folder is this run's from now on."""
        self._began, self._started = time.time(), time.perf_counter()
        self._write(trainer, "running")

    def on_start(self, trainer: Trainer[Any]) -> None:
        ahead = self._spent + self._last
        if trainer.processes.is_main and ahead <= self.share * (time.perf_counter() - self._started):
            self._write(trainer, "running")

    def on_epoch_end(self, trainer: Trainer[Any], row: Row) -> None:
        if trainer.epoch < trainer.config.epochs:  # the end follows
            self.on_start(trainer)

    def on_end(self, trainer: Trainer[Any]) -> None:
        if trainer.processes.is_main:
            self._write(trainer, "stopped" if trainer.stopped else "finished", why=trainer.stopped or "")

    def on_failure(self, trainer: Trainer[Any], error: BaseException) -> None:
        """The run is ended by ``error``, which is raised after this. Nothing is written of one that did not begin."""
        if self._began is None or not trainer.processes.is_main:
            return
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        sentence = str(error) if isinstance(error, UserError | Interrupted) else describe_exception(error)
        notes = [note for note in getattr(error, "__notes__", ()) if RESUME_WITH in note]
        why, _, resume = "\n".join([sentence, *notes]).partition(RESUME_WITH)
        state, by = ("interrupted", trainer.processes.flag.signal) if interrupted else ("failed", "")
        resume = resume or (self._resume(trainer) if interrupted else "")
        self._write(trainer, state, by=by, why=why.rstrip("\n ;"), resume=resume)

    def _resume(self, trainer: Trainer[Any]) -> str:
        return trainer.run_folder.how_to_resume().partition(RESUME_WITH)[2]

    def _write(self, trainer: Trainer[Any], state: str, *, resume: str | None = None, **more: Any) -> None:
        from diffusion_align.report import write_report
        from diffusion_align.report.status import RunStatus, write_status

        before = time.perf_counter()
        resume = self._resume(trainer) if resume is None else resume
        status = RunStatus(state, epoch=trainer.epoch, began=self._began or 0.0, resume=resume, **more)
        try:
            write_status(trainer.folder, status)
            write_report(trainer.folder)
        except Exception as error:
            if not self._failed:
                print_warning(f"{first_line(error)}; the run continues without its report")
            self._failed = True
        self._last = time.perf_counter() - before
        self._spent += self._last
