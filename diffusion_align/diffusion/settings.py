"""Settings that methods for pictures share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffusion_align.diffusion.policy import LoRAConfig
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.training.config import TrainingConfig


class DenoisingConfig(TrainingConfig):
    """What every method that trains a diffusion model has."""

    show_prompts: list[str] | None = Field(None, description="prompts of the grids; the first ones if not given")
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    lora: LoRAConfig | None = Field(default_factory=LoRAConfig, description="null trains the whole UNet")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of frozen weights, which halves their memory; what is trained is float32"
    )
    weights_variant: str | None = Field(None, description="weight files of the model to choose, e.g. fp16")
    base_config: str | None = Field(
        None, description="for a model in one .safetensors file: folder or hub id of a diffusers pipeline built like it"
    )

    def cross_checks(self) -> list[str]:
        problems = super().cross_checks()
        if self.show_prompts is not None and not self.show_prompts:
            problems.append("show_prompts is empty: leave it out, or set grid_every=0 for no grids")
        if self.dtype != "float32" and self.lora is None:
            problems.append(f"dtype={self.dtype} is of frozen weights and lora=null trains them all: leave one out")
        return problems
