"""The batch sizes that a run measures: which to choose by the seconds each takes, and how those are taken.

Sizes double until memory, the epoch or the gain ends. What is measured is ``Work``; nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from diffusion_align.training.config import AUTO

GAIN = 0.03
"""A larger batch must do so much more in a second."""
USUAL = 8
"""About where a search begins: what a batch gains below is more than any clock's error."""
SECONDS = 4.0
"""After so long a search begins nothing more."""
_SETTLED = 0.3
"""Seconds of passes after which the best of them is believed, if there were not three before."""
_USED = 0.8
"""Share of the free main memory that a batch may be expected to take."""


def choose(sizes: Sequence[int], seconds: Sequence[float]) -> int:
    """The smallest size that is within ``GAIN`` of the fastest, in samples per second.

    Args:
        sizes: of batches.
        seconds: that a batch of each takes.

    Raises:
        ValueError: they are not as many, or none.
    """
    if len(sizes) != len(seconds) or not sizes:
        raise ValueError(f"sizes ({len(sizes)}) and seconds ({len(seconds)}) must be as many, and at least one")
    rates = [size / one for size, one in zip(sizes, seconds, strict=True)]
    return next(size for size, rate in sorted(zip(sizes, rates, strict=True)) if rate * (1 + GAIN) >= max(rates))


def doubling(count: int, *, dividing: bool = True) -> list[int]:
    """Sizes from 1 to ``count``, each at least twice the one before, but for the last; by default divisors of it."""
    sizes = [1]
    for size in range(2, count + 1):
        if size >= 2 * sizes[-1] and (not dividing or count % size == 0):
            sizes.append(size)
    return sizes if sizes[-1] == count else [*sizes, count]


class Tried(NamedTuple):
    """Sizes that fit with the seconds that a batch of each takes; ``full``: a larger one did not fit."""

    seconds: dict[int, float]
    full: bool = False


def own_seconds() -> Callable[[], float]:
    """A clock of seconds from now: on the wall or of this process, whichever are fewer; others only move the wall's."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: min(time.perf_counter() - wall, time.process_time() - cpu)


def search(
    sizes: Sequence[int], seconds_of: Callable[[int], float], *, clock: Callable[[], float] | None = None
) -> Tried:
    """Measure the smallest size, the one next to ``USUAL``, and larger ones until memory, gain or time end.

    The gain ends with the first one above ``USUAL`` that gains less than ``GAIN``. Where the one next to ``USUAL`` does
    not fit, smaller ones are tried.

    Args:
        sizes: ascending.
        seconds_of: what a batch of a size takes; raises ``torch.OutOfMemoryError`` where it does not fit.
        clock: in seconds; ``own_seconds`` if not given.
    """
    clock = own_seconds() if clock is None else clock
    found: dict[int, float] = {}

    def fits(size: int) -> bool:
        with contextlib.suppress(torch.OutOfMemoryError):
            found[size] = seconds_of(size)
        if torch.cuda.is_available():  # after the exception, which holds what the pass had
            gc.collect()
            torch.cuda.empty_cache()
        return size in found

    usual = max((n for n in sizes if n <= USUAL), default=sizes[0])
    begun = clock()
    for size in [sizes[0], *(n for n in sizes[1:] if n >= usual)]:
        before = clock()
        if not fits(size):
            smaller = [n for n in sizes if max(found, default=size) < n < size]
            next(filter(fits, reversed(smaller)), None)
            return Tried(found, full=True)
        if size > usual and choose(list(found), list(found.values())) != size:
            break
        now = clock()
        if now - begun > SECONDS or now - before > SECONDS / 2:  # the next takes twice as long
            break
    return Tried(found)


class Stopwatch:
    """Times passes, and refuses what would not fit into main memory as far as smaller batches tell.

    Args:
        device: that the passes run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._each = 0.0  # bytes per sample, at most

    def time(self, run: Callable[[], object], size: int) -> float:
        """Seconds of ``run``, a pass of ``size`` samples: the best of up to three.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        on_gpu = self.device.type == "cuda"
        free = math.inf if on_gpu else _USED * psutil.virtual_memory().available
        if size * self._each > free:
            raise torch.OutOfMemoryError(f"a batch of {size} is expected not to fit into main memory")
        seconds: list[float] = []
        resident = psutil.Process().memory_info().rss
        while len(seconds) < 3 and (sum(seconds) < _SETTLED or len(seconds) < 1 + on_gpu):
            begun, elapsed = time.perf_counter(), own_seconds()
            run()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - begun if on_gpu else elapsed())
        self._each = max(0, _peak_resident() - resident) / size
        return min(seconds)


def _peak_resident() -> int:
    """The most bytes of main memory that this process has had; 0 where that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Work:
    """What one process does in an epoch, as far as the sizes of its batches matter.

    Attributes:
        sampling: seconds to sample so many; may raise ``torch.OutOfMemoryError``, as the next.
        training: seconds of a forward and a backward pass of so many.
        samples: of an epoch, which ``sample_batch_size`` must divide.
        actions: of an update.
        passes: training passes of one action, per sample.
        unit: ``micro_batch_size`` must be a multiple of it.
        together: whether both sizes must be equal.
    """

    sampling: Callable[[int], float]
    training: Callable[[int], float]
    samples: int
    actions: int
    passes: float = 1.0
    unit: int = 1
    together: bool = False


