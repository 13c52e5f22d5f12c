"""One long-lived thread beside the main one, for rewards that are computed while the next batch is sampled.

It is the same for all of them and for every call, the check before training too: what a reward keeps for its thread (a
database connection, an event loop) is there again the next time, and what cannot work there fails in the check.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from diffusion_align.interrupt import Overdue

Result = TypeVar("Result")


class LongLivedThread:
    """Runs what it is given, one after the other; a daemon, so that nothing that hangs in it keeps a program alive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = 0

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """The future of ``function(*arguments)``."""
        future: Future[Result] = Future()
        with self._lock:
            if self._thread is None or self._process != os.getpid():  # threads do not survive a fork
                self._jobs, self._process = queue.SimpleQueue(), os.getpid()
                self._thread = threading.Thread(target=self._work, args=(self._jobs,), name=self.name, daemon=True)
                self._thread.start()
            self._jobs.put((future, function, arguments))
        return future

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` in the thread, waited for; at once if this is the thread."""
        import torch

        if threading.current_thread() is self._thread:
            return function(*arguments)
        threads = torch.get_num_threads()  # asking for it also fixes it for this thread
        try:
            future = self.submit(function, *arguments)
            settle([future])
            return future.result()
        except Overdue:
            self.leave()
            raise
        finally:
            torch.set_num_threads(threads)  # torch keeps one default for all beside each thread's value

    def leave(self) -> None:
        """Leave the thread with what it does not come back from; the next job gets another one."""
        with self._lock:
            self._thread = None

    def _work(self, jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]) -> None:
        import torch

        while True:
            future, function, arguments = jobs.get()
            if future.set_running_or_notify_cancel():
                # A second team of OpenMP threads would halve the sampler's speed on a small CPU.
                torch.set_num_threads(1)
                torch.get_num_threads()
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del future, function, arguments  # images would stay in memory until the next job


def settle(futures: Sequence[Future[Any]]) -> None:
    """Wait for all that are not cancelled, which nobody would ever call done.

    In short turns: a signal that arrives just before the main thread blocks would be noticed at its end only.
    """
    futures = [future for future in futures if not future.cancelled()]
    while wait(futures, timeout=0.2).not_done:
        pass


background = LongLivedThread("diffusion-align background")


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes in this thread as it does in the long-lived one: scores are the same bits in both."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
