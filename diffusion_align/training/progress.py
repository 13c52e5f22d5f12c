"""Progress bars that look alike everywhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import get_console
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
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


class Bars:
    """The progress bars of a run; disabled they print nothing. Tasks may be opened before the bars are shown."""

    def __init__(self, *, disable: bool = False) -> None:
        self.progress = progress_bars(disable=disable)
        self._epochs: TaskID | None = None

    def show_epochs(self, done: int, total: int, description: str) -> None:
        """The topmost bar: ``done`` of ``total`` epochs."""
        if self._epochs is None:
            self._epochs = self.progress.add_task(description, total=total)
        self.progress.update(self._epochs, completed=done, description=description)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar below the others while inside; call what is given with how much has been done since."""
        task = self.progress.add_task(description, total=total)
        try:
            yield lambda count: self.progress.advance(task, count)
        finally:
            self.progress.remove_task(task)
