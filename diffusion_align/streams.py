"""What is printed: text that stays text, on a terminal and in Markdown, on streams that outlive their readers."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from typing import Any, TextIO, cast

# A reader that has gone (`| head -1`), a terminal that was closed, a descriptor that never was one (`>&-`).
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN}


def printable(text: str, *, keep: str = "") -> str:
    """``text`` as text: characters that would steer a terminal (escapes, direction marks) become spaces.

    ``keep``: those that stay although they are not printed, such as line breaks.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def print_warning(sentence: str) -> None:
    """Print ``sentence`` on stderr behind "warning:", which is yellow on a terminal unless NO_COLOR is set."""
    seen = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "\x1b[1;33mwarning:\x1b[0m" if seen and os.environ.get("TERM") != "dumb" else "warning:"
    print(label, sentence, file=sys.stderr, flush=True)


def literal(text: str) -> str:
    """``text`` as code: markup in it is shown and not obeyed."""
    text = " ".join(text.split())
    ticks = fence(text, least=1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def fence(text: str, *, least: int) -> str:
    """More backticks than ``text`` has in a row, so that nothing in it ends the code."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def plain(text: str) -> str:
    """``text`` in prose, without what Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(text.split()))


def cell(text: str) -> str:
    """``text`` inside a table, where a bar or a new line would end the cell."""
    return " ".join(text.replace("|", "\\|").split())


class LastingStreams:
    """From now on printing never raises, whatever becomes of the streams, and whatever their encoding lacks."""

    def __init__(self) -> None:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # the next file to be opened would get this number, and all that is printed with it
                os.open(os.devnull, os.O_RDWR)
        self._before = sys.stdout, sys.stderr
        self._ours = tuple(_Lasting(stream) for stream in self._before)
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in self._ours)

    def close(self) -> str | None:
        """Put the streams back; why something is missing of what was printed to a reader that is still there."""
        for stream in self._ours:
            stream.flush()
        if (sys.stdout, sys.stderr) == self._ours:
            sys.stdout, sys.stderr = self._before
        return next((stream.lost for stream in self._ours if stream.lost), None)


class _Lasting:
    """A text stream; once it cannot be written to, it and its descriptor are the null device."""

    def __init__(self, stream: TextIO | None) -> None:
        self.lost: str | None = None
        self._stream = cast(Any, open(os.devnull, "w", encoding="utf-8") if stream is None else stream)  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError, OSError):
            self._stream.reconfigure(errors="backslashreplace")  # `LC_ALL=C` knows ASCII only

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in _GONE:
            self.lost = self.lost or error.strerror
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())  # what it still holds is written at the end of the process
        except (OSError, ValueError, AttributeError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        finally:
            os.close(nowhere)
