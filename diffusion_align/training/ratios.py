"""What every method with importance ratios logs of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusion_align.estimators import clip_fractions, importance_ratio
from diffusion_align.estimators.policy import LOG_CLAMP, Level


def ratio_statistics(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    clip_high: float,
    mask: Tensor | None = None,
    level: Level = "decision",
) -> dict[str, Tensor]:
    """Ratios, and which of them are clipped or clamped, of the decisions that count, (n,) each, detached.

    Args as in ``clipped_surrogate``.
    """
    logp = logp.detach()
    ratio = importance_ratio(logp, logp_old, mask=mask, level=level)
    low, high = clip_fractions(
        logp, logp_old, clip=clip, clip_high=clip_high, advantages=advantages, mask=mask, level=level
    )
    statistics = {
        "ratio/mean": ratio,
        "ratio/min": ratio,
        "ratio/max": ratio,
        "ratio/clamped": ((logp - logp_old).abs() > LOG_CLAMP).float(),
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }
    return {name: value if mask is None else value[mask] for name, value in statistics.items()}


def first_pass_deviation(statistics: Mapping[str, float]) -> float:
    """How far from 1 the ratios of an update are that no weight has changed before; only rounding is right."""
    return max(statistics["ratio/max"] - 1, 1 - statistics["ratio/min"])
