"""How a run ends before its last epoch: the sentences it prints, and how it is resumed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, Never

import torch

from diffusion_align.errors import Interrupted, RewardError, TrainingError
from diffusion_align.interrupt import INTERRUPTED
from diffusion_align.invocation import RESUME_WITH
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.digests import Identity
from diffusion_align.training.run_folder import RunFolder
from diffusion_align.writing import WriteError

UNTRAINED_EPOCHS = 3
"""After so many epochs in a row in which nothing was trained a run ends."""
_LAST_SAVE = 300  # seconds that a checkpoint may take in a process that must end
_LAST_REPORT = 10  # and the report
_UNANSWERED = "stopped, as something did not answer"
_LESS_MEMORY = "lower micro_batch_size or sample_batch_size, or set gradient_checkpointing=true"
_REMEDIES = {"fp16": "set mixed_precision=bf16 or no", "max_completion_length": "raise max_completion_length"}


def interruption(folder: RunFolder, *, epoch: int, epochs: int) -> Interrupted:
    """What is raised of a run that was interrupted once ``epoch`` of its ``epochs`` were finished."""
    when = f"after epoch {epoch} of {epochs}" if epoch else "before epoch 1 ended"
    return Interrupted(f"stopped {when}\n{folder.how_to_resume()}")


def add_memory_advice(error: BaseException) -> None:
    """Note what to lower, of a GPU without memory."""
    if isinstance(error, torch.OutOfMemoryError):
        error.add_note(_LESS_MEMORY)


def add_resume(error: BaseException, folder: RunFolder) -> None:
    """Note how a run is resumed from its last checkpoint: after a second Ctrl-C, or where a disk or a GPU was full."""
    told = any(RESUME_WITH in note for note in getattr(error, "__notes__", ()))
    saved = isinstance(error, torch.OutOfMemoryError | WriteError | KeyboardInterrupt)
    if saved and folder.config_file.is_file() and not told:
        stands = "the last checkpoint stands; " if folder.checkpoints else ""
        error.add_note(stands + folder.how_to_resume())


def changed_by_mending(error: Exception, identity: Identity, config: TrainingConfig) -> dict[str, Any]:
    """The settings under which a run resumes once the user's code that raised ``error`` is another."""
    rewards = ("reward", "evaluation") if isinstance(error, RewardError) else ()
    code = [name for name in rewards if any(place.endswith(".py") for place, _ in identity.get(name, ()))]
    return {"accept_changed": sorted({*config.accept_changed, *code})} if code else {}


def nothing_trained(reason: str) -> TrainingError:
    """What is raised of a run that has never trained anything, with what to do about ``reason``."""
    other = "use another reward, more samples per group or other prompts"
    remedy = next((remedy for cause, remedy in _REMEDIES.items() if cause in reason), other)
    return TrainingError(f"{reason}: {remedy}")


def end_process(folder: RunFolder, save: Callable[[], object] | None, report: Callable[[Interrupted], object]) -> Never:
    """In another thread: end this process, whose main thread is in foreign code or waits for other processes and
    cannot be reached.

    Args:
        folder: of the run.
        save: write a checkpoint, if there is something to write.
        report: write the report of the ending.
    """
    if save is not None:
        _in_time(save, (), _LAST_SAVE)
    newest = "".join(path.name for path in folder.checkpoints[-1:]) or "none"
    how = folder.how_to_resume()
    _in_time(report, [Interrupted(_UNANSWERED)], _LAST_REPORT)
    print(f"{_UNANSWERED}; the newest checkpoint is {newest}\n{how}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _in_time(call: Callable[..., object], arguments: Iterable[Any], seconds: float) -> None:
    """In a thread of its own, which is left alone after ``seconds``: on a GPU that hangs it would, too."""
    thread = threading.Thread(target=call, args=tuple(arguments), daemon=True)
    thread.start()
    thread.join(seconds)
