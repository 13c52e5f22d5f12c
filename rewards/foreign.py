"""The one place where rewards are called: with copies, in a known thread; every end but an answer is a sentence.

Rewards for images and text, their checks and their construction all come here, whoever calls them: training, held-out
evaluation, ``compare``, ``pairs``, ``score``, a server, Python.
"""

import asyncio
import contextlib
import copy
import errno
import functools
import inspect
import io
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion_align import errors
from diffusion_align.background import LongLivedThread, background
from diffusion_align.errors import RewardError
from diffusion_align.interrupt import Overdue, breakable

Result = TypeVar("Result")

_PLAIN = (str, int, float, bool, bytes, type(None))
_local = threading.local()
_asynchronous = LongLivedThread("diffusion-align event loop")  # where this thread has a loop that runs: notebooks
foreign_code = functools.partial(errors.foreign_code, error=RewardError)


def reward_name(reward: Any) -> str:
    """The name of a reward: its ``name`` attribute, else the function's or the class's name."""
    if isinstance(getattr(reward, "name", None), str):
        return reward.name
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def runs_in_background(reward: Any) -> bool:
    """Whether every call of ``reward`` is made in the long-lived thread: its attribute ``background``."""
    return getattr(reward, "background", False) is True


def in_its_thread(reward: Any, function: Callable[[], Result]) -> Result:
    """``function()`` in the thread where ``reward`` is called: this one, or the long-lived one; gradients as here."""
    if not runs_in_background(reward):
        return function()
    gradients = torch.is_grad_enabled()  # each thread has its own switch

    def called() -> Result:
        with torch.set_grad_enabled(gradients):
            return function()

    with _breakable(reward):
        return background.run(called)


def answer_of(reward: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What a reward answers, called here and now with copies of its arguments; what it awaits is waited for.

    Raises:
        RewardError: it raised, or closed a standard stream.
    """
    name = reward_name(reward)
    positional, by_name = map(copied, arguments), {key: copied(value) for key, value in named.items()}
    were_closed = _closed_streams()
    with _breakable(reward), foreign_code(f"reward '{name}' raised "):
        try:
            answer = reward(*positional, **by_name)
            if inspect.isawaitable(answer):
                answer = _awaited(answer)
        finally:
            closed = _closed_streams() - were_closed
            _reopen(closed)
    if closed:
        raise RewardError(f"reward '{name}' closed {' and '.join(sorted(closed))}: a reward must leave it open")
    return answer


@contextlib.contextmanager
def _breakable(reward: Any) -> Iterator[None]:
    """Inside, what does not come back is left once a run has been asked to stop and its grace period is over."""
    try:
        with breakable():
            yield
    except Overdue as error:
        raise RewardError(f"reward '{reward_name(reward)}' did not answer when the run was asked to stop") from error


def copied(value: Any) -> Any:
    """A copy that shares nothing that can be changed, item by item of a list; what cannot be copied is as it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    try:
        return copy.deepcopy(value)
    except Exception:
        return {key: copied(one) for key, one in value.items()} if type(value) is dict else value


def _awaited(answer: Awaitable[Any]) -> Any:
    """The result of an awaitable, in an event loop that is kept: sessions may belong to it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return _asynchronous.run(_awaited, answer)
    if getattr(_local, "loop", None) is None or _local.process != os.getpid():
        _local.loop, _local.process = asyncio.new_event_loop(), os.getpid()
    task = asyncio.ensure_future(answer, loop=_local.loop)
    try:
        return _local.loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                _local.loop.run_until_complete(task)
        raise


def _closed_streams() -> set[str]:
    return {name for name in ("stdout", "stderr") if _is_closed(getattr(sys, name))}


def _is_closed(stream: Any) -> bool:
    try:
        if stream.closed:
            return True
        os.fstat(stream.fileno())
    except OSError as error:
        return error.errno == errno.EBADF
    except Exception:  # nothing, or something without a file behind it
        return False
    return False


def _reopen(names: set[str]) -> None:
    """So that an error can still be printed; only where the file behind a closed stream is there."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if name in names:
            with contextlib.suppress(OSError):
                os.fstat(number)
                file = io.FileIO(number, "w", closefd=False)
                setattr(sys, name, io.TextIOWrapper(file, "utf-8", errors="backslashreplace", write_through=True))
