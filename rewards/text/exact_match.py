"""Whether the completion is the answer, word for word."""

import re
import unicodedata
from typing import Any

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.text.base import Text, column_of, text_of
from diffusion_align.rewards.text.regex import pattern_problem

ABOUT = {
    "exact_match": {
        "range": "0 or 1",
        "extra": None,
        "licence": "no model",
    },
}


class ExactMatch:
    """Equality as a reward. Build it with `exact_match`."""

    name = "exact_match"

    def __init__(self, column: str, ignore_case: bool, ignore_punctuation: bool, extract: str | None):
        self.column, self.ignore_case, self.ignore_punctuation = column, ignore_case, ignore_punctuation
        self.extract = re.compile(extract) if extract else None

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        answers = column_of(columns, self.column, self.name)
        return [self._score(text_of(c), answer) for c, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float | None:
        if answer is None:
            return None
        if self.extract:
            found = list(self.extract.finditer(text))
            if not found:
                return 0.0
            text = (found[-1].group(1) if self.extract.groups else found[-1].group()) or ""
        accepted = answer if isinstance(answer, list | tuple) else [answer]
        return float(self._normalised(text) in {self._normalised(str(one)) for one in accepted})

    def _normalised(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(" " if unicodedata.category(character)[0] == "P" else character for character in text)
        return " ".join(text.split())


def exact_match(
    *,
    column: str = "answer",
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    extract: str | None = None,
) -> ExactMatch:
    """1 where the completion equals the answer, else 0; white space at the ends and its amount never count.

    Nothing is said about a sample whose answer is None.

    Args:
        column: of the data, that holds the answer, or a list of answers any of which will do; numbers as they print.
        ignore_case: upper and lower case are equal.
        ignore_punctuation: every punctuation mark counts as white space.
        extract: a regular expression; what the last match's first group holds (the whole match if it has none) is
            compared in place of the whole completion, e.g. ``(?s)<answer>(.*?)</answer>``. No match scores 0.
    """
    problem = exact_match_problem(
        column=column, ignore_case=ignore_case, ignore_punctuation=ignore_punctuation, extract=extract
    )
    if problem:
        raise RewardError(problem)
    return ExactMatch(column, ignore_case, ignore_punctuation, extract)


def exact_match_problem(
    *, column: Any = "answer", ignore_case: Any = False, ignore_punctuation: Any = False, extract: Any = None
) -> str | None:
    """What is wrong with these options, in one sentence, or None."""
    for option, value in {"ignore_case": ignore_case, "ignore_punctuation": ignore_punctuation}.items():
        if not isinstance(value, bool):
            return f"{option}={value!r} must be true or false"
    if not isinstance(column, str) or not column:
        return f"column={column!r} must be the name of a column of the data"
    return None if extract is None else pattern_problem("extract", extract)
