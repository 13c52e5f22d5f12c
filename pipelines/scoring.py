"""Score images that are at hand, whatever they are held in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.arguments import check_same_length
from diffusion_align.errors import UserError, first_line
from diffusion_align.images import UnreadableImage, to_rgb
from diffusion_align.inputs import default_device
from diffusion_align.rewards import build_reward, call_reward
from diffusion_align.rewards.image.clip import model_for_images

ImageLike = Image.Image | Tensor | np.ndarray


def score_images(
    reward: Any,
    images: Sequence[ImageLike] | Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    model: str | None = None,
) -> Tensor:
    """Scores (B,) of images, which may differ in size.

    Args:
        reward: from ``build_reward``, or the name, mapping or list that it takes.
        images: B of them: PIL images, float tensors (3, H, W) in [0, 1], or uint8 arrays (H, W, 3) or (H, W).
        prompts: B texts.
        metadata: B mappings that the reward receives; empty ones if not given.
        model: the model that sampled the images, for a reward that is built here (see ``build_reward``); if not given,
            ``emoji-sd`` for images of 64 x 64 pixels, else none: photographs are scored by the published networks.

    Raises:
        UserError: the counts differ, or something is no such image.
        RewardError: the reward cannot be built, or cannot score them.
    """
    notes = [{} for _ in prompts] if metadata is None else metadata
    check_same_length(("images", images), ("prompts", prompts), *(() if metadata is None else [("metadata", notes)]))
    tensors = [as_image_tensor(image, i) for i, image in enumerate(images)]
    if not callable(reward):
        model = model_for_images((x.shape[-1], x.shape[-2]) for x in tensors) if model is None else model
        reward = build_reward(reward, model=model, device=default_device())
    scores = [call_reward(reward, x[None], [text], [dict(n)]) for x, text, n in zip(tensors, prompts, notes)]
    return torch.cat(scores) if scores else torch.empty(0)


def as_image_tensor(image: ImageLike, index: int = 0) -> Tensor:
    """Float (3, H, W) in [0, 1] of an image; a PIL image as ``diffusion_align.images`` has it from a file.

    Args:
        image: as for ``score_images``.
        index: of the image, for errors.

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
        return as_image_tensor(Image.fromarray(np.ascontiguousarray(plain)), index)
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
    """Float (B, 3, H, W) in [0, 1] of PIL images of one size, as rewards take them."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255
