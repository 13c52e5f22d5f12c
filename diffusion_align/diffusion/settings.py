"""Settings of the methods that train a diffusion model; they import no torch, so that the command line is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from diffusion_align.bounds import LARGEST, LARGEST_SIDE, MOST
from diffusion_align.data.image_pairs import PairsConfig
from diffusion_align.data.prompts import PromptsConfig, check_image_prompts
from diffusion_align.data.sources import in_python
from diffusion_align.diffusion.samplers import SAMPLERS, find_sampler
from diffusion_align.errors import UserError, problems_of, short
from diffusion_align.models.model_ref import check_image_model
from diffusion_align.rewards.settings import RewardSetting, check_diversity, reward_checks, weight_checks
from diffusion_align.training.aliases import formerly_beside, other_words
from diffusion_align.training.attention import ImageAttention, attention_checks
from diffusion_align.training.config import LoRASettings, PolicyConfig, multiple_checks
from diffusion_align.training.section import OrInfinite, Section, Weight
from diffusion_align.training.settings import (
    EvaluationConfig,
    ExperimentalAdvantages,
    StopConfig,
    dropout_checks,
    no_std,
)

if TYPE_CHECKING:
    from diffusion_align.diffusion.schedule import DiffusionSchedule
    from diffusion_align.training.evaluation import Evaluation


class SamplerConfig(Section):
    """How images are sampled, in training and for the grids."""

    name: str = Field("ddim", description="ddim, ddpm, or a function of your own: module:function, file.py:function")
    steps: int = Field(50, ge=1, le=MOST, description="denoising steps per image")
    eta: float = Field(1.0, ge=0, le=1, description="DDIM's noise; 0 has no density and is refused for training")
    guidance_scale: float = Field(
        5.0, ge=1, le=LARGEST, description="scale of classifier-free guidance; 1 switches it off"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further options of your own sampler")

    @field_validator("name")
    @classmethod
    def _found(cls, name: str) -> str:
        try:
            find_sampler(name)
        except UserError as error:
            raise ValueError(str(error).removeprefix(f"sampler={name!r} is unknown: ")) from error
        return name

    def cross_checks(self) -> Iterator[str]:
        if self.options and self.name in SAMPLERS:
            yield f"options={short(self.options)} is for a sampler of your own, not for name={self.name}: leave it out"

    @property
    def is_deterministic(self) -> bool:
        """Whether no step has a density; of a sampler of one's own its table says so."""
        return self.name == "ddim" and self.eta == 0

    def schedule(self, scheduler: Any) -> DiffusionSchedule:
        """``build_schedule`` with these settings; the sampler's options are ``eta`` and those of ``options``."""
        from diffusion_align.diffusion.schedule import build_schedule

        return build_schedule(scheduler, self.steps, sampler=self.name, options={"eta": self.eta, **self.options})


LORA_LAYERS = ("attention", "feed_forward", "convolutions")
"""Kinds of layers that ``lora.layers`` can name; a model's family says which it has."""


