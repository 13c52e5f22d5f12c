"""Errors a user can act on. The CLI prints their one sentence (each, if several) and exits with status 2."""

from __future__ import annotations

import contextlib
import difflib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from diffusion_align.interrupt import Overdue, interrupted, interruptible

_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class UserError(Exception):
    """One sentence: the setting, its value, what is allowed, what to do."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, all at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def together(*checks: Callable[[], Any]) -> list[Any]:
    """What each of ``checks`` returns.

    Raises:
        ConfigError: with the problems of all that raise one.
    """
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return results


def problems_of(check: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    """The sentences of the UserError that ``check`` raises of these arguments; none if it raises none."""
    try:
        check(*arguments, **options)
    except UserError as error:
        return getattr(error, "problems", [str(error)])
    return []


class CheckpointError(UserError):
    """A checkpoint that is foreign, damaged or missing."""


class TrainingError(UserError):
    """Training cannot continue: a ratio off 1 on the first pass, a loss that is not finite."""


class RewardError(UserError, ValueError):
    """A reward that cannot be built, raised, or answered something other than one finite score per image or text."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP; the state of the last finished epoch has been saved."""


def first_line(error: BaseException) -> str:
    """What another library's error says first, to stand in a sentence; its kind if it says nothing.

    Where the Hub is out of reach, diffusers reports a missing file: then its cause decides.
    """
    if _is_out_of_reach(error):
        return f"{_OUT_OF_REACH}, check the name and the network or give a folder"
    if str(error).startswith("You set `ignore_mismatched_sizes`"):  # transformers, which has the details in a log
        return "the shapes of its weights are not those that its configuration says"
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.rstrip().endswith(":") and more:  # a heading
        first = f"{first.rstrip()} {more[0].strip()}"
    return first.rstrip(".") if len(first) <= 400 else first[:397] + "..."


_OUT_OF_REACH = "it is not in the cache and the Hub is out of reach"


def _is_out_of_reach(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "LocalEntryNotFoundError":  # huggingface_hub's, which is not imported for this
            return True
        error = error.__cause__ or error.__context__
    return False


def short(value: Any, most: int = 80) -> str:
    """``repr(value)`` in one line and at most ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # of a number of more digits than Python writes
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = re.sub(r"\s*\n\s*", " ", text)  # of a table, an array
    return text if len(text) <= most else text[: most - 3] + "..."


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """ "did you mean 'x'?", x of ``known`` being the nearest to ``word``; empty where none is near.

    ``cutoff``: how near, from 0 to 1, as of ``difflib``.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or else the list of what is known."""
    known = sorted(known)
    return did_you_mean(word, known) or f"known are {', '.join(known)}"


@contextlib.contextmanager
def foreign_code(what: str, after: str = "", *, error: type[UserError] = UserError) -> Iterator[None]:
    """Whatever is raised inside becomes an ``error`` that begins with ``what``, SystemExit and its like too.

    An ``error`` stays as it is, and so does a Ctrl-C: KeyboardInterrupt where a loop that counts Ctrl-C was told
    to stop, or where there is none.
    """
    try:
        yield
    except (error, Overdue):
        raise
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt) and (interrupted() or not interruptible()):
            raise
        raise error(f"{what}{describe_exception(raised)}{_place(raised.__traceback__)}{after}") from raised


def describe_exception(error: BaseException) -> str:
    """``TypeError: the first line of its message``, for one-sentence errors; of the Hub's out of reach just that."""
    if isinstance(error, OSError) and _is_out_of_reach(error):
        return _OUT_OF_REACH
    try:
        lines = str(error).strip().splitlines()
    except BaseException:  # the text of an exception is code of its author's
        return f"{type(error).__name__}, whose text cannot be read"
    return f"{type(error).__name__}: {lines[0][:1000]}" if lines else type(error).__name__


def _place(traceback: TracebackType | None) -> str:
    """ " (file, line)" of the innermost frame that is neither a library's nor ours, for who has to repair it."""
    found = ""
    while traceback is not None:
        code, module = traceback.tb_frame.f_code, str(traceback.tb_frame.f_globals.get("__name__"))
        if not code.co_filename.startswith((*_LIBRARIES, "<")) and module.split(".")[0] != "diffusion_align":
            found = f" ({Path(code.co_filename).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return found
