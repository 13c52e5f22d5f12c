"""One side of a comparison: epochs when the other end asks for them, timed, with what they spent time and memory on.

Both our process and TRL's in its environment run this, so it needs the standard library and torch alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class Enough(BaseException):
    """No further epoch is wanted. No ``Exception``: libraries would handle it."""


class Clock:
    """Seconds by what they were spent on; where parts are nested, the inner one has them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._parts: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class Side:
    """What is measured of the epochs, and the conversation about them: a line of JSON each way.

    What libraries print goes to standard error.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.clock, self.work = Clock(), Counter[str]()
        self.sampling = 0.0
        self.rise = 0.0
        self._resident = 0.0
        self._began: tuple[float, float] | None = None

    def tell(self, **values: Any) -> None:
        print(json.dumps(values), file=self._out, flush=True)

    def next_epoch(self, **of_last: Any) -> None:
        """Tell of the epoch that ends here, if one does, and wait until the next one is wanted; Enough if none is.

        The first one must be asked for before anything is told: ``tell`` first that everything is loaded.
        """
        if self._began is not None:
            wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
            told = {"wall": wall, "cpu": cpu, "sampling": self.sampling, "parts": dict(self.clock.seconds)}
            self.tell(**told, work=dict(self.work), rise=self.rise, **memory(), **of_last)
        if not sys.stdin.readline():
            raise Enough
        self.clock.seconds.clear()
        self.work.clear()
        self.sampling = self.rise = 0.0
        self._began = time.perf_counter(), time.process_time()

    # -- what is looked at: each replaces a function of an owner by one that does the same -------------------------

    def time_part(self, owner: Any, method: str, name: str) -> None:
        """Its seconds are the clock's part ``name``; where there is no such method, the part is empty."""

        def timed(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            with self.clock.part(name):
                return call(*arguments, **options)

        _replace(owner, method, timed)

    def time_sampling(self, owner: Any, method: str) -> None:
        """Its seconds, and those of all it calls, are the epoch's sampling; not what it waited for its turn before."""

        def timed(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                began = start if self._began is None else max(start, self._began[0])
                self.sampling += time.perf_counter() - began

        _replace(owner, method, timed)

    def watch_network(self, network: Any) -> None:
        """Its forward passes are parts, with and without a gradient, and their rows, or tokens, are the work."""

        def counted(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            kind = "trained" if torch.is_grad_enabled() else "sampled"
            given = options.get("input_ids", options.get("sample", arguments[0] if arguments else None))
            if given is not None:
                self.work[kind] += given.numel() if given.ndim == 2 else len(given)
            with self.clock.part(f"forward pass, {kind}"):
                return call(*arguments, **options)

        _replace(network, "forward", counted)

    def watch_rise(self, owner: Any, loss: str, other: Any, backward: str) -> None:
        """How far the resident memory rises from before the loss until the backward pass is done, in MiB."""

        def begun(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
            self._resident = resident_mib("VmRSS")
            return call(*arguments, **options)

        def ended(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            self.rise = max(self.rise, resident_mib("VmHWM") - self._resident)
            return found

        _replace(owner, loss, begun)
        _replace(other, backward, ended)


def _replace(owner: Any, method: str, around: Callable[..., Any]) -> None:
    call = getattr(owner, method, None)
    if call is None:
        return

    @functools.wraps(call)
    def replaced(*arguments: Any, **options: Any) -> Any:  # a function, as a class's methods are
        return around(call, *arguments, **options)

    setattr(owner, method, replaced)


def resident_mib(field: str) -> float:
    """VmRSS, resident now, or VmHWM, the peak of it; 0 where the system has no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def memory() -> dict[str, float]:
    """MiB: resident now, and the largest so far."""
    if torch.cuda.is_available():
        return {"resident": torch.cuda.memory_allocated() / 2**20, "peak": torch.cuda.max_memory_allocated() / 2**20}
    return {"resident": resident_mib("VmRSS"), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def finish() -> None:
    """End at once: what was measured has been told, and nothing is to be written."""
    sys.stderr.flush()
    os._exit(0)
