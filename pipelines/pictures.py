"""Pictures of people and of models: as rewards take them, as notebooks and folders show them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.errors import UserError, first_line
from diffusion_align.images import UnreadableImage, to_rgb
from diffusion_align.report import image_grid, save_png
from diffusion_align.writing import make_folder

Picture = Image.Image | Tensor | np.ndarray


@dataclass(frozen=True)
class DrawnImages:
    """What a call returns, as diffusers' pipelines do; notebooks show it as a grid.

    Attributes:
        images: the pictures.
        prompts: of each of them.
    """

    images: list[Image.Image]
    prompts: list[str] = field(default_factory=list)

    def grid(self, columns: int | None = None) -> Image.Image:
        """One picture of them all, the prompts beneath.

        Args:
            columns: pictures a row; nearly a square if not given.

        Raises:
            UserError: there are none, or ``columns`` is below 1.
        """
        try:
            return image_grid(self.images, captions=self.prompts or None, columns=columns)
        except ValueError as error:
            raise UserError(str(error)) from None

    def save(self, folder: str | Path) -> Path:
        """Write ``0000.png`` and so on, and ``grid.png`` of them all; returns the folder.

        Args:
            folder: made if it is not there; pictures of these names in it are replaced.

        Raises:
            UserError: there are no pictures, or they cannot be written.
        """
        target, grid = Path(os.path.expanduser(folder)), self.grid()
        make_folder(target, parents=True)
        for i, image in enumerate(self.images):
            save_png(image, target / f"{i:04d}.png")
        save_png(grid, target / "grid.png")
        return target

    def _repr_png_(self) -> bytes | None:
        return png_bytes(self.grid()) if self.images else None


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def score_images(
    reward: Any,
    images: Sequence[Picture] | Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> Tensor:
    """Scores (B,) of pictures, which may differ in size.

    Args:
        reward: from ``build_reward``.
        images: B pictures: PIL images, float tensors (3, H, W) in [0, 1], or uint8 arrays (H, W, 3) or (H, W).
        prompts: B texts.
        metadata: B mappings that the reward receives; empty ones if not given.

    Raises:
        UserError: the counts differ, or something is no such picture.
        RewardError: the reward cannot score them.
    """
    from diffusion_align.rewards import call_reward

    if isinstance(images, Image.Image) or isinstance(prompts, str):
        raise UserError("a single picture or prompt is given: give lists of one length")
    notes = [{} for _ in images] if metadata is None else metadata
    if not len(images) == len(prompts) == len(notes):
        also = "" if metadata is None else f" and {len(notes)} metadata"
        raise UserError(f"{len(images)} images, {len(prompts)} prompts{also}: give lists of one length")
    pictures = [as_picture(image, i) for i, image in enumerate(images)]
    scores = [call_reward(reward, x[None], [text], [dict(n)]) for x, text, n in zip(pictures, prompts, notes)]
    return torch.cat(scores) if scores else torch.empty(0)


def as_picture(image: Picture, index: int = 0) -> Tensor:
    """Float (3, H, W) in [0, 1] of a picture; a PIL image as ``diffusion_align.images`` has it from a file.

    Args:
        image: as for ``score_images``.
        index: of the picture, for errors.

    Raises:
        UserError: it is none, or its values cannot be told.
    """
    subject = f"image {index}"
    if isinstance(image, Image.Image):
        try:
            return as_batch([to_rgb(image)])[0]
        except UnreadableImage as problem:
            raise UserError(f"{subject} {problem}") from None
        except (OSError, SyntaxError, ValueError) as error:  # it was opened, and is decoded only now
            raise UserError(f"{subject} cannot be read ({first_line(error)})") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
            raise UserError(
                f"{subject} is an array of {image.dtype} {image.shape}: give uint8 (H, W, 3) or float tensors (3, H, W)"
            )
        plain = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        return as_picture(Image.fromarray(np.ascontiguousarray(plain)), index)
    if not isinstance(image, Tensor):
        raise UserError(f"{subject} is a {type(image).__name__}: give PIL images, float tensors or uint8 arrays")
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise UserError(
            f"{subject} is a tensor of {image.dtype} {tuple(image.shape)}: give float (3, H, W) with values in [0, 1]"
        )
    if not bool(((image >= 0) & (image <= 1)).all()):
        low, high = image.min().item(), image.max().item()
        raise UserError(f"{subject} has values from {low:.4g} to {high:.4g}: scale them to [0, 1]")
    return image.detach().float().cpu()


def as_batch(images: Sequence[Image.Image]) -> Tensor:
    """Float (B, 3, H, W) in [0, 1] of PIL pictures of one size, as rewards take them."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255
