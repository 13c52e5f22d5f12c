"""Whether the number that the completion ends in (or begins with) is the answer."""

import re
from decimal import Decimal
from typing import Any

from diffusion_align.bounds import LARGEST
from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.text.base import Text, column_of, text_of
from diffusion_align.shown import short

ABOUT = {
    "numeric_match": {
        "range": "0 or 1",
        "extra": None,
        "licence": "no model",
    },
}
WHICH = {"last": -1, "first": 0}
# A sign is one only where nothing is subtracted from a number or a bracket; digits within words (H2O) are no numbers.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-+\u2212]))?[$€£¥]?(?<!\w)(?<!\w\.)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)


def numbers_in(text: str) -> list[Decimal]:
    """The numbers in a text, exactly.

    Read: ``12``, ``-3.5``, ``+1``, ``.5``, ``1,234,567.8`` (commas before every three digits), ``$1,000``, ``-$5``,
    ``6.02e23``, the minus sign U+2212. ``5-3`` holds 5 and 3, ``1/2`` holds 1 and 2, ``50%`` is 50. A decimal comma is
    not read: ``3,14`` holds 3 and 14.
    """
    found = []
    for match in NUMBER.finditer(text):
        sign = "-" if match["sign"] in ("-", "\u2212") else ""
        found.append(Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or "")))
    return found


class NumericMatch:
    """Equality of numbers as a reward. Build it with `numeric_match`."""

    name = "numeric_match"

    def __init__(self, column: str, which: str, tolerance: float):
        self.column, self.place, self.tolerance = column, WHICH[which], Decimal(str(tolerance))

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        answers = column_of(columns, self.column, self.name)
        return [self._score(text_of(c), answer) for c, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float | None:
        wanted = numbers_in(str(answer))
        if not wanted:
            return None
        given = numbers_in(text)
        return float(bool(given) and abs(given[self.place] - wanted[-1]) <= self.tolerance)


def numeric_match(*, column: str = "answer", which: str = "last", tolerance: float = 0.0) -> NumericMatch:
    """1 where the last (or first) number in the completion equals the answer, else 0.

    Nothing is said about a sample whose answer holds no number; a completion without one scores 0.

    Args:
        column: of the data, that holds the answer: a number, or text whose last number it is (as in GSM8K).
        which: "last" or "first" number of the completion.
        tolerance: how far apart the two may be, both ends included; compared in decimals, without rounding.
    """
    problem = numeric_match_problem(column=column, which=which, tolerance=tolerance)
    if problem:
        raise RewardError(problem)
    return NumericMatch(column, which, tolerance)


def numeric_match_problem(*, column: Any = "answer", which: Any = "last", tolerance: Any = 0.0) -> str | None:
    """What is wrong with these options, in one sentence, or None."""
    if which not in tuple(WHICH):
        return f"which={which!r} is unknown: choose one of {', '.join(WHICH)}"
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance <= LARGEST:
        return f"tolerance={short(tolerance)} must be a number of at least 0, at most {LARGEST:g}"
    if not isinstance(column, str) or not column:
        return f"column={column!r} must be the name of a column of the data"
    return None
