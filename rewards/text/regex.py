"""Whether, how often or how much of the completion matches a pattern."""

import re
from collections.abc import Callable
from typing import Any

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.text.base import Text, text_of

ABOUT = {
    "regex": {
        "range": "0 or 1 (search, full), 0 to 1 (share), 0 and above (count)",
        "extra": None,
        "licence": "no model",
    },
}
MODES: dict[str, Callable[[re.Pattern[str], str], float]] = {
    "search": lambda pattern, text: float(pattern.search(text) is not None),
    "full": lambda pattern, text: float(pattern.fullmatch(text) is not None),
    "count": lambda pattern, text: float(sum(1 for _ in pattern.finditer(text))),
    "share": lambda pattern, text: sum(m.end() - m.start() for m in pattern.finditer(text)) / max(len(text), 1),
}


class Regex:
    """The match as a reward. Build it with `regex`."""

    name = "regex"

    def __init__(self, pattern: str, mode: str):
        self.pattern, self.mode = re.compile(pattern), mode

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        return [MODES[self.mode](self.pattern, text_of(completion)) for completion in completions]


def regex(*, pattern: str, mode: str = "search") -> Regex:
    """How well the completion matches a regular expression.

    Args:
        pattern: of Python's ``re``; flags stand inside it, e.g. ``(?s)`` lets the dot match line breaks, ``(?i)``
            ignores case. A pattern with nested repetitions can take very long; there is no time limit.
        mode: "search", 1 where it matches somewhere, else 0; "full", 1 where it matches the whole completion;
            "count", the number of matches, none overlapping; "share", the part of the characters that they cover.
    """
    problem = regex_problem(pattern=pattern, mode=mode)
    if problem:
        raise RewardError(problem)
    return Regex(pattern, mode)


def regex_problem(*, pattern: Any, mode: Any = "search") -> str | None:
    """What is wrong with these options, in one sentence, or None."""
    if mode not in tuple(MODES):
        return f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}"
    return pattern_problem("pattern", pattern)


def pattern_problem(option: str, pattern: Any) -> str | None:
    """Why the value of ``option`` is no regular expression, in one sentence, or None."""
    if not isinstance(pattern, str) or not pattern:
        return f"{option}={pattern!r} must be a regular expression"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{option}={pattern!r} is not a regular expression: {error}"
    return None
