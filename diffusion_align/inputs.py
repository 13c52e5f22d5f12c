"""Paths and devices that people name, checked before anything is opened or loaded: opening a pipe would wait for ever.

A check raises what ``error`` makes of one sentence: ``subject``, such as "model='a/b'", and what is wrong with it.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from diffusion_align.errors import UserError

Error = Callable[[str], Exception]
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/")
PROBE = ".diffusion-align-"
"""What files begin with that only try whether a folder can be written to."""
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def check_path(
    path: str | Path,
    subject: str,
    want: Literal["file", "folder", "either"] = "either",
    *,
    to: Literal["readable", "writable"] = "readable",
    error: Error = UserError,
) -> None:
    """Raise an ``error`` if ``path`` is what it must not be; all is well if it is not there.

    Args:
        path: ``~`` is expanded.
        want: what it has to be if it is there.
        to: what for.
    """
    if problem := _wrong(path, want, to):
        raise error(f"{subject} {problem}")


def check_output(path: str | Path, subject: str, want: Literal["file", "folder"], *, error: Error = UserError) -> None:
    """Raise an ``error`` if nothing can be written to ``path``, which may not be there yet; nothing is left behind."""
    if problem := _unwritable(path, want):
        raise error(f"{subject} {problem}")


def default_device() -> str:
    """A GPU where there is one, Apple's included."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


_DEVICES = "give cpu, cuda, cuda:1 or the like"


def check_device(device: Any, subject: str, *, error: Error = UserError) -> None:
    """Raise an ``error`` if tensors cannot be put on ``device``; None is well."""
    if device is None:
        return
    import torch

    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise error(f"{subject} is not a device: {_DEVICES}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise error(f"{subject} is not a device: {_DEVICES}") from None
    if kind == "meta":
        raise error(f"{subject} cannot be used, as it holds no data: {_DEVICES}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as raised:  # the second: torch was built without CUDA
        reason = (str(raised).splitlines() or [type(raised).__name__])[0][:300].rstrip(".")
        raise error(f"{subject} cannot be used: {reason}") from None


def _wrong(path: str | Path, want: str, to: str) -> str | None:
    """What stands behind the name of a path that is not what it must be."""
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


def _unwritable(path: str | Path, want: str) -> str | None:
    if want == "file" and str(path).startswith(_STREAMS):  # a pipe that somebody reads, or a terminal
        return None
    if problem := _wrong(path, "file" if want == "file" else "either", "writable"):
        return problem
    place = Path(os.path.expanduser(path))
    there = place if want == "folder" else place.parent
    while not there.exists():  # without an error: ``_wrong`` has seen those
        if there.is_symlink():
            return f"cannot be made, as {there} is a link to nothing: give another path"
        there = there.parent
    if not there.is_dir():
        return f"cannot be made, as {there} is a file: give another path"
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
