"""Sampled KL(pi || pi_ref): the penalty in the reward. l = logp - logp_ref; nats throughout."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from diffusion_align.estimators._checks import check_choice, check_shapes, widen

_EXPONENT_BOUND = 20.0
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def kl_reward(
    logp_old: Tensor, logp_ref: Tensor, kind: Literal["k1", "k3"] = "k1", *, allow_biased: bool = False
) -> Tensor:
    """Penalty per decision in nats, detached, to *subtract* from the reward (times beta): ``reward - beta * penalty``.

    "k1": ``logp_old - logp_ref``; the policy gradient of this penalty is grad KL(pi||ref), exactly. "k3":
    ``exp(-l) - 1 + l`` with l = logp_old - logp_ref; it is never negative, but in the reward its expected gradient is
    grad KL(pi||ref) - grad KL(ref||pi), another direction. [002] "Rethinking KL Divergence in RLHF", 2025, §2–3 and
    table 1.

    Args:
        logp_old: (B, T) nats, the policy that sampled, not the one being trained ([002] eq. 39); detached.
        logp_ref: (B, T) nats, the reference; detached.
        kind: "k1" or "k3"; for "k3" an l below -20 counts as -20, which keeps float32 finite.
        allow_biased: True silences the warning for "k3".

    Returns:
        (B, T), float32 or wider, without a gradient.

    Raises:
        ValueError: on different shapes or an unknown kind.
    """
    check_choice("kind", kind, ("k1", "k3"))
    check_shapes(logp_old=logp_old, logp_ref=logp_ref)
    log_ratio = widen(logp_old).detach() - widen(logp_ref).detach()
    if kind == "k1":
        return log_ratio
    if not allow_biased:
        _warn_once(
            'kl_reward(kind="k3") is biased: its expected gradient is grad KL(pi||ref) - grad KL(ref||pi), not '
            'grad KL(pi||ref); use kind="k1", or allow_biased=True to keep it.'
        )
    log_ratio = log_ratio.clamp(min=-_EXPONENT_BOUND)
    return torch.expm1(-log_ratio) + log_ratio