class LoRAConfig(LoRASettings):
    """Low-rank adapters on the UNet and, with ``text_encoder``, on the text encoders."""

    layers: str = Field(
        "attention",
        description="layers with an adapter: attention, feed_forward, convolutions (of the residual blocks, as small "
        "models need) or several, as in attention+feed_forward",
    )

    text_encoder: bool = Field(
        False,
        strict=True,
        description="adapters on the attention projections of all text encoders too, which then stay on the GPU",
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


Side = Annotated[int, Field(ge=8, le=LARGEST_SIDE)]
_SIDE: TypeAdapter[int] = TypeAdapter(Side)


class DenoisingConfig(PolicyConfig):
    """What every method that trains a diffusion model has."""

    model_kind = "image"
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
        default_factory=LoRAConfig, description="the adapter to train; null trains the whole UNet"
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
        None, description="model family of your own, for a model that is not Stable Diffusion: file.py:Class"
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
    def needs_reference(self) -> bool:
        """Whether full training keeps a frozen copy as the reference; with LoRA, the base is that reference."""
        return True

    @property
    def has_reference(self) -> bool:
        """Whether a run can compare its policy with the reference."""
        return self.lora is not None or self.needs_reference

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
        yield from problems_of(check_image_model, self.model, **own)
        yield from reward_checks(getattr(self, "reward", None), "image")


def _range_checks(steps: tuple[float, float]) -> Iterator[str]:
    if not 0 <= steps[0] < steps[1] <= 1:
        yield f"timestep_range={list(steps)} must be two numbers 0 <= first < last <= 1"


class ExperimentalDDPO(ExperimentalAdvantages):
    """Rarely used settings of DDPO."""

    credit: Literal["step", "to_go"] = Field("step", description="to_go also charges a step with the KL of later steps")


class DDPOConfig(DenoisingConfig):
    """Fine-tune a Stable Diffusion pipeline towards a reward (DDPO).

    Settings of ``DDPOTrainer``; see ``DenoisingConfig`` and ``TrainingConfig`` for those of every trainer.
    """

    aliases: ClassVar = {
        "beta": "kl_coef",
        "epsilon": "clip_range",
        "num_generations": "group_size",
        **formerly_beside(ExperimentalDDPO),
    }

    method: str = Field("ddpo", description="the training method")
    prompts: PromptsConfig = Field(
        description="list of texts, file, folder, Hub dataset or shipped list; see PromptsConfig"
    )
    reward: RewardSetting = Field(
        description="name, 'module:function', {name: ..., options}, a function, or a list of these"
    )
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )

    objective: Literal["ratio", "score_function"] = Field(
        "ratio", description="clipped importance ratio, or the score function, which has no ratio"
    )
    logp_reduction: Literal["mean", "sum"] = Field(
        "mean", description="over latent dimensions: log-prob, ratio and KL alike"
    )
    clip_range: float = Field(1e-4, gt=0, lt=1, description="clip range of the ratio, in the chosen reduction")
    clip_range_nats: OrInfinite | None = Field(
        None, gt=0, description="bound on the joint log-ratio; replaces clip_range"
    )
    timestep_range: tuple[Weight, Weight] = Field(
        (0.0, 1.0), description="part of the stochastic steps, from noise (0) to image (1), that is trained on"
    )
    timestep_fraction: float = Field(1.0, gt=0, le=1, description="share of those steps trained on, sampled per image")

    group_size: int = Field(1, ge=1, le=MOST, description="images per prompt per epoch")
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

    kl_coef: float = Field(
        0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference, in units of the advantage"
    )
    kl: Literal["closed_form", "k1_reward"] = Field(
        "closed_form", description="KL as a loss in closed form, or its k1 estimate subtracted from the reward"
    )
    experimental: ExperimentalDDPO = Field(default_factory=ExperimentalDDPO, description="rarely used settings")

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)
        if self.reward is None:
            yield "reward is empty: give a name, 'module:function' or a mapping"
        if self.sampler.is_deterministic:
            yield (
                "sampler.eta=0 makes every step deterministic, so there is no log-prob to train on: set sampler.eta "
                "above 0"
            )
        yield from dropout_checks(self.lora)
        yield from multiple_checks(self, "group_size")
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
        yield from _range_checks(self.timestep_range)
        if self.experimental.credit == "to_go" and (self.timestep_fraction < 1 or self.timestep_range[1] < 1):
            yield (
                "experimental.credit=to_go needs the KL of every later step: set timestep_fraction=1 and "
                "timestep_range to end at 1"
            )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.stop_when.kl_above is not None

    def nats_in_logp(self, dimensions: int) -> int:
        """What turns a log-prob in the chosen reduction into nats, for latents of ``dimensions`` numbers."""
        return dimensions if self.logp_reduction == "mean" else 1

    def clip_bounds(self, dimensions: int) -> tuple[float, float, float]:
        """How far below and above 1 the ratio counts, and the upper bound on the joint log-ratio of an action, nats."""
        low = high = self.clip_range
        if self.clip_range_nats is not None:
            bound = self.clip_range_nats / self.nats_in_logp(dimensions)
            low, high = -math.expm1(-bound), math.expm1(bound)
        return low, high, math.log1p(high) * self.nats_in_logp(dimensions)


Weighting = Literal["exact", "uniform", "snr_share"]


class ExperimentalDiffusionDPO(Section):
    """Rarely used settings of Diffusion-DPO."""

    target: Literal["posterior_mean", "posterior_sample", "logged"] = Field(
        "posterior_mean",
        description="x_s: its mean given x_0, a sample given x_0, or online the one that the sampler logged",
    )
    reward_mode: Literal["kl", "signed_kl", "logratio"] = Field(
        "kl", description="corrected: r is the KL to the reference (eq. 36), that with a sign, or the log-ratio"
    )
    old_refresh: Literal["update", "epoch"] = Field(
        "update", description="corrected: when the policy that r is computed with is refreshed"
    )
    loser_weight: float = Field(1.0, ge=0, le=LARGEST, description="weight of the rejected image's error")
    loser_clip: OrInfinite | None = Field(
        None, gt=0, description="the rejected image's error counts up to the reference's plus this many nats"
    )
    max_winner_error: OrInfinite = Field(
        2.0, gt=1, description="stop when the chosen images' error is this many times the reference's"
    )


