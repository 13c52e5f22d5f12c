"""Errors a user can act on. The CLI prints their one sentence (each, if several) and exits with status 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """One sentence: the setting, its value, what is allowed, what to do."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, all at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(UserError):
    """A checkpoint that is foreign, damaged or missing."""


class TrainingError(UserError):
    """Training cannot go on: a ratio off 1 on the first pass, a loss that is not finite."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP; the state of the last finished epoch has been saved."""


def first_line(error: BaseException) -> str:
    """What another library's error says first, to stand in a sentence; its kind if it says nothing.

    diffusers says of a hub out of reach that a file is missing: then what it was caused by decides.
    """
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "LocalEntryNotFoundError":  # huggingface_hub's, which is not imported for this
            return "it is not in the cache and the hub is out of reach, check the name and the network or give a folder"
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
