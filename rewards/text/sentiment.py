"""How positive the completion sounds, by VADER (Hutto and Gilbert 2014, ICWSM): a lexicon and rules, no network."""

import importlib.util
from typing import Any

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.text.base import Text, text_of

ABOUT = {
    "sentiment": {
        "range": "-1 to 1",
        "extra": "text-rewards",
        "licence": "MIT (vaderSentiment)",
    },
}


class Sentiment:
    """VADER's compound score as a reward. Build it with `sentiment`."""

    name = "sentiment"

    def __init__(self, analyzer: Any):
        self.analyzer = analyzer

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        return [self.analyzer.polarity_scores(text_of(completion))["compound"] for completion in completions]


def sentiment() -> Sentiment:
    """VADER's compound sentiment of the completion, English: -1 negative, 0 neutral or empty, 1 positive."""
    problem = sentiment_problem()
    if problem:
        raise RewardError(problem)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return Sentiment(SentimentIntensityAnalyzer())


def sentiment_problem() -> str | None:
    """What is missing, in one sentence, or None."""
    if importlib.util.find_spec("vaderSentiment") is None:
        return "vaderSentiment is not installed: pip install 'diffusion-align[text-rewards]'"
    return None
