"""Code that is not ours, a user's or a library's: whatever it raises becomes one sentence."""

from __future__ import annotations

import contextlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from diffusion_align.errors import UserError
from diffusion_align.interrupt import Overdue, interrupted, interruptible

_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@contextlib.contextmanager
def foreign_code(what: str, after: str = "", *, error: type[UserError] = UserError) -> Iterator[None]:
    """Whatever is raised inside becomes an ``error`` that begins with ``what``, SystemExit and its like too.

    An ``error`` stays as it is, and so does a Ctrl-C: KeyboardInterrupt where a loop that counts Ctrl-C has been asked
    to stop, or where there is none.
    """
    try:
        yield
    except (error, Overdue):
        raise
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt) and (interrupted() or not interruptible()):
            raise
        raise error(f"{what}{describe_exception(raised)}{_place(raised.__traceback__)}{after}") from raised


def describe_exception(error: BaseException) -> str:
    """``TypeError: the first line of its message``, for one-sentence errors."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException:  # the text of an exception is code of its author's
        return f"{type(error).__name__}, whose text cannot be read"
    return f"{type(error).__name__}: {lines[0][:1000]}" if lines else type(error).__name__


def _place(traceback: TracebackType | None) -> str:
    """ " (file, line)" of the innermost frame that is neither a library's nor ours, for who has to repair it."""
    found = ""
    while traceback is not None:
        code, module = traceback.tb_frame.f_code, str(traceback.tb_frame.f_globals.get("__name__"))
        if not code.co_filename.startswith((*_LIBRARIES, "<")) and module.split(".")[0] != "diffusion_align":
            found = f" ({Path(code.co_filename).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return found
