"""Settings of training by a reward's own gradient; they import no torch, so that the command line is quick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.diffusion.sampler_settings import QuietSamplerConfig, SamplerConfig, range_checks
from diffusion_align.diffusion.settings import RewardedConfig
from diffusion_align.rewards.settings import gradient_checks
from diffusion_align.training.section import Section, Weight

INERT = 0.05
"""Noise level (sigma) below which a step changes nothing that one can see."""
HELD_OUT: dict[str, Any] = {"reward": "clip_score", "every": 1}
"""The evaluation of a run whose settings name none."""
FALLING = 3
"""``stop_when.gold_falling`` of a run whose settings say nothing of it."""
_OF_VARIANT = {
    "last_steps": ("draft", "align_prop"),
    "from_sigma": ("draft",),
    "low_variance": ("draft",),
    "late_range": ("refl",),
}
"""Setting -> the variants that it is for."""


class GuidedSamplerConfig(QuietSamplerConfig):
    """A sampler without noise by default, and with guidance, as pipelines have it."""

    guidance_scale: float = Field(
        SamplerConfig.model_fields["guidance_scale"].default,
        ge=1,
        le=LARGEST,
        description="scale of guidance; 1 switches classifier-free guidance off, and halves the work",
    )


class RewardGradientConfig(RewardedConfig):
    """Fine-tune a text-to-image pipeline by the gradient of a differentiable reward (DRaFT, AlignProp, ReFL).

    Settings of ``RewardGradientTrainer``; see ``RewardedConfig``, ``DenoisingConfig`` and ``TrainingConfig`` for the
    others. These runs find what a reward overlooks within tens of updates, so that a held-out reward watches them
    unless ``evaluation`` or ``stop_when.gold_falling`` is null.
    """

    method: str = Field("reward_gradient", description="the training method")
    sampler: GuidedSamplerConfig = Field(
        default_factory=GuidedSamplerConfig, description="how images are sampled, by default without noise"
    )
    variant: Literal["draft", "align_prop", "refl"] = Field(
        "draft",
        description="where the gradient ends: draft, before the last steps; align_prop, at a random step; refl, at a "
        "random late step, from which the image is predicted at once",
    )
    last_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="the gradient goes through so many steps, of align_prop at most; null is as far as from_sigma, of "
        "align_prop all",
    )
    from_sigma: float = Field(
        0.1,
        gt=0,
        le=1,
        description="draft: through the fewest last steps that begin at this noise level or above; from image (0) to "
        "noise (1)",
    )
    low_variance: int = Field(
        0,
        ge=0,
        le=MOST,
        description="draft with one step: take it again so many times from the image with other noise, and average "
        "(DRaFT-LV)",
    )
    late_range: tuple[Weight, Weight] = Field(
        (0.75, 1.0), description="refl: part of the steps, from noise (0) to image (1), of which an update takes one"
    )
    kl_coef: float = Field(
        0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference, in the unit of the reward"
    )

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, settings: Any) -> Any:
        """Fill in the held-out reward and the rule that ends the run, unless they are switched off."""
        if not isinstance(settings, Mapping):
            return settings
        evaluation, rules = (_given(settings.get(name, {})) for name in ("evaluation", "stop_when"))
        if isinstance(evaluation, Mapping):
            evaluation = {**HELD_OUT, **evaluation}
        rewarded = isinstance(evaluation, Mapping) and evaluation["reward"] is not None
        if rewarded and isinstance(rules, Mapping):
            rules = {"gold_falling": FALLING, **rules}
        return {**settings, "evaluation": evaluation, "stop_when": rules}

    def cross_checks(self) -> Iterator[str]:
        for name, variants in _OF_VARIANT.items():
            value = getattr(self, name)
            if self.variant not in variants and value != type(self).model_fields[name].default:
                shown = list(value) if isinstance(value, tuple) else value
                yield f"{name}={shown} has no effect with variant={self.variant}: leave it out"
        if self.last_steps is not None and self.last_steps > self.sampler.steps:
            yield f"last_steps={self.last_steps} is more than sampler.steps={self.sampler.steps}: lower it"
        if self.last_steps is not None and self.from_sigma != type(self).model_fields["from_sigma"].default:
            yield f"from_sigma={self.from_sigma:g} has no effect with last_steps: leave one of them out"
        yield from range_checks(self.late_range, "late_range")
        if self.inner_epochs > 1:
            yield (
                f"inner_epochs={self.inner_epochs} has no effect here, where every update samples its own images: "
                "raise epochs instead"
            )
        if self.dtype == "float16" and self.mixed_precision != "fp16":
            given = self.mixed_precision or "null"
            yield (
                f"dtype=float16 with mixed_precision={given} lets small gradients of the reward vanish: set "
                "dtype=bfloat16, or mixed_precision=fp16, which scales them"
            )
        if self.lora is not None and self.lora.dropout:
            yield (
                f"lora.dropout={self.lora.dropout:g} would also drop out while the images are sampled that are "
                "trained on: leave it out"
            )

    def name_checks(self) -> Iterator[str]:
        yield from gradient_checks(self.reward, None if self.evaluation is None else self.evaluation.reward)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.stop_when.kl_above is not None


def _given(section: Any) -> Any:
    """A section made in Python as the mapping of what was given to it; anything else as it is."""
    if not isinstance(section, Section):
        return section
    return {name: getattr(section, name) for name in section.model_fields_set}
