"""Batches of fixed samples, previews or a held-out evaluation, divided among the processes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from diffusion_align.interrupt import Overdue
from diffusion_align.training.processes import Processes

Part = TypeVar("Part")


def batches_of(count: int, batch_size: int) -> list[range]:
    """The indices of ``count`` samples, batch by batch; the last one may be smaller."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def own_batches(count: int, batch_size: int, processes: Processes) -> list[range]:
    """Those of ``batches_of`` that this process samples: consecutive, at most one more than any other process has.

    Whole batches are divided, so that each has the same shape, and with it each sample the same bits, however many
    processes there are.
    """
    batches = batches_of(count, batch_size)
    first, last = (round(len(batches) * k / processes.count) for k in (processes.index, processes.index + 1))
    return batches[first:last]


def sample_together(
    count: int,
    batch_size: int,
    sample: Callable[[range], Part],
    processes: Processes,
    *,
    error: type[Exception],
    on_batch: Callable[[int], object] = lambda size: None,
    interruptible: bool = False,
) -> list[Part]:
    """What ``sample`` makes of each batch, in the order of the batches, on every process; each samples its own.

    Args:
        sample: indices of a batch -> what is gathered.
        error: raised if another process failed.
        on_batch: called with the size of each finished batch.
        interruptible: whether to stop between batches when any process received an interrupt.

    Raises:
        Exception: what ``sample`` raises, or on the other processes ``error``.
        Interrupted: see ``interruptible``.
    """
    own = own_batches(count, batch_size, processes)
    turns = math.ceil(len(batches_of(count, batch_size)) / processes.count)  # of every process: they wait below
    parts: list[Part] = []
    failure: BaseException | None = None
    for turn in range(turns):
        if interruptible and processes.stop_if_interrupted(failed=failure is not None):
            break
        if failure is not None or turn >= len(own):
            continue
        try:
            parts.append(sample(own[turn]))
        except (Exception, Overdue) as problem:  # the other processes wait
            failure = problem
        else:
            on_batch(len(own[turn]))
    processes.raise_together(failure, error)
    return processes.gather_in_order(parts)
