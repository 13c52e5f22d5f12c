"""Policy-gradient losses per action, unreduced, for Gaussian and categorical actions alike.

Shapes are written (B, T); every function here takes any one common shape, such as flattened pairs (N,), except
``level="sequence"``, which needs (B, T). ``mask`` is bool of that shape; an entry that does not count has loss 0 and no
gradient, whatever it holds. Results are (B, T), float32 or wider. Different shapes, a mask that is not bool and a
setting out of its range are a ``ValueError``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_align.estimators.masked import (
    at_least_float32,
    check_choice,
    check_shapes,
    masked_fill_zero,
    masked_mean,
)

Level = Literal["action", "sequence"]
_LEVEL_ALIASES: dict[str, Level] = {"decision": "action", "token": "action"}
LOG_CLAMP = 20.0  # nats; how many log-ratios are beyond it is for the caller to log


class _StraightThroughClamp(torch.autograd.Function):
    """``clamp(x, -bound, bound)`` with the gradient of the identity, for infinite ``x`` too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        return x.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _check_clip(clip: float, clip_high: float | None) -> tuple[float, float]:
    high = clip if clip_high is None else clip_high
    if not clip >= 0 or not high >= 0:
        raise ValueError(f"clip={clip}, clip_high={clip_high} is not allowed: both must be at least 0.")
    return 1.0 - clip, 1.0 + high


def importance_ratio(
    logp: Tensor,
    logp_old: Tensor,
    *,
    mask: Tensor | None = None,
    level: Level = "action",
    log_clamp: float = LOG_CLAMP,
) -> Tensor:
    """Ratio ``rho = exp(logp - logp_old)`` of the trained to the sampling policy, no unit.

    "action": one ratio per action, [002] eq. 74 (PPO). "sequence": ``rho = exp(mean_t(logp - logp_old))`` over the
    actions that count, so length-normalised, and the same at each t of its row (GSPO, arXiv:2507.18071, eq. 7).

    The exponent is clamped to ±``log_clamp`` straight through: the value is exp(clamped), the gradient that value times
    the gradient of the log-ratio, so an entry beyond the clamp still moves.

    Args:
        logp: (B, T) nats; the only input with a gradient.
        logp_old: (B, T) nats, the behaviour policy; detached.
        level: "action" or "sequence".
        log_clamp: bound on the log-ratio in nats, > 0 and at most 80.

    Masked entries are 1 ("action") or their row's ratio ("sequence").
    """
    level = _LEVEL_ALIASES.get(level, level)
    check_choice("level", level, ("action", "sequence"))
    check_shapes(ndim=2 if level == "sequence" else None, logp=logp, logp_old=logp_old, mask=mask)
    if not 0 < log_clamp <= 80:
        raise ValueError(f"log_clamp={log_clamp} is not allowed: it must be > 0 and at most 80.")
    log_ratio = masked_fill_zero(at_least_float32(logp) - at_least_float32(logp_old).detach(), mask)
    if level == "sequence":
        counts = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
        log_ratio = masked_mean(log_ratio, counts, 1).unsqueeze(1).expand(logp.shape)
    return torch.exp(_StraightThroughClamp.apply(log_ratio, log_clamp))


def clipped_surrogate(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    level: Level = "action",
) -> Tensor:
    """PPO-2 clipped loss per action, unreduced: ``-min(rho*A, clamp(rho, 1-clip, 1+clip_high)*A)``.

    ``rho`` is ``importance_ratio``. Schulman et al. 2017 (arXiv:1707.06347), eq. 7, negated; [000] eq. 26. With
    ``dual_clip = c`` the loss of a negative advantage is at most ``-c*A`` (Ye et al. 2020, arXiv:1912.09729, eq. 5).

    Args:
        logp: (B, T) nats, the policy being trained; the only input with a gradient.
        logp_old: (B, T) nats, the policy that sampled; detached.
        advantages: (B, T), no unit; detached.
        clip: width of the trust region below 1, at least 0.
        clip_high: width above 1; None means ``clip``.
        dual_clip: None, or a bound > 1 on the ratio where the advantage is negative.
        level: "action" or "sequence", see ``importance_ratio``.
    """
    check_shapes(logp=logp, logp_old=logp_old, advantages=advantages, mask=mask)
    ratio = importance_ratio(logp, logp_old, mask=mask, level=level)
    return clipped_ratio_loss(ratio, advantages, clip=clip, clip_high=clip_high, dual_clip=dual_clip, mask=mask)


