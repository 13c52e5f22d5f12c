"""A reward with settings: how much of a colour an image shows."""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from diffusion_align.extending import RewardSettings


class Colour(RewardSettings):
    """One colour's excess over the other two, averaged over the image: -1 to 1."""

    name: ClassVar[str] = "colour"
    about: ClassVar[dict[str, Any]] = {"range": "-1 to 1", "licence": "no model"}

    colour: Literal["red", "green", "blue"] = Field("red", description="the colour that scores")
    centre: float = Field(1.0, gt=0, le=1, description="share of height and width that is scored, from the middle")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1]."""
        height, width = images.shape[2:]
        top, left = (round(side * (1 - self.centre) / 2) for side in (height, width))
        channels = images[:, :, top : height - top, left : width - left].mean((2, 3))
        wanted = ("red", "green", "blue").index(self.colour)
        return 1.5 * channels[:, wanted] - 0.5 * channels.sum(1)
