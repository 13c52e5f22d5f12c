"""``main``: it runs a command, and whatever ends it becomes one sentence and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from diffusion_align.cli.commands import app
from diffusion_align.cli.terminal import errors, print_error
from diffusion_align.errors import Interrupted, UserError, first_line
from diffusion_align.invocation import IN_COMMANDS, PROGRAM, RESUME_WITH
from diffusion_align.streams import LastingStreams, printable


def main() -> None:
    """Run a command; the exit status is 0, 2 (a user's error), 130 (interrupted) or 1 (anything unexpected)."""
    from diffusion_align import interrupt

    if _is_for_a_shell(sys.argv[1:]):
        app(prog_name=PROGRAM)
    streams = LastingStreams()
    arguments, debug = _without_debug(sys.argv[1:])
    try:
        status = app(arguments, standalone_mode=False, prog_name=PROGRAM)
        if status == interrupt.INTERRUPTED:  # what typer makes of Ctrl-C in its newer versions
            errors.print("stopped")
    except Interrupted as stop:
        _print_for_all([str(stop)])
        status = interrupt.INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped")
        status = interrupt.INTERRUPTED
    except BaseException as error:
        if debug:
            errors.print(_traceback(error), markup=False)
        if isinstance(error, UserError) or _is_a(error, "OutOfMemoryError"):
            notes, how = _notes(error)
            status = print_error("; ".join([str(error), *notes]))
            _print_for_all(how)
        elif isinstance(error, SystemExit):  # never ours, so nothing was finished, whatever its code
            called = f"sys.exit({error.code!r}) was called by code outside this package"
            status = print_error(f"{called}: let it raise an error instead")
        elif _is_a(error, "ClickException"):
            status = _usage(error)
        else:
            status = _unexpected(error, debug)
    lost = streams.close()
    if lost is not None:
        failed = print_error(f"the output could not be printed in full ({lost}): make room where it is written")
        status = status or failed
    status = status if isinstance(status, int) else 0
    if interrupt.left_behind:
        os._exit(status)
    sys.exit(status)


def _is_for_a_shell(arguments: list[str]) -> bool:
    """Whether a shell asks for completions, or is to be given the script that asks: typer then exits by itself."""
    completing = {"--install-completion", "--show-completion"}.intersection(arguments[:1])
    return bool(completing) or f"_{PROGRAM}_COMPLETE".replace("-", "_").upper() in os.environ


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The command line without --debug, and whether it was there; what stands behind "--" are values."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    kept = [word for word in options if word != "--debug"]
    return kept + arguments[len(options) :], len(kept) < len(options)


def _unexpected(error: BaseException, debug: bool) -> int:
    """One sentence about an error that nobody foresaw, and its traceback in a file that only the user can read."""
    import tempfile

    try:
        what = f"{type(error).__name__}: {first_line(error)}"
    except Exception:  # even its text fails
        what = type(error).__name__
    place = "above"
    if not debug:
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", errors="backslashreplace", prefix="diffusion-align-", suffix=".txt", delete=False
            ) as file:  # with mode 0600
                file.write(_traceback(error))
            place = f"in {file.name} (--debug prints it)"
        except OSError:
            errors.print(_traceback(error), markup=False)
    print_error(f"unexpected {what}; the traceback is {place}")
    _print_for_all(_notes(error)[1])  # the others may be of other libraries
    return 1


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _notes(error: BaseException) -> tuple[list[str], list[str]]:
    """What was noted about an error on the way: parts of its sentence, and lines that tell how to resume."""
    notes = list(map(str, getattr(error, "__notes__", ())))
    return [note for note in notes if RESUME_WITH not in note], [note for note in notes if RESUME_WITH in note]


def _print_for_all(lines: list[str]) -> None:
    """Print what holds for all processes of a run, once."""
    from diffusion_align.training.launch import is_first_process

    if is_first_process():
        for line in lines:
            errors.print(printable(line, keep=IN_COMMANDS), markup=False)


_NO_INTEGER = "Input should be a valid integer, unable to parse string as an integer"


def _usage(error: Any) -> int:
    """A wrong command line; without any arguments the help."""
    if _is_a(error, "NoArgsIsHelpError"):
        error.show()
        return 2
    command = error.ctx.command_path if getattr(error, "ctx", None) else "diffusion-align"
    message = error.format_message().rstrip(".").replace(_NO_INTEGER, "it must be a whole number")
    message = message.replace("Input should be", "it must be")
    if len(message) > 500:  # whatever was typed is in it
        message = message[:500] + "..."
    return print_error(f"{message}: see {command} --help")


def _is_a(error: BaseException, *names: str) -> bool:
    """By name: neither torch for `--help`, nor the click that typer has in this version (its own or the package)."""
    return any(cls.__name__ in names for cls in type(error).__mro__)
