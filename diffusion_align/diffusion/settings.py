"""Settings of the methods that train a diffusion model; they import no torch, so that the command line is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from diffusion_align.bounds import LARGEST, LARGEST_SIDE, MOST, MOST_PROMPT_TOKENS
from diffusion_align.data.image_pairs import PairsConfig
from diffusion_align.data.prompts import PromptsConfig, check_image_prompts
from diffusion_align.data.sources import in_python
from diffusion_align.diffusion.flow_samplers import FLOW_SAMPLERS, NOISE_LEVELS
from diffusion_align.diffusion.samplers import SAMPLERS, check_sampler, default_sampler, find_sampler
from diffusion_align.errors import UserError, problems_of, short
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.models.image_pipelines import scheduler_at_hand
from diffusion_align.models.model_ref import check_image_model, image_model_ref
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
    from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps
    from diffusion_align.training.evaluation import Evaluation


NoisyOrder = Literal["random", "progressive"]


class SamplerConfig(Section):
    """How images are sampled, in training and for the grids."""

    name: str | None = Field(
        None,
        description="ddim, ddpm, for flow-matching models flow, flow_sde, cps, dance or ddim, or a function of your "
        "own: module:function, file.py:function; null is ddim, or flow for a flow-matching model",
    )
    steps: int = Field(50, ge=1, le=MOST, description="denoising steps per image")
    eta: float = Field(
        1.0, ge=0, le=1, description="noise of ddim and flow; 0 has no density and is refused for training"
    )
    noise_level: float | None = Field(
        None, ge=0, le=LARGEST, description="noise of flow_sde (0.7 if null), cps (0.7, at most 1) and dance (0.3)"
    )
    guidance_scale: float = Field(
        5.0, ge=1, le=LARGEST, description="scale of guidance; 1 switches classifier-free guidance off"
    )
    noisy_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="with ddpo: only so many steps in a row are noisy and trained on, the others are deterministic; "
        "null is all",
    )
    noisy_range: tuple[Weight, Weight] | None = Field(
        None,
        description="part of the stochastic steps, from noise (0) to image (1), in which those lie; null as of "
        "timestep_range",
    )
    noisy_order: NoisyOrder = Field(
        "random", description="where they lie: random in each epoch, or progressive, one step closer to the image each"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further options of your own sampler")

    @field_validator("name")
    @classmethod
    def _found(cls, name: str | None) -> str | None:
        try:
            if name is not None:
                find_sampler(name)
        except UserError as error:
            raise ValueError(str(error).removeprefix(f"sampler={name!r} is unknown: ")) from error
        return name

    def cross_checks(self) -> Iterator[str]:
        named = "null" if self.name is None else self.name
        if self.options and (self.name is None or self.name in SAMPLERS):
            yield f"options={short(self.options)} is for a sampler of your own, not for name={named}: leave it out"
        if self.name not in NOISE_LEVELS and self.noise_level is not None:
            yield (
                f"noise_level={self.noise_level:g} is for name={', '.join(NOISE_LEVELS)}, not for name={named}: set "
                "one of them, or leave noise_level out"
            )
        if self.name in NOISE_LEVELS and self.eta != 1:
            yield self.no_eta(self.eta)
        if self.name == "cps" and self.noise_level is not None and self.noise_level > 1:
            yield f"noise_level={self.noise_level:g} is more than 1, the most that name=cps has: lower it"
        yield from _range_checks(self.noisy_range, "noisy_range")
        if self.noisy_steps is None:
            for name in (name for name, plain in _NO_WINDOW.items() if getattr(self, name) != plain):
                value = getattr(self, name)
                shown = list(value) if isinstance(value, tuple) else value
                yield f"{name}={shown} has no effect without noisy_steps: set that as well, or leave {name} out"
        elif self.noisy_steps > self.steps:
            yield f"noisy_steps={self.noisy_steps} is more than steps={self.steps}: lower it"
        elif self.name == "ddpm":
            yield self.always_noisy

    def no_eta(self, eta: float) -> str:
        """The sentence about an eta where the noise is ``noise_level``."""
        return f"eta={eta:g} has no effect with name={self.name}, whose noise is noise_level: leave it out"

    @property
    def noise_setting(self) -> str:
        """The setting that scales the noise of the sampler: eta or noise_level."""
        return "noise_level" if self.name in NOISE_LEVELS else "eta"

    @property
    def passes(self) -> int:
        """Passes of the network in a step: classifier-free guidance takes a second one."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def always_noisy(self) -> str:
        """Sentence about a sampler whose steps cannot be made deterministic."""
        return (
            f"noisy_steps={self.noisy_steps} needs a sampler that is deterministic with eta=0, and name={self.name} is "
            "not: use name=ddim, or leave noisy_steps out"
        )

    @property
    def quiet(self) -> SamplerConfig:
        """The same steps without any noise."""
        return self.model_copy(update={self.noise_setting: 0.0, **_NO_WINDOW})

    @property
    def preview(self) -> SamplerConfig:
        """How previews, evaluations and the trained pipeline sample: ``quiet`` where training has a window."""
        return self if self.noisy_steps is None else self.quiet

    @property
    def is_deterministic(self) -> bool:
        """Whether no step has a density; of a sampler of one's own its table says so."""
        return self.name in (None, "ddim", "flow", *NOISE_LEVELS) and getattr(self, self.noise_setting) == 0

    def without_noise(self) -> Iterator[str]:
        """Sentences about a sampler none of whose steps has a density, as far as that shows without its model."""
        if self.is_deterministic:
            noise = self.noise_setting
            yield (
                f"sampler.{noise}=0 makes every step deterministic, so there is no log-prob to train on: set "
                f"sampler.{noise} above 0"
            )
        elif self.steps == 1 and self.name in FLOW_SAMPLERS:
            yield (
                "sampler.steps=1 is the last step only, which is deterministic, so there is no log-prob to train on: "
                "set sampler.steps to 2 or more"
            )

    def schedule(self, scheduler: Any, set_timesteps: SetTimesteps | None = None) -> DiffusionSchedule:
        """``build_schedule`` with these settings, which are the sampler's options together with ``options``."""
        from diffusion_align.diffusion.schedule import build_schedule

        noise = {"eta": self.eta} if self.noise_level is None else {"eta": self.eta, "noise_level": self.noise_level}
        options = {**noise, **self.options}
        return build_schedule(scheduler, self.steps, sampler=self.name, options=options, set_timesteps=set_timesteps)


