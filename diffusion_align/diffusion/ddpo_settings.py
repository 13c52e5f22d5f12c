"""Settings of DDPO; they import no torch, so that the command line is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from diffusion_align.bounds import LARGEST
from diffusion_align.diffusion.sampled_steps_settings import SampledStepsConfig
from diffusion_align.diffusion.settings import AdvantageConfig
from diffusion_align.training.aliases import formerly_beside
from diffusion_align.training.section import OrInfinite
from diffusion_align.training.settings import ExperimentalAdvantages, dropout_checks

_LARGEST_LOG = 700
"""The exponentials of larger numbers are more than a float holds."""
EVERY_LATER_STEP = (
    "experimental.credit=to_go needs the KL of every later step: set timestep_fraction=1 and timestep_range to end at 1"
)


class ExperimentalDDPO(ExperimentalAdvantages):
    """Rarely used settings of DDPO."""

    credit: Literal["step", "to_go"] = Field("step", description="to_go also charges a step with the KL of later steps")


class DDPOConfig(SampledStepsConfig, AdvantageConfig):
    """Fine-tune a text-to-image pipeline towards a reward (DDPO).

    Settings of ``DDPOTrainer``; see ``SampledStepsConfig``, ``AdvantageConfig``, ``DenoisingConfig`` and
    ``TrainingConfig`` for the others.
    """

    aliases: ClassVar = {
        "beta": "kl_coef",
        "epsilon": "clip_range",
        **formerly_beside(ExperimentalDDPO),
    }

    method: str = Field("ddpo", description="the training method")

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
    kl_coef: float = Field(
        0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference, in units of the advantage"
    )
    kl: Literal["closed_form", "k1_reward"] = Field(
        "closed_form", description="KL as a loss in closed form, or its k1 estimate subtracted from the reward"
    )
    experimental: ExperimentalDDPO = Field(default_factory=ExperimentalDDPO, description="rarely used settings")

    def cross_checks(self) -> Iterator[str]:
        yield from dropout_checks(self.lora)
        yield from self._trust_region_checks()
        ends_early = self.timestep_range is not None and self.timestep_range[1] < 1
        if self.experimental.credit == "to_go" and (self.timestep_fraction < 1 or ends_early):
            yield EVERY_LATER_STEP

    @property
    def has_kl_loss(self) -> bool:
        return self.kl_coef > 0

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