class Sizes(NamedTuple):
    """What was chosen.

    Attributes:
        sample, micro: ``sample_batch_size`` and ``micro_batch_size``.
        seconds: of the sampling and training of one sample; nan where that was not measured.
        told: sizes that were chosen, and over what each gains.
    """

    sample: int
    micro: int
    seconds: float
    told: list[str]


class _Found(NamedTuple):
    size: int
    each: float  # seconds of a sample
    gain: str


def decide(
    work: Work,
    sample: int | str,
    micro: int | str,
    *,
    compared: bool = False,
    clock: Callable[[], float] | None = None,
) -> Sizes:
    """The sizes that ``work`` is done with; those that are given stay.

    Args:
        work: what is measured.
        sample, micro: sizes, or ``AUTO``.
        compared: also measure where nothing is to be chosen, for ``seconds``.
        clock: see ``search``.
    """

    def find(sizes: Sequence[int], seconds_of: Callable[[int], float], *, backward: bool = False) -> _Found:
        if len(sizes) > 1:
            return _found(sizes, search(sizes, seconds_of, clock=clock), halved=backward)
        # A size that is given is not begun where a single sample takes too long for it.
        tried = search(sorted({1, *sizes}), seconds_of, clock=clock) if compared else Tried({})
        return _Found(sizes[0], _each(tried.seconds), str(sizes[0]))

    def both(size: int) -> float:
        return work.sampling(size) + work.passes * work.training(size)

    given = [int(size) for size in (sample, micro) if size != AUTO]
    if work.together and len(given) < 2 and all(work.samples % size == 0 for size in given):
        shared = doubling(math.gcd(work.samples, max(1, work.actions)))  # no smaller batch is left at the end
        found = find(given or shared, both, backward=True)
        return Sizes(found.size, found.size, found.each, [f"sample_batch_size and micro_batch_size {found.gain}"])
    sampled = find(doubling(work.samples) if sample == AUTO else [int(sample)], work.sampling)
    units = doubling(max(1, work.actions // work.unit), dividing=False)
    trained = find([work.unit * n for n in units] if micro == AUTO else [int(micro)], work.training, backward=True)
    told = [f"sample_batch_size {sampled.gain}"] if sample == AUTO else []
    told += [f"micro_batch_size {trained.gain}"] if micro == AUTO else []
    return Sizes(sampled.size, trained.size, sampled.each + work.passes * trained.each, told)


def _found(sizes: Sequence[int], tried: Tried, *, halved: bool) -> _Found:
    """``halved``: where memory ended the search, half of it is left to what was not measured."""
    seconds, full = tried
    size = choose(list(seconds), list(seconds.values())) if seconds else sizes[0]
    if not full:  # where time ended the search before, nothing is known of a gain
        size = max(size, max((n for n in sizes if max(seconds, default=USUAL) < n <= USUAL), default=size))
    elif halved:
        size = max((n for n in sizes if n <= size and 2 * n <= max(seconds, default=0)), default=sizes[0])
    ended = ", more does not fit" if full else ""
    before = next((n for n in (USUAL, *seconds) if n in seconds and n < size), None)
    gain = ""
    if before is not None and size in seconds:
        gain = f" ({seconds[before] * size / (seconds[size] * before):.2g}x of {before}{ended})"
    return _Found(size, _each({n: one for n, one in seconds.items() if n <= size}), f"{size}{gain or ended}")


def _each(seconds: dict[int, float]) -> float:
    """Seconds of one sample in the largest batch."""
    return min((one / size for size, one in seconds.items() if size == max(seconds)), default=math.nan)
