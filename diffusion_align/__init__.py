"""Align diffusion models (and text policies) with rewards and preferences."""

from typing import TYPE_CHECKING

from diffusion_align.lazy import offered

if TYPE_CHECKING:
    from diffusion_align import estimators, llm, pipelines, rewards
    from diffusion_align.diffusion.ddpo import DDPOTrainer
    from diffusion_align.diffusion.dpo import DiffusionDPOTrainer
    from diffusion_align.diffusion.settings import DDPOConfig, DiffusionDPOConfig
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
    "llm",
    "pipelines",
    "rewards",
]

__getattr__, __dir__ = offered(
    __name__,
    {
        "DDPOConfig": "diffusion_align.diffusion.settings",
        "DDPOTrainer": "diffusion_align.diffusion.ddpo",
        "DiffusionDPOConfig": "diffusion_align.diffusion.settings",
        "DiffusionDPOTrainer": "diffusion_align.diffusion.dpo",
        "ImageAlignmentPipeline": "diffusion_align.pipelines.image",
        "TextAlignmentPipeline": "diffusion_align.pipelines.text",
        "estimators": "diffusion_align.estimators",
        "llm": "diffusion_align.llm",
        "pipelines": "diffusion_align.pipelines",
        "rewards": "diffusion_align.rewards",
    },
)
