"""What a reward, sampler, model family, method or callback of your own is made of; docs/extending.md shows each."""

# ruff: noqa: F401
from diffusion_align.data.prompts import PromptsConfig, items_of_epoch
from diffusion_align.diffusion.rollout import Trajectory, replay
from diffusion_align.diffusion.samplers import ddim
from diffusion_align.diffusion.settings import DenoisingConfig, GroupedConfig
from diffusion_align.diffusion.step import Step
from diffusion_align.diffusion.trainer import Collected as CollectedImages
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.llm.collection import Collected as CollectedTexts
from diffusion_align.llm.dpo import DPOTrainer
from diffusion_align.llm.policy import Sequences
from diffusion_align.llm.settings import DPOConfig, OnlineConfig
from diffusion_align.llm.trainer import TextTrainer
from diffusion_align.models.families import ATTENTION, Conditioning, ModelFamily
from diffusion_align.rewards import RewardSetting, RewardSettings
from diffusion_align.training.callbacks import Callback
from diffusion_align.training.context import EpochCost, Metric, RunContext
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.trainer import Trainer
