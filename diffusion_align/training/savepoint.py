"""The state to which a run can be resumed from any place of an epoch: that after the last finished epoch.

While nothing is trained it is still there and can be saved, whatever breaks the run off, even in another thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from diffusion_align.training import checkpoint
from diffusion_align.training.processes import Processes

Write = Callable[[list[Any]], object]
"""Writes a checkpoint of the weights as they are; it is given the random states of all processes."""


class Savepoint:
    """Whether, and with which random state, the last finished epoch can be saved.

    Attributes:
        rng: this process's random state after that epoch.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._intact = False
        self._lock = threading.Lock()  # held while a checkpoint is written, and to change ``_intact``
        self._saved_at = time.monotonic()
        self.rng = checkpoint.rng_state()

    @property
    def age(self) -> float:
        """Seconds since a checkpoint was written, or since the run was made."""
        return time.monotonic() - self._saved_at

    def mark(self) -> None:
        """The random state is that of the savepoint from now on."""
        self.rng = checkpoint.rng_state()

    @contextlib.contextmanager
    def intact(self) -> Iterator[None]:
        """Inside, no weights change."""
        with self._lock:
            self._intact = True
        try:
            yield
        finally:
            with self._lock:  # what another thread has begun to write is not trained on meanwhile
                self._intact = False

    @contextlib.contextmanager
    def withheld(self) -> Iterator[None]:
        """Inside, the weights are others, which no other thread saves."""
        with self._lock:
            before, self._intact = self._intact, False
        try:
            yield
        finally:
            with self._lock:
                self._intact = before

    def save(self, write: Write) -> None:
        """Called on every process, where the weights are those of the savepoint."""
        self._saved_at = time.monotonic()
        rng = self._processes.gather_in_order([self.rng])
        with self._lock:
            self._processes.on_main(lambda: write(rng))

    def save_if_intact(self, write: Write) -> None:
        """In another thread, of one process: wait for a checkpoint that is being written, and write one if possible."""
        with self._lock:
            if self._intact:
                write([self.rng])
