"""The loop every trainer shares: collect -> score -> estimate -> update.

A trainer supplies what it samples, what it estimates from the scores and its loss per decision; order, gradient
accumulation, processes, logging, checkpoints, resume and interruption are here.

Randomness is drawn from streams named by (seed, purpose, epoch, sample), and every process knows the global plan, so a
run does not depend on how its work is divided.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ValidationError
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from diffusion_align import __version__
from diffusion_align.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from diffusion_align.interrupt import INTERRUPTED, InterruptFlag, Overdue, waiting_for_others
from diffusion_align.training import checkpoint
from diffusion_align.training.config import Content, TrainingConfig, dump_config, load_yaml
from diffusion_align.training.digests import Identity, changed_content, same_content
from diffusion_align.training.finite import gradient_problem, largest, loss_problem, weights_problem
from diffusion_align.training.launch import accelerator_problems
from diffusion_align.training.lock import LOCK_FILE, FolderLock
from diffusion_align.training.places import absolute_paths
from diffusion_align.training.progress import progress_bars
from diffusion_align.training.randomness import generator
from diffusion_align.training.statistics import UpdateStatistics
from diffusion_align.training.tracking import MetricsLog
from diffusion_align.writing import WriteError, make_folder, sweep, write_text

Batch = TypeVar("Batch")
_LAST_SAVE = 300  # seconds that a checkpoint may take in a process that must end
UNTRAINED_EPOCHS = 3
"""After so many epochs in a row in which nothing was trained a run ends."""
# Settings that may change on resume: where and how long, never what.
WATCHING = {
    "output_dir",
    "resume",
    "accept_changed",
    "checkpoint_every",
    "checkpoint_minutes",
    "interrupt_grace",
    "keep_checkpoints",
    "trackers",
    "num_threads",
    "grid_every",
}
"""Settings of where a run is and how it is watched, which change no weight."""
_FREE_ON_RESUME = WATCHING | {"epochs", "stop_when"}
# Settings whose content is compared instead of their name, where it is known.
_KNOWN_BY_CONTENT = {"model", "reference_model", "prompts", "dataset", "eval_dataset", "pairs"}
# What lies in a folder that no run has used yet.
_NO_RUN = {LOCK_FILE}
# What a run writes into its folder.
_TRACES = (
    "config.yaml",
    "metrics.jsonl",
    "samples",
    "checkpoints",
    "best",
    "final",
    "report.html",
    "evaluation.json",
    "diffusion-align",
)
# Settings that fit a run into a machine's memory: they may change, and the last bits of what is computed with them.
_FREE_BUT_FOR_BITS = {"micro_batch_size", "sample_batch_size", "mixed_precision"}
# Where a reward is computed and how long it is waited for: a server may come back under another address.
_FREE_IN_REWARDS = {
    "url",
    "timeout",
    "patience",
    "token_file",
    "concurrency",
    "cache",
    "device",
    "offload",
    "background",
}


class Work(NamedTuple):
    """What an epoch trains on.

    Attributes:
        samples: (K,) int64 global indices of those worth training on.
        decisions: of each sample.
        counted: more than K where samples without a gradient are skipped, which then changes no gradient: the updates
            of an epoch divide by equal shares of this number, without it by the samples they train on. What is logged
            is always of the samples trained on.
    """

    samples: Tensor
    decisions: int = 1
    counted: int | None = None


class Trainer(ABC, Generic[Batch]):
    """One run of one method in one folder.

    Args:
        config: checked settings.
        accelerator: devices, precision, processes and trackers.

    Subclasses give ``trainable`` and the abstract methods; ``train`` does the rest.
    """

    headline = "reward"  # the metric that the progress bar shows
    none_left = "equal rewards, or ties, have no gradient"  # why an epoch may have no samples to train on
    keeps: tuple[str, ...] = ()  # what in the run folder is worth keeping though nothing is trained yet

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = config.output_dir
        self.epoch = 0  # finished epochs
        self.step = 0  # optimizer steps, skipped ones counted
        self.stopped: str | None = None  # why the run ended before its last epoch
        self.identity: Identity = {}  # what the run is made of, if whoever built this trainer has said so
        self._flag = InterruptFlag()
        self._log = MetricsLog(self.folder / "metrics.jsonl", accelerator)
        self._failed_together = self._unfit_together = self._can_be_saved = False
        self._saving = threading.Lock()  # held while a checkpoint is written, and to change ``_can_be_saved``
        self._steps_taken = 0  # optimizer steps, skipped ones not counted
        self._untrained, self._why_untrained = 0, ""  # epochs in a row, up to the last, without any
        # An epoch's row, and its last update's, of a checkpoint written between the epoch and its measurement.
        self._unmeasured: tuple[dict[str, Any], dict[str, Any]] | None = None
        if problems := accelerator_problems(accelerator):
            raise ConfigError(problems)
        if config.samples_per_epoch % (accelerator.num_processes * config.sample_batch_size):
            raise ConfigError(
                [
                    f"samples_per_epoch={config.samples_per_epoch} must be a multiple of {accelerator.num_processes} "
                    f"processes x sample_batch_size={config.sample_batch_size}"
                ]
            )
        share = config.samples_per_epoch // accelerator.num_processes
        first = share * accelerator.process_index
        self.local_samples = range(first, first + share)  # this process's part of the global samples

    @property
    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained."""

    @abstractmethod
    def collect(self) -> tuple[Batch, dict[str, float]]:
        """Sample and score ``local_samples`` of epoch ``self.epoch``; metrics of the whole epoch."""

    @abstractmethod
    def estimate(self, batch: Batch) -> tuple[Work, dict[str, float]]:
        """Advantages, references and so on, stored in ``batch``; what to train on, and metrics."""

    @abstractmethod
    def loss(self, batch: Batch, samples: Tensor, decisions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (n,) and detached statistics (n,) of n decisions, given local sample and decision indices (n,).

        A statistic is averaged over decisions; one whose name ends in ``/min`` or ``/max`` keeps its extreme.
        """

    def check_update(self, statistics: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Metrics to add to an update's, before its step; TrainingError where training should not go on.

        ``first``: of the epoch, so the weights still equal the sampler's.
        """
        return {}

    def after_updates(self) -> dict[str, float]:
        """Metrics of what the epoch's updates looked at; called on every process."""
        return {}

    def measure(self) -> dict[str, float]:
        """Metrics after ``self.epoch`` epochs, such as those of held-out data; called on every process."""
        return {}

    def checkpoint_wanted(self) -> bool:
        """Whether to write a checkpoint of this epoch although none is due; the same everywhere."""
        return False

    def loss_coefficients(self) -> dict[str, float]:
        """Setting -> value of those that a term of the loss is multiplied by; named where the loss overflows."""
        return {}

    def measure_first(self) -> dict[str, float]:
        """The same before anything is trained; nothing is written if it is empty."""
        return {}

    def stop_reason(self, row: Mapping[str, float]) -> str | None:
        """Why the run should end now, given an epoch's metrics and those of its last update; the same everywhere."""
        return None

    def show(self, name: str) -> None:
        """Write pictures (or texts) of the fixed prompts; called on the main process."""

    @abstractmethod
    def finish(self) -> None:
        """Write ``final/`` and the report; called on the main process."""

    def extra_state(self) -> dict[str, Any]:
        """JSON values a trainer needs back on resume."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``extra_state`` returned."""

    def train(self) -> Path:
        """Run until ``config.epochs`` epochs are finished and return the run folder.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint has been written.
            TrainingError, CheckpointError, RewardError, WriteError: with one sentence; the last checkpoint stands.
        """
        config = self.config
        flag = InterruptFlag(config.interrupt_grace, self._leave)
        with flag as self._flag, self._progress() as self._bars, self._own_folder(), self._resumable_if_not_written():
            self._prepare()
            while self.epoch < config.epochs and self.stopped is None:
                self._rng_at_start = checkpoint.rng_state()
                started = time.perf_counter()
                with self._saved_if_broken_off():
                    batch, collected = self.collect()
                sampled = time.perf_counter()
                work, estimated = self.estimate(batch)
                steps_before = self._steps_taken
                last = self._update(batch, work)
                estimated |= self.after_updates()
                updated = time.perf_counter()
                self.epoch += 1
                row = {
                    "step": self.step,
                    "epoch": self.epoch,
                    **collected,
                    **estimated,
                    "samples_used": len(work.samples),
                    **self._untrained_epochs(work, trained=self._steps_taken > steps_before),
                    "time/sample": sampled - started - collected.get("time/score", 0.0),
                    "time/update": updated - sampled,
                }
                row["time/epoch"] = updated - started
                row |= self._measured(row, last)
                shown = time.perf_counter()
                self._show_if_due()
                row["time/grid"] = time.perf_counter() - shown
                row["time/epoch"] = time.perf_counter() - started
                self._write_row(row)
                headline = _headline(last | row, self.headline)
                self._bars.update(self._epochs_bar, completed=self.epoch, description=headline)
                self._rng_at_start = checkpoint.rng_state()
                self.stopped = self.stop_reason(last | row) or self._nothing_left_to_train()
                due = self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs
                if due or self.stopped or self.checkpoint_wanted() or self._checkpoint_overdue():
                    self.save()
                if self.epoch < config.epochs and not self.stopped:
                    with self._saved_if_broken_off():
                        self.stop_if_interrupted()
            self._bars.update(self._epochs_bar, description="writing final/ and the report")
            with self.averaged_weights():
                self.on_main_process(self.finish)
            self.accelerator.wait_for_everyone()
            self._end_training()
        return self.folder

    def stop_if_interrupted(self, *, failed: bool = False) -> bool:
        """Between batches of ``collect``: leave the epoch if any process was asked to stop.

        Every process must call this at the same place. Returns whether anything ``failed`` on any process.
        """
        flags = torch.tensor([float(self._flag.raised), float(failed)], device=self.accelerator.device)
        with waiting_for_others():
            interrupted, any_failed = self.accelerator.reduce(flags, reduction="sum").tolist()
        if interrupted and not any_failed:
            raise Interrupted
        return any_failed > 0

    def raise_together(self, failure: BaseException | None, kind: type[Exception]) -> None:
        """Raise on every process if any has a ``failure``; the others would wait for it forever.

        Where a process was asked to stop, that is the cause of the failure, or will do for one: Interrupted is raised.
        """
        interrupted, unfit = self._flag.raised, isinstance(failure, TrainingError)
        if self.accelerator.num_processes > 1:
            with waiting_for_others():
                told = gather_object([(None if failure is None else str(failure), unfit, interrupted)])
            messages = [message for message, _, _ in told if message is not None]
            failure = failure or (kind(messages[0]) if messages else None)
            interrupted = any(raised for _, _, raised in told)
            self._failed_together, self._unfit_together = bool(messages), any(unfit for _, unfit, _ in told)
        if failure is not None:
            raise Interrupted if interrupted else failure

    def on_main_process(self, write: Callable[[], object]) -> None:
        """Call ``write`` on the main process; where that fails all processes raise, as none would answer the others."""
        failure: BaseException | None = None
        if self.accelerator.is_main_process:
            try:
                write()
            except Exception as error:
                failure = error
        if self.accelerator.num_processes > 1:
            told: list[str | None] = [None if failure is None else str(failure) or type(failure).__name__]
            broadcast_object_list(told)
            failure = failure or (None if told[0] is None else WriteError(told[0]))
            self._failed_together = failure is not None
        if failure is not None:
            raise failure

    def keep_average(self) -> None:
        """After training: make the weights in memory what ``final/`` holds, their EMA if one is kept."""
        if self._ema is not None:
            self._ema.copy_to(self._parameters)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the trained parameters are their EMA, if one is kept."""
        if self._ema is None:
            yield
            return
        parameters = list(self.trainable.values())
        with self._saving:
            could, self._can_be_saved = self._can_be_saved, False
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)
            with self._saving:
                self._can_be_saved = could

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[TaskID]:
        """A bar below the epochs' one; advance it with ``self.advance``."""
        bar = self._bars.add_task(description, total=total)
        try:
            yield bar
        finally:
            self._bars.remove_task(bar)

    def advance(self, bar: TaskID, count: int = 1) -> None:
        self._bars.advance(bar, count)

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        from transformers import get_scheduler

        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._parameters = list(self.trainable.values())
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=self.accelerator.device.type == "cuda",
        )
        steps = config.epochs * self._steps_per_epoch
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self._schedule = get_scheduler(schedule, optimizer, config.warmup_steps, steps)
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._ema = None
        if config.ema_decay is not None:
            from diffusers.training_utils import EMAModel

            self._ema = EMAModel(self._parameters, decay=config.ema_decay)
        self._saved_at = time.monotonic()
        newest = self._checkpoints()[-1:] if config.resume else []
        if newest:
            self._load(newest[0])
        elif (self.folder / "config.yaml").is_file():
            self._check_same_run(load_yaml(self.folder / "config.yaml"), self.folder)
        self._began = self.epoch
        self.accelerator.wait_for_everyone()  # all have read the folder before the main process writes to it
        self.on_main_process(self._open_folder)  # before any tracker writes there: with config.yaml it can be resumed
        if config.trackers:
            self._log.start_trackers({"config": dump_config(config)})
        step = self.step if newest else -1
        self.on_main_process(lambda: self._log.rewind(step, unmeasured=self._unmeasured is not None))
        self._epochs_bar = self._bars.add_task("starting", total=config.epochs, completed=self.epoch)
        if self._unmeasured is not None:
            row, last = self._unmeasured
            row = row | self._measured(row, last)
            self._show_if_due()
            self._write_row(row)
            self.stopped = self.stop_reason(last | row) or self._nothing_left_to_train()
        if not newest:
            self._show_if_due()
            try:
                first = self.measure_first()
            except (Interrupted, Overdue):  # nothing to save yet
                self._end_training()
                raise Interrupted(f"stopped before the first epoch; {self._how_to_resume}") from None
            if first:
                self._write_row({"step": 0, "epoch": 0, **first})

    def _open_folder(self) -> None:
        sweep(self.folder)
        # What was accepted this once belongs to the run from now on; a change after that is to be accepted again.
        write_text(self.folder / "config.yaml", dump_config(self.config.model_copy(update={"accept_changed": []})))

    def _write_row(self, row: Mapping[str, Any]) -> None:
        self.on_main_process(lambda: self._log.write(row))

    def _measured(self, row: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
        """``measure()`` of the epoch that ``row`` is about; broken off, it is made up for on resume."""
        self._rng_at_start = checkpoint.rng_state()
        self._unmeasured = (row, last)
        with self._saved_if_broken_off():
            measured = self.measure()
        self._unmeasured = None
        return measured

    def _show_if_due(self) -> None:
        every = self.config.grid_every
        if every and self.epoch % every == 0:
            with self.averaged_weights():
                self.on_main_process(lambda: self.show(f"epoch_{self.epoch:04d}"))

    def _untrained_epochs(self, work: Work, *, trained: bool) -> dict[str, float]:
        """``untrained_epochs``, those in a row up to this one without any step, and a line about it; or nothing."""
        self._untrained = 0 if trained else self._untrained + 1
        if trained:
            return {}
        if len(work.samples) == 0:
            self._why_untrained = f"no sample was left to train on ({self.none_left})"
        else:
            self._why_untrained = "every step overflowed in fp16 and was skipped"
        if self.accelerator.is_main_process:
            print(f"epoch {self.epoch}: nothing was trained, {self._why_untrained}", file=sys.stderr, flush=True)
        return {"untrained_epochs": self._untrained}

    def _nothing_left_to_train(self) -> str | None:
        """Why a run ends whose last ``UNTRAINED_EPOCHS`` epochs trained nothing; the same everywhere.

        What was trained before is kept as ``stop_when`` would. Where nothing ever was, the run fails; its checkpoint
        does not count the epochs so far, so that going on with it gives as many again.
        """
        if self._untrained < UNTRAINED_EPOCHS:
            return None
        scaler = self.accelerator.scaler
        if "fp16" in self._why_untrained and scaler is not None and scaler.get_scale() >= 1:
            return None  # it is still on its way down to a scale that fits
        reason = f"nothing was trained in {self._untrained} epochs in a row: {self._why_untrained}"
        if self._steps_taken:
            return reason
        self._untrained = 0
        self.save()
        remedies = {"fp16": "set mixed_precision=bf16 or no", "max_completion_length": "raise max_completion_length"}
        other = "use another reward, more samples a group or other prompts"
        remedy = next((remedy for cause, remedy in remedies.items() if cause in reason), other)
        raise TrainingError(f"{reason}: {remedy}")

    @property
    def _steps_per_epoch(self) -> int:
        return self.config.updates_per_epoch * self.config.inner_epochs

    def _progress(self) -> Progress:
        return progress_bars(disable=not self.accelerator.is_main_process)

    # -- update ----------------------------------------------------------------------------------------------------

    def _update(self, batch: Batch, work: Work) -> dict[str, float]:
        """All optimizer steps of one epoch; the metrics of the last one."""
        config, (keep, decisions, counted) = self.config, work
        row: dict[str, float] = {}
        own = torch.tensor([self.local_samples.start, self.local_samples.stop])
        with self.progress(
            "  training", config.inner_epochs * len(keep) * decisions // self.accelerator.num_processes
        ) as bar:
            for inner in range(config.inner_epochs):
                order = keep[torch.randperm(len(keep), generator=generator(config.seed, "order", self.epoch, inner))]
                for update, chunk in enumerate(order.tensor_split(config.updates_per_epoch)):
                    self.step += 1
                    if len(chunk) == 0:
                        continue
                    local = chunk[(chunk >= own[0]) & (chunk < own[1])] - own[0]
                    pairs = (
                        torch.cartesian_prod(local, torch.arange(decisions))
                        if len(local)
                        else torch.empty(0, 2, dtype=torch.int64)
                    )
                    mixing = generator(config.seed, "pairs", self.epoch, inner, update, self.accelerator.process_index)
                    pairs = pairs[torch.randperm(len(pairs), generator=mixing)]
                    divisor = len(chunk) if counted is None else counted / config.updates_per_epoch
                    statistics = self._accumulate(batch, pairs, divisor * decisions, bar)
                    statistics |= self.check_update(statistics, first=inner == 0 and update == 0)
                    statistics["grad_norm"] = self._optimizer_step()
                    self._steps_taken += math.isfinite(statistics["grad_norm"])
                    row = {
                        "step": self.step,
                        "epoch": self.epoch + 1,
                        **statistics,
                        "learning_rate": self._schedule.get_last_lr()[0],
                    }
                    self._schedule.step()
                    self._write_row(row)
        return row

    def _accumulate(self, batch: Batch, pairs: Tensor, total: float, bar: TaskID) -> dict[str, float]:
        """Gradient of the losses of all processes over ``total``; ``pairs`` (n, 2) are ours."""
        statistics = UpdateStatistics()
        device = self.accelerator.device
        for micro_batch in pairs.split(self.config.micro_batch_size):
            if len(micro_batch) == 0:
                continue
            samples, steps = micro_batch.to(device).unbind(1)
            losses, observed = self.loss(batch, samples, steps)
            self.accelerator.backward(losses.sum() / total)
            statistics.add({"loss": losses.detach(), **observed}, samples)
            self._bars.advance(bar, len(micro_batch))
        result = statistics.over_processes(self.accelerator)
        if not math.isfinite(result["loss"]):
            raise TrainingError(
                loss_problem(
                    result,
                    step=self.step,
                    coefficients=self.loss_coefficients(),
                    mixed_precision=self.config.mixed_precision,
                )
            )
        return result

    def _optimizer_step(self) -> float:
        """Sum the gradients of all processes, clip, step; returns the norm before clipping.

        Raises:
            TrainingError: gradient or weights are not finite; a step that the scaler of fp16 skips is none.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        total, weights = torch.stack([norm.float(), largest(self._parameters).to(norm.device).float()]).tolist()
        if not math.isfinite(weights):
            config = self.config
            raise TrainingError(
                weights_problem(step=self.step, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
            )
        if not (math.isfinite(total) or self.accelerator.scaler):
            raise TrainingError(gradient_problem(step=self.step))
        # accelerate's ``step_was_skipped`` does not know: a fused optimizer is called and skips the step by itself.
        if self._ema is not None and math.isfinite(total):
            self._ema.step(self._parameters)
        return total

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _saved_if_broken_off(self) -> Iterator[None]:
        """Collecting changes no weights, so whatever breaks it off, the epoch's beginning can still be saved."""
        with self._saving:
            self._can_be_saved = True
        try:
            yield
        except (Interrupted, Overdue):
            self._stop()
        except Exception as error:
            # Of any process: where one saves nothing, the others would wait for it.
            unfit = isinstance(error, TrainingError) or self._unfit_together  # the weights, for these settings
            if unfit and self.epoch == 0:
                raise  # there is nothing to go on with
            together = self.accelerator.num_processes == 1 or self._failed_together  # saving needs every process
            if together and not self._leaves_nothing():
                with contextlib.suppress(WriteError):  # what failed first is what is said; the last checkpoint stands
                    self.save()
                failed_before = not self._fresh and self.epoch == self._began  # and would again
                if unfit and self.accelerator.mixed_precision == "fp16":
                    error.add_note(f"{self._how_to_resume} mixed_precision=no")
                elif not (unfit or failed_before or isinstance(error, WriteError)):
                    error.add_note(self._how_to_resume)
            raise
        finally:
            with self._saving:  # what ``_leave`` has begun to write is not trained on meanwhile
                self._can_be_saved = False

    @contextlib.contextmanager
    def _resumable_if_not_written(self) -> Iterator[None]:
        """What could not be written, a full disk say, is said with how the run is resumed from its last checkpoint."""
        try:
            yield
        except WriteError as error:
            if (self.folder / "config.yaml").is_file() and not self._nothing_trained():
                stands = "the last checkpoint stands, " if self._checkpoints() else ""
                error.add_note(stands + self._how_to_resume)
            raise

    @property
    def _how_to_resume(self) -> str:
        return f"go on with resume=true output_dir={self.config.output_dir}"

    def _stop(self) -> None:
        self.save()
        self._end_training()
        raise Interrupted(f"stopped after epoch {self.epoch} of {self.config.epochs}; {self._how_to_resume}")

    def _end_training(self) -> None:
        self._log.end_trackers()
        self.accelerator.end_training()

    def _leave(self) -> None:
        """In another thread: end this process, whose main thread is in foreign code or waits for other processes and
        cannot be reached. Without others, and where the epoch's beginning can still be saved, it is."""
        if self.accelerator.num_processes == 1:
            # In a thread of its own: on a GPU that hangs it would, too.
            saving = threading.Thread(target=self._save_beginning, daemon=True)
            saving.start()
            saving.join(_LAST_SAVE)
        newest = "".join(path.name for path in self._checkpoints()[-1:]) or "none"
        said = f"stopped, as something did not answer; the newest checkpoint is {newest}; {self._how_to_resume}"
        print(said, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    def _checkpoints(self) -> list[Path]:
        return checkpoint.list_checkpoints(self.folder / "checkpoints")

    def _save_beginning(self) -> None:
        """For ``_leave``: wait for a checkpoint that is being written, and write the epoch's beginning if it can be."""
        with self._saving:
            if self._can_be_saved:
                self._write_checkpoint([self._rng_at_start])

    def save(self) -> None:
        """Write a checkpoint of the last finished epoch."""
        self._saved_at = time.monotonic()
        rng = [self._rng_at_start]
        if self.accelerator.num_processes > 1:
            rng = gather_object(rng)
        with self._saving:
            self.on_main_process(lambda: self._write_checkpoint(rng))

    def _checkpoint_overdue(self) -> bool:
        """Whether ``checkpoint_minutes`` have passed since the last one, by the clock of the main process."""
        if self.config.checkpoint_minutes is None:
            return False
        overdue = [time.monotonic() - self._saved_at > 60 * self.config.checkpoint_minutes]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(overdue)
        return overdue[0]

    def _write_checkpoint(self, rng: Sequence[Any]) -> None:
        weights: dict[str, dict[str, Tensor]] = {"trained": dict(self.trainable)}
        if self._ema is not None:
            weights["ema"] = dict(zip(self.trainable, self._ema.shadow_params, strict=True))
        scaler = self.accelerator.scaler
        checkpoint.save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            weights=weights,
            tensors={
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "rng": rng,
            },
            state={
                "version": __version__,
                "epoch": self.epoch,
                "step": self.step,
                "stopped": self.stopped,
                "steps_taken": self._steps_taken,
                "untrained": [self._untrained, self._why_untrained],
                "unmeasured": self._unmeasured,
                "ema_steps": self._ema.optimization_step if self._ema else 0,
                "config": self.config.model_dump(mode="json"),
                "identity": self.identity,
                "extra": self.extra_state(),
            },
            keep=self.config.keep_checkpoints,
        )

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Inside, no other run uses the folder; one that fails in its first epoch leaves it as it was found.

        Raises:
            UserError: another process holds it.
        """
        absent = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        self._fresh = bool(absent) or not any(path.name not in _NO_RUN for path in self.folder.iterdir())
        self.accelerator.wait_for_everyone()  # all have looked before the main process makes it
        with contextlib.ExitStack() as stack:
            if self.accelerator.is_main_process:
                for place in reversed(absent):
                    stack.callback(_remove_if_empty, place)
            self.on_main_process(lambda: stack.enter_context(self._lock()))
            try:
                yield
            except Interrupted:
                raise
            except Exception:
                if self.accelerator.is_main_process and self._nothing_trained():
                    for name in _TRACES:
                        with contextlib.suppress(OSError):  # what failed first is what is said
                            checkpoint.remove(self.folder / name)
                raise

    def _lock(self) -> FolderLock:
        return FolderLock(make_folder(self.folder, parents=True))

    def _nothing_trained(self) -> bool:
        """Whether this process began the run, finished no epoch, and nothing is there that took long to make."""
        return self._fresh and self.epoch == 0 and not any((self.folder / name).exists() for name in self.keeps)

    def _leaves_nothing(self) -> bool:
        """``_nothing_trained`` of the main process, on all."""
        decision = [self._nothing_trained() if self.accelerator.is_main_process else None]
        return bool(broadcast_object_list(decision)[0])

    def _check_same_run(self, theirs: Mapping[str, Any], path: Path, identity: Mapping[str, Any] | None = None) -> None:
        """What decides what is trained must be as it was when the run was started: settings, and content.

        Args:
            theirs: the run's settings.
            path: where they are from.
            identity: what the run was made of, if that is known.
        """
        with contextlib.suppress(ValidationError):  # of an older version: what it did not have was as it is by default
            theirs = type(self.config).model_validate(theirs).model_dump(mode="json")
        mine, theirs = (
            what_is_trained(absolute_paths(config, self.folder))
            for config in (self.config.model_dump(mode="json"), theirs)
        )
        free = _FREE_ON_RESUME if self.config.lr_schedule == "constant" else _FREE_ON_RESUME - {"epochs"}
        accepted = set(self.config.accept_changed)
        moved = (same_content(identity or {}, self.identity) & _KNOWN_BY_CONTENT) | accepted
        changed = [k for k in mine if k not in free | moved | _FREE_BUT_FOR_BITS and mine[k] != theirs.get(k)]
        others = {k: v for k, v in changed_content(identity or {}, self.identity).items() if k not in accepted}
        failure = None
        if changed or others:
            acceptable = [k for k in typing.get_args(Content) if k in accepted | set(changed) | others.keys()]
            remedy = "put it back or choose a new output_dir"
            # Another model may be this run's own result, whose adapters would be added once more.
            if set(changed) <= set(acceptable) - {"model", "reference_model"}:
                remedy = (
                    f"put it back, choose a new output_dir, or set accept_changed=[{', '.join(acceptable)}] to resume "
                    "with what is there now"
                )
            what = ", ".join(f"{k} was {theirs.get(k)!r} and is {mine[k]!r}" for k in changed)
            content = " and ".join(f"{setting} ({', '.join(places)})" for setting, places in others.items())
            which = f"another run: {what};" if changed else f"a run with other content of {content}:"
            failure = CheckpointError(f"{path} belongs to {which} {remedy}")
        self.raise_together(failure, CheckpointError)  # a process on another machine reads other files
        resized = [k for k in mine if k in _FREE_BUT_FOR_BITS and mine[k] != theirs.get(k)]
        if resized and self.accelerator.is_main_process:
            what = ", ".join(f"{k}={mine[k]} (was {theirs.get(k)})" for k in resized)
            print(
                f"resumed with {what}: from here on numbers may differ in their bits from the run's own",
                file=sys.stderr,
            )

    def _load(self, path: Path) -> None:
        weights, tensors, state = checkpoint.load_checkpoint(path)
        self._check_same_run(state["config"], path, state.get("identity"))
        if self.identity and not state.get("identity") and self.accelerator.is_main_process:
            print(
                f"{path} does not say what its model, data and rewards held: whether they are the same was not checked",
                file=sys.stderr,
            )
        trainable = self.trainable
        if {n: t.shape for n, t in weights["trained"].items()} != {n: p.shape for n, p in trainable.items()}:
            raise CheckpointError(
                f"checkpoint {path} holds other weights than this model trains: was the model's folder changed?"
            )
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(weights["trained"][name])
            if self._ema is not None:
                for name, shadow in zip(trainable, self._ema.shadow_params, strict=True):
                    shadow.copy_(weights["ema"][name])
                self._ema.optimization_step = state["ema_steps"]
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._schedule.load_state_dict(tensors["schedule"])
        if tensors["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(tensors["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._steps_taken = state.get("steps_taken", self.step)
        self._untrained, self._why_untrained = state.get("untrained", (0, ""))
        self._unmeasured = state.get("unmeasured")
        if state["config"].get("stop_when") == self.config.model_dump(mode="json").get("stop_when"):
            self.stopped = state.get("stopped")  # under other rules the run goes on
        self.load_extra_state(state["extra"])
        own = tensors["rng"]
        checkpoint.set_rng_state(own[min(self.accelerator.process_index, len(own) - 1)])


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def what_is_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only says where its rewards are."""
    return {name: _placeless(value) if name in ("reward", "evaluation") else value for name, value in config.items()}


def _placeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_placeless(one) for one in value]
    if isinstance(value, dict):
        return {key: _placeless(inner) for key, inner in value.items() if key not in _FREE_IN_REWARDS}
    return value


def _headline(row: Mapping[str, float], key: str) -> str:
    return f"{key} {row[key]:.4g}" if key in row else f"step {row['step']}"
