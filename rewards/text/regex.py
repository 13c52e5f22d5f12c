"""Whether, how often or how much of the completion matches a pattern."""

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from diffusion_align.rewards.settings import RewardSettings
from diffusion_align.rewards.text.base import Text, text_of

MODES: dict[str, Callable[[re.Pattern[str], str], float]] = {
    "search": lambda pattern, text: float(pattern.search(text) is not None),
    "full": lambda pattern, text: float(pattern.fullmatch(text) is not None),
    "count": lambda pattern, text: float(sum(1 for _ in pattern.finditer(text))),
    "share": lambda pattern, text: sum(m.end() - m.start() for m in pattern.finditer(text)) / max(len(text), 1),
}


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
"""An option that is a regular expression."""


class Regex(RewardSettings):
    """How well the completion matches a regular expression.

    Modes: "search", 1 where it matches somewhere, else 0; "full", 1 where it matches the whole completion; "count", the
    number of matches, none overlapping; "share", the part of the characters that they cover.
    """

    name: ClassVar[str] = "regex"
    about: ClassVar[dict[str, Any]] = {
        "range": "0 or 1 (search, full), 0 to 1 (share), 0 and above (count)",
        "licence": "no model",
    }

    pattern: Pattern = Field(
        description="regular expression of Python, flags inside it: (?s) lets the dot match line breaks, (?i) ignores "
        "case; nested repetitions can take very long"
    )
    mode: Literal["search", "full", "count", "share"] = Field(
        "search", description="a match somewhere, of the whole completion, their number, or the characters they cover"
    )

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        pattern, score = re.compile(self.pattern), MODES[self.mode]
        return [score(pattern, text_of(completion)) for completion in completions]
