"""JPEG file size as a reward: the two compressibility tasks of DDPO (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from pydantic import Field

from diffusion_align.rewards.base import to_uint8
from diffusion_align.rewards.settings import RewardSettings

if TYPE_CHECKING:
    from torch import Tensor


def jpeg_sizes(images: Tensor, *, quality: int = 95) -> Tensor:
    """JPEG file size of each image in kB (1 kB = 1000 bytes), float32 (B,), as PIL writes it (4:2:0 chroma).

    Args:
        images: float (B, 3, H, W) in [0, 1]; rounded to 8 bits as diffusers does. No gradient flows.
        quality: PIL's scale, 1 to 100.
    """
    import torch

    sizes = []
    for image in to_uint8(images).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegCompressibility(RewardSettings):
    """How small the image is as a JPEG file: minus the file size in kB."""

    name: ClassVar[str] = "jpeg_compressibility"
    sign: ClassVar[float] = -1.0
    about: ClassVar[dict[str, Any]] = {
        "model": "no model",
        "range": "below 0, in kB",
        "cost": "one JPEG encoding per image",
        "licence": "no model",
    }

    quality: int = Field(95, ge=1, le=100, description="PIL's scale")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.sign * jpeg_sizes(images, quality=self.quality)


class JpegIncompressibility(JpegCompressibility):
    """How large the image is as a JPEG file: the file size in kB."""

    name = "jpeg_incompressibility"
    sign = 1.0
    about: ClassVar[dict[str, Any]] = JpegCompressibility.about | {"range": "above 0, in kB"}
