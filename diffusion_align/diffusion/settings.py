"""Settings that the methods for diffusion models share; they import no torch, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from diffusion_align.bounds import LARGEST, LARGEST_SIDE, MOST, MOST_PROMPT_TOKENS
from diffusion_align.data.prompts import PromptsConfig, check_image_prompts
from diffusion_align.data.sources import in_python
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.samplers import check_sampler, default_sampler
from diffusion_align.errors import problems_of
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.models.image_pipelines import scheduler_at_hand
from diffusion_align.models.model_ref import check_image_model, image_model_ref
from diffusion_align.rewards.settings import RewardSetting, check_diversity, reward_checks, weight_checks
from diffusion_align.training.aliases import formerly_beside
from diffusion_align.training.attention import ImageAttention, attention_checks
from diffusion_align.training.config import LoRASettings, PolicyConfig, multiple_checks
from diffusion_align.training.section import OrInfinite, Weight
from diffusion_align.training.settings import (
    EvaluationConfig,
    ExperimentalAdvantages,
    StopConfig,
    no_std,
)

if TYPE_CHECKING:
    from diffusion_align.models.families import ModelFamily
    from diffusion_align.training.evaluation import Evaluation

LORA_LAYERS = ("attention", "feed_forward", "convolutions")
"""Kinds of layers that ``lora.layers`` can name; a model's family says which it has."""


class LoRAConfig(LoRASettings):
    """Low-rank adapters on the UNet or transformer and, with ``text_encoder``, on the text encoders."""

    layers: str = Field(
        "attention",
        description="layers with an adapter: attention, feed_forward, convolutions (of a UNet's residual blocks, as "
        "small models need) or several, as in attention+feed_forward",
    )

    text_encoder: bool = Field(
        False,
        strict=True,
        description="adapters on the attention projections of all text encoders too, which then stay on the GPU; for "
        "Stable Diffusion 1.x, 2 and XL",
    )

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: str) -> str:
        kinds = layers.split("+")
        if not set(kinds) <= set(LORA_LAYERS):
            raise ValueError(f"it must be {', '.join(LORA_LAYERS)}, or several joined by +")
        return "+".join(kind for kind in LORA_LAYERS if kind in kinds)  # any order is the same adapter

    def cross_checks(self) -> Iterator[str]:
        if self.text_encoder and self.dropout:
            yield (
                f"dropout={self.dropout:g} is of each sample, but with text_encoder=true a prompt is encoded once for "
                "all its samples: leave one of them out"
            )


class ImageEvaluationConfig(EvaluationConfig):
    """Images of fixed prompts, sampled from fixed noise every few epochs and scored by a held-out reward."""

    aliases: ClassVar = {"images": "samples", "pictures": "samples"}

    reward: RewardSetting = Field(None, description="the held-out reward; null measures diversity alone")
    prompts: PromptsConfig | None = Field(None, description="like the training prompts, which are used if null")
    samples: int = Field(32, ge=2, le=MOST, description="number of images; they take the prompts in turn")
    diversity: str = Field(
        "clip", description="distance between two images: pixels, the CLIP that suits the model (clip) or another one"
    )

    def name_checks(self) -> Iterator[str]:
        yield from reward_checks(self.reward, "image")
        yield from (f"diversity: {problem}" for problem in problems_of(check_diversity, self.diversity))


class ImageStopConfig(StopConfig):
    """Also when images come to be all alike."""

    diversity_below: float | None = Field(
        None, gt=0, le=LARGEST, description="lowest diversity, in the unit of evaluation.diversity"
    )

    def broken(self, row: Mapping[str, Any], evaluation: Evaluation | None) -> list[str]:
        reasons = super().broken(row, evaluation)
        diversity, least = row.get("diversity"), self.diversity_below
        if least is not None and diversity is not None and diversity < least:
            reasons.append(f"the diversity is {diversity:.4g}, below stop_when.diversity_below={least:g}")
        return reasons


def negative_prompt_checks(
    prompt: str | None, guidance_scale: float | None, setting: str = "guidance_scale"
) -> Iterator[str]:
    """Sentences about a negative prompt that no text encoder accepts, or that has no effect without guidance.

    Args:
        prompt: None for none.
        guidance_scale: None if it is not known.
        setting: name of the guidance scale in the sentence.
    """
    yield from problems_of(check_image_prompts, [] if prompt is None else [prompt], name="negative_prompt")
    if prompt is not None and guidance_scale is not None and guidance_scale <= 1:
        yield (
            f"negative_prompt has no effect with {setting}={guidance_scale:g}, which switches guidance off: set it "
            "above 1, or leave negative_prompt out"
        )


_OF_FAMILY = ("negative_prompt", "attention", "channels_last", "max_sequence_length", "t5")
Side = Annotated[int, Field(ge=8, le=LARGEST_SIDE)]
_SIDE: TypeAdapter[int] = TypeAdapter(Side)


