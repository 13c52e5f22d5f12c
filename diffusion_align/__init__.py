"""Align diffusion models (and text policies) with rewards and preferences."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align import estimators, pipelines, rewards
    from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer
    from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
    from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline

__version__ = "0.1.0"
__all__ = [
    "DDPOConfig",
    "DDPOTrainer",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "ImageAlignmentPipeline",
    "TextAlignmentPipeline",
    "estimators",
    "pipelines",
    "rewards",
]

_HOME = {
    "DDPOConfig": "diffusion_align.diffusion.ddpo",
    "DDPOTrainer": "diffusion_align.diffusion.ddpo",
    "DiffusionDPOConfig": "diffusion_align.diffusion.dpo",
    "DiffusionDPOTrainer": "diffusion_align.diffusion.dpo",
    "ImageAlignmentPipeline": "diffusion_align.pipelines",
    "TextAlignmentPipeline": "diffusion_align.pipelines",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import diffusion_align`` stays fast, and estimators need no diffusers."""
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"diffusion_align.{name}")
    raise AttributeError(f"module 'diffusion_align' has no attribute {name!r}")
