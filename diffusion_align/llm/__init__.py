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

_FILES = {"RewardModel": "reward_model"}  # the others are called as their files are
_METHODS = {name: name.removesuffix("Config").removesuffix("Trainer") for name in __all__}
__getattr__, __dir__ = offered(
    __name__,
    {name: f"diffusion_align.llm.{_FILES.get(method, method.lower())}" for name, method in _METHODS.items()},
)
