"""KL(pi || pi_ref) from samples: values, losses and the penalty in the reward. l = logp - logp_ref, r = exp(-l), nats.

Which estimator, where it stands and how an off-policy sample is weighed are three separate choices. s = grad logp:

======== ======================= ========================= ==================================
kind     value                   loss "direct", times s    loss "unbiased", times s
======== ======================= ========================= ==================================
k1       l                       1 (expectation 0)         w (l + 1), w = pi/pi_old
k2       l²/2                    l                         w l
k3, k4   r - 1 + l               1 - r (grad KL(ref||pi))  w l
k3_clip  min(r, clip) - 1 + l    1 - r; +1 where clipped   w (1 - min(r, clip)), still biased
======== ======================= ========================= ==================================

The expectation of w l s, and of w (l + 1) s, is grad KL(pi||ref). In the reward only k1 has that policy gradient. k4 =
where(k1 < 0, k3, min(k1, k3)) equals k3, because k3 < k1 wherever k1 > 0. [002] "Rethinking KL Divergence in RLHF",
2025, §2–3, table 1, appendices D and F; Schulman, "Approximating KL divergence", 2020.

Common arguments: ``kind``, above; ``clip`` > 0, the bound on r in k3_clip; ``mask``, bool like ``logp``: an entry that
does not count is 0 and has no gradient, whatever it holds. r is bounded by e^20 in float32 and e^600 in float64, w by
e^20: all stays finite for log-ratios up to 1e18 in size, and no gradient is zeroed. Different shapes, a mask that is
not bool, an unknown choice or a clip that is not > 0 are a ``ValueError``. Results are float32 or wider.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_choice, check_shapes, masked_fill_zero
from diffusion_align.estimators.policy import importance_ratio

Kind = Literal["k1", "k2", "k3", "k3_clip", "k4"]
KINDS: tuple[Kind, ...] = ("k1", "k2", "k3", "k3_clip", "k4")

_BIASES = {
    "k1 direct": "its expected gradient is 0, no constraint at all, and off-policy it pushes away from the sampler",
    "k2 direct": "samples of logp_old are not weighed by pi/pi_old",
    "k3 direct": "its expected gradient is grad KL(ref||pi), not grad KL(pi||ref)",
    "k3_clip direct": "its gradient changes sign where r > clip, just where the policy is furthest from the reference",
    "k3_clip unbiased": "clipping biases it whatever the weight: on-policy it is a clipped grad KL(ref||pi)",
    "k2 in the reward": "its expected gradient is the sum over actions of pi l²/2 s, not grad KL(pi||ref)",
    "k3 in the reward": "its expected gradient is grad KL(pi||ref) - grad KL(ref||pi), not grad KL(pi||ref)",
    "k3_clip in the reward": "its expected gradient is that of k3, grad KL(pi||ref) - grad KL(ref||pi), clipped",
}
_warned: set[str] = set()


def _warn_of_bias(form: str, remedy: str) -> None:
    form = form.replace("k4", "k3")
    if form in _BIASES and form not in _warned and not torch.compiler.is_compiling():
        _warned.add(form)
        sentence = f"KL as {form} is biased: {_BIASES[form]}; {remedy}, or pass allow_biased=True to keep it."
        warnings.warn(sentence, UserWarning, stacklevel=3)


def _log_ratio(logp: Tensor, logp_ref: Tensor, kind: str, clip: float, mask: Tensor | None) -> Tensor:
    check_choice("kind", kind, (*KINDS, "minimax"))
    check_shapes(logp=logp, logp_ref=logp_ref, mask=mask)
    if not clip > 0:
        raise ValueError(f"clip={clip} is not allowed: the bound on pi_ref/pi must be > 0.")
    return masked_fill_zero(at_least_float32(logp.detach()) - logp_ref.detach(), mask)


def _bound(x: Tensor) -> float:
    return 600.0 if x.dtype == torch.float64 else 20.0


def _ratio_minus_one(log_ratio: Tensor, kind: str, clip: float) -> Tensor:
    """``r - 1``, bounded; exact for small l too."""
    bound = _bound(log_ratio)
    return torch.expm1((-log_ratio).clamp(max=min(math.log(clip), bound) if kind == "k3_clip" else bound))


def _value(log_ratio: Tensor, kind: str, clip: float) -> Tensor:
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind != "k3_clip":
        log_ratio = log_ratio.clamp(min=-_bound(log_ratio))  # r - 1 and l bounded alike: k3 is never negative
    return _ratio_minus_one(log_ratio, kind, clip) + log_ratio


def _coefficient(log_ratio: Tensor, kind: str, clip: float) -> Tensor:
    return log_ratio if kind in ("k1", "k2") else -_ratio_minus_one(log_ratio, kind, clip)


def kl_value(
    logp: Tensor, logp_ref: Tensor, kind: Kind = "k1", *, clip: float = 10.0, mask: Tensor | None = None
) -> Tensor:
    """One-sample estimate of KL(pi||ref) per action, nats, detached: for logging and for stopping rules.

    Sampled from pi, k1 and k3 are unbiased and k2 and k3_clip are not. The variance of k3 is infinite when pi_ref²/pi
    is not integrable ([002] appendix D is such a case).

    Args:
        logp: (B, T) nats, the policy that sampled.
        logp_ref: (B, T) nats, the reference.

    Returns (B, T) without a gradient: use ``kl_loss`` to train.
    """
    check_choice("kind", kind, KINDS)
    return _value(_log_ratio(logp, logp_ref, kind, clip, mask), kind, clip)


def kl_gradient_coefficient(
    logp: Tensor, logp_ref: Tensor, kind: Kind | Literal["minimax"], *, clip: float = 10.0, mask: Tensor | None = None
) -> Tensor:
    """What multiplies grad logp when the KL is minimised, detached ([002] figure 1 and appendix F).

    "k1" (in the reward) and "k2" (as the loss): l. "k3", "k4": 1 - r. "k3_clip": 1 - min(r, clip), whose sign is right
    everywhere, unlike that of its autograd. "minimax": pi - pi_ref, in expectation the gradient of |pi - pi_ref|²/2.
    Subtracted from the reward (times beta) it gives the policy gradient of that loss; with "k3" that is [002] eq. 35.

    Args as ``kl_value``. Returns (B, T), no unit.
    """
    log_ratio = _log_ratio(logp, logp_ref, kind, clip, mask)
    if kind != "minimax":
        return _coefficient(log_ratio, kind, clip)
    bounded, bounded_ref = (at_least_float32(x).detach().clamp(max=_bound(log_ratio)) for x in (logp, logp_ref))
    return masked_fill_zero(bounded.exp() - bounded_ref.exp(), mask)


def kl_loss(
    logp: Tensor,
    logp_ref: Tensor,
    *,
    logp_old: Tensor | None = None,
    kind: Kind = "k2",
    gradient: Literal["unbiased", "direct"] = "unbiased",
    clip: float = 10.0,
    allow_biased: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """KL loss per action, unreduced: the weighted value in nats, with the gradient of the module's table.

    "unbiased" weighs each sample by w = ``importance_ratio(logp, logp_old)``, 1 without ``logp_old``: sg(w)·k2, and
    w·k1 and w·k3 differentiated through w too; the last has the gradient of sg(w)·k2 sample by sample. Their
    expectation over samples of ``logp_old`` is grad KL(pi||ref) exactly. "direct" is the autograd of the bare value, as
    [002] eq. 11, 24 and 30 write it. What an action changes in later ones is left out: see ``reward_to_go``.

    Args:
        logp: (B, T) nats, the policy being trained; the only input with a gradient.
        logp_ref: (B, T) nats, the reference.
        logp_old: (B, T) nats, the policy that sampled; None only if that is ``logp`` itself (on-policy).
        gradient: "unbiased" or "direct".
        allow_biased: True silences the warning that names a form's bias, once a form.

    Returns (B, T).
    """
    check_choice("kind", kind, KINDS)
    check_choice("gradient", gradient, ("unbiased", "direct"))
    check_shapes(logp=logp, logp_old=logp_old)
    log_ratio = _log_ratio(logp, logp_ref, kind, clip, mask)
    if not allow_biased and not (kind == "k2" and logp_old is None):
        _warn_of_bias(f"{kind} {gradient}", 'use kind="k2", gradient="unbiased"')
    value = _value(log_ratio, kind, clip)
    coefficient = _coefficient(log_ratio, kind, clip)
    if gradient == "unbiased":
        weight = torch.ones_like(value) if logp_old is None else importance_ratio(logp, logp_old, mask=mask).detach()
        if kind != "k3_clip":  # k3 + dk3/dl = l as well
            coefficient = log_ratio + 1.0 if kind == "k1" else log_ratio
        value, coefficient = weight * value, weight * coefficient
    elif kind == "k1":
        coefficient = torch.ones_like(value)
    elif kind == "k3_clip":
        coefficient = torch.where(-log_ratio > math.log(clip), 1.0, coefficient)
    path = masked_fill_zero(logp, mask)
    return value + coefficient * (path - path.detach())


def kl_reward(
    logp_old: Tensor,
    logp_ref: Tensor,
    kind: Kind = "k1",
    *,
    clip: float = 10.0,
    allow_biased: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Penalty per action in nats, detached, to *subtract* from the reward (times beta): ``reward - beta * penalty``.

    k1, ``logp_old - logp_ref`` ([002] eq. 20), has the policy gradient grad KL(pi||ref) exactly; over several updates
    on one batch, weighed by pi/pi_old, it is grad KL(pi||ref) - grad KL(pi||old) ([002] eq. 39). The others are biased.

    Args:
        logp_old: (B, T) nats, the policy that sampled, not the one being trained ([002] eq. 39); detached.
        logp_ref: (B, T) nats, the reference; detached.
        allow_biased: as in ``kl_loss``.

    Returns (B, T) without a gradient.
    """
    if not allow_biased:
        _warn_of_bias(f"{kind} in the reward", 'use kind="k1"')
    return kl_value(logp_old, logp_ref, kind, clip=clip, mask=mask)
