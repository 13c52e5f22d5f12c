"""Language policies: the same estimators and the same loop as for images."""

from typing import TYPE_CHECKING

from diffusion_align.lazy import offered

if TYPE_CHECKING:
    from diffusion_align.llm.dpo import DPOTrainer
    from diffusion_align.llm.grpo import GRPOTrainer
    from diffusion_align.llm.kto import KTOTrainer
    from diffusion_align.llm.ppo import PPOTrainer
    from diffusion_align.llm.reward_model import RewardModelTrainer
    from diffusion_align.llm.settings import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, RewardModelConfig

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
]

_FILES = {"RewardModelTrainer": "reward_model"} | {name: "settings" for name in __all__ if name.endswith("Config")}
__getattr__, __dir__ = offered(
    __name__,  # the other trainers' files are called as their methods are
    {name: f"diffusion_align.llm.{_FILES.get(name, name.removesuffix('Trainer').lower())}" for name in __all__},
)
