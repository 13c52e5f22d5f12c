"""What an epoch of a diffusion recipe asks for, from its settings alone: decisions, passes of the UNet, nats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from diffusion_align.diffusion.ddpo import DDPOConfig, clip_nats, kl_probes
from diffusion_align.diffusion.dpo import DiffusionDPOConfig
from diffusion_align.diffusion.schedule import DiffusionSchedule, training_schedule
from diffusion_align.diffusion.step_weights import nats_per_squared_error
from diffusion_align.estimators import beta_in_nats

Lines = list[tuple[str, str]]
"""(name, value); a name without a value is the heading of those that follow."""
ImageConfig = DDPOConfig | DiffusionDPOConfig


@dataclass(frozen=True)
class Passes:
    """UNet passes of one sample in an epoch, by what they are for, and pictures decoded; evaluation on average."""

    sampling: int
    reference: int
    trained: int
    probed: int
    evaluation: float
    decoded: float

    @property
    def forward(self) -> float:
        return self.sampling + self.reference + self.probed + self.evaluation


def trained_schedule(config: ImageConfig, scheduler: Mapping[str, Any]) -> DiffusionSchedule:
    """The steps that are trained on, as the trainer builds them."""
    import diffusers

    kind = getattr(diffusers, str(scheduler.get("_class_name")), diffusers.DDIMScheduler)
    bare = SimpleNamespace(config=dict(kind.from_config(dict(scheduler)).config))  # with the defaults of its class
    drawing = config.sampler.schedule(bare)
    logged = isinstance(config, DDPOConfig) or config.target == "logged"
    return drawing if logged else training_schedule(bare)


def describe_epoch(config: ImageConfig, steps: Tensor | None) -> tuple[int, Lines]:
    """Decisions in an epoch (for Diffusion-DPO of a pair), and lines about it."""
    samples = config.samples_per_epoch
    if isinstance(config, DDPOConfig):
        count = config.sampler.steps if steps is None else len(steps)
        whole, decisions = samples, samples * max(1, round(config.timestep_fraction * count))
        what = ("pictures an epoch", f"{samples}, each {config.sampler.steps} steps")
    else:
        whole = samples // (config.group_size if config.online else 1)
        decisions = whole * config.decisions_per_pair
        source = "" if config.pairs is None else config.pairs.source
        judged = f"the best and the worst of {config.group_size} pictures each"
        what = ("pairs an epoch", f"{whole}, {judged}" if config.online else f"{whole} from {source}")
    passes = count_passes(config, decisions, steps)
    used = [
        f"{passes.sampling} forward while sampling" if passes.sampling else "",
        f"{passes.reference} forward for the reference" if passes.reference else "",
        f"{passes.probed} forward to estimate kl_path" if passes.probed else "",
        f"{passes.evaluation:g} forward for the evaluation" if passes.evaluation else "",
        f"{passes.trained} forward and backward while training",
    ]
    # An update takes whole pictures or pairs; with settings that are not allowed there may be none.
    each = math.ceil(whole / config.updates_per_epoch) * (decisions // max(1, whole))
    return decisions, [
        ("an epoch", ""),
        ("epochs", str(config.epochs)),
        what,
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        ("decisions an update", f"{each} of all processes together, its effective batch"),
        (
            "micro-batches an update",
            f"{math.ceil(each / config.micro_batch_size)} of {config.micro_batch_size}, their gradients added up; "
            "shared among the processes",
        ),
        ("UNet passes an epoch", ", ".join(part for part in used if part)),
    ]


def count_passes(config: ImageConfig, decisions: int, steps: Tensor | None) -> Passes:
    """``decisions`` of an epoch, as ``describe_epoch`` counts them; the trained ``steps``, None if not known."""
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    drawn = guided * config.samples_per_epoch * config.sampler.steps
    seen = config.evaluation.pictures / config.evaluation.every if config.evaluation else 0
    evaluation = guided * config.sampler.steps * seen
    if isinstance(config, DDPOConfig):
        trained = guided * decisions
        reference = trained if config.kl_coef > 0 else 0
        looked = kl_probes(config, config.sampler.steps if steps is None else len(steps), decisions)
        probed = 2 * guided * min(looked, decisions)  # the policy and the reference
        decoded = config.samples_per_epoch + seen
        return Passes(drawn, reference, trained * config.inner_epochs, probed, evaluation, decoded)
    trained = 2 * decisions * (guided if config.target == "logged" else 1)
    # Where the reference is asked once for all inner epochs, so is the policy as it is at the epoch's beginning.
    looks = 2 if config.inner_epochs > 1 or config.old_refresh == "epoch" else 1
    decoded = seen + (config.samples_per_epoch if config.online else 0)
    drawn = drawn if config.online else 0
    return Passes(drawn, trained * looks, trained * config.inner_epochs, 0, evaluation, decoded)


def describe_nats(
    config: ImageConfig, schedule: DiffusionSchedule | None, steps: Tensor | None, dimensions: int | None
) -> Lines:
    """What the clip or beta is in nats, which needs the model's resolution and for beta its noise schedule."""
    if dimensions is None:
        return []
    if isinstance(config, DDPOConfig):
        if config.objective != "ratio":
            return []
        nats = clip_nats(config, dimensions)
        return [("clip in nats", f"{nats:.3g}, the joint bound on a decision's {dimensions} dimensions")]
    if config.beta is not None:
        return [("beta in nats", f"{config.beta:.3g}")]
    if config.beta_dpo is None or schedule is None or steps is None or len(steps) == 0:
        return []
    weight_sum = float(nats_per_squared_error(schedule)[steps].sum())
    beta = beta_in_nats(config.beta_dpo, dimensions=dimensions, weight_sum=weight_sum)
    return [("beta in nats", f"{beta:.3g}, which beta_dpo={config.beta_dpo:g} is at this resolution and schedule")]
