"""Whether the number that the completion ends in (or begins with) is the answer."""

import re
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import Field

from diffusion_align.bounds import LARGEST
from diffusion_align.rewards.settings import RewardSettings
from diffusion_align.rewards.text.base import Column, Text, column_of, text_of

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


class NumericMatch(RewardSettings):
    """Whether a number in the completion equals the answer: 1 or 0, by the last number or the first.

    A sample whose answer holds no number gets no score; a completion without one scores 0.
    """

    name: ClassVar[str] = "numeric_match"
    about: ClassVar[dict[str, Any]] = {"needs": "answers in the data", "range": "0 or 1", "licence": "no model"}

    column: Column = Field(
        "answer", description="column of the data with the answer: a number, or text whose last number it is (GSM8K)"
    )
    which: Literal["last", "first"] = Field("last", description="number of the completion")
    tolerance: float = Field(
        0.0, ge=0, le=LARGEST, description="how far apart the two may be; compared in decimals, without rounding"
    )

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        answers = column_of(columns, self.column, self.name)
        return [self._score(text_of(c), answer) for c, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float | None:
        wanted = numbers_in(str(answer))
        if not wanted:
            return None
        given = numbers_in(text)
        place = -1 if self.which == "last" else 0
        return float(bool(given) and abs(given[place] - wanted[-1]) <= Decimal(str(self.tolerance)))
