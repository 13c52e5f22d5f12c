"""Arguments that people know by the names of diffusers, transformers and TRL."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sized
from typing import Any, ParamSpec, TypeVar

from diffusion_align.errors import UserError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def check_same_length(*lists: tuple[str, Any]) -> None:
    """UserError unless all ``lists``, (name, list), have as many entries as the first; a text is not a list."""
    are_lists = [isinstance(one, Sized) and not isinstance(one, str) for _, one in lists]
    got = [str(len(one)) if is_list else f"one {type(one).__name__}" for (_, one), is_list in zip(lists, are_lists)]
    if not all(are_lists) or len(set(got)) > 1:
        names, got = ([*one[:-2], " and ".join(one[-2:])] for one in ([name for name, _ in lists], got))
        raise UserError(f"{', '.join(names)} must be lists of the same length: got {', '.join(got)}")


def also_called(aliases: Mapping[str, str], without: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function be called with other libraries' names.

    Args:
        aliases: another library's name -> the argument that it is here.
        without: a name that no argument answers to -> a sentence about what to do instead.

    The function then raises UserError, in one sentence, where an argument is unknown, or given twice under two names.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__.replace("__call__", "the pipeline")
        parameters = inspect.signature(function).parameters
        known = [key for key in parameters if key not in ("self", "cls")]
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            for alias in aliases.keys() & kwargs.keys():
                ours = aliases[alias]
                if ours in kwargs or list(parameters).index(ours) < len(args):
                    raise UserError(f"{alias} is another name of {ours}: give one of them")
                kwargs[ours] = kwargs.pop(alias)
            for key in kwargs:
                if key in known or takes_all:
                    continue
                meant = did_you_mean(key, [*known, *aliases], cutoff=0.7) or f"it takes {', '.join(known)}"
                raise UserError(f"{name} has no argument {key}: {without.get(key, meant)}")
            return function(*args, **kwargs)

        return wrapped

    return wrap
