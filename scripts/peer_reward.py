"""The reward of both sides' language models: cheap, and different for every completion, so that all are trained on."""

from __future__ import annotations

from typing import Any


def digits(completions: list[Any], *_: Any, **__: Any) -> list[float]:
    """The sum of a text's digits."""
    return [float(sum(int(letter) for letter in str(text) if letter.isdigit())) for text in completions]
