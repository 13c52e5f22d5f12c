"""What a call costs: seconds, operations, kernels, dispatched operators, waits of the host for the GPU, memory.

Each takes a call and makes it once or more; ``EpochMeter`` measures the phases of a run's epochs.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_align.training.callbacks import Callback

Call = Callable[[], object]
_WAITING = "synchronizing CUDA operation"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device, *, least: int = 3, most: float = 1.0) -> float:
    """The median of the wall-clock seconds of ``call``, after one to warm up.

    Args:
        least: at least so many are timed.
        most: seconds after which no other is begun.
    """
    if device.type == "cpu":  # where no figure means anything
        least, most = 1, 0.0
    else:
        call()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < least or (sum(taken) < most and len(taken) < 50):
        begun = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations per second of a product of two random matrices (``side``, ``side``), the best of some."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(2 if device.type == "cpu" else 12):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(4):
            torch.matmul(left, right)
        synchronize(device)
        best = min(best, (time.perf_counter() - begun) / 4)
    return 2 * side**3 / best


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copies of ``size`` bytes on the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, most=0.3)


def operations(call: Call) -> int:
    """Floating-point operations of matrix products, convolutions and attention, those of recomputed passes too."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(function, "is_view", False) and function.namespace == "aten":
            self.count += 1
        return function(*args, **(kwargs or {}))


def operators(call: Call) -> int:
    """Operators of torch that ``call`` dispatches, views left out: about what a GPU launches as kernels."""
    with _Operators() as mode:
        call()
    return mode.count


@dataclass(frozen=True)
class Kernels:
    """What a GPU ran: how many kernels, how many copies and fills beside them, and the seconds of all."""

    count: int
    copies: int
    seconds: float


def kernels(call: Call, device: torch.device) -> Kernels | None:
    """Of one ``call``; None where there is no GPU, or the profiler sees none of its kernels."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    found = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    copies = [event for event in found if event.name.startswith(("Memcpy", "Memset"))]
    if len(found) == len(copies):
        return None
    busy = sum(event.time_range.elapsed_us() for event in found) / 1e6
    return Kernels(len(found) - len(copies), len(copies), busy)


class Waits:
    """How often the host has waited for the GPU, and in which lines."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught

    @property
    def count(self) -> int:
        return len(self._found())

    def lines(self, most: int = 8) -> dict[str, int]:
        """``file:line`` -> how often; those that waited most."""
        places = Counter("/".join(f"{one.filename}:{one.lineno}".split("/")[-2:]) for one in self._found())
        return dict(places.most_common(most))

    def _found(self) -> list[warnings.WarningMessage]:
        return [one for one in self._caught if _WAITING in str(one.message)]


@contextlib.contextmanager
def waits() -> Iterator[Waits]:
    """Inside, each wait of the host for the GPU is counted; on a machine without one there is none."""
    gpu = torch.cuda.is_available()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield Waits(caught)
        finally:
            if gpu:
                torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(always)


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Inside, and afterwards, what is given says the most bytes that tensors on the GPU have had; 0 without one."""
    if device.type != "cuda":
        yield lambda: 0
        return
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)


@dataclass(frozen=True)
class Phase:
    """Of one epoch: seconds, and the most bytes that tensors on the GPU had in it."""

    seconds: float
    bytes: int


@dataclass
class EpochMeter(Callback):
    """The phases of each epoch of a run: "sampling" (rewards too), "training" (the updates); and what its rows say.

    Attributes:
        phases: name -> one for each epoch.
        updates, epochs: the rows of ``metrics.jsonl``.
        actions: that were trained on in each epoch.
        at_end: called with the trainer when the run has ended and its policy is still as in training.
    """

    at_end: Callable[[Any], None] = lambda trainer: None
    phases: dict[str, list[Phase]] = field(default_factory=dict)
    updates: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    failure: Exception | None = None

    def on_start(self, trainer: Any) -> None:
        device = trainer.accelerator.device
        collect, estimate, after = trainer.collect, trainer.estimate, trainer.after_updates
        self._begin(device)

        def collected() -> Any:
            self._begin(device)
            found = collect()
            self._end("sampling", device)
            return found

        def estimated(given: Any) -> Any:
            found = estimate(given)
            _, plan, _ = found
            self.actions.append(len(plan.sample_indices) * plan.steps_per_sample)
            self._begin(device)
            return found

        def ended() -> Any:
            self._end("training", device)
            return after()

        trainer.collect, trainer.estimate, trainer.after_updates = collected, estimated, ended

    def on_update(self, trainer: Any, row: Mapping[str, Any]) -> None:
        self.updates.append(dict(row))

    def on_epoch_end(self, trainer: Any, row: Mapping[str, Any]) -> None:
        self.epochs.append(dict(row))

    def on_end(self, trainer: Any) -> None:
        try:
            self.at_end(trainer)
        except Exception as error:  # a run would make one sentence of it
            self.failure = error

    def last(self, phase: str) -> Phase:
        """Of the last epoch; what failed in ``at_end`` is raised."""
        if self.failure is not None:
            raise self.failure
        return self.phases[phase][-1]

    def deviations(self) -> list[float]:
        """How far from 1 ratios were before any update of each epoch."""
        return [row["ratio/first_pass_deviation"] for row in self.updates if "ratio/first_pass_deviation" in row]

    def _begin(self, device: torch.device) -> None:
        with peak(device) as self._bytes:
            self._begun = time.perf_counter()

    def _end(self, phase: str, device: torch.device) -> None:
        synchronize(device)
        found = Phase(time.perf_counter() - self._begun, self._bytes())
        self.phases.setdefault(phase, []).append(found)