class DiffusionDPOConfig(DenoisingConfig):
    """Fine-tune a Stable Diffusion pipeline towards the preferred of two images (Diffusion-DPO).

    Settings of ``DiffusionDPOTrainer``; see ``DenoisingConfig`` and ``TrainingConfig`` for those of every trainer.
    ``samples_per_epoch`` counts pairs, or with online judging images.
    """

    aliases: ClassVar = {
        "decisions_per_pair": "steps_per_pair",
        "num_generations": "group_size",
        "bucket_reso_steps": "bucket_step",
        "aspect_bucket_alignment": "bucket_step",
        **formerly_beside(ExperimentalDiffusionDPO),
    }

    method: str = Field("diffusion_dpo", description="the training method")
    pairs: PairsConfig | None = Field(None, description="a source of pairs, or a mapping with its options")
    bucket_step: Side | None = Field(
        None,
        description="train on pairs at about their own aspect ratio, in buckets of at most the run's area whose sides "
        "are multiples of this many pixels (usually 64); null crops all to one size",
    )
    prompts: PromptsConfig | None = Field(
        None, description="for judging online: list of texts, file, folder, Hub dataset or shipped list"
    )
    reward: RewardSetting = Field(None, description="judges online; with `pairs` it only scores the shown images")
    reward_weights: list[Weight] | None = Field(
        None, description="one weight per reward of a list; 1 each if not given"
    )
    group_size: int = Field(
        4, ge=2, le=MOST, description="online: images per prompt; the best and the worst are a pair"
    )

    variant: Literal["original", "corrected"] = Field(
        "original", description="the Diffusion-DPO paper's loss, or the corrected one of docs/diffusion_dpo.md"
    )
    loss_type: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="loss of the difference of log-ratios")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="probability that a label is wrong")
    beta: float | None = Field(None, gt=0, le=LARGEST, description="price of one nat, as weighted by `weighting`")
    beta_dpo: float | None = Field(
        None, gt=0, le=LARGEST, description="Diffusion-DPO's beta (2000 to 5000), for mean squared errors"
    )
    weighting: Annotated[Weighting, other_words(share="snr_share")] = Field(
        "uniform", description="weights of the steps: exact, uniform (Diffusion-DPO's) or snr_share"
    )
    timestep_range: tuple[Weight, Weight] = Field(
        (0.0, 1.0), description="part of the stochastic steps, from noise (0) to image (1), that is trained on"
    )
    steps_per_pair: int = Field(
        1, ge=1, le=MOST, description="steps sampled per pair per epoch, each with its own noise"
    )
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of pairs trained on with the empty prompt")

    kl_coef: float | None = Field(
        None, ge=0, le=LARGEST, description="price of one nat of KL; 2 beta (corrected) or 0 when not given"
    )
    experimental: ExperimentalDiffusionDPO = Field(
        default_factory=ExperimentalDiffusionDPO, description="rarely used settings"
    )

    @property
    def online(self) -> bool:
        return self.pairs is None

    def cross_checks(self) -> Iterator[str]:
        yield from weight_checks(self.reward, self.reward_weights)
        if (self.beta is None) == (self.beta_dpo is None):
            yield "give either beta (per nat) or beta_dpo (Diffusion-DPO's, for mean squared errors)"
        if self.online and (self.prompts is None or self.reward is None):
            yield "give pairs, or prompts and a reward to sample and judge pairs online"
        if not self.online and self.prompts is not None:
            yield "give either pairs, or prompts to sample and judge pairs online, not both"
        if self.online:
            yield from multiple_checks(self, "group_size")
            if self.bucket_step is not None:
                yield "bucket_step is for given pairs, but images judged online all have one size: leave it out"
        rare = self.experimental
        if rare.target == "logged" and (not self.online or self.sampler.is_deterministic):
            yield "experimental.target=logged needs the sampler's noisy steps: judge online and set sampler.eta above 0"
        if rare.target == "logged" and self.caption_dropout:
            yield "experimental.target=logged trains on steps sampled with their prompt: leave caption_dropout out"
        yield from _range_checks(self.timestep_range)
        if self.variant == "corrected" and (self.loss_type != "sigmoid" or self.label_smoothing):
            yield "variant=corrected has a loss of its own: leave loss_type and label_smoothing out"
        if self.loss_type != "sigmoid" and self.label_smoothing:
            yield f"label_smoothing has no effect with loss_type={self.loss_type}: leave one of them out"
        if self.variant == "original" and (rare.reward_mode != "kl" or rare.old_refresh != "update"):
            yield (
                "experimental.reward_mode and experimental.old_refresh need variant=corrected: set it, or leave them "
                "out"
            )
