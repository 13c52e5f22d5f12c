"""Log-prob and exact KL of isotropic Gaussian actions, p(x_s | x_t) = N(mean, std² I).

[000] Y. Liu, "Rethinking the Reference model in RLHF", 2025, §3.1–3.2 and appendix B.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_choice, check_shapes

Reduction = Literal["sum", "mean"]
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _std_column(std: float | Tensor, like: Tensor, name: str) -> Tensor:
    """``std`` as a tensor that broadcasts against the (B, d) tensor ``like``: (1, 1) or (B, 1)."""
    if isinstance(std, Tensor):
        if std.ndim == 0 or tuple(std.shape) == (like.shape[0],):
            return std.to(like.dtype) if std.ndim == 0 else std.to(like.dtype).unsqueeze(1)
        raise ValueError(f"{name} must be a float, a 0-d tensor or ({like.shape[0]},), got shape {tuple(std.shape)}.")
    if not isinstance(std, (int, float)) or not std > 0:
        raise ValueError(f"{name}={std!r} is not a number > 0; leave deterministic steps out, they have no density.")
    return torch.full((1, 1), std, dtype=like.dtype, device=like.device)


def _flat(x: Tensor, name: str) -> Tensor:
    """``x`` (B, ...) as (B, d) in float32 or wider; d = 1 for (B,)."""
    if x.ndim == 0 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be (B, ...) with at least one entry per sample, got {tuple(x.shape)}.")
    return at_least_float32(x).reshape(x.shape[0], math.prod(x.shape[1:]))


def _reduce(x: Tensor, reduction: Reduction) -> Tensor:
    return x.sum(1) if reduction == "sum" else x.mean(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: float | Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Log-density of ``x`` under N(mean, std² I) in nats: ``-|x - mean|²/(2 std²) - d log(std) - d/2 log(2 pi)``.

    [000] eq. 19. ``reduction="mean"`` divides by d, so that exp of a difference of two such values is the d-th root of
    the density ratio. In float32 the sum resolves about 6e-8 of its size: 1e-3 nats at d = 16 384.

    Args:
        x: (B, ...) the actions; a gradient flows.
        mean: (B, ...) same shape as ``x``; a gradient flows.
        std: float, 0-d or (B,), in the unit of ``x``; a gradient flows. Must be > 0: a deterministic step has no
            density and callers leave it out. Only a Python number is checked; a tensor is not read.
        reduction: "sum" or "mean" over all dimensions but the first.

    Returns (B,) nats (per dimension with "mean"), float32 or wider. Raises ValueError on different shapes, on a ``std``
    that is none of the above, or on an unknown reduction.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    check_shapes(x=x, mean=mean)
    x, mean = _flat(x, "x"), _flat(mean, "mean")
    sigma = _std_column(std, x, "std")
    return _reduce(-0.5 * ((x - mean) / sigma).square() - sigma.log() - _HALF_LOG_2PI, reduction)


def gaussian_kl(
    mean: Tensor,
    mean_ref: Tensor,
    std: float | Tensor,
    std_ref: float | Tensor | None = None,
    *,
    reduction: Reduction = "sum",
) -> Tensor:
    """KL(N(mean, std² I) || N(mean_ref, std_ref² I)) in nats, exact.

    ``d (log(std_ref/std) + std²/(2 std_ref²) - 1/2) + |mean - mean_ref|²/(2 std_ref²)``, [000] eq. 70. Without
    ``std_ref`` both have ``std`` and only the last term remains (eq. 71); its gradient in ``mean`` is
    ``(mean - mean_ref)/std²`` (eq. 76).

    Args:
        mean: (B, ...) of the policy; a gradient flows.
        mean_ref: (B, ...) of the reference; a gradient flows (detach it, or compute it without one).
        std: float, 0-d or (B,), > 0, of the policy; a gradient flows. See ``gaussian_log_prob``.
        std_ref: the same for the reference; None means ``std``.
        reduction: "sum" or "mean" over all dimensions but the first.

    Returns (B,) nats (per dimension with "mean"), float32 or wider, never negative but for rounding. Raises ValueError
    on different shapes, on a std that is none of the above, or on an unknown reduction.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    check_shapes(mean=mean, mean_ref=mean_ref)
    mean, mean_ref = _flat(mean, "mean"), _flat(mean_ref, "mean_ref")
    sigma = _std_column(std, mean, "std")
    if std_ref is None:
        return _reduce(0.5 * ((mean - mean_ref) / sigma).square(), reduction)
    sigma_ref = _std_column(std_ref, mean, "std_ref")
    log_scale = (sigma / sigma_ref).log()
    # expm1 keeps the difference accurate when the two stds are close.
    scale_term = 0.5 * torch.expm1(2.0 * log_scale) - log_scale
    return _reduce(scale_term + 0.5 * ((mean - mean_ref) / sigma_ref).square(), reduction)
