"""Values in sentences."""

from __future__ import annotations

import re
from typing import Any


def short(value: Any, most: int = 80) -> str:
    """``repr(value)`` in one line and at most ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # of a number of more digits than Python writes
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = re.sub(r"\s*\n\s*", " ", text)  # of a table, an array
    return text if len(text) <= most else text[: most - 3] + "..."
