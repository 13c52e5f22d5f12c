"""Progress bars that look alike everywhere."""

from typing import Any

from rich import get_console
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _LastingConsole(Console):
    """rich ends the process where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Bars(Progress):
    """Disabled it prints nothing; rich before 13.9 ends with an empty line all the same."""

    def stop(self) -> None:
        if not self.disable:
            super().stop()


def progress_bars(*columns: str | ProgressColumn, **options: Any) -> Progress:
    """rich's ``Progress`` with ``columns``, else what is done, of how much, and the time; ``options`` are its own."""
    if (options.get("console") or get_console()).is_jupyter:
        # IPython flushes what rich has put in the place of stdout and stderr, and rich then displays, without end.
        options = {"redirect_stdout": False, "redirect_stderr": False} | options
    options.setdefault("console", _LastingConsole())
    if not columns:
        done = BarColumn(), MofNCompleteColumn()
        columns = TextColumn("{task.description}"), *done, TimeElapsedColumn(), TimeRemainingColumn()
    return _Bars(*columns, **options)
