"""Which picture people pick for a prompt, by PickScore (Kirstain et al. 2023, arXiv:2305.01569).

PickScore_v1 is CLIP ViT-H/14 trained on choices between two pictures made for one prompt. Its weights are a
transformers CLIPModel; the tokenizer is that of the CLIP it started from.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.clip import clip_problem, load_clip
from diffusion_align.rewards.clip_score import ClipScore

PICK_SCORE = "yuvalkirstain/PickScore_v1"
VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
ABOUT = {
    "pick_score": {
        "model": f"{PICK_SCORE} (tokenizer: {VIT_H_14})",
        "range": "-100 to 100, in practice 17 to 24",
        "cost": "3.9 GB to download, 0.4 TFLOPs a picture",
        "extra": None,
        "licence": "MIT",
        "differentiable": True,
    },
}


class PickScore(ClipScore):
    """The scaled cosine as a reward. Build it with `pick_score`."""

    name = "pick_score"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.encoder.scale * super().__call__(images, prompts, metadata)


def pick_score(
    *,
    clip: str | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    model: str | None = None,
    device: str | torch.device = "cpu",
) -> PickScore:
    """How likely people are to pick the picture for its prompt: ``exp(logit_scale) * cosine`` of PickScore_v1.

    The authors' score: of two pictures for one prompt, the sigmoid of the difference is the share of people who pick
    the first. Some trainers divide it by 26; ``scale: 0.0385`` does that.

    Args:
        clip: a local copy of PickScore_v1, or another CLIP (see `diffusion_align.rewards.clip`). Where it has no
            tokenizer of its own, that of CLIP ViT-H/14 is downloaded.
        dtype: of the CLIP; "float16" and "bfloat16" only on a GPU.
        batch_size: pictures a forward pass.
        model: the diffusion model being trained; the score does not depend on it.
    """
    problem = pick_score_problem(clip=clip, dtype=dtype, batch_size=batch_size)
    if problem:
        raise RewardError(problem)
    encoder = load_clip(PICK_SCORE if clip is None else clip, device=device, dtype=dtype, tokenizer=VIT_H_14)
    return PickScore(encoder, batch_size=batch_size)


def pick_score_problem(
    *, clip: Any = None, dtype: Any = "float32", batch_size: Any = 64, device: Any = None
) -> str | None:
    """What is wrong with these options, in one sentence, or None. Loads nothing."""
    return clip_problem(PICK_SCORE if clip is None else clip, dtype=dtype, batch_size=batch_size)
