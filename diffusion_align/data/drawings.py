"""Preference pairs of drawings: one concept, one background, the full-colour 3-D drawing chosen over the flat one.

``preferences.safetensors`` stores each drawing once, as a lossless WebP with transparency, so that a pair can be put
on any background; ``preferences.tsv`` says which rows make a pair and which split their concept is in. Sources and
licences: Fluent Emoji, MIT, see ``NOTICE``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from PIL import Image
from safetensors import safe_open

from diffusion_align.assets import asset_path

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 16, 30),
    "gray": (144, 154, 167),
    "red": (226, 20, 51),
    "orange": (242, 140, 17),
    "yellow": (243, 234, 70),
    "green": (44, 173, 67),
    "cyan": (80, 214, 227),
    "blue": (59, 118, 226),
    "purple": (142, 77, 205),
    "pink": (246, 170, 199),
    "brown": (124, 83, 45),
}
"""The background colours emoji-sd was trained on, by the word its captions use."""


@dataclass(frozen=True)
class PreferencePair:
    """One comparison; the drawings, both of the same concept, are decoded when they are looked at."""

    prompt: str
    label: str
    background: str
    split: str
    row: int

    @property
    def chosen(self) -> Tensor:
        """(3, 64, 64) float32 in [0, 1]; so is ``rejected``."""
        return composite(_drawing("chosen", self.row), BACKGROUNDS[self.background])

    @property
    def rejected(self) -> Tensor:
        return composite(_drawing("rejected", self.row), BACKGROUNDS[self.background])


def composite(rgba: Tensor, colour: Sequence[int] | Tensor) -> Tensor:
    """(..., 3, H, W) float32 in [0, 1]: premultiplied RGBA over a plain colour.

    Args:
        rgba: (..., H, W, 4) uint8, colours already multiplied by alpha.
        colour: (..., 3) in 0..255, one per image or one for all.
    """
    import torch

    values = rgba.float() / 255
    background = torch.as_tensor(colour, dtype=torch.float32, device=rgba.device) / 255
    mixed = values[..., :3] + (1 - values[..., 3:]) * background[..., None, None, :]
    return mixed.clamp(0, 1).movedim(-1, -3)


def load_drawing_pairs(split: Literal["train", "heldout", "all"] = "all") -> list[tuple[str, str, Tensor, Tensor]]:
    """(label, split, chosen, rejected) of every concept of a split; drawings (64, 64, 4) uint8 premultiplied RGBA.

    The split is by concept: no concept of "heldout" occurs in "train".

    Raises:
        ValueError: ``split`` is none of the three names.
    """
    rows = _rows(split)
    return [(label, part, _drawing("chosen", row), _drawing("rejected", row)) for label, part, row in rows]


def _rows(split: str) -> list[tuple[str, str, int]]:
    """(label, split, row of its drawings) of every concept of a split."""
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split is {split!r}: choose train, heldout or all")
    with asset_path("preferences-table").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [(one["label"], one["split"], int(one["row"])) for one in rows if split in ("all", one["split"])]


def _drawing(side: str, row: int) -> Tensor:
    data, ends = _packed()[side]
    return decode_drawing(data[ends[row - 1] if row else 0 : ends[row]].tobytes())


@cache
def _packed() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Side -> its drawings, one WebP file after the other, and where each ends."""
    with safe_open(asset_path("preferences"), "np") as file:
        sides = ("chosen", "rejected")
        return {side: (file.get_tensor(side), file.get_tensor(f"{side}_ends").tolist()) for side in sides}


def load_preferences(
    split: Literal["train", "heldout", "all"] = "train", *, backgrounds: Sequence[str] = ("white",)
) -> list[PreferencePair]:
    """The pairs of a split, each concept once on every requested background.

    The prompt is the caption emoji-sd knows: "a fox", or "a fox on a blue background" where the background is not
    white. It does not name the style.

    Args:
        split: "train", "heldout" (concepts that no training pair shows) or "all".
        backgrounds: names from ``BACKGROUNDS``.

    Raises:
        ValueError: an unknown split or background; the sentence lists those there are.
    """
    unknown = [name for name in backgrounds if name not in BACKGROUNDS]
    if unknown:
        raise ValueError(f"there is no background {unknown[0]!r}: choose from {', '.join(BACKGROUNDS)}")
    pairs = []
    for label, part, row in _rows(split):
        for name in backgrounds:
            article = "an" if name == "orange" else "a"
            prompt = f"a {label}" if name == "white" else f"a {label} on {article} {name} background"
            pairs.append(PreferencePair(prompt, label, name, part, row))
    return pairs


def encode_drawing(rgba: Tensor) -> bytes:
    """Lossless WebP of a (64, 64, 4) uint8 premultiplied RGBA drawing."""
    buffer = io.BytesIO()
    Image.fromarray(rgba.numpy(), "RGBA").save(buffer, "WEBP", lossless=True, quality=80, method=6, exact=True)
    return buffer.getvalue()


def decode_drawing(data: bytes) -> Tensor:
    """Inverse of ``encode_drawing``."""
    import torch

    with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        rgba = image.convert("RGBA")
    return torch.frombuffer(bytearray(rgba.tobytes()), dtype=torch.uint8).reshape(rgba.height, rgba.width, 4)
