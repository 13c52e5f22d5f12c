"""Values in sentences."""

from __future__ import annotations

from typing import Any


def short(value: Any, most: int = 80) -> str:
    """``repr(value)`` in at most ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # of a number of more digits than Python writes
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
