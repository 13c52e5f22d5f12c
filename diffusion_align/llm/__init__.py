"""Language policies: the same estimators and the same loop as for pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.llm.dpo import DPOConfig, DPOTrainer
    from diffusion_align.llm.grpo import GRPOConfig, GRPOTrainer
    from diffusion_align.llm.kto import KTOConfig, KTOTrainer
    from diffusion_align.llm.ppo import PPOConfig, PPOTrainer
    from diffusion_align.llm.reward_model import RewardModelConfig, RewardModelTrainer

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

_HOME = {"RewardModel": "reward_model"}  # the others are called as their files are


def __getattr__(name: str) -> Any:
    """Import on first use, as the package itself does."""
    import importlib

    if name in __all__:
        method = name.removesuffix("Config").removesuffix("Trainer")
        return getattr(importlib.import_module(f"diffusion_align.llm.{_HOME.get(method, method.lower())}"), name)
    raise AttributeError(f"module 'diffusion_align.llm' has no attribute {name!r}")
