"""Which image people pick for a prompt, by PickScore (Kirstain et al. 2023, arXiv:2305.01569).

PickScore_v1 is CLIP ViT-H/14 trained on choices between two images made for one prompt. Its weights are a
transformers CLIPModel; the tokenizer is that of the CLIP it started from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from diffusion_align.rewards.image.clip import Clip, load_clip
from diffusion_align.rewards.image.clip_score import ClipScore
from diffusion_align.rewards.networks import NetworkSettings

if TYPE_CHECKING:
    import torch

PICK_SCORE = "yuvalkirstain/PickScore_v1"
VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScoreSettings(NetworkSettings):
    """How likely people are to pick the image for its prompt: ``exp(logit_scale) * cosine`` of PickScore_v1.

    The authors' score: of two images for one prompt, the sigmoid of the difference is the share of people who pick
    the first. Some trainers divide it by 26; ``scale: 0.0385`` does that.
    """

    name: ClassVar[str] = "pick_score"
    about: ClassVar[dict[str, Any]] = {
        "needs": "prompts",
        "model": f"{PICK_SCORE} (tokenizer: {VIT_H_14})",
        "range": "-100 to 100, in practice 17 to 24",
        "cost": "3.9 GB to download, 0.4 TFLOPs per image",
        "licence": "MIT",
        "differentiable": True,
    }

    clip: Clip = Field(
        PICK_SCORE, description="a local copy, or another CLIP; without a tokenizer of its own it gets CLIP ViT-H/14's"
    )

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> ClipScore:
        encoder = load_clip(self.clip, device=device, dtype=self.dtype, tokenizer=VIT_H_14)
        return ClipScore(encoder, name=self.name, scale=encoder.scale, batch_size=self.batch_size)
