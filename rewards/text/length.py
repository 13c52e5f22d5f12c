"""Length of the completion as a reward."""

from typing import Any

from diffusion_align.bounds import LARGEST
from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.text.base import Text, text_of

ABOUT = {
    "length": {
        "range": "0 and above without a target, 0 and below with one",
        "extra": None,
        "licence": "no model",
    },
}
UNITS = ("words", "chars")


class Length:
    """The length as a reward. Build it with `length`."""

    name = "length"

    def __init__(self, target: float | None, unit: str):
        self.target, self.unit = target, unit

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        texts = [text_of(completion) for completion in completions]
        lengths = [len(text.split()) if self.unit == "words" else len(text) for text in texts]
        if self.target is None:
            return [float(n) for n in lengths]
        return [-abs(n - self.target) / self.target for n in lengths]


def length(*, target: float | None = None, unit: str = "words") -> Length:
    """The number of words or characters, or minus its relative distance to a target.

    With n the length: n itself without a target, so longer is better (``scale: -1`` for shorter); with one
    ``-|n - target| / target``, which is 0 at the target and -1 for an empty completion.

    Args:
        target: the wanted length, above 0.
        unit: "words", what stands between white space, or "chars", Unicode code points, white space among them.
    """
    problem = length_problem(target=target, unit=unit)
    if problem:
        raise RewardError(problem)
    return Length(target, unit)


def length_problem(*, target: Any = None, unit: Any = "words") -> str | None:
    """What is wrong with these options, in one sentence, or None."""
    number = isinstance(target, int | float) and not isinstance(target, bool) and 0 < target <= LARGEST
    if target is not None and not number:
        return f"target={target!r} must be a number of {unit} above 0, or left out"
    if unit not in UNITS:
        return f"unit={unit!r} is unknown: choose one of {', '.join(UNITS)}"
    return None
