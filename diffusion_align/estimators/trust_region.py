"""Trust regions that use the exact KL of a Gaussian action to the policy that sampled it.

With x = mean_old + std eps, delta = (mean - mean_old)/std and D = |delta|, over d dimensions:

    log rho = delta·eps - D²/2            in nats, or that over d where log-probs are means over dimensions
    KL(pi || pi_old) = D²/2

``E rho = 1`` for the joint ratio. The mean's is ``exp(-(D²/2d)(1 - 1/d)) < 1``: averaging the log-prob, not the policy,
shifts it to the left.

Shapes are written (B, T); every function here takes any one common shape, such as (N,). Results are float32 or wider.
Different shapes and a setting out of its range are a ``ValueError``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_shapes
from diffusion_align.estimators.policy import importance_ratio


def divergence_mask(logp: Tensor, logp_old: Tensor, advantages: Tensor, kl: Tensor, *, bound: float) -> Tensor:
    """Which actions count, (B, T) bool: all but those beyond the bound whose update would take them further.

    Dropped where ``KL(pi || pi_old) > bound`` and ``A (logp - logp_old) > 0``: the action has already become likelier
    and is good, or less likely and is bad. Flow-DPPO (arXiv:2606.11025). It takes the place of PPO's clip, which bounds
    the log-ratio of the one action that was sampled instead of the distance of the two policies.

    Args:
        logp: (B, T), the policy being trained, in nats or nats per dimension.
        logp_old: (B, T), the policy that sampled, in the unit of ``logp``.
        advantages: (B, T).
        kl: (B, T), KL(pi || pi_old) of each action.
        bound: in the unit of ``kl``, at least 0; 0 drops every action that has gone any way in its own direction.

    No gradient flows.
    """
    check_shapes(logp=logp, logp_old=logp_old, advantages=advantages, kl=kl)
    if not bound >= 0:
        raise ValueError(f"bound={bound} is not allowed: it must be at least 0.")
    with torch.no_grad():
        return ~((kl > bound) & (advantages * (logp - logp_old) > 0))


def guarded_ratio(logp: Tensor, logp_old: Tensor, kl: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's ratio, ``rho_g = exp(std (logp - logp_old + kl))``, no unit (Wang et al. 2025, arXiv:2510.22319).

    Its logarithm is ``std delta·eps / d`` with log-probs that are means over dimensions: the shift of the plain ratio
    is gone, and a step counts in proportion to its std. The gradient at equal policies is that of the plain ratio times
    std. Away from them it is ``rho_g eps·(d mean)/d``, the score at the old policy instead of the new one, so this is
    not an importance weight.

    Args:
        logp: (B, T), the policy being trained, in nats or nats per dimension; a gradient flows.
        logp_old: (B, T), the policy that sampled, in the unit of ``logp``; detached.
        kl: (B, T), KL(pi || pi_old) in the unit of ``logp``; a gradient flows.
        std: (B, T) of each action, in the unit of a latent; never the mean of a batch, whose steps differ. Detached.

    The exponent is clamped like that of ``importance_ratio``.
    """
    check_shapes(logp=logp, logp_old=logp_old, kl=kl, std=std)
    centred = at_least_float32(logp) - at_least_float32(logp_old).detach() + at_least_float32(kl)
    exponent = std.detach() * centred
    return importance_ratio(exponent, torch.zeros_like(exponent))
