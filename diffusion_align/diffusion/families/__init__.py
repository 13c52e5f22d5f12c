"""Families of diffusers pipelines: what sets one apart, in one short file each.

A family has no state. ``StableDiffusion`` is the contract; what differs is overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_align.diffusion.families.sdxl import StableDiffusionXL
from diffusion_align.diffusion.families.stable_diffusion import Conditioning, StableDiffusion
from diffusion_align.errors import UserError

__all__ = ["FAMILIES", "Conditioning", "StableDiffusion", "StableDiffusionXL", "family_of", "family_of_network"]

FAMILIES: dict[str, StableDiffusion] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
}
"""Class of pipeline -> its family."""


def family_of(pipeline: Any) -> StableDiffusion:
    """The family of a diffusers pipeline.

    Raises:
        UserError: its class is not supported.
    """
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise UserError(f"{name} is not supported: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_network(config: Mapping[str, Any]) -> StableDiffusion:
    """The family whose network has a configuration, where no pipeline is at hand."""
    is_xl = config.get("addition_embed_type") == "text_time"
    return FAMILIES["StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"]
