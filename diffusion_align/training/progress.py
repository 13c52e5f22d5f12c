"""What a run shows of its progress: bars that look alike everywhere, and lines where bars cannot be drawn."""

import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

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

from diffusion_align.streams import printable

_SECONDS = 0.5
"""Between two looks of the bars in a notebook."""
LINE_SECONDS = 1.0
"""At least, between two lines about epochs."""


class _LastingConsole(Console):
    """rich ends the process where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Bars(Progress):
    """Disabled it prints nothing; rich before 13.9 ends with an empty line all the same."""

    def stop(self) -> None:
        if not self.disable:
            super().stop()


class _NotebookBars(_Bars):
    """Without ipywidgets rich shows nothing in a notebook: the bars are a display there, which is replaced."""

    def __init__(self, *columns: str | ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, auto_refresh=False, **options)
        self._display: Any = None
        self._shown = -math.inf

    def start(self) -> None:
        if not self.disable:
            ipython = sys.modules["IPython"]  # which a notebook runs in
            self._display = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)

    def stop(self) -> None:
        self._show()

    def refresh(self) -> None:
        if time.monotonic() - self._shown > _SECONDS:
            self._show()

    def update(self, *arguments: Any, **options: Any) -> None:
        super().update(*arguments, **options)
        self.refresh()

    def advance(self, *arguments: Any, **options: Any) -> None:
        super().advance(*arguments, **options)
        self.refresh()

    def _show(self) -> None:
        if self._display is None:
            return
        self._shown = time.monotonic()
        console = Console(file=io.StringIO(), width=100, force_jupyter=False)
        console.print(self.get_renderable())
        self._display.update({"text/plain": cast(io.StringIO, console.file).getvalue()}, raw=True)


def can_draw(console: Console) -> bool:
    """Whether bars move there: in a notebook, or on a terminal that can; FORCE_COLOR makes none of a file."""
    try:
        forced = bool(os.environ.get("FORCE_COLOR"))
        return console.is_jupyter or (console.is_interactive and (not forced or console.file.isatty()))
    except ValueError:  # it is closed
        return False


def progress_bars(*columns: str | ProgressColumn, disable: bool = False, **options: Any) -> Progress:
    """rich's ``Progress`` with ``columns``, else what is done, of how much, and the time; ``options`` are its own.

    Where bars cannot be drawn it is disabled, too.
    """
    kind: type[Progress] = _Bars
    if (options.get("console") or get_console()).is_jupyter:
        kind = _Bars if importlib.util.find_spec("ipywidgets") else _NotebookBars
        # IPython flushes what rich has put in the place of stdout and stderr, and rich then displays, without end.
        options = {"redirect_stdout": False, "redirect_stderr": False} | options
    options.setdefault("console", _LastingConsole())
    if not columns:
        done = BarColumn(), MofNCompleteColumn()
        columns = TextColumn("{task.description}"), *done, TimeElapsedColumn(), TimeRemainingColumn()
    return kind(*columns, disable=disable or not can_draw(options["console"]), **options)


class Bars:
    """The progress of a run: bars, and lines where bars cannot be drawn; disabled it shows nothing.

    Tasks may be opened before the bars are shown.
    """

    def __init__(self, *, disable: bool = False) -> None:
        self.progress = progress_bars(disable=disable)
        self._epochs: TaskID | None = None
        self._disabled = disable
        self._line_at = -math.inf

    def print_start(self, *lines: str) -> None:
        """Lines before the first epoch, above the bars; a notebook shows the bars alone."""
        if not self._disabled and not self.progress.console.is_jupyter:
            for line in lines:
                self._print(line)

    def print_epoch(self, line: str, *, always: bool) -> None:
        """A line about an epoch that is done, where no bars are; not all of them, unless ``always``."""
        if self._disabled or can_draw(self.progress.console):
            return
        if always or time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            self._print(line)

    def _print(self, line: str) -> None:
        self.progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

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
