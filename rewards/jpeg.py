"""JPEG file size as a reward: the two compressibility tasks of DDPO (Black et al. 2023, arXiv:2305.13301)."""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.rewards.base import RewardError, to_uint8

ABOUT = {
    "jpeg_compressibility": {
        "model": "no model",
        "range": "below 0, in kB",
        "cost": "one JPEG encoding a picture",
        "extra": None,
        "licence": "no model",
        "differentiable": False,
    },
    "jpeg_incompressibility": {
        "model": "no model",
        "range": "above 0, in kB",
        "cost": "one JPEG encoding a picture",
        "extra": None,
        "licence": "no model",
        "differentiable": False,
    },
}


def jpeg_sizes(images: Tensor, *, quality: int = 95) -> Tensor:
    """JPEG file size of each picture in kB (1 kB = 1000 bytes), float32 (B,), as PIL writes it (4:2:0 chroma).

    Args:
        images: float (B, 3, H, W) in [0, 1]; rounded to 8 bits as diffusers does. No gradient flows.
        quality: PIL's scale, 1 to 100.
    """
    sizes = []
    for picture in to_uint8(images).numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegSize:
    """``sign`` times the JPEG size in kB."""

    differentiable = False

    def __init__(self, name: str, sign: float, quality: int):
        problem = jpeg_problem(quality=quality)
        if problem:
            raise RewardError(problem)
        self.name, self.sign, self.quality = name, sign, quality

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.sign * jpeg_sizes(images, quality=self.quality)


def jpeg_compressibility(*, quality: int = 95) -> JpegSize:
    """Minus the JPEG file size in kB: small files score high."""
    return JpegSize("jpeg_compressibility", -1.0, quality)


def jpeg_incompressibility(*, quality: int = 95) -> JpegSize:
    """The JPEG file size in kB: large files score high."""
    return JpegSize("jpeg_incompressibility", 1.0, quality)


def jpeg_problem(*, quality: Any = 95) -> str | None:
    """What is wrong with these options, in one sentence, or None."""
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        return f"quality={quality!r} is not a JPEG quality: give a whole number from 1 to 100"
    return None


jpeg_compressibility_problem = jpeg_incompressibility_problem = jpeg_problem
