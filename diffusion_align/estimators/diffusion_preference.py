"""Diffusion-DPO on one denoising step of a chosen (w) and a rejected (l) sample, noised alike.

Errors are in nats: err = |x_s - mu|²/(2 std²), (B,), summed over dimensions; x_s is what the step should have given, mu
the mean predicted by the policy, by the reference (``_ref``) or by the policy some updates ago (``_old``). The loss of
both works with errors of any other common scale too, if ``beta`` makes up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_shapes
from diffusion_align.estimators.preference import Beta, checked_beta, dpo_loss


def diffusion_dpo_loss(
    err_w: Tensor, err_w_ref: Tensor, err_l: Tensor, err_l_ref: Tensor, beta: Beta, *, label_smoothing: float = 0.0
) -> Tensor:
    """Original: ``-log sigmoid(-beta [(err_w - err_w_ref) - (err_l - err_l_ref)])``, (B,); ln 2 at the reference.

    It is ``dpo_loss`` of the log-ratios ``err_ref - err``. Wallace et al. 2023 (arXiv:2311.12908), eq. 14; [000] eq.
    34, whose T omega(lambda) turns squared errors of the noise into these nats.

    Args:
        err_w, err_l: (B,); a gradient flows, and through a ``beta`` that has one.
        err_w_ref, err_l_ref: (B,); detached.
        beta: float or (B,), > 0, per nat.
        label_smoothing: see ``dpo_loss``.

    Raises ValueError on different shapes or a setting out of its range.
    """
    check_shapes(ndim=1, err_w=err_w, err_w_ref=err_w_ref, err_l=err_l, err_l_ref=err_l_ref)
    chosen = at_least_float32(err_w_ref).detach() - at_least_float32(err_w)
    rejected = at_least_float32(err_l_ref).detach() - at_least_float32(err_l)
    return dpo_loss(chosen, rejected, beta, label_smoothing=label_smoothing)


def corrected_diffusion_dpo_loss(
    err_w: Tensor, err_l: Tensor, kl_old_w: Tensor, kl_old_l: Tensor, beta: Beta
) -> Tensor:
    """[000] eq. 36 to the letter: ``beta sg(sigmoid(beta kl_old_l - beta kl_old_w)) (err_w - err_l)``, (B,).

    kl_old = |mu_old - mu_ref|²/(2 std²). At the reference the gradient is that of ``diffusion_dpo_loss``. Afterwards
    the weight cannot tell a change that favours the winner from one that does not, and the loss has no minimum: it
    needs ``lam (KL_w + KL_l)/2`` added, lam > 2 beta if old follows the policy. With ``err_ref - err_old`` in place of
    ``kl_old`` the gradient is that of ``diffusion_dpo_loss`` where old is the policy itself.

    Args:
        err_w, err_l: (B,); a gradient flows, and through a ``beta`` that has one.
        kl_old_w, kl_old_l: (B,) nats; detached.
        beta: float or (B,), > 0.

    Raises ValueError on different shapes or a beta that is not > 0.
    """
    check_shapes(ndim=1, err_w=err_w, err_l=err_l, kl_old_w=kl_old_w, kl_old_l=kl_old_l)
    beta = checked_beta(beta, err_w)
    weight = torch.sigmoid(beta * (at_least_float32(kl_old_l) - at_least_float32(kl_old_w))).detach()
    return beta * weight * (at_least_float32(err_w) - at_least_float32(err_l))


def beta_in_nats(beta_dpo: float, *, dimensions: int, weight_sum: float) -> float:
    """``beta_dpo / (2 dimensions weight_sum)``: Diffusion-DPO's beta (2000–5000, mean squared error, factor ½) in nats.

    A step's error in nats is c²/(2 std²) times the summed squared error of the noise; ``weight_sum`` is the sum of that
    factor over all training steps, for which Diffusion-DPO takes one constant. ``dimensions``: d of a latent.
    Raises ValueError unless all three are > 0.
    """
    if not (beta_dpo > 0 and dimensions > 0 and weight_sum > 0):
        raise ValueError(f"{beta_dpo=}, {dimensions=}, {weight_sum=} is not allowed: all must be > 0.")
    return beta_dpo / (2 * dimensions * weight_sum)
