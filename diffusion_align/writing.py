"""How files are written: whole or not at all, and one sentence where it cannot be done.

What is not finished is called ``.NAME.PID-NUMBER.tmp`` beside its target. A writer that fails removes it; what a killed
one left, ``sweep`` removes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusion_align.errors import UserError, short
from diffusion_align.inputs import check_path

_count = itertools.count()
_UMASK = os.umask(0)  # it can be read by setting it only
os.umask(_UMASK)
_BLOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV)
_IN_THE_WAY = (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys(_BLOCKED, "make it writable or choose another place"),
    **dict.fromkeys(_GONE, "its folder was moved, removed or never there: put it back or choose another place"),
    **dict.fromkeys(_IN_THE_WAY, "something else of that name is in the way: move it or choose another place"),
}
# safetensors and tokenizers are written in Rust, whose errors say their number in the text only.
_RUST = re.compile(r"\(os error (\d+)\)")


class WriteError(UserError):
    """A file or folder that cannot be written: which, why, and what to do."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, whatever keeps ``path`` from being written is a WriteError; other errors stay what they are."""
    try:
        yield
    except Exception as error:
        # A sentence is one already, whatever the error was that it is about.
        if isinstance(error, UserError) or (number := _number(error)) is None:
            raise
        # 0: torch says that its stream failed and not why.
        why = os.strerror(number) if number else "the write failed"
        remedy = _REMEDIES.get(number, "check the disk or choose another place")
        raise WriteError(f"{path} cannot be written ({why}): {remedy}") from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that readers, and a kill, find the old content or the new, never a part."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """``write_bytes`` in UTF-8; half of a surrogate pair, which UTF-8 has no place for, is written as ``\\udcff``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file and wait until it is on the disk; if there is no room for all of it, nothing is added."""
    data = line.encode("utf-8", "backslashreplace") + b"\n"
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            length = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except BaseException:
                os.ftruncate(file, length)
                raise
        finally:
            os.close(file)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; at the end, what is there takes the place of ``path``. Its folder must exist.

    A link stays one, and a pipe or a device such as /dev/stdout is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    named, path = path, Path(os.path.realpath(path))
    temporary = _temporary(path)
    with writing(named):
        try:
            yield temporary
            _share(temporary)
            _sync(temporary)
            _take_place(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill; at the end it is ``path`` or, where that exists already, its files take their places in it.

    Other files of a folder that exists stay. The folder that ``path`` is in must exist.
    """
    path = Path(path)
    temporary = _temporary(path / "new" if path.is_dir() else path)  # inside: beside it may be another disk
    with writing(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
            for file in files:
                _share(file)
                _sync(file)
            if not path.is_dir():
                rename(temporary, path)
                return
            for file in files:
                target = path / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                rename(file, target)
            shutil.rmtree(temporary, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def make_folder(path: str | Path, *, parents: bool = False) -> Path:
    """Make a folder unless it is there. Without ``parents``, what it is in must exist: a run's folder that was moved
    or deleted while the run continues is not made anew behind somebody's back."""
    check_path(path, f"the folder {short(str(path))}", to="writable", error=WriteError)
    with writing(path):
        Path(path).mkdir(parents=parents, exist_ok=True)
    return Path(path)


def output_folder(path: str | Path) -> Path:
    """``path``, its ``~`` expanded, as a folder that ``new_folder`` can fill: what it is in is made.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    folder = Path(os.path.expanduser(path))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(path)!r} is a file: name a folder")
    make_folder(folder.parent, parents=True)
    return folder


def rename(source: Path, target: Path) -> None:
    """Give what is at ``source`` the name ``target``, on the disk too."""
    os.replace(source, target)
    try:
        _sync(target.parent)
    except OSError as error:  # folders that may not be read, or of file systems that cannot do it
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def sweep(folder: str | Path, *, of: str | None = None) -> None:
    """Remove what killed writers have left in ``folder`` and the folders in it; nobody else may be writing there.

    ``of``: only what writers of this name in ``folder`` have left, which others may use.
    """
    inside = [p for p in Path(folder).glob("*") if p.is_dir() and not p.is_symlink()]
    # .tmpXXXXXX is the name that safetensors itself gives to the files that it has not finished.
    names = [".*.tmp", ".tmp??????"] if of is None else [f".{of}.*.tmp"]
    for place in [Path(folder), *(inside if of is None else [])]:
        for left in [path for name in names for path in place.glob(name)]:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


def _take_place(source: Path, target: Path) -> None:
    """``rename`` of a file, or where that cannot be, as of one that a container mounts, a copy of what is in it."""
    try:
        rename(source, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(source, target)
        _sync(target)
        source.unlink()


def _temporary(path: Path) -> Path:
    # A name may have 255 bytes; several threads may write one path.
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{next(_count)}.tmp")


def _share(file: Path) -> None:
    """Give a new file the rights of any other; safetensors leaves its files to their owner alone."""
    with contextlib.suppress(OSError):  # of file systems that have no rights
        file.chmod(0o666 & ~_UMASK)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; Windows does that for a file's writer only."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(error: BaseException | None) -> int | None:
    """The errno of the failed write that ``error`` comes from, 0 for an unknown one, None if it is of another kind."""
    stream_failed = False
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _RUST.search(str(error)):
            return int(found[1])
        stream_failed |= "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
        error = error.__cause__ or error.__context__
    return 0 if stream_failed else None
