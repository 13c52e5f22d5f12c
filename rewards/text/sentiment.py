"""How positive the completion sounds, by VADER (Hutto and Gilbert 2014, ICWSM): a lexicon and rules, no network."""

import importlib.util
from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import model_validator

from diffusion_align.errors import RewardError
from diffusion_align.rewards.settings import RewardSettings
from diffusion_align.rewards.text.base import Text, text_of


class Sentiment(RewardSettings):
    """How positive the English completion is: VADER's compound sentiment, 0 where it is neutral or empty."""

    name: ClassVar[str] = "sentiment"
    about: ClassVar[dict[str, Any]] = {"range": "-1 to 1", "extra": "text-rewards", "licence": "MIT (vaderSentiment)"}

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if importlib.util.find_spec("vaderSentiment") is None:
            raise RewardError("vaderSentiment is not installed: pip install 'diffusion-align[text-rewards]'")
        return self

    @cached_property
    def _analyzer(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        return SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        return [self._analyzer.polarity_scores(text_of(completion))["compound"] for completion in completions]
