"""Ctrl-C, SIGTERM and SIGHUP as a flag, read by loops where they can stop without losing anything, and by who waits.

Code that is not ours (a reward, a tracker) may never come back to such a loop. It is called within ``breakable``, where
it is left when it is still running ``grace`` seconds after the run was told to stop.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

GRACE = 20.0  # seconds; batch systems and containers kill 30 s after their signal
PATIENCE = 10.0  # seconds more until foreign code that cannot be left (in C) ends the process
PATIENCE_WITH_OTHERS = 120.0  # and another process that does not answer, which may still be busy with a batch
INTERRUPTED = 130  # exit status, of the shells' convention
_ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Ignored unless somebody listens, so that one too many does no harm.
_OVERDUE = getattr(signal, "SIGURG", None)
_entered: list[InterruptFlag] = []
_foreign = _waiting = False  # what the main thread is in
left_behind = False  # whether foreign code was left: a thread of it may continue and keep the process from ending


class Overdue(BaseException):
    """Raised in the main thread within ``breakable``; no Exception, which code that tries again would catch."""


def interrupted() -> bool:
    """Whether a loop in this process was told to stop and has not yet: nothing is worth waiting for."""
    return any(flag.raised for flag in _entered)


def interruptible() -> bool:
    """Whether a loop in this process takes Ctrl-C as a flag, so that it raises no KeyboardInterrupt."""
    return bool(_entered)


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """Around a call of foreign code, or the waiting for it: Overdue is raised in it once the grace period is over.

    That is possible in the main thread only; elsewhere nothing happens.
    """
    global _foreign, left_behind
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _foreign = _foreign, True
    try:
        if any(flag.overdue for flag in _entered):
            raise Overdue
        yield
    except Overdue:
        left_behind = True
        raise
    finally:
        _foreign = before


@contextlib.contextmanager
def waiting_for_others() -> Iterator[None]:
    """Around the waiting for other processes, which nothing can break off: overdue, this process ends."""
    global _waiting
    before, _waiting = _waiting, True
    try:
        yield
    finally:
        _waiting = before


class InterruptFlag:
    """Within ``with``, the first SIGINT, SIGTERM or SIGHUP sets ``raised``; a second acts as if nothing were here.

    ``signal`` is then its name.

    Python lets only the main thread set handlers: in another one nothing is caught. Nor is a SIGHUP that is ignored, as
    under nohup.

    Args:
        grace: seconds from the first signal until foreign code is left.
        leave: called in a thread of its own where the main thread stays in foreign code for ``PATIENCE`` seconds more,
            or waits for other processes: it cannot be reached any more, so the process must be ended.
    """

    def __init__(self, grace: float = GRACE, leave: Callable[[], object] | None = None) -> None:
        self.raised = self.overdue = False
        self.signal = ""
        self._grace, self._leave = grace, leave
        self._previous: dict[int, object] = {}
        self._asked, self._left = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._raise)
            if _OVERDUE is not None:
                self._before = signal.signal(_OVERDUE, self._break_off)
                self._watch = threading.Thread(target=self._wait, name="interrupt", daemon=True)
                self._watch.start()
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _entered.remove(self)
        self._restore()
        if self._watch is not None:
            self._left.set()
            self._asked.set()
            self._watch.join()
            signal.signal(_OVERDUE, signal.SIG_DFL if self._before is None else self._before)  # type: ignore[arg-type]

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised, self.signal = True, signal.Signals(number).name
        self._asked.set()
        self._restore()

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        if self.overdue and _foreign:
            raise Overdue

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous = {}

    def _wait(self) -> None:
        """In a thread of its own: wake the main thread each second once the grace period is over."""
        self._asked.wait()
        if self._left.wait(self._grace):
            return
        self.overdue, stuck = True, 0.0
        main = threading.main_thread().ident
        while not self._left.is_set():
            if _foreign and main is not None:
                signal.pthread_kill(main, _OVERDUE)  # type: ignore[arg-type]
            pause = min(1.0, PATIENCE / 10)
            self._left.wait(pause)
            stuck = stuck + pause if _foreign or _waiting else 0.0
            long = stuck > (PATIENCE if _foreign else PATIENCE_WITH_OTHERS)
            if long and self._leave is not None and not self._left.is_set():
                self._leave()
                return