_NO_WINDOW: dict[str, Any] = {
    name: SamplerConfig.model_fields[name].default for name in ("noisy_steps", "noisy_range", "noisy_order")
}


def _range_checks(steps: tuple[float, float] | None, setting: str = "timestep_range") -> Iterator[str]:
    if steps is not None and not 0 <= steps[0] < steps[1] <= 1:
        yield f"{setting}={list(steps)} must be two numbers 0 <= first < last <= 1"


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


_LARGEST_LOG = 700
"""The exponentials of larger numbers are more than a float holds."""
_TIMESTEP_RANGE = (
    "part of the stochastic steps, from noise (0) to image (1), that is trained on; null is all of them, but of a "
    "flow-matching model not the last one where it alone holds more than half of the path's KL"
)
EVERY_LATER_STEP = (
    "experimental.credit=to_go needs the KL of every later step: set timestep_fraction=1 and timestep_range to end at 1"
)


class ExperimentalDDPO(ExperimentalAdvantages):
    """Rarely used settings of DDPO."""

    credit: Literal["step", "to_go"] = Field("step", description="to_go also charges a step with the KL of later steps")


class DDPOConfig(DenoisingConfig):
    """Fine-tune a text-to-image pipeline towards a reward (DDPO).

    Settings of ``DDPOTrainer``; see ``DenoisingConfig`` and ``TrainingConfig`` for those of every trainer.
    """

    trains_sampled_steps = True
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
    kl_bound_nats: OrInfinite | None = Field(
        None,
        ge=0,
        description="drop an action whose step is more than this many nats of KL from the policy that sampled it and "
        "would move further away; replaces the clip",
    )
    ratio: Literal["plain", "guard"] = Field(
        "plain", description="importance ratio, or GRPO-Guard's: centred, and in proportion to a step's std"
    )
    timestep_range: tuple[Weight, Weight] | None = Field(None, description=_TIMESTEP_RANGE)
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
        yield from self.sampler.without_noise()
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
        if self.sampler.noisy_steps is not None:
            if self.timestep_range is not None:
                yield (
                    f"timestep_range={list(self.timestep_range)} has no effect with sampler.noisy_steps, which are all "
                    "trained on: set sampler.noisy_range instead"
                )
            if self.timestep_fraction < 1:
                yield (
                    f"timestep_fraction={self.timestep_fraction:g} has no effect with sampler.noisy_steps, which are "
                    "all trained on: lower sampler.noisy_steps instead"
                )
        yield from self._trust_region_checks()
        ends_early = self.timestep_range is not None and self.timestep_range[1] < 1
        if self.experimental.credit == "to_go" and (self.timestep_fraction < 1 or ends_early):
            yield EVERY_LATER_STEP

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.stop_when.kl_above is not None

    @property
    def needs_old_means(self) -> bool:
        """Whether the loss compares a step with that of the policy that sampled it, beyond their log-probs."""
        return self.kl_bound_nats is not None or self.ratio == "guard"

    def _trust_region_checks(self) -> Iterator[str]:
        bound = None if self.kl_bound_nats is None else f"kl_bound_nats={self.kl_bound_nats:g}"
        if self.objective == "score_function":
            for given in ([] if bound is None else [bound]) + (["ratio=guard"] if self.ratio == "guard" else []):
                yield f"{given} has no effect with objective=score_function, which has no ratio: leave one of them out"
        elif bound is not None and self.ratio == "guard":
            yield f"{bound} replaces the clip, for which ratio=guard centres the ratio: leave one of them out"
        elif self.ratio == "guard" and self.clip_range_nats is not None:
            yield (
                f"clip_range_nats={self.clip_range_nats:g} bounds the joint log-ratio, which ratio=guard changes in "
                "every step: set clip_range instead"
            )
        if bound is not None and self.objective == "ratio":
            for name in ("clip_range", "clip_range_nats"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    yield f"{name}={value:g} has no effect with kl_bound_nats, which replaces the clip: leave it out"

    def nats_in_logp(self, dimensions: int) -> int:
        """What turns a log-prob in the chosen reduction into nats, for latents of ``dimensions`` numbers."""
        return dimensions if self.logp_reduction == "mean" else 1

    def clip_bounds(self, dimensions: int) -> tuple[float, float, float]:
        """How far below and above 1 the ratio counts, and the upper bound on the joint log-ratio of an action, nats."""
        low = high = self.clip_range
        if self.clip_range_nats is not None:
            bound = self.clip_range_nats / self.nats_in_logp(dimensions)
            low = -math.expm1(-bound)
            high = math.expm1(bound) if bound < _LARGEST_LOG else math.inf
        return low, high, math.log1p(high) * self.nats_in_logp(dimensions)


Weighting = Literal["exact", "uniform", "snr_share"]
StepDraw = Literal["uniform", "logit_normal"]


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
    """Fine-tune a text-to-image pipeline towards the preferred of two images (Diffusion-DPO).

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
    timestep_range: tuple[Weight, Weight] | None = Field(None, description=_TIMESTEP_RANGE)
    steps_per_pair: int = Field(
        1, ge=1, le=MOST, description="steps sampled per pair per epoch, each with its own noise"
    )
    step_draw: StepDraw = Field(
        "uniform",
        description="how often a step is sampled: uniform, all alike; or logit_normal, most often in the middle",
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
            yield (
                "experimental.target=logged needs the sampler's noisy steps: judge online and set "
                f"sampler.{self.sampler.noise_setting} above 0"
            )
        if rare.target == "logged" and self.caption_dropout:
            yield "experimental.target=logged trains on steps sampled with their prompt: leave caption_dropout out"
        yield from _range_checks(self.timestep_range)
        if self.step_draw == "logit_normal" and self.stop_when.kl_above is not None:
            yield (
                "stop_when.kl_above needs the KL of every step, but step_draw=logit_normal hardly ever samples those "
                "next to the image, which carry much of it: set step_draw=uniform, or leave it out"
            )
        if self.variant == "corrected" and (self.loss_type != "sigmoid" or self.label_smoothing):
            yield "variant=corrected has a loss of its own: leave loss_type and label_smoothing out"
        if self.loss_type != "sigmoid" and self.label_smoothing:
            yield f"label_smoothing has no effect with loss_type={self.loss_type}: leave one of them out"
        if self.variant == "original" and (rare.reward_mode != "kl" or rare.old_refresh != "update"):
            yield (
                "experimental.reward_mode and experimental.old_refresh need variant=corrected: set it, or leave them "
                "out"
            )
