"""What is wrong with an option of a reward that is a number: one sentence for each kind, and always two bounds."""

from typing import Any

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.shown import short


def number_problem(*, most: float = LARGEST, **numbers: Any) -> str | None:
    """Which of these settings is not a number above 0 and at most ``most``, in one sentence, or None."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            return f"{name}={short(value)} must be a number above 0"
        if value > most:
            return f"{name}={short(value)} must be at most {most:g}"
    return None


def count_problem(minimum: int, *, most: int = MOST, **counts: Any) -> str | None:
    """Which of these settings is not a whole number from ``minimum`` to ``most``, in one sentence, or None."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            return f"{name}={short(value)} must be a whole number of at least {minimum}"
        if value > most:
            return f"{name}={short(value)} must be at most {most}"
    return None


def is_coefficient(value: Any) -> bool:
    """Whether it is a finite number that scores can be multiplied with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
