"""Who holds a run's folder: one process at a time, by a lock of the operating system.

It ends with its process however that ends. The lock file names that process and is gone when it ends by itself. What a
killed one leaves is a file without a lock, and in nobody's way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path

from diffusion_align.errors import UserError
from diffusion_align.streams import print_warning
from diffusion_align.writing import writing

LOCK_FILE = ".lock"
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_FAR = 1 << 30  # on Windows a locked byte cannot be read, so it is one far behind what the file says
_held: set[FolderLock] = set()


class FolderLock:
    """``with FolderLock(folder): ...``; the folder must be there.

    Where the file system knows no locks, a line on stderr says so and nothing is locked.

    Raises:
        UserError: another process holds it; which one, and on which machine.
        WriteError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        tries = 5  # whoever only looks holds it for a moment
        while True:
            with writing(self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = _lock(descriptor)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _UNSUPPORTED:
                    raise
                print_warning(
                    f"{self.folder}: its file system has no locks ({error.strerror}): make sure that no other process "
                    "uses this folder"
                )
                self.path.unlink(missing_ok=True)
                return self
            if not locked and (tries := tries - 1):
                os.close(descriptor)
                time.sleep(0.02)
                continue
            if not locked:
                held = _in_use(self.folder, descriptor)
                os.close(descriptor)
                raise held
            if _is_still(descriptor, self.path):
                break
            os.close(descriptor)  # the one before removed the file while we waited for it
        _held.add(self)
        self._descriptor = descriptor
        try:
            with writing(self.path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if sys.platform == "win32":  # where an open file cannot be removed
            os.close(descriptor)
            self._remove()
        else:
            if _is_still(descriptor, self.path):  # not so where the folder was moved, and another run begun there
                self._remove()
            os.close(descriptor)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # a file without a lock is in nobody's way
            self.path.unlink(missing_ok=True)


def check_not_in_use(folder: Path) -> None:
    """Nothing is made, and what cannot be looked at passes.

    Raises:
        UserError: another process holds the folder; which one, and on which machine.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:
        return
    try:
        free = _lock(descriptor, shared=True)
    except OSError:
        free = True
    try:
        if not free:
            raise _in_use(folder, descriptor)
    finally:
        os.close(descriptor)


def _in_use(folder: Path, descriptor: int) -> UserError:
    os.lseek(descriptor, 0, os.SEEK_SET)
    process, _, host = os.read(descriptor, 400).decode(errors="replace").strip().partition(" ")
    holder = f"process {process} on {host}" if process and host else "another process"
    return UserError(f"{str(folder)!r} is in use by {holder}: wait until it ends, stop it, or choose another folder")


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that ``path`` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock was free; it is then ours until the file is closed."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _let_go() -> None:
    """A forked child shares its parent's locks: it must not keep them when the parent is killed, nor end them."""
    for lock in _held:
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