def clipped_ratio_loss(
    ratio: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``clipped_surrogate`` of a ratio that is known: (B, T) of ``importance_ratio``; the only input with a gradient.

    Other args as there.
    """
    check_shapes(ratio=ratio, advantages=advantages, mask=mask)
    low, high = _check_clip(clip, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} is not allowed: it must be > 1, or None to switch it off.")
    advantages = masked_fill_zero(advantages.detach(), mask)
    free, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    # Not torch.minimum: it halves the gradient at a tie, which is every first pass if clip is 0.
    loss = -torch.where(clipped < free, clipped, free)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def clip_fractions(
    logp: Tensor,
    logp_old: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    level: Level = "action",
) -> tuple[Tensor, Tensor]:
    """Which actions the clip takes out, for logging: ``(low, high)``, average them for the fractions.

    ``low``: rho < 1 - clip and A < 0; ``high``: rho > 1 + clip_high and A > 0. These are the entries that the surrogate
    gives no gradient, but for those that only ``dual_clip`` takes out. Without ``advantages`` the sign is not checked
    for. ``low | high`` is the whole clipped region.

    Args as in ``clipped_surrogate``; no gradient flows. Returns two bool tensors (B, T); False where masked.
    """
    check_shapes(logp=logp, logp_old=logp_old, advantages=advantages, mask=mask)
    ratio = importance_ratio(logp.detach(), logp_old, mask=mask, level=level)
    return clipped_ratios(ratio, clip=clip, clip_high=clip_high, advantages=advantages, mask=mask)


def clipped_ratios(
    ratio: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``clip_fractions`` of a ratio that is known: (B, T) of ``importance_ratio``. Other args as there."""
    check_shapes(ratio=ratio, advantages=advantages, mask=mask)
    bound_low, bound_high = _check_clip(clip, clip_high)
    low, high = ratio < bound_low, ratio > bound_high
    if advantages is not None:
        low, high = low & (advantages < 0), high & (advantages > 0)
    return (low, high) if mask is None else (low & mask, high & mask)


def score_function_loss(logp: Tensor, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """REINFORCE loss per action, unreduced: ``-A * logp``; its gradient is the estimate, its value means nothing.

    [000] eq. 22–24, where the terms of ``logp`` without a gradient are dropped.

    Args:
        logp: (B, T) nats; the only input with a gradient.
        advantages: (B, T); detached.
    """
    check_shapes(logp=logp, advantages=advantages, mask=mask)
    return -masked_fill_zero(advantages.detach(), mask) * masked_fill_zero(logp, mask)


def value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, *, clip: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Squared error of the value per action, halved, unreduced: ``(V - R)²/2``.

    With ``clip`` it is ``max((V - R)², (V_c - R)²)/2`` with ``V_c = V_old + clamp(V - V_old, -clip, clip)``, as in
    PPO's reference implementation (described by Engstrom et al. 2020, arXiv:2005.12729).

    Args:
        values: (B, T), in the unit of the return; the only input with a gradient.
        values_old: (B, T), the values at sampling time; detached, unused without ``clip``.
        returns: (B, T); detached.
        clip: None, or the allowed change in the unit of the return, at least 0.
    """
    check_shapes(values=values, values_old=values_old, returns=returns, mask=mask)
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip={clip} is not allowed: it must be at least 0, or None to switch it off.")
    values, values_old, returns = (masked_fill_zero(x, mask) for x in (values, values_old.detach(), returns.detach()))
    error = (values - returns).square()
    if clip is not None:
        clipped = values_old + (values - values_old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error