class DenoisingConfig(PolicyConfig):
    """What every method that trains a diffusion model has."""

    model_kind = "image"
    trains_sampled_steps: ClassVar[bool] = False
    """Whether the steps that are trained on are those that the sampler has taken."""
    aliases: ClassVar = {"train_resolution": "resolution"}

    show_prompts: list[str] | None = Field(
        None, description="prompts of the preview grids; the first ones if not given"
    )
    _listed = field_validator("show_prompts", mode="before")(in_python)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="how images are sampled")
    height: Side | None = Field(
        None, description="height in pixels of all images, sampled, shown and trained on; null is the model's own"
    )
    width: Side | None = Field(None, description="width in pixels, likewise")
    resolution: Side | None = Field(None, description="side of square images in pixels; sets height and width")
    negative_prompt: str | None = Field(
        None, description="what guidance leads away from, in sampling and training; null is no prompt"
    )
    lora: LoRAConfig | None = Field(
        default_factory=LoRAConfig, description="the adapter to train; null trains the whole UNet or transformer"
    )
    attention: ImageAttention = "auto"
    channels_last: bool = Field(
        False,
        strict=True,
        description="convolutions in channels-last memory format, often faster on GPUs with tensor cores",
    )
    weights_variant: str | None = Field(None, description="variant of the model's weight files, e.g. fp16")
    base_config: str | None = Field(
        None, description="for a model in one .safetensors file: folder or Hub id of a diffusers pipeline built like it"
    )
    family: str | None = Field(
        None, description="model family of your own, for a model of no shipped family: file.py:Class"
    )

    max_sequence_length: int | None = Field(
        None,
        ge=1,
        le=MOST_PROMPT_TOKENS,
        description="tokens of a prompt for T5 or Qwen3, in models that have one; null is the pipeline's own number",
    )
    t5: bool = Field(
        True,
        strict=True,
        description="false loads Stable Diffusion 3 without T5, its largest text encoder, whose states are zeros then",
    )
    offload_text_encoders: bool = Field(
        True,
        strict=True,
        description="keep the text encoders in main memory, and on the GPU only while they encode prompts",
    )
    vae_slicing: bool = Field(False, strict=True, description="the VAE encodes and decodes one image at a time")
    vae_tiling: bool = Field(
        False,
        strict=True,
        description="the VAE processes images larger than its own in overlapping tiles, which changes them",
    )
    upcast_vae: bool | None = Field(
        None,
        strict=True,
        description="run the VAE in float32 whatever the dtype; null follows the model (force_upcast)",
    )

    evaluation: ImageEvaluationConfig | None = Field(None, description="a held-out reward and the diversity of images")
    stop_when: ImageStopConfig = Field(default_factory=ImageStopConfig, description="rules that end the run early")

    @property
    def family_settings(self) -> dict[str, Any]:
        """Name -> value of the settings that not every model family can have."""
        return {"guidance_scale": self.sampler.guidance_scale} | {name: getattr(self, name) for name in _OF_FAMILY}

    @property
    def needs_reference(self) -> bool:
        """Whether full training keeps a frozen copy as the reference; with LoRA, the base is that reference."""
        return True

    @property
    def has_reference(self) -> bool:
        """Whether a run can compare its policy with the reference."""
        return self.lora is not None or self.needs_reference

    def decided_by(self, scheduler: Any) -> Self:
        """The same settings where a sampler or a range of steps that is null is what the model's scheduler makes it.

        With a window, which no range goes with, that stays null.
        """
        decided: dict[str, Any] = {}
        if self.sampler.name is None:
            decided["sampler"] = self.sampler.model_copy(update={"name": default_sampler(scheduler)})
        whole = getattr(self, "timestep_range", ()) is None and self.sampler.noisy_steps is None
        if whole and not is_flow(scheduler.config):
            decided["timestep_range"] = (0.0, 1.0)
        return self.model_copy(update=decided)

    @model_validator(mode="before")
    @classmethod
    def _square(cls, settings: Any) -> Any:
        """Turn ``resolution`` into ``height`` and ``width``, the only two that are read."""
        if not isinstance(settings, Mapping) or settings.get("resolution") is None:
            return settings
        if settings.get("height") is not None or settings.get("width") is not None:
            return settings  # which is an error
        try:
            side = _SIDE.validate_python(settings["resolution"])
        except ValidationError:
            return settings  # of which the field says the same
        return {**settings, "height": side, "width": side, "resolution": None}

    def cross_checks(self) -> Iterator[str]:
        yield from problems_of(check_image_prompts, self.show_prompts or [], name="show_prompts")
        yield from negative_prompt_checks(self.negative_prompt, self.sampler.guidance_scale, "sampler.guidance_scale")
        if self.resolution is not None:
            yield f"resolution={self.resolution} sets height and width, which are given as well: leave it, or them, out"
        if self.sampler.noisy_steps is not None and not self.trains_sampled_steps:
            yield (
                f"sampler.noisy_steps={self.sampler.noisy_steps} is for methods that train on the steps they sampled, "
                "such as ddpo: leave it out"
            )
        yield from self.stop_when.unmeasured(self.evaluation)
        if self.stop_when.diversity_below is not None and self.evaluation is None:
            yield "stop_when.diversity_below needs evaluations: set evaluation, or leave it out"
        yield from attention_checks(self.attention)
        if self.dtype == "float16" and self.mixed_precision in ("bf16", "auto"):
            import torch

            # torch's normalization layers for CPUs do not take bf16 activations with fp16 weights.
            if not torch.cuda.is_available():
                yield (
                    f"dtype=float16 with mixed_precision={self.mixed_precision} needs a GPU: use dtype=bfloat16, or "
                    "mixed_precision=no"
                )

    def name_checks(self) -> Iterator[str]:
        own: dict[str, Any] = {"variant": self.weights_variant, "base_config": self.base_config, "family": self.family}
        own["lora_layers"] = self.lora.layers if self.lora else None
        own["lora_text_encoder"] = self.lora is not None and self.lora.text_encoder
        own |= {name: getattr(self, name, None) for name in ("height", "width", "bucket_step")}
        # First what stands in no other section, whose settings may be wrong as well.
        problems = problems_of(check_image_model, self.model, **own)
        problems = problems or problems_of(check_image_model, self.model, **own, settings=self.family_settings)
        yield from problems or self._sampler_checks()
        yield from reward_checks(getattr(self, "reward", None), "image")

    def _sampler_checks(self) -> Iterator[str]:
        """Whether the sampler is for this kind of model, where the configuration of its scheduler is at hand."""
        scheduler = scheduler_at_hand(image_model_ref(self.model).base)
        if scheduler is not None and self.sampler.name is not None:
            yield from problems_of(check_sampler, self.sampler.name, scheduler)


