"""The loop every trainer shares: collect -> estimate -> update -> measure.

A trainer supplies what it samples, what it estimates from the scores and its loss per action; order, gradient
accumulation, processes, callbacks, checkpoints, resume and interruption are here.

Random numbers come from streams named by (seed, purpose, epoch, sample), and every process knows the global plan, so a
run does not depend on how its work is divided.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align import __version__
from diffusion_align.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainingError,
    UserError,
)
from diffusion_align.interrupt import InterruptFlag, Overdue
from diffusion_align.invocation import PythonCall
from diffusion_align.references import reference_to
from diffusion_align.report.metrics import NAMES
from diffusion_align.streams import print_warning
from diffusion_align.training import checkpoint
from diffusion_align.training.callbacks import (
    Callback,
    DescribeMetrics,
    MetricsLog,
    Preview,
    Report,
    Row,
    Trackers,
    call_each,
    plain_row,
)
from diffusion_align.training.calls import check_call
from diffusion_align.training.config import TrainingConfig, multiple_checks
from diffusion_align.training.context import RunContext
from diffusion_align.training.digests import Identity
from diffusion_align.training.endings import (
    UNTRAINED_EPOCHS,
    add_memory_advice,
    add_resume,
    changed_by_mending,
    end_process,
    interruption,
    nothing_trained,
)
from diffusion_align.training.finite import require_finite_loss
from diffusion_align.training.launch import check_accelerator, make_accelerator
from diffusion_align.training.lines import epoch_line, start_lines
from diffusion_align.training.method import Batch, TrainingMethod, TrainingPlan
from diffusion_align.training.optimization import Optimization
from diffusion_align.training.precision import Machine, matrix_products_in_tf32, with_precision
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.training.randomness import generator
from diffusion_align.training.reading import dump_config, load_yaml
from diffusion_align.training.resume import check_same_run
from diffusion_align.training.run_folder import RunFolder
from diffusion_align.training.savepoint import Savepoint
from diffusion_align.training.statistics import UpdateStatistics
from diffusion_align.writing import WriteError, sweep, write_text


class Trainer(TrainingMethod[Batch]):
    """One run of one method in one folder.

    A subclass gives ``trainable``, ``collect``, ``estimate``, ``loss`` and ``finish``; ``train`` does the rest. Those
    methods and ``save`` may also be called on a trainer that does not train.

    Args:
        config: checked settings.
        accelerator: devices, precision, processes and trackers; a plain one when not given.
        callbacks: called after the project's own, in this order.

    Attributes:
        epoch: finished epochs.
        step: optimizer steps, skipped ones counted.
        resumed: whether a checkpoint was loaded.
        stopped: why the run ended before its last epoch.
        identity: what the run is made of, by content, if whoever built this trainer gave it.
        model_given: whether whoever built it gave a language model in memory.
        local_samples: this process's part of an epoch's global samples.
        processes, bars, folder, run_folder, log: what helpers are given.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A call as TRL's trainers take it, or without a policy, is answered with the one that is meant."""
        check_call(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator | None = None, *, callbacks: Sequence[Callback] = ()
    ) -> None:
        if not config.method:  # of settings made in Python: the run folder says what trained
            config = config.model_copy(update={"method": reference_to(type(self))})
        self.accelerator = accelerator or make_accelerator()
        # Of a policy made in Python the run folder says how it is trained.
        self.config = with_precision(config, Machine(launched=self.accelerator.mixed_precision))
        self.processes = Processes(self.accelerator)
        self.bars = Bars(disable=not self.processes.is_main)
        self.folder = config.output_dir
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        kind, settings = type(self).__name__, type(config).__name__
        here = PythonCall(f"{kind}({settings}({{}}), ...).train()", {"output_dir": self.folder})
        self.run_folder = RunFolder(self.folder, self.processes, here, self.keeps)
        trackers = [Trackers(self.accelerator)] if config.trackers else []
        self.report = Report()
        self.callbacks: list[Callback] = [DescribeMetrics(), Preview(), *callbacks, self.log, *trackers, self.report]
        self.epoch = self.step = self._began = 0
        self._training_since = 0.0  # on the clock of ``time.perf_counter``
        self.resumed = False
        self.stopped: str | None = None
        self.identity: Identity = {}
        self.model_given = False
        self._savepoint = Savepoint(self.processes)
        self._steps_before = 0  # optimizer steps taken before the epoch's updates
        self._updates, self._in_update = 0, False  # those made of an epoch that is resumed within; whether in the next
        self._failed_update: Exception | None = None  # of a user's callback after one of the epoch's updates
        self._untrained, self._why_untrained = 0, ""  # epochs in a row, up to the last, without any
        # An epoch's row, and its last update's, of a checkpoint written between the epoch and its measurement.
        self._unmeasured: tuple[Row, Row] | None = None
        check_accelerator(self.accelerator)
        for problem in multiple_checks(config, "sample_batch_size", self.processes.count):
            raise ConfigError([problem])
        share = config.samples_per_epoch // self.processes.count
        first = share * self.processes.index
        self.local_samples = range(first, first + share)

    @classmethod
    def from_run(cls, run: RunContext) -> Self:
        """The trainer of a run; override it where the constructor takes other arguments."""
        return cls(run.config, run.accelerator, callbacks=run.callbacks)

    # -- the run ---------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run until ``config.epochs`` epochs are finished and return the run folder.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint has been written.
            UserError: a TrainingError, CheckpointError, RewardError or WriteError; the last checkpoint stands.
        """
        with self._running():
            self._begin()  # 1. resume or start, config.yaml, the first previews and measurement
            while self.epoch < self.config.epochs and self.stopped is None:
                started = time.perf_counter()
                collected, metrics = self._collect()  # 2. sample and score
                sampled = time.perf_counter()
                batch, plan, estimated = self.estimate(collected)  # 3. advantages, references
                last = self._update(batch, plan)  # 4. optimizer steps
                row = plain_row(metrics | estimated | self.after_updates()) | self._trained(plan)
                row["time/sample"] = sampled - started - metrics.get("time/score", 0.0)
                row["time/update"] = time.perf_counter() - sampled
                self._end_epoch(row, last, started)  # 5. measure, callbacks, stop rules, checkpoint
            self._end()  # 6. final/, the report
        return self.folder

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Inside, signals are a flag, bars are shown, and the folder is this run's."""
        tf32 = matrix_products_in_tf32(self.config.tf32)
        flag, folder = InterruptFlag(self.config.interrupt_grace, self._leave), self.run_folder
        with tf32, flag, self.bars.progress, folder.held(lambda: self.epoch):
            self.processes.flag = flag
            try:
                yield
            except (Interrupted, Overdue):
                stopped = interruption(folder, epoch=self.epoch, epochs=self.config.epochs)
                self.report.on_failure(self, stopped)
                raise stopped from None
            except BaseException as error:
                add_memory_advice(error)
                if not folder.is_forgotten(error, self.epoch):
                    add_resume(error, folder)
                    self.report.on_failure(self, error)
                raise

    def _begin(self) -> None:
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        newest = self.run_folder.checkpoints[-1:] if config.resume else []
        if newest:
            self._load(newest[0])
        elif self.run_folder.config_file.is_file():
            self._check_same_run(load_yaml(self.run_folder.config_file), None, self.folder)
        self.resumed, self._began = bool(newest), self.epoch
        self.processes.wait()  # all have read the folder before the main process writes to it
        self.processes.on_main(lambda: self._open_folder(self.step if newest else -1))
        self.bars.print_start(
            *start_lines(config, done=self.epoch, device=self.processes.device.type, processes=self.processes.count),
            *self.data_lines(),
        )
        self.bars.show_epochs(self.epoch, config.epochs, "starting")
        try:
            self._each("on_start")
            first = {} if newest else self.measure_first()
        except (Interrupted, Overdue):  # nothing to save yet
            self._close()
            raise
        if first:
            self._each("on_update", plain_row({"step": 0, "epoch": 0, **first}))
        if self._unmeasured is not None:
            row, last = self._unmeasured
            requested = self._measure(row, last)
            self.stopped = self.stop_reason(last | row) or requested or self._nothing_left_to_train()
        self._training_since = time.perf_counter()

    def _check_same_run(self, theirs: Mapping[str, Any], their_identity: Identity | None, path: Path) -> None:
        mine, given = (self.config, self.identity), self.model_given
        check_same_run(*mine, theirs, their_identity, path, self.processes, model_given=given)

    def _open_folder(self, step: int) -> None:
        """``config.yaml`` first: with it the run can be resumed, whatever a tracker or callback does."""
        sweep(self.folder)
        # What was accepted this once belongs to the run from now on; a change after that is to be accepted again.
        write_text(self.run_folder.config_file, dump_config(self.config.model_copy(update={"accept_changed": []})))
        self.log.rewind(step, unmeasured=self._unmeasured is not None)
        self.report.begin(self)

    def _collect(self) -> tuple[Any, dict[str, float]]:
        self._savepoint.mark()
        with self._checkpoint_on_failure():
            return self.collect()

    def _trained(self, plan: TrainingPlan) -> Row:
        """The counters of an epoch that ends here; ``untrained_epochs``, those in a row without any step, with a line
        about it, only where this is one."""
        self.epoch += 1
        used = len(plan.sample_indices) * self.samples_each
        row: Row = {"step": self.step, "epoch": self.epoch, "samples_used": used}
        if self.optimization.steps > self._steps_before:
            self._untrained = 0
            return row
        self._untrained += 1
        if len(plan.sample_indices) == 0:
            self._why_untrained = f"no sample was left to train on ({self.none_left})"
        else:
            self._why_untrained = "every step overflowed in fp16 and was skipped"
        if self.processes.is_main:
            print_warning(f"epoch {self.epoch}: nothing was trained, {self._why_untrained}")
        return row | {"untrained_epochs": self._untrained}

    def _end_epoch(self, row: Row, last: Row, started: float) -> None:
        config = self.config
        row["time/epoch"] = time.perf_counter() - started
        requested = self._measure(row, last)
        known, key = last | row, self.headline
        shown = f"{NAMES.get(key, key)} {known[key]:.4g}" if key in known else f"step {self.step}"
        self.bars.show_epochs(self.epoch, config.epochs, shown)
        self._savepoint.mark()
        self.stopped = self.stop_reason(known) or requested or self._nothing_left_to_train()
        done = self.epoch - self._began
        left = (time.perf_counter() - self._training_since) / done * (config.epochs - self.epoch)
        line = epoch_line(known, epochs=config.epochs, headline=key, left=left)
        self.bars.print_epoch(line, always=done == 1 or self.epoch == config.epochs or bool(self.stopped))
        due = self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs
        due = due or bool(self.stopped) or self.checkpoint_wanted()
        if not due and config.checkpoint_minutes is not None:  # by the clock of the main process
            due = self.processes.from_main(self._savepoint.age > 60 * config.checkpoint_minutes)
        if due:
            self.save()
        if self.epoch < config.epochs and not self.stopped:
            with self._checkpoint_on_failure():
                self.processes.stop_if_interrupted()

    def _end(self) -> None:
        self.bars.show_epochs(self.epoch, self.config.epochs, "writing final/ and the report")
        with self.ema_weights():
            self.before_finish()
            self.processes.on_main(self.finish)
        self._each("on_end")
        self.processes.wait()
        self._close()

    def _close(self) -> None:
        self._each("on_close")
        self.accelerator.end_training()

    def _each(self, method: str, *row: Row) -> list[Any]:
        """What the callbacks return, one after the other: one that fails on a process fails on all, and none waits.

        What a user's raises after an update is kept for the end of its epoch, which is then not lost.
        """
        given, failed_update = call_each(self, method, *row)
        self._failed_update = self._failed_update or failed_update
        return given

    def _measure(self, row: Row, last: Row) -> str | None:
        """``measure()`` of the epoch that ``row`` is about, and the callbacks, which may give a reason to stop.

        If it is interrupted, it is repeated on resume, and the epoch is not lost.
        """
        started = time.perf_counter()
        self._savepoint.mark()
        self._unmeasured = (dict(row), last)
        with self._checkpoint_on_failure():
            self.processes.raise_together(self._failed_update, UserError)  # it is on all, or on none
            row |= plain_row(self.measure())
            row["time/epoch"] += time.perf_counter() - started
            reasons = [str(reason) for reason in self._each("on_epoch_end", row) if reason]
        self._unmeasured = None
        return "; ".join(dict.fromkeys(self.processes.gather_in_order(reasons))) or None

    def _nothing_left_to_train(self) -> str | None:
        """Why a run ends whose last ``UNTRAINED_EPOCHS`` epochs trained nothing; the same everywhere.

        What was trained before is kept as ``stop_when`` would. Where nothing ever was, the run fails; its checkpoint
        does not count the epochs so far, so that resuming from it gives as many again.
        """
        if self._untrained < UNTRAINED_EPOCHS:
            return None
        if "fp16" in self._why_untrained and self.optimization.scale_may_fall:
            return None
        reason = f"nothing was trained in {self._untrained} epochs in a row: {self._why_untrained}"
        if self.optimization.steps:
            return reason
        self._untrained = 0
        self.save()
        raise nothing_trained(reason)

    # -- update ----------------------------------------------------------------------------------------------------

    @cached_property
    def optimization(self) -> Optimization:
        """Made when it is first needed: the trained weights are then complete."""
        return Optimization(self.trainable, self.config, self.processes)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the trained parameters are their EMA, if one is kept, and no checkpoint is written of them."""
        if self.config.ema_decay is None:
            yield
            return
        with self._savepoint.withheld(), self.optimization.ema_weights():
            yield

    def _update(self, batch: Batch, plan: TrainingPlan) -> Row:
        """All optimizer steps of one epoch; the metrics of the last one."""
        config, (keep, steps, normalizer) = self.config, plan
        if not self._updates:
            self._steps_before = self.optimization.steps
        row: Row = {}
        own = torch.tensor([self.local_samples.start, self.local_samples.stop])
        with self.bars.task("  training", config.inner_epochs * len(keep) * steps // self.processes.count) as advance:
            for inner in range(config.inner_epochs):
                order = keep[torch.randperm(len(keep), generator=generator(config.seed, "order", self.epoch, inner))]
                for update, chunk in enumerate(order.tensor_split(config.updates_per_epoch)):
                    number = inner * config.updates_per_epoch + update
                    if number < self._updates:
                        continue
                    self.step += 1
                    if len(chunk) == 0:
                        continue
                    local = chunk[(chunk >= own[0]) & (chunk < own[1])] - own[0]
                    indices = torch.stack([local.repeat_interleave(steps), torch.arange(steps).repeat(len(local))], 1)
                    mixing = generator(config.seed, "pairs", self.epoch, inner, update, self.processes.index)
                    indices = indices[torch.randperm(len(indices), generator=mixing)]
                    divisor = len(chunk) if normalizer is None else normalizer / config.updates_per_epoch
                    with self._resumable(number):
                        statistics = self.accumulate(batch, indices, divisor * steps, advance)
                    row = {"step": self.step, "epoch": self.epoch + 1, **statistics.over_processes(self.accelerator)}
                    require_finite_loss(row, self.loss_coefficients(), mixed_precision=self.accelerator.mixed_precision)
                    row |= plain_row(self.check_update(row, first=inner == 0 and update == 0))
                    row["grad_norm"] = self.optimization.step(self.step)
                    row["learning_rate"] = self.optimization.learning_rate
                    self.optimization.advance_schedule()
                    self._each("on_update", row)
        self._updates = 0
        return row

    @contextlib.contextmanager
    def _resumable(self, number: int) -> Iterator[None]:
        """Around the gradients of update ``number`` of an epoch: where updates stand alone, a run that is interrupted
        or fails there resumes before it."""
        if not self.updates_stand_alone:
            yield
            return
        self._updates, self._in_update = number, True
        self._savepoint.mark()
        try:
            with self._checkpoint_on_failure():
                self.processes.stop_if_interrupted()
                yield
        except BaseException:
            self.step -= 1
            raise
        finally:
            self._in_update = False

    def accumulate(
        self, batch: Batch, indices: Tensor, normalizer: float, on_actions: Callable[[int], object] = lambda count: None
    ) -> UpdateStatistics:
        """Add the gradient of the losses of ``indices`` over ``normalizer`` to what is there.

        Args:
            batch: from ``estimate``.
            indices: (n, 2) int64, local sample and which of its actions.
            normalizer: what the sum of the losses of all processes is divided by.
            on_actions: called after each micro-batch with its size.
        """
        statistics = UpdateStatistics()
        for part, micro_batch in self.micro_batches(batch, indices):
            samples, actions = micro_batch.to(self.processes.device).unbind(1)
            dropout = self.dropout
            with dropout(self.dropout_seeds(part, samples, actions)) if dropout else contextlib.nullcontext():
                losses, observed = self.loss(part, samples, actions)
                self.optimization.backward(losses.sum() / normalizer)
            statistics.add({"loss": losses.detach(), **observed}, self.independent(samples))
            on_actions(len(samples))
        return statistics

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _checkpoint_on_failure(self) -> Iterator[None]:
        """Inside, no weights change, so whatever breaks it off, the state at its beginning can still be saved."""
        with self._savepoint.intact():
            try:
                yield
            except (Interrupted, Overdue):
                self.save()
                self._close()
                raise
            except Exception as error:
                processes, folder = self.processes, self.run_folder
                # Of any process: where one saves nothing, the others would wait for it.
                unfit = isinstance(error, TrainingError) or processes.unfit_together  # the weights, for these settings
                if unfit and self.epoch == 0:
                    raise  # there is nothing to resume from
                together = processes.count == 1 or processes.failed_together  # saving needs every process
                if together and not processes.from_main(processes.is_main and folder.nothing_trained(self.epoch)):
                    with contextlib.suppress(WriteError):  # the first failure is reported; the last checkpoint stands
                        self.save()
                    if unfit and self.accelerator.mixed_precision == "fp16":
                        error.add_note(folder.how_to_resume(mixed_precision="no"))
                    elif not (unfit or isinstance(error, WriteError)):
                        changed = changed_by_mending(error, self.identity, self.config)
                        error.add_note(folder.how_to_resume(**changed))
                raise

    def _leave(self) -> None:
        """In another thread: end this process, whose main thread cannot be reached. Without other processes, and where
        the epoch's beginning can still be saved, it is."""
        alone, save = self.processes.count == 1, partial(self._savepoint.save_if_intact, self._write_checkpoint)
        end_process(self.run_folder, save if alone else None, partial(self.report.on_failure, self))

    def save(self) -> None:
        """Write a checkpoint of the last finished epoch, or update where they stand alone."""
        self._savepoint.save(self._write_checkpoint)

    def _write_checkpoint(self, rng: Sequence[Any]) -> None:
        optimization, step = self.optimization, self.step - self._in_update
        checkpoint.save_checkpoint(
            self.folder / "checkpoints",
            step,
            weights=optimization.weights() | self.extra_weights(),
            tensors={**optimization.tensors(), "rng": rng},
            state={
                "version": __version__,
                "epoch": self.epoch,
                "step": step,
                "updates": [self._updates, self._steps_before],
                "stopped": self.stopped,
                "steps_taken": optimization.steps,
                "untrained": [self._untrained, self._why_untrained],
                "unmeasured": self._unmeasured,
                "ema_steps": optimization.ema_steps,
                "config": self.config.model_dump(mode="json"),
                "identity": self.identity,
                "extra": self.extra_state(),
            },
            keep=self.config.keep_checkpoints,
        )

    def _load(self, path: Path) -> None:
        weights, tensors, state = checkpoint.load_checkpoint(path)
        self._check_same_run(state["config"], state.get("identity"), path)
        if self.config.epochs < (done := state["epoch"]):
            raise CheckpointError(f"epochs={self.config.epochs}, but {done} are finished: set epochs={done} or more")
        if self.identity and not state.get("identity") and self.processes.is_main:
            print_warning(
                f"{path} does not record the content of its model, data and rewards: a change was not checked for"
            )
        if {n: t.shape for n, t in weights["trained"].items()} != {n: p.shape for n, p in self.trainable.items()}:
            raise CheckpointError(
                f"checkpoint {path} holds other weights than this model trains: restore the model's folder or choose a "
                "new output_dir"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.optimization.load(
            weights, tensors, steps=state.get("steps_taken", self.step), ema_steps=state["ema_steps"]
        )
        self._updates, self._steps_before = state.get("updates", (0, 0))
        self._untrained, self._why_untrained = state.get("untrained", (0, ""))
        self._unmeasured = state.get("unmeasured")
        if state["config"].get("stop_when") == self.config.model_dump(mode="json").get("stop_when"):
            self.stopped = state.get("stopped")  # under other rules the run continues
        self.load_extra_state(state["extra"])
        self.load_extra_weights(weights)
        own = tensors["rng"]
        checkpoint.set_rng_state(own[min(self.processes.index, len(own) - 1)])
