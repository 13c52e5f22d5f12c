"""Random looks of a drawing: moved, tinted, blurred and noisy. Batched; the randomness comes from a generator."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def move(
    rgba: Tensor, generator: torch.Generator, *, degrees: float = 12, zoom: float = 0.12, shift: float = 0.08
) -> Tensor:
    """(B, 64, 64, 4) uint8 drawings turned, scaled and shifted at random, half of them mirrored."""
    B = len(rgba)
    u = torch.rand((B, 5), generator=generator) * 2 - 1
    angle, scale = u[:, 0] * math.radians(degrees), 1 + u[:, 1] * zoom
    mirror = torch.where(u[:, 2] < 0, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos * mirror, -sin, u[:, 3] * shift, sin * mirror, cos, u[:, 4] * shift], 1).view(B, 2, 3)
    grid = F.affine_grid(theta, [B, 4, *rgba.shape[1:3]], align_corners=False)
    moved = F.grid_sample(rgba.movedim(-1, 1).float(), grid, align_corners=False)
    return moved.movedim(1, -1).round().clamp(0, 255).to(torch.uint8)


def degrade(
    images: Tensor, generator: torch.Generator, *, tint: float = 0.1, blur: float = 1.2, noise: float = 0.06
) -> Tensor:
    """(B, 3, H, W) images in [0, 1] with random brightness, contrast, saturation, then blur, then noise."""
    B = len(images)
    u = torch.rand((B, 5, 1, 1, 1), generator=generator)
    factor = 1 + tint * (2 * u - 1)
    images = images * factor[:, 0]
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor[:, 1] + mean
    gray = images.mean(1, keepdim=True)
    images = (images - gray) * factor[:, 2] + gray
    # Two blurs of fixed width, mixed by a random weight: cheaper than a kernel for every image.
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * blur**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    soft = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    soft = F.conv2d(soft, kernel.transpose(2, 3), groups=3)
    weight = (2 * u[:, 3] - 1).clamp(min=0)
    images = images + weight * (soft - images)
    strength = noise * (2 * u[:, 4] - 1).clamp(min=0)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
