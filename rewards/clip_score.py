"""How well a picture fits its prompt, by CLIP (Radford et al. 2021, arXiv:2103.00020)."""

from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.clip import ClipEncoder, clip_problem, default_clip, load_clip

ABOUT = {
    "clip_score": {
        "model": "CLIP openai/clip-vit-large-patch14, emoji-clip, any CLIPModel or open_clip model",
        "range": "-1 to 1, in practice 0.1 to 0.4 (ViT-L/14), 0.2 to 0.8 (emoji-clip)",
        "cost": "1.7 GB to download, 0.16 TFLOPs a picture (ViT-L/14); nothing to download (emoji-clip)",
        "extra": "open-clip, for 'open_clip:...' only",
        "licence": "MIT (CLIP ViT-L/14), Apache-2.0 (emoji-clip); open_clip models: see each",
        "differentiable": True,
    },
}


class ClipScore:
    """The cosine similarity as a reward. Build it with `clip_score`."""

    name = "clip_score"
    differentiable = True

    def __init__(self, encoder: ClipEncoder, *, batch_size: int = 64):
        self.encoder, self.batch_size = encoder, batch_size

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        pictures = self.encoder.embed_images(images, batch_size=self.batch_size)
        texts = self.encoder.embed_texts(prompts, batch_size=self.batch_size)
        return (pictures * texts).sum(dim=-1)

    def to(self, device: str | torch.device) -> "ClipScore":
        self.encoder.to(device)
        return self


def clip_score(
    *,
    clip: str | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    model: str | None = None,
    device: str | torch.device = "cpu",
) -> ClipScore:
    """Cosine similarity of the picture's and the prompt's CLIP embeddings.

    The cosine itself: not times 100, not clamped at 0 (torchmetrics' CLIPScore is ``max(100 * cosine, 0)``).

    Args:
        clip: which CLIP, see `diffusion_align.rewards.clip`; default: the one that suits ``model``.
        dtype: of the CLIP; "float16" and "bfloat16" only on a GPU.
        batch_size: pictures a forward pass.
        model: the diffusion model being trained.
    """
    problem = clip_score_problem(clip=clip, dtype=dtype, batch_size=batch_size)
    if problem:
        raise RewardError(problem)
    encoder = load_clip(clip or default_clip(model), device=device, dtype=dtype)
    return ClipScore(encoder, batch_size=batch_size)


def clip_score_problem(
    *, clip: Any = None, dtype: Any = "float32", batch_size: Any = 64, device: Any = None
) -> str | None:
    """What is wrong with these options, in one sentence, or None. Loads nothing."""
    return clip_problem(default_clip(None) if clip is None else clip, dtype=dtype, batch_size=batch_size)
