"""Errors a user can act on. The CLI prints their one sentence (each, if several) and exits with status 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusion_align.shown import short

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Interrupted",
    "RewardError",
    "TrainingError",
    "UserError",
    "first_line",
    "problems_of",
    "short",
    "together",
]


class UserError(Exception):
    """One sentence: the setting, its value, what is allowed, what to do."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, all at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
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
    """Training cannot go on: a ratio off 1 on the first pass, a loss that is not finite."""


class RewardError(UserError, ValueError):
    """A reward that cannot be built, raised, or answered something other than one finite score per image or text."""


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
    if str(error).startswith("You set `ignore_mismatched_sizes`"):  # transformers, which has the details in a log
        return "the shapes of its weights are not those that its configuration says"
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.rstrip().endswith(":") and more:  # a heading
        first = f"{first.rstrip()} {more[0].strip()}"
    return first.rstrip(".") if len(first) <= 400 else first[:397] + "..."
