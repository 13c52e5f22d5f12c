"""Align diffusion models (and text policies) with rewards and preferences."""

from typing import TYPE_CHECKING

from diffusion_align.lazy import offered

if TYPE_CHECKING:
    from diffusion_align import estimators, llm, pipelines, rewards
    from diffusion_align.diffusion.ddpo import DDPOTrainer
    from diffusion_align.diffusion.ddpo_settings import DDPOConfig
    from diffusion_align.diffusion.dpo import DiffusionDPOTrainer
    from diffusion_align.diffusion.dpo_settings import DiffusionDPOConfig
    from diffusion_align.diffusion.forward import ForwardTrainer
    from diffusion_align.diffusion.forward_settings import ForwardConfig
    from diffusion_align.diffusion.reward_gradient import RewardGradientTrainer
    from diffusion_align.diffusion.reward_gradient_settings import RewardGradientConfig
    from diffusion_align.diffusion.reward_weighted import RWRTrainer
    from diffusion_align.diffusion.reward_weighted_settings import RWRConfig
    from diffusion_align.llm import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        PPOConfig,
        PPOTrainer,
        RewardModelConfig,
        RewardModelTrainer,
    )
    from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
    from diffusion_align.pipelines.run import build_trainer

__version__ = "0.1.0"
__all__ = [
    "DDPOConfig",
    "DDPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "ForwardConfig",
    "ForwardTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "ImageAlignmentPipeline",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RWRConfig",
    "RWRTrainer",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "TextAlignmentPipeline",
    "build_trainer",
    "estimators",
    "llm",
    "pipelines",
    "rewards",
]

__getattr__, __dir__ = offered(
    __name__,
    {
        "DDPOConfig": "diffusion_align.diffusion.ddpo_settings",
        "DDPOTrainer": "diffusion_align.diffusion.ddpo",
        "DiffusionDPOConfig": "diffusion_align.diffusion.dpo_settings",
        "DiffusionDPOTrainer": "diffusion_align.diffusion.dpo",
        "ForwardConfig": "diffusion_align.diffusion.forward_settings",
        "ForwardTrainer": "diffusion_align.diffusion.forward",
        "RWRConfig": "diffusion_align.diffusion.reward_weighted_settings",
        "RWRTrainer": "diffusion_align.diffusion.reward_weighted",
        "DPOConfig": "diffusion_align.llm",
        "DPOTrainer": "diffusion_align.llm",
        "GRPOConfig": "diffusion_align.llm",
        "GRPOTrainer": "diffusion_align.llm",
        "KTOConfig": "diffusion_align.llm",
        "KTOTrainer": "diffusion_align.llm",
        "PPOConfig": "diffusion_align.llm",
        "PPOTrainer": "diffusion_align.llm",
        "RewardGradientConfig": "diffusion_align.diffusion.reward_gradient_settings",
        "RewardGradientTrainer": "diffusion_align.diffusion.reward_gradient",
        "RewardModelConfig": "diffusion_align.llm",
        "RewardModelTrainer": "diffusion_align.llm",
        "ImageAlignmentPipeline": "diffusion_align.pipelines.image",
        "TextAlignmentPipeline": "diffusion_align.pipelines.text",
        "build_trainer": "diffusion_align.pipelines.run",
        "estimators": "diffusion_align.estimators",
        "llm": "diffusion_align.llm",
        "pipelines": "diffusion_align.pipelines",
        "rewards": "diffusion_align.rewards",
    },
)
