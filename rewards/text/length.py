"""Length of the completion as a reward."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from diffusion_align.bounds import LARGEST
from diffusion_align.rewards.settings import RewardSettings
from diffusion_align.rewards.text.base import Text, text_of


class Length(RewardSettings):
    """How long the completion is: words or characters, or minus their relative distance to a target.

    With n the length: n itself without a target, so longer is better (``scale: -1`` for shorter); with one
    ``-|n - target| / target``, which is 0 at the target and -1 for an empty completion.
    """

    name: ClassVar[str] = "length"
    about: ClassVar[dict[str, Any]] = {
        "range": "0 and above without a target, 0 and below with one",
        "licence": "no model",
    }

    target: float | None = Field(None, gt=0, le=LARGEST, description="the wanted length")
    unit: Literal["words", "chars"] = Field(
        "words", description="words between white space, or Unicode code points, white space included"
    )

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float]:
        texts = [text_of(completion) for completion in completions]
        lengths = [len(text.split()) if self.unit == "words" else len(text) for text in texts]
        if self.target is None:
            return [float(n) for n in lengths]
        return [-abs(n - self.target) / self.target for n in lengths]