def passes_as_counted(config: DenoisingConfig, family: ModelFamily) -> DenoisingConfig:
    """``config`` without guidance where that is embedded, an input of the network that costs no second pass."""
    if family.guidance == "free":
        return config
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"guidance_scale": 1.0})})


class RewardedConfig(DenoisingConfig):
    """What every method has that samples images of prompts and is taught by a reward."""

    prompts: PromptsConfig = Field(
        description="list of texts, file, folder, Hub dataset or shipped list; see PromptsConfig"
    )
    reward: RewardSetting = Field(
        description="name, 'module:function', {name: ..., options}, a function, or a list of these"
    )
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)
        if self.reward is None:
            yield "reward is empty: give a name, 'module:function' or a mapping"


class GroupedConfig(RewardedConfig):
    """What every method has that samples several images of a prompt."""

    aliases: ClassVar = {"num_generations": "group_size"}

    group_size: int = Field(1, ge=1, le=MOST, description="images per prompt per epoch")

    def cross_checks(self) -> Iterator[str]:
        yield from multiple_checks(self, "group_size")


class AdvantageConfig(GroupedConfig):
    """What every method has that trains on the advantages of its images over others."""

    aliases: ClassVar = formerly_beside(ExperimentalAdvantages)

    advantages: Literal["prompt_history", "group", "leave_one_out"] = Field(
        "prompt_history",
        description="deviation from a prompt's mean reward in units of its std, over past epochs or the group of this "
        "one; or reward minus the mean of the rest of the group (RLOO)",
    )
    history_size: int = Field(32, ge=1, le=MOST, description="rewards kept per prompt, for the 4096 prompts seen last")
    history_min_count: int = Field(
        16,
        ge=1,
        le=MOST,
        description="number of rewards from which on a prompt's own history is used; until then, the whole epoch's",
    )
    advantage_clip: OrInfinite = Field(
        5.0, gt=0, description="bound on an advantage; with leave_one_out, in the unit of the reward"
    )
    experimental: ExperimentalAdvantages = Field(
        default_factory=ExperimentalAdvantages, description="rarely used settings"
    )

    def cross_checks(self) -> Iterator[str]:
        if self.advantages != "prompt_history" and self.group_size < 2:
            yield f"advantages={self.advantages} compares images of one prompt: set group_size to 2 or more"
        if self.advantages == "leave_one_out" and self.experimental.clips_std:
            yield no_std("experimental.clip_std", "advantages=leave_one_out")
        if self.history_min_count > self.history_size:
            yield (
                f"history_min_count={self.history_min_count} is more than history_size={self.history_size}, so no "
                "prompt would ever use its own history: change one of them"
            )
        yield from self.experimental.bounds_checks()
