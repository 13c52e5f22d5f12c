"""What an epoch of a recipe for images asks for, as its method says it: actions and passes of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from diffusion_align.diffusion.trainer import DenoisingConfig
from diffusion_align.training.context import EpochCost, Lines


def as_scheduler(settings: Mapping[str, Any]) -> SimpleNamespace:
    """A scheduler's configuration as a trainer finds it, with the defaults of its class."""
    import diffusers

    kind = getattr(diffusers, str(settings.get("_class_name")), diffusers.DDIMScheduler)
    return SimpleNamespace(config=dict(kind.from_config(dict(settings)).config))


def evaluated(config: DenoisingConfig) -> float:
    """Pictures of an evaluation, an epoch on average."""
    return config.evaluation.pictures / config.evaluation.every if config.evaluation else 0


def evaluation_passes(config: DenoisingConfig) -> float:
    """Forward passes of the network an epoch on average."""
    return (2 if config.sampler.guidance_scale > 1 else 1) * config.sampler.steps * evaluated(config)


def describe_epoch(config: DenoisingConfig, cost: EpochCost) -> Lines:
    """Lines about an epoch."""
    evaluation = evaluation_passes(config)
    used = [
        f"{cost.sampling} forward while sampling" if cost.sampling else "",
        f"{cost.reference} forward for the reference" if cost.reference else "",
        f"{cost.probed} forward to estimate kl_path" if cost.probed else "",
        f"{evaluation:g} forward for the evaluation" if evaluation else "",
        f"{cost.trained} forward and backward while training",
    ]
    # An update takes whole pictures or pairs; with settings that are not allowed there may be none.
    each = math.ceil(cost.units / config.updates_per_epoch) * (cost.actions // max(1, cost.units))
    return [
        ("an epoch", ""),
        ("epochs", str(config.epochs)),
        cost.what,
        ("optimizer steps an epoch", str(config.updates_per_epoch * config.inner_epochs)),
        ("decisions an update", f"{each} of all processes together, its effective batch"),
        (
            "micro-batches an update",
            f"{math.ceil(each / config.micro_batch_size)} of {config.micro_batch_size}, their gradients added up; "
            "shared among the processes",
        ),
        ("UNet passes an epoch", ", ".join(part for part in used if part)),
    ]
