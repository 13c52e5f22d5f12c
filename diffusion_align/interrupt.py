"""Ctrl-C and SIGTERM as a flag, read by loops where they can stop without losing anything, and by whoever waits."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_entered: list[InterruptFlag] = []


def interrupted() -> bool:
    """Whether a loop in this process was asked to stop and has not yet: nothing is worth waiting for."""
    return any(flag.raised for flag in _entered)


class InterruptFlag:
    """Within ``with``, the first SIGINT or SIGTERM sets ``raised``; a second one acts as if nothing were here.

    Python lets only the main thread set handlers: in another one nothing is caught.
    """

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._raise)
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _entered.remove(self)
        self._restore()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous = {}
