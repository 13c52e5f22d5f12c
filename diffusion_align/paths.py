"""What can be wrong with a path, seen before anything is opened: opening a pipe would wait for ever."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Literal

Want = Literal["file", "folder", "either"]
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/")
PROBE = ".diffusion-align-"
"""What files begin with that only try whether a folder can be written to."""
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def path_problem(
    path: str | Path, want: Want = "either", *, to: Literal["readable", "writable"] = "readable"
) -> str | None:
    """What ``path`` is that it must not be, to stand behind its name; None of one that is well or not there.

    Args:
        path: ``~`` is expanded.
        want: what it has to be if it is there.
        to: what for.
    """
    text = str(path)
    if not text.strip():
        return "is empty: give a path"
    if "\0" in text:
        return "holds a NUL character: give a path without it"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return "is not valid Unicode: rename it, or give another path"
    place = os.path.expanduser(text)
    try:
        os.lstat(text)
    except OSError:
        if place == text and text.startswith("~"):
            return f"begins with {text.split('/')[0][:40]}, and there is no user of that name: give another path"
    try:
        mode = os.stat(place).st_mode
    except OSError as error:
        return _unreachable(place, error, to)
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is not None:
        return f"is a {kind}: give {'a file or a folder' if want == 'either' else f'a {want}'}"
    if want == "file" and stat.S_ISDIR(mode):
        return "is a folder: give a file"
    if want == "folder" and not stat.S_ISDIR(mode):
        return "is a file: give a folder"
    return None


def output_problem(path: str | Path, want: Literal["file", "folder"]) -> str | None:
    """Why nothing can be written to ``path``, a file or folder that may not be there yet; nothing is left behind."""
    if want == "file" and str(path).startswith(_STREAMS):  # a pipe that somebody reads, or a terminal
        return None
    problem = path_problem(path, "file" if want == "file" else "either", to="writable")
    if problem is not None:
        return problem
    place = Path(os.path.expanduser(path))
    there = place if want == "folder" else place.parent
    while not there.exists():  # without an error: ``path_problem`` has seen those
        if there.is_symlink():
            return f"cannot be made: {there} is a link to nothing: choose another path"
        there = there.parent
    if not there.is_dir():
        return f"cannot be made: {there} is a file"
    try:
        tempfile.TemporaryFile(dir=there, prefix=PROBE).close()
        if want == "file" and place.exists() and not os.access(place, os.W_OK):
            return f"is not writable: {os.strerror(errno.EACCES)}"
    except OSError as error:
        return f"is not writable: {error.strerror}"
    return None


def _unreachable(place: str, error: OSError, to: str) -> str | None:
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself: give another path"
    if error.errno == errno.ENAMETOOLONG:
        return f"is not {to}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is a link to nothing: give another path" if os.path.islink(place) else None
    return f"is not {to}: {error.strerror}"
