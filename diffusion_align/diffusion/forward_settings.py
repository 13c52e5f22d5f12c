"""Settings of the forward-process methods; they import no torch, so that the command line is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.diffusion.sampler_settings import QuietSamplerConfig, range_checks
from diffusion_align.diffusion.settings import AdvantageConfig
from diffusion_align.training.config import AUTO
from diffusion_align.training.section import OrInfinite, Weight
from diffusion_align.training.settings import dropout_checks

Objective = Literal["nft", "awm", "dgpo", "crd"]
NoiseWeighting = Literal["exact", "uniform", "logit_normal"]
BETAS: dict[str, float] = {"nft": 1.0, "dgpo": 0.1, "crd": 0.1}
"""Objective -> ``beta`` where that is null; one that has none is not here."""
CLIP_NATS = 1.64
"""``clip_range_nats`` where that is null: what DDPO's clip_range 1e-4 means for Stable Diffusion 1.5."""
OF_FAMILY: dict[str, Any] = {"forward_process": True}
"""What a model family is told of these methods, see ``ModelFamily.setting_checks``."""
GROUPED = ("dgpo", "crd")
"""Objectives that compare the images of a group in every update."""


class ForwardConfig(AdvantageConfig):
    """Fine-tune a text-to-image pipeline towards a reward on its finished images, noised again (NFT, AWM, DGPO, CRD).

    Settings of ``ForwardTrainer``; see ``AdvantageConfig``, ``DenoisingConfig`` and ``TrainingConfig`` for the others.
    """

    aliases: ClassVar = {"draws": "steps_per_image"}

    method: str = Field("forward", description="the training method")
    sampler: QuietSamplerConfig = Field(
        default_factory=QuietSamplerConfig, description="how images are sampled, by default without noise and guidance"
    )
    objective: Objective = Field("nft", description="the loss: nft, awm, dgpo or crd, see docs/forward.md")
    steps_per_image: int = Field(
        2, ge=1, le=MOST, description="noise levels per image per epoch, each with its own noise; stratified"
    )
    weighting: NoiseWeighting = Field(
        "uniform",
        description="which noise levels an image is trained at: uniform, logit_normal (most often in the middle), or "
        "exact, in proportion to their weight in the likelihood",
    )
    timestep_range: tuple[Weight, Weight] | None = Field(
        None,
        description="part of the noise levels, from noise (0) to image (1), that is trained on; null is down to the "
        "last one at which the sampler calls the network",
    )
    beta: float | None = Field(
        None,
        gt=0,
        le=LARGEST,
        description="nft: strength of the pull to the old policy (1 if null); dgpo, crd: price of one nat (0.1)",
    )
    clip_range_nats: OrInfinite | None = Field(
        None, gt=0, description="awm: bound on the log-ratio of an image to the old policy; 1.64 if null"
    )
    old_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the old policy, which samples, that is kept after every epoch; 0 is none of it",
    )
    kl_coef: float = Field(
        0.0, ge=0, le=LARGEST, description="price of one nat of KL to the reference, in units of the advantage"
    )
    consistency_images: int = Field(
        16, ge=0, le=MOST, description="images from which the self-consistency is measured before training; 0 does not"
    )

    def cross_checks(self) -> Iterator[str]:
        yield from dropout_checks(self.lora)
        yield from range_checks(self.timestep_range)
        if self.beta is not None and self.objective not in BETAS:
            yield f"beta={self.beta:g} has no effect with objective={self.objective}: leave it out"
        if self.clip_range_nats is not None and self.objective != "awm":
            bound = f"clip_range_nats={self.clip_range_nats:g}"
            yield f"{bound} has no effect with objective={self.objective}: leave it out"
        if self.objective == "nft" and math.isinf(self.advantage_clip):
            yield "advantage_clip=.inf leaves objective=nft no scale of the advantages: set a finite number"
        if self.consistency_images == 1:
            yield "consistency_images=1 is too few to compare their gradients: set 2 or more, or 0"
        if self.objective in GROUPED:
            if self.group_size < 2:
                yield f"objective={self.objective} compares images of one prompt: set group_size to 2 or more"
            elif self.micro_batch_size != AUTO and self.micro_batch_size % self.group_size:
                yield (
                    f"objective={self.objective} needs whole groups in a micro-batch: set micro_batch_size to a "
                    f"multiple of group_size={self.group_size}"
                )
            if 0 < (groups := self.samples_per_epoch // self.group_size) < self.updates_per_epoch:
                yield (
                    f"updates_per_epoch={self.updates_per_epoch} is more than samples_per_epoch/group_size={groups}: "
                    f"with objective={self.objective} each update needs at least one group"
                )

    @property
    def family_settings(self) -> dict[str, Any]:
        return super().family_settings | OF_FAMILY

    def decided_by(self, scheduler: Any) -> Self:
        """As of all, but that ``timestep_range`` stays null, which here is up to the sampler."""
        return super().decided_by(scheduler).model_copy(update={"timestep_range": self.timestep_range})

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.stop_when.kl_above is not None

    @property
    def strength(self) -> float:
        """``beta``, or the objective's own."""
        return BETAS.get(self.objective, 1.0) if self.beta is None else self.beta

    @property
    def clip_nats(self) -> float:
        """``clip_range_nats``, or its default."""
        return CLIP_NATS if self.clip_range_nats is None else self.clip_range_nats

    @property
    def members(self) -> int:
        """Images that the loss sees together: one, or a group."""
        return self.group_size if self.objective in GROUPED else 1
