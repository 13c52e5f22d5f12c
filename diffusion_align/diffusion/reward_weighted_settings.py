"""Settings of reward-weighted regression; they import no torch, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from diffusion_align.bounds import LARGEST
from diffusion_align.diffusion.sampled_steps_settings import SampledStepsConfig


class RWRConfig(SampledStepsConfig):
    """Fine-tune a text-to-image pipeline on its own images, better ones counting more (reward-weighted regression).

    Settings of ``RWRTrainer``; see ``SampledStepsConfig``, ``DenoisingConfig`` and ``TrainingConfig`` for the others.
    """

    method: str = Field("rwr", description="the training method")

    temperature: float = Field(
        1.0, gt=0, le=LARGEST, description="of the softmax over rewards, in stds of the reward; lower is greedier"
    )
    softmax_over: Literal["epoch", "group"] = Field(
        "epoch", description="images that are compared: all of an epoch, or those of one prompt"
    )

    def cross_checks(self) -> Iterator[str]:
        if self.softmax_over == "group" and self.group_size < 2:
            yield "softmax_over=group compares images of one prompt: set group_size to 2 or more"
