"""How well an image fits its prompt, by CLIP (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from diffusion_align.rewards.image.clip import OPEN_CLIP, Clip, ClipEncoder, default_clip, load_clip
from diffusion_align.rewards.networks import NetworkSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ClipScore:
    """``scale`` times the cosine similarity as a reward. `ClipSettings` and those of other CLIPs build it."""

    differentiable = True

    def __init__(self, encoder: ClipEncoder, *, name: str = "clip_score", scale: float = 1.0, batch_size: int = 64):
        self.encoder, self.name, self.scale, self.batch_size = encoder, name, scale, batch_size
        self.scorer = encoder.label

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        seen = self.encoder.embed_images(images, batch_size=self.batch_size)
        texts = self.encoder.embed_texts(prompts, batch_size=self.batch_size)
        return self.scale * (seen * texts).sum(dim=-1)

    def to(self, device: str | torch.device) -> ClipScore:
        self.encoder.to(device)
        return self


class ClipSettings(NetworkSettings):
    """How well the image fits its prompt: cosine similarity of their CLIP embeddings.

    The cosine itself: not times 100, not clamped at 0 (torchmetrics' CLIPScore is ``max(100 * cosine, 0)``).
    """

    name: ClassVar[str] = "clip_score"
    about: ClassVar[dict[str, Any]] = {
        "needs": "prompts",
        "model": "CLIP openai/clip-vit-large-patch14, emoji-clip, any CLIPModel or open_clip model",
        "range": "-1 to 1, in practice 0.1 to 0.4 (ViT-L/14), 0.2 to 0.8 (emoji-clip)",
        "cost": "1.7 GB to download, 0.16 TFLOPs per image (ViT-L/14); nothing to download (emoji-clip)",
        "extra": "open-clip, for 'open_clip:...' only",
        "licence": "MIT (CLIP ViT-L/14), Apache-2.0 (emoji-clip); open_clip models: see each",
        "differentiable": True,
    }

    clip: Clip | None = Field(
        None,
        description=f"a folder, a Hub id or {OPEN_CLIP}ARCHITECTURE/WEIGHTS; by default the one that suits the model",
    )

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> ClipScore:
        encoder = load_clip(self.clip or default_clip(model), device=device, dtype=self.dtype)
        return ClipScore(encoder, batch_size=self.batch_size)
