"""What is printed on a terminal or into a pipe: lines as they are, errors that are seen, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import rich.table
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

_NARROW = 60
"""Columns below which the cells of a table would be a few letters wide."""

console = Console()
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def print_line(line: str, *, keep: str = "") -> None:
    """Print as it is: no markup in it, not cut at the terminal's width, nothing that steers a terminal but ``keep``."""
    from diffusion_align.streams import printable

    console.print(printable(line, keep=keep), highlight=False, markup=False, soft_wrap=True)


def print_note(line: str) -> None:
    """The same on stderr, so that what is piped on holds results only."""
    from diffusion_align.streams import printable

    errors.print(printable(line), markup=False)


def print_error(sentences: str) -> int:
    """Each line of ``sentences`` on stderr behind "error:", red on a terminal; returns a user error's exit status."""
    from diffusion_align.streams import printable

    for sentence in sentences.split("\n"):
        errors.print(Text.assemble(("error:", "bold red"), f" {printable(sentence)}"))
    return 2


class Entry(NamedTuple):
    """Something that a configuration can name: what it is, and in a few words its choices, its default."""

    name: str
    text: str
    note: str = ""


class Group(NamedTuple):
    """Entries under a title."""

    title: str
    rows: list[Entry]


class Table(NamedTuple):
    """Rows of cells under a title and a header."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_listing(parts: Sequence[Group | Table]) -> None:
    """On a terminal wrapped at its width; in a pipe a line for every entry or row, for grep."""
    for i, part in enumerate(parts):
        console.print(Text(part.title, style="bold"), soft_wrap=not console.is_terminal)
        if isinstance(part, Group):
            _print_group(part)
        else:
            _print_table(part)
        if console.is_terminal and i + 1 < len(parts):
            console.print()


def _print_group(group: Group) -> None:
    for name, text, note in group.rows:
        if not console.is_terminal:
            print_line(f"  {name}  {text}" + (f" ({note})" if note else ""))
        elif not note and len(name) + len(text) + 4 <= console.width:
            console.print(Text.assemble("  ", (name, "cyan"), f"  {text}"))
        else:
            console.print(Padding(Text.assemble((name, "cyan"), (f"  {note}" if note else "", "dim")), (0, 0, 0, 2)))
            console.print(Padding(Text(text), (0, 0, 0, 6)))


def _print_table(table: Table) -> None:
    if console.is_terminal and console.width < _NARROW:
        rows = [Entry(name, text, "; ".join(filter(None, more))) for name, text, *more in table.rows]
        _print_group(Group(table.title, rows))
        return
    if console.is_terminal:
        shown = rich.table.Table(*table.header, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        shown.columns[0].no_wrap = True
        for row in table.rows:
            shown.add_row(*(Text(cell, style="cyan" if i == 0 else "") for i, cell in enumerate(row)))
        console.print(Padding(shown, (0, 0, 0, 2)))
        return
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    for row in (table.header, *table.rows):
        print_line("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_aligned(lines: list[tuple[str, str]]) -> None:
    """Names and their values side by side, at most 100 columns, on a terminal at most as many as it has; a name without
    a value heads those that follow."""
    import textwrap

    column = max(26, *(len(name) + 2 for name, _ in lines))
    width = min(98 - column, max(24, console.width - column - 2)) if console.is_terminal else 98 - column
    for name, value in lines:
        if not value:
            console.print(f"\n[bold]{name}[/bold]", highlight=False)
        for i, part in enumerate(textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)):
            console.print(f"  {name if i == 0 else '':<{column}}{part}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, gone when done, and the function that sets it; nothing where nobody looks."""
    from diffusion_align.training.progress import progress_bars

    with progress_bars(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def hide_loading_bars() -> None:
    """The libraries show one for every model part, and remarks about packages nobody needs here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
