"""Prompts that a function gives, as TRL's and ddpo-pytorch's ``prompt_fn``: it is called ahead for a fixed list."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusion_align.errors import UserError, foreign_code, short

CALLS = 1000
"""Times that a function is called where no other number is set."""


def rows_of_calls(function: Callable[[], Any], calls: int = CALLS, *, column: str = "prompt") -> list[dict[str, Any]]:
    """A row for each of ``calls`` calls, in their order; a single row if all are equal.

    The global random numbers of Python, numpy and torch are the same every time this is called, so that every process,
    and a run that is resumed, has the same list; they are put back afterwards.

    Args:
        function: returns a prompt, (prompt, metadata) or a row, a mapping with ``column``.
        calls: at least 1.
        column: what the prompt's column is called.

    Raises:
        UserError: the function raised, or returned something else.
    """
    with _same_random_numbers(), foreign_code(f"the function {_name(function)} raised "):
        returned = [function() for _ in range(calls)]
    rows = [_row(value, function, column) for value in returned]
    return rows if any(not _equal(row, rows[0]) for row in rows) else rows[:1]


def _equal(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    try:
        return bool(row == other)
    except Exception:  # arrays in them have no single answer; that there are some is reported where rows are read
        return False


def _row(value: Any, function: Callable[[], Any], column: str) -> dict[str, Any]:
    match value:
        case str():
            return {column: value}
        case (str() | list() as prompt, Mapping() as metadata):
            return {**metadata, column: prompt}
        case list() if value and all(isinstance(message, Mapping) for message in value):  # a conversation
            return {column: value}
        case Mapping() if column in value:
            return dict(value)
    if isinstance(value, Iterator):
        called = f"{_name(function)}()"
        raise UserError(f"the function {_name(function)} returned an iterator: give what it goes through, {called}")
    raise UserError(
        f"the function {_name(function)} returned {short(value)}: let it return a prompt, or (prompt, metadata) with a "
        "dict"
    )


def _name(function: Callable[[], Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__)).rpartition("<locals>.")[2]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    import numpy as np
    import torch

    from diffusion_align.training.checkpoint import rng_state, set_rng_state

    before = rng_state()
    try:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the user's function may use it
        torch.manual_seed(0)
        yield
    finally:
        set_rng_state(before)
