"""Settings that methods for pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.data.prompts import PromptsConfig, check_image_prompts
from diffusion_align.data.sources import in_python
from diffusion_align.diffusion.policy import LoRAConfig
from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.errors import ConfigError
from diffusion_align.rewards.setting import RewardSetting
from diffusion_align.training.config import OrInfinite, Section, TrainingConfig


class EvaluationConfig(Section):
    """Pictures of fixed prompts, drawn from fixed noise every few epochs and judged by what is not trained on."""

    reward: RewardSetting = Field(None, description="the gold reward, held out; null measures diversity alone")
    prompts: PromptsConfig | None = Field(None, description="as for training; the prompts of the training if null")
    pictures: int = Field(32, ge=2, le=MOST, description="how many; the prompts take turns")
    every: int = Field(1, ge=1, le=MOST, description="epochs")
    diversity: str = Field(
        "clip", description="distance between two pictures: pixels, the CLIP that suits the model (clip) or another one"
    )


class StopConfig(Section):
    """When a run ends before its last epoch: as soon as one of these holds."""

    kl_above: OrInfinite | None = Field(
        None, gt=0, description="nats of a whole path, kl_path less two standard errors"
    )
    gold_falling: int | None = Field(
        None, ge=1, le=MOST, description="evaluations in a row in which gold is below its best"
    )
    diversity_below: float | None = Field(None, gt=0, le=LARGEST, description="in the unit of evaluation.diversity")


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

    evaluation: EvaluationConfig | None = Field(None, description="a held-out reward and the diversity of pictures")
    stop_when: StopConfig = Field(default_factory=StopConfig, description="rules that end the run early")

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
        needed = [name for name in ("gold_falling", "diversity_below") if getattr(self.stop_when, name) is not None]
        if needed and self.evaluation is None:
            yield f"stop_when.{needed[0]} looks at evaluations: set evaluation, or leave it out"
        elif self.stop_when.gold_falling is not None and self.evaluation and self.evaluation.reward is None:
            yield "stop_when.gold_falling looks at a gold reward: set evaluation.reward, or leave it out"
