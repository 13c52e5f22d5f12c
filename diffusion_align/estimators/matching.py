"""Forward-process losses: a sample x_0 is noised to x_t, and its reward weighs the matching error of the network there.

``output`` is what the network predicts at x_t (eps, v, x_0 or a flow velocity), (B, ...); ``output_old`` is that of the
policy that sampled, ``output_ref`` of the reference; ``target`` is what it should have been. err, (B,), is the error of
an output; errors of any common scale do, such as nats. A are advantages.

At equal policies the losses of NFT (times c), AWM, DGPO (times 2) and CRD have one gradient, that of ``A err``, if A is
centred in its group and within ±c. They differ in what follows. AWM needs no function here: it is
``clipped_surrogate(-err, -err_old, A, clip=...)`` (Xue et al. 2025, arXiv:2509.25050).

Losses are unreduced, (B,), float32 or wider. Different shapes and a setting out of its range are a ``ValueError``.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffusion_align.estimators.masked import at_least_float32, check_shapes, group_indices
from diffusion_align.estimators.preference import checked_beta


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _check_samples(**tensors: Tensor) -> None:
    check_shapes(ndim=None, **tensors)
    for name, x in tensors.items():
        if x.ndim < 2:
            raise ValueError(f"{name} must be (B, ...) with at least one dimension of its own, got {tuple(x.shape)}.")


def matching_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, (B,), a mean over all dimensions but the first.

    Args:
        output: (B, ...); the only input with a gradient.
        target: (B, ...), in the unit of ``output``; detached.
    """
    _check_samples(output=output, target=target)
    return _mean((at_least_float32(output) - at_least_float32(target).detach()).square())


def reward_probability(advantages: Tensor, clip: float) -> Tensor:
    """NFT's probability that a sample is a good one, ``r = 1/2 + clip(A, ±c)/2c`` in [0, 1]; any shape, no gradient.

    Args:
        advantages: any shape, no unit.
        clip: c > 0, the advantage from which a sample counts as good for sure.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} is not allowed: it must be > 0 and finite.")
    return 0.5 + at_least_float32(advantages).detach().clamp(-clip, clip) / (2 * clip)


def _nft_terms(
    output: Tensor, output_old: Tensor, target: Tensor, reward_probability: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Old output as it is given, its change u and r; the arguments of NFT checked."""
    _check_samples(output=output, output_old=output_old, target=target)
    if reward_probability.shape != output.shape[:1]:
        raise ValueError(
            f"reward_probability must have the shape {tuple(output.shape[:1])}, got {tuple(reward_probability.shape)}."
        )
    r = at_least_float32(reward_probability).detach()
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError("reward_probability must lie in [0, 1]: take it from the function of that name.")
    checked_beta(float(beta), r)
    old = output_old.detach()
    return old, at_least_float32(output) - at_least_float32(old), r


def nft_loss(output: Tensor, output_old: Tensor, target: Tensor, reward_probability: Tensor, beta: float) -> Tensor:
    """DiffusionNFT: ``(r err(old + beta u) + (1 - r) err(old - beta u))/beta`` with u = output - old, (B,).

    Zheng et al. 2025 (arXiv:2509.16117) without its adaptive weight. Divided by beta, the gradient at output = old is
    the same for every beta: that of ``(2r - 1) err``. With r of ``reward_probability(A, c)``, c times this loss has
    there the gradient of ``clip(A, ±c) err``. The minimiser is ``u = E[(2r - 1)(target - old) | x_t]/beta``, so a small
    beta goes beyond the samples.

    Args:
        output: (B, ...); the only input with a gradient.
        output_old, target: (B, ...), in the unit of ``output``; detached.
        reward_probability: (B,), r in [0, 1]; detached.
        beta: > 0; the strength of the trust region around old, see ``nft_loss_as_trust_region``.
    """
    old, change, r = _nft_terms(output, output_old, target, reward_probability, beta)
    better, worse = (matching_error(old + sign * beta * change, target) for sign in (1, -1))
    return (r * better + (1 - r) * worse) / beta


