"""Whether the completion is the answer, word for word."""

import re
import unicodedata
from typing import Any, ClassVar

from pydantic import Field

from diffusion_align.rewards.settings import RewardSettings
from diffusion_align.rewards.text.base import Column, Text, column_of, text_of
from diffusion_align.rewards.text.regex import Pattern


class ExactMatch(RewardSettings):
    """Whether the completion equals the answer: 1 or 0; white space at the ends and its amount never count.

    A sample whose answer is None gets no score.
    """

    name: ClassVar[str] = "exact_match"
    about: ClassVar[dict[str, Any]] = {"needs": "answers in the data", "range": "0 or 1", "licence": "no model"}

    column: Column = Field(
        "answer", description="column of the data with the answer, or a list of answers any of which will do"
    )
    ignore_case: bool = Field(False, description="upper and lower case are equal")
    ignore_punctuation: bool = Field(False, description="every punctuation mark counts as white space")
    extract: Pattern | None = Field(
        None,
        description="what the last match's first group holds (the whole match if it has none) is compared in place of "
        "the whole completion, e.g. (?s)<answer>(.*?)</answer>; no match scores 0",
    )

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        answers = column_of(columns, self.column, self.name)
        return [self._score(text_of(c), answer) for c, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: Any) -> float | None:
        if answer is None:
            return None
        if self.extract is not None:
            pattern = re.compile(self.extract)
            found = list(pattern.finditer(text))
            if not found:
                return 0.0
            text = (found[-1].group(1) if pattern.groups else found[-1].group()) or ""
        accepted = answer if isinstance(answer, list | tuple) else [answer]
        return float(self._normalised(text) in {self._normalised(str(one)) for one in accepted})

    def _normalised(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(" " if unicodedata.category(character)[0] == "P" else character for character in text)
        return " ".join(text.split())
