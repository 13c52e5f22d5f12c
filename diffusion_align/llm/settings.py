"""Settings that text methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from diffusion_align.bounds import MOST
from diffusion_align.data.sources import in_python
from diffusion_align.data.text_rows import TextDataConfig
from diffusion_align.llm.evaluation import TextEvaluationConfig
from diffusion_align.llm.policy import LoRAConfig
from diffusion_align.rewards.settings import RewardSetting, several_rewards_problems
from diffusion_align.training.config import TrainingConfig, Weight
from diffusion_align.training.evaluation import StopConfig


class TextConfig(TrainingConfig):
    """What every method that trains a language model has."""

    lora: LoRAConfig | None = Field(default_factory=LoRAConfig, description="null trains the whole model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of frozen weights, which halves their memory; what is trained is float32"
    )
    reference_model: str | None = Field(
        None, description="name, folder or hub id of another reference with the same tokens; the model as it is if null"
    )
    learning_rate: float = Field(1e-4, gt=0, le=1000, description="of AdamW, after the warm-up")
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="of sampling and of every log-prob alike")
    max_prompt_length: int | None = Field(None, ge=1, le=MOST, description="tokens; longer prompts keep their end")
    max_completion_length: int = Field(256, ge=1, le=MOST, description="tokens; longer completions are cut")
    show_prompts: list[Any] | None = Field(
        None, description="prompts of the samples; the first of the data when not given"
    )
    _listed = field_validator("show_prompts", mode="before")(in_python)

    evaluation: TextEvaluationConfig | None = Field(None, description="a held-out reward on fixed prompts")
    stop_when: StopConfig = Field(default_factory=StopConfig, description="rules that end the run early")

    @property
    def needs_reference(self) -> bool:
        """Whether the policy must keep a reference beside what is trained."""
        return True

    @property
    def logs_kl(self) -> bool:
        """Whether every epoch logs ``kl_path``; else evaluations do."""
        return False

    def cross_checks(self) -> Iterator[str]:
        if self.show_prompts is not None and not self.show_prompts:
            yield "show_prompts is empty: leave it out, or set grid_every=0 for no samples"
        if self.dtype != "float32" and self.lora is None:
            yield f"dtype={self.dtype} is of frozen weights and lora=null trains them all: leave one out"
        if self.stop_when.kl_above is not None and not self.logs_kl and self.evaluation is None:
            yield (
                "stop_when.kl_above looks at a KL that this run measures in evaluations only: set evaluation, or leave "
                "it out"
            )
        yield from self.stop_when.evaluation_problems(self.evaluation)


class OnlineConfig(TextConfig):
    """What methods have that sample completions and ask rewards about them."""

    prompts: TextDataConfig | None = Field(None, description="texts or messages: list, file, shipped list or hub id")
    reward: RewardSetting = Field(
        None, description="name, 'module:function', {name: ..., options}, a function, or a list of these"
    )
    reward_weights: list[Weight] | None = Field(None, description="one for each reward of a list; all 1 if not given")
    num_generations: int = Field(8, ge=1, le=MOST, description="completions a prompt in an epoch")

    @property
    def online(self) -> bool:
        """Whether completions are sampled, not given."""
        return True

    def cross_checks(self) -> Iterator[str]:
        yield from several_rewards_problems(self.reward, self.reward_weights)
        if self.online and self.samples_per_epoch % self.num_generations:
            yield (
                f"samples_per_epoch={self.samples_per_epoch} is not a multiple of "
                f"num_generations={self.num_generations}: change one of them"
            )