def nft_loss_as_trust_region(
    output: Tensor, output_old: Tensor, target: Tensor, reward_probability: Tensor, beta: float
) -> Tensor:
    """``nft_loss`` as ``beta |u|² - 2 (2r - 1) u·e + |e|²/beta`` with e = target - old; means over dimensions, (B,).

    A policy gradient, a quadratic trust region around old and a constant, so it is bounded below for every r, where
    ``A err`` with A < 0 is not. Args as in ``nft_loss``.
    """
    old, change, r = _nft_terms(output, output_old, target, reward_probability, beta)
    rest = at_least_float32(target).detach() - old
    return beta * _mean(change.square()) - 2 * (2 * r - 1) * _mean(change * rest) + _mean(rest.square()) / beta


def _group_mean(x: Tensor, group_ids: Tensor) -> Tensor:
    """(B,): the mean of the group of each x, for whole groups."""
    index, counts = group_indices(group_ids)
    sizes = sorted(set(counts.tolist()))
    if len(sizes) > 1 or sizes == [1]:
        raise ValueError(
            f"groups of {' and '.join(map(str, sizes))} sample(s) are incomplete: all must have one size, at least 2; "
            "keep the samples of a group in one batch."
        )
    if not sizes:
        return x
    # Sorted rows rather than index_add, whose order of summation on a GPU differs from run to run.
    means = x[index.argsort(stable=True).to(x.device)].view(-1, *sizes).mean(1)
    return means[index.to(x.device)]


def group_preference_weights(
    errors: Tensor, errors_ref: Tensor, advantages: Tensor, group_ids: Tensor, beta: float
) -> Tensor:
    """DGPO's weight of the group of each sample, ``sigmoid(sum over the group of A beta (err - err_ref) / G)``, (B,).

    The DGPO loss is ``weight A err``: the gradient of ``-log sigmoid(-that sum)``, a DPO loss of the good against the
    bad samples of a group, times G/beta. At the reference the weight is 1/2. Luo et al. 2025 (arXiv:2510.08425).

    Args:
        errors, errors_ref: (B,) matching errors of the policy and of the reference, on the same x_t.
        advantages: (B,), best centred in their groups.
        group_ids: (B,) integers; equal ids form a group. All groups must be whole: they have one size G > 1.
        beta: > 0, per unit of the error.

    No gradient flows.
    """
    check_shapes(ndim=1, errors=errors, errors_ref=errors_ref, advantages=advantages, group_ids=group_ids)
    change = at_least_float32(errors).detach() - at_least_float32(errors_ref).detach()
    checked_beta(float(beta), change)
    return _group_mean(at_least_float32(advantages).detach() * beta * change, group_ids).sigmoid()


def centred_reward_loss(log_ratio: Tensor, advantages: Tensor, group_ids: Tensor, beta: float) -> Tensor:
    """CRD: ``(beta R - A)²/2 beta``, (B,), with R, the log-ratio, and A both centred in their group.

    The minimum has R = A/beta + const, the optimum of the reward with a KL of weight beta to the old policy; centring
    removes the constant, which nobody knows. Divided by 2 beta, the gradient at R = 0 is that of ``-A log_ratio`` for
    every beta. Zhu et al. 2026 (arXiv:2603.14128).

    Args:
        log_ratio: (B,), ``err_old - err`` in nats or in another unit of the error; the only input with a gradient. That
            of the group's mean cancels in the sum over a group.
        advantages: (B,); detached.
        group_ids: (B,) integers, as in ``group_preference_weights``.
        beta: > 0, in the unit of A per unit of ``log_ratio``.
    """
    check_shapes(ndim=1, log_ratio=log_ratio, advantages=advantages, group_ids=group_ids)
    checked_beta(float(beta), log_ratio)
    gap = beta * at_least_float32(log_ratio) - advantages.detach()
    return (gap - _group_mean(gap, group_ids)).square() / (2 * beta)


def likelihood_weight(t: Tensor) -> Tensor:
    """``(1 - t)/t``, the weight of a flow velocity's squared error at x_t = (1 - t) x_0 + t eps, any shape.

    With it, and t uniform, the summed error's gradient is minus that of log p(x_0), in nats (exactly for a Gaussian
    model's mean); 0 at pure noise and unbounded at t = 0. ``nats_per_squared_error`` is its counterpart for the steps
    of a schedule. Args: t, in (0, 1].
    """
    if not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError("t must lie in (0, 1]: the weight is unbounded at 0.")
    t = at_least_float32(t)
    return (1 - t) / t
