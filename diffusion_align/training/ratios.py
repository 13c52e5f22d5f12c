"""What every method with importance ratios logs of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusion_align.estimators import clipped_ratios
from diffusion_align.estimators.policy import LOG_CLAMP


def ratio_statistics(
    ratio: Tensor,
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    clip_high: float,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Ratios, and which of them are clipped or clamped, of the actions that count, (n,) each, detached.

    ``ratio`` is ``importance_ratio``'s of ``logp`` and ``logp_old``; args as in ``clipped_surrogate``.
    """
    ratio = ratio.detach()
    low, high = clipped_ratios(ratio, clip=clip, clip_high=clip_high, advantages=advantages, mask=mask)
    statistics = {
        "ratio/mean": ratio,
        "ratio/min": ratio,
        "ratio/max": ratio,
        "ratio/clamped": ((logp.detach() - logp_old).abs() > LOG_CLAMP).float(),
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }
    return {name: value if mask is None else value[mask] for name, value in statistics.items()}


def first_pass_deviation(statistics: Mapping[str, float]) -> float:
    """How far from 1 the ratios of an update are that no weight has changed before; only rounding is right."""
    return max(statistics["ratio/max"] - 1, 1 - statistics["ratio/min"])
