"""The scheduler of flow-matching models, diffusers' ``FlowMatchEulerDiscreteScheduler``, and how pipelines set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_align.errors import UserError


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is that of flow matching by Euler steps."""
    named = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    return "beta_schedule" not in config and "shift" in config and named == "FlowMatchEulerDiscreteScheduler"


def dynamic_shift(config: Any, tokens: int | None) -> float | None:
    """mu, by which a scheduler of this ``config`` shifts its sigmas for an image of so many tokens; None if statically.

    Linear in their number (Esser et al. 2024, arXiv:2403.03206, section 5.3.2, as FLUX applies it).

    Raises:
        UserError: the number is not known.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    if tokens is None:
        raise UserError(
            "the scheduler shifts its sigmas by the size of the image (use_dynamic_shifting), for which the number of "
            "image tokens must be known: give the model's family image_tokens"
        )
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    lowest, highest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (highest - lowest) / (most - fewest)
    mu: float = tokens * slope + (lowest - slope * fewest)
    return mu


def set_spaced_timesteps(scheduler: Any, steps: int, tokens: int | None = None) -> None:
    """As Stable Diffusion 3 does: evenly spaced between the scheduler's own ends, and then shifted.

    With a static shift the last end is shifted already, and so the last step begins near the data.
    """
    scheduler.set_timesteps(steps, mu=dynamic_shift(scheduler.config, tokens))


def set_linear_timesteps(scheduler: Any, steps: int, tokens: int | None = None) -> None:
    """As FLUX and most others do: sigmas 1, ..., 2/N, 1/N, and then shifted."""
    import numpy as np

    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=dynamic_shift(scheduler.config, tokens))
