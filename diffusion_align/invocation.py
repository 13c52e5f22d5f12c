"""How this process was started, and the command that resumes it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROGRAM = "diffusion-align"
RESUME_WITH = "resume with: "
"""Precedes a command at the end of a line; the command is complete and can be pasted."""
IN_COMMANDS = "\n\u200d"
"""Characters that are not printable but stay in a printed command: line breaks and the joiner of emoji."""


class Started(Protocol):
    """How a run was started."""

    def again(self, **settings: Any) -> str:
        """The command or call that starts it again, with ``settings`` in place of those given."""


@dataclass(frozen=True)
class CommandLine:
    """A command as it was typed.

    Attributes:
        program: its words up to the command: ``diffusion-align``, ``accelerate launch -m diffusion_align``.
        arguments: the others.
        aliases: other names of settings; None where the command takes options (``--resume``), not ``key=value``.
        own: ``program`` without a launcher, which other commands do not need.
    """

    program: tuple[str, ...]
    arguments: tuple[str, ...]
    aliases: Mapping[str, str] | None = None
    own: tuple[str, ...] = (PROGRAM,)

    def again(self, **settings: Any) -> str:
        """The words for a shell, quoted; an option is given where its setting is True."""
        if self.aliases is None:
            changed = [f"--{name}" for name, value in settings.items() if value is True]
            kept = [word for word in self.arguments if word not in changed]
        else:
            changed = [f"{name}={_as_yaml(value)}" for name, value in settings.items()]
            typed = [(word, word.partition("=")[0] if "=" in word else "") for word in self.arguments]
            kept = [word for word, key in typed if self.aliases.get(key, key) not in settings]
        end = kept.index("--") if "--" in kept else len(kept)  # no options after it
        return shlex.join([*self.program, *kept[:end], *changed, *kept[end:]])


@dataclass(frozen=True)
class PythonCall:
    """A call in Python; ``...`` stands for the arguments that nothing can print.

    Attributes:
        form: of the call, with ``{}`` where its keywords stand.
        given: the keywords that are printed.
    """

    form: str
    given: Mapping[str, str | Path]

    def again(self, **settings: Any) -> str:
        """One line of Python."""
        keywords = {name: str(value) for name, value in self.given.items()} | settings
        return self.form.format(", ".join(["...", *(f"{name}={value!r}" for name, value in keywords.items())]))


def command_line(aliases: Mapping[str, str] | None = None) -> CommandLine:
    """How this process was started, with its launcher if there is one, such as ``accelerate launch`` or ``uv run``."""
    arguments = sys.argv[1:]
    program = _before(arguments, sys.orig_argv)
    if program is None:
        return CommandLine((PROGRAM,), tuple(arguments), aliases)
    own = _as_typed(program)
    for words in _parents():
        launcher = _before(arguments, words)
        if launcher is None:
            break
        program = launcher
    return CommandLine(tuple(_as_typed(program)), tuple(arguments), aliases, tuple(own))


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _before(arguments: Sequence[str], words: Sequence[str]) -> list[str] | None:
    """The words before ``arguments``, where these are the last."""
    count = len(words) - len(arguments)
    return list(words[:count]) if count > 0 and arguments and list(words[count:]) == list(arguments) else None


def _parents() -> list[list[str]]:
    """The command lines of the processes that this one was started by, the nearest first."""
    import psutil

    found = []
    try:
        for process in psutil.Process().parents():
            found.append(process.cmdline())
    except psutil.Error:  # one that has ended, or is not ours to read
        pass
    return found


def _as_typed(program: Sequence[str]) -> list[str]:
    """A script without the interpreter that the system runs it by, and what is on the PATH by its name."""
    first, *others = program
    if others and "python" in os.path.basename(first) and os.access(others[0], os.X_OK) and os.path.isfile(others[0]):
        first, *others = others
    return [shortest(first), *others]


def shortest(path: str) -> str:
    """How a program is called from the current folder: its name, where the PATH leads to it, or a path."""
    folder, name = os.path.split(path)
    found = shutil.which(name)
    # The folders, not what is in them: a python of two environments is a link to one file.
    if folder and found is not None and os.path.realpath(os.path.dirname(found)) == os.path.realpath(folder):
        return name
    return shown_path(path) if folder else path


def shown_path(path: str | Path) -> str:
    """A path, relative to the current folder if it is inside it."""
    absolute = os.path.abspath(path)
    below = os.path.relpath(absolute)
    return absolute if below.startswith(os.pardir) else below
