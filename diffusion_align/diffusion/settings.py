"""Settings that methods for images share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from diffusion_align.data.prompts import check_image_prompts
from diffusion_align.data.sources import in_python
from diffusion_align.diffusion.evaluation import ImageEvaluationConfig, ImageStopConfig
from diffusion_align.diffusion.policy import LoRAConfig
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.errors import ConfigError
from diffusion_align.training.config import TrainingConfig


class DenoisingConfig(TrainingConfig):
    """What every method that trains a diffusion model has."""

    show_prompts: list[str] | None = Field(None, description="prompts of the grids; the first ones if not given")
    _listed = field_validator("show_prompts", mode="before")(in_python)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="how images are sampled")
    lora: LoRAConfig | None = Field(default_factory=LoRAConfig, description="null trains the whole UNet")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of frozen weights, which halves their memory; what is trained is float32"
    )
    weights_variant: str | None = Field(None, description="weight files of the model to choose, e.g. fp16")
    base_config: str | None = Field(
        None, description="for a model in one .safetensors file: folder or hub id of a diffusers pipeline built like it"
    )

    evaluation: ImageEvaluationConfig | None = Field(None, description="a held-out reward and the diversity of images")
    stop_when: ImageStopConfig = Field(default_factory=ImageStopConfig, description="rules that end the run early")

    def steps_problem(self, count: int) -> str | None:
        """One sentence if ``count`` stochastic steps are too few to train on."""
        return None

    def cross_checks(self) -> Iterator[str]:
        if self.show_prompts is not None and not self.show_prompts:
            yield "show_prompts is empty: leave it out, or set grid_every=0 for no grids"
        try:
            check_image_prompts(self.show_prompts or [], name="show_prompts")
        except ConfigError as error:
            yield from error.problems
        if self.dtype != "float32" and self.lora is None:
            yield f"dtype={self.dtype} is of frozen weights and lora=null trains them all: leave one out"
        yield from self.stop_when.evaluation_problems(self.evaluation)
