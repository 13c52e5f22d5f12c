"""Preference losses: DPO and its family, the trajectory form, rejection sampling, Bradley–Terry.

A log-ratio is log pi - log pi_ref of a whole sample, summed over its actions, in nats; ``h`` is the chosen one's
minus the rejected one's. Arguments are (B,) unless stated otherwise; a gradient flows through all that have one, a
``beta`` too. ``beta`` is a float or (B,), > 0 (only a float is checked). Losses are (B,), unreduced, float32 or wider.
Every function raises a ``ValueError`` on shapes that do not fit and on a setting out of its range. [001] F. Sun,
"Direct preference optimisation", 2025; [004] notes on DPO.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_align.estimators.masked import at_least_float32, check_shapes, masked_fill_zero, masked_mean

Beta = float | Tensor


def checked_beta(beta: Beta, like: Tensor) -> Beta:
    if isinstance(beta, Tensor):
        if beta.ndim == 0 or beta.shape == like.shape[:1]:
            return at_least_float32(beta)
        raise ValueError(f"beta must be a float or {tuple(like.shape[:1])}, got shape {tuple(beta.shape)}.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} is not allowed: it must be > 0.")
    return beta


def _gap(chosen: Tensor, rejected: Tensor) -> Tensor:
    check_shapes(ndim=1, chosen=chosen, rejected=rejected)
    return at_least_float32(chosen) - at_least_float32(rejected)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood in nats that ``chosen`` beats ``rejected``: ``-log sigmoid(chosen - rejected)``.

    Of two scores (log-strengths); Bradley & Terry 1952. [004] prints ``-sigmoid(rejected - chosen)``, which trains
    towards the loser.
    """
    return -logsigmoid(_gap(chosen, rejected))


def dpo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    beta: Beta,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DPO, ``-log sigmoid(beta h)``; with M rejected ``-log softmax(beta log-ratios)[chosen]``. ln(1 + M) at the start.

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; [001] eq. 8 and, for many rejected, eq. 17. Label smoothing gives
    the rejected that much of the target, in equal parts (conservative DPO for M = 1).

    Args:
        rejected_logratio: (B,) or (B, M).
        label_smoothing: probability that a label is wrong, in [0, 1/2].
        mask: bool like ``rejected_logratio``, which of them count, whatever the others hold; a row without any is 0.
    """
    check_shapes(rejected_logratio=rejected_logratio, mask=mask)
    rejected = at_least_float32(rejected_logratio.unsqueeze(1) if rejected_logratio.ndim == 1 else rejected_logratio)
    if chosen_logratio.ndim != 1 or rejected.ndim != 2 or len(rejected) != len(chosen_logratio):
        shapes = f"{tuple(chosen_logratio.shape)} and {tuple(rejected_logratio.shape)}"
        raise ValueError(f"expected chosen_logratio (B,) and rejected_logratio (B,) or (B, M), got {shapes}.")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is not allowed: it must lie in [0, 0.5].")
    counts = torch.ones_like(rejected, dtype=torch.bool) if mask is None else mask.reshape(rejected.shape)
    beta = checked_beta(beta, chosen_logratio)
    beta = beta.unsqueeze(1) if isinstance(beta, Tensor) and beta.ndim else beta
    margins = beta * (masked_fill_zero(rejected, counts) - at_least_float32(chosen_logratio).unsqueeze(1))
    # Not log_softmax: its float32 result loses the gradient of a chosen one that is well ahead.
    loss = -logsigmoid(-margins.masked_fill(~counts, -math.inf).logsumexp(1))
    return loss - label_smoothing * masked_mean(margins, counts, 1) if label_smoothing else loss


def robust_dpo_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, beta: Beta, *, label_smoothing: float = 0.0
) -> Tensor:
    """rDPO: ``((1 - eps) L(h) - eps L(-h)) / (1 - 2 eps)`` with L(h) = -log sigmoid(beta h), eps = ``label_smoothing``.

    Where labels are swapped with probability eps, its expectation is the DPO loss of the true labels; that of
    ``dpo_loss(label_smoothing=eps)`` is not. It has no lower bound: for h -> inf it falls like -eps beta h/(1 - 2 eps).
    Chowdhury et al. 2024 (arXiv:2403.00409).

    Args:
        label_smoothing: probability that a label is wrong, in [0, 1/2).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} is not allowed: it must lie in [0, 0.5).")
    margin = checked_beta(beta, chosen_logratio) * _gap(chosen_logratio, rejected_logratio)
    loss = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return loss / (1 - 2 * label_smoothing)


def ipo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: Beta) -> Tensor:
    """IPO: ``(h - 1/(2 beta))²``. Azar et al. 2023 (arXiv:2310.12036), eq. 17; [001] eq. 50."""
    return (_gap(chosen_logratio, rejected_logratio) - 0.5 / checked_beta(beta, chosen_logratio)).square()


def hinge_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: Beta) -> Tensor:
    """Hinge: ``max(0, 1 - beta h)``. SLiC with a reference, as in Liu et al. 2023 (arXiv:2309.06657), eq. 8."""
    return (1.0 - checked_beta(beta, chosen_logratio) * _gap(chosen_logratio, rejected_logratio)).relu()


def kto_loss(
    logratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: Beta,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, unpaired: ``w_D (1 - sigmoid(beta (l - z)))`` if desirable, else ``w_U (1 - sigmoid(beta (z - l)))``.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8; [001] eq. 51 multiplies by beta twice.

    Args:
        logratio: l, of samples with a label each.
        desirable: bool.
        reference_point: z, 0-d or (B,): the mean log-ratio of *mismatched* prompts and samples, an estimate of the KL;
            detached, and raised to 0 if negative.
    """
    check_shapes(ndim=1, logratio=logratio, desirable=desirable)
    if desirable.dtype != torch.bool or reference_point.shape not in ((), logratio.shape):
        found = f"{desirable.dtype} and {tuple(reference_point.shape)}"
        raise ValueError(f"expected a bool desirable and a reference_point 0-d or like logratio, got {found}.")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"{desirable_weight=}, {undesirable_weight=} is not allowed: both must be at least 0.")
    baseline = at_least_float32(reference_point).detach().clamp(min=0)
    reward = checked_beta(beta, logratio) * (at_least_float32(logratio) - baseline)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward))


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, beta: Beta, *, margin: float = 0.0) -> Tensor:
    """SimPO, without a reference: ``-log sigmoid(beta (chosen_logp - rejected_logp) - margin)``.

    The log-probs are *means* over tokens. Meng et al. 2024 (arXiv:2405.14734), eq. 6; [001] eq. 52.
    """
    return -logsigmoid(checked_beta(beta, chosen_logp) * _gap(chosen_logp, rejected_logp) - margin)


def orpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, weight: float = 0.1) -> Tensor:
    """ORPO: ``-chosen_logp - weight log sigmoid(log odds(chosen) - log odds(rejected))``, odds = p/(1 - p).

    The log-probs are *means* over tokens, <= 0; the odds count them as -1e-6 at most, so that they stay finite, without
    stopping the gradient. Hong et al. 2024 (arXiv:2403.07691), eq. 6–7; [001] eq. 53.
    """
    if not weight >= 0:
        raise ValueError(f"weight={weight} is not allowed: it must be at least 0.")
    odds = []
    for logp in (at_least_float32(chosen_logp), at_least_float32(rejected_logp)):
        below_zero = torch.where(logp < -1e-6, logp, logp - logp.detach() - 1e-6)
        odds.append(logp - torch.log(-torch.expm1(below_zero)))
    return -at_least_float32(chosen_logp) - weight * logsigmoid(_gap(*odds))


def trajectory_dpo_loss(
    first_logratio: Tensor,
    second_logratio: Tensor,
    labels: Tensor,
    beta: Beta,
    *,
    gamma: float = 1.0,
    first_mask: Tensor | None = None,
    second_mask: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of ``sigmoid(beta (sum_t gamma^t l_t of the first - the same of the second))``, nats.

    [001] eq. 46–47 (contrastive preference learning, arXiv:2310.13639). gamma = 1 and label 1 over one action is DPO.

    Args:
        first_logratio, second_logratio: (B, T1), (B, T2), log-ratios of single actions.
        labels: (B,) in [0, 1]: 1 if the first is preferred, 0 the second, 1/2 a tie.
        gamma: discount in [0, 1]; t counts the actions that count.
        first_mask, second_mask: bool like the log-ratios; what the others hold does not matter.
    """
    seen = labels.device.type == "cpu"  # elsewhere the test would make the device wait
    if not 0 <= gamma <= 1 or (seen and not bool(((labels >= 0) & (labels <= 1)).all())):
        raise ValueError(f"gamma={gamma} and all labels must lie in [0, 1].")
    scores = []
    for logratio, mask in ((first_logratio, first_mask), (second_logratio, second_mask)):
        check_shapes(ndim=2, logratio=logratio, mask=mask)
        counts = torch.ones_like(logratio, dtype=torch.bool) if mask is None else mask
        time = (counts.cumsum(1) - 1).clamp(min=0)  # of the actions that count
        scores.append((masked_fill_zero(logratio, counts) * gamma ** time.to(at_least_float32(logratio).dtype)).sum(1))
    check_shapes(ndim=1, labels=labels, first=scores[0], second=scores[1])
    reward = checked_beta(beta, labels) * (scores[0] - scores[1])
    return -at_least_float32(labels) * logsigmoid(reward) - (1 - at_least_float32(labels)) * logsigmoid(-reward)


def rso_accept(rewards: Tensor, beta: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Which of N candidates per prompt to keep, (..., N) bool: each with probability ``exp((r - max r)/beta)``.

    The best is always kept. For many candidates from pi_ref those kept are samples of pi_ref exp(r/beta)/Z, the
    optimum; for few they fall short of it. Pairs of them go into any pair loss. Liu et al. 2023 (arXiv:2309.06657).

    Args:
        rewards: (..., N), finite; the maximum is taken over the last dimension.
        generator: on the rewards' device; None means torch's own.
    """
    if rewards.ndim == 0 or not bool(rewards.isfinite().all()) or isinstance(beta, Tensor):
        raise ValueError(f"rewards {tuple(rewards.shape)} must be (..., N) and finite, and beta a float.")
    checked_beta(beta, rewards)
    rewards = at_least_float32(rewards).detach()
    if rewards.numel() == 0:
        return torch.zeros_like(rewards, dtype=torch.bool)
    chance = ((rewards - rewards.amax(-1, keepdim=True)) / beta).exp()
    return torch.rand(rewards.shape, generator=generator, device=rewards.device, dtype=rewards.dtype) < chance


def fit_bradley_terry(wins: Tensor) -> Tensor:
    """Log-strengths (n,), float64, mean 0, that make a table of wins most likely: P(i beats j) = sigmoid(s_i - s_j).

    Newton's method on the concave log-likelihood ``sum_ij wins_ij log sigmoid(s_i - s_j)``; a step that changes a pair
    by r is shortened to log(1 + r), so that it rises (it is self-concordant). A finite maximum exists only if every
    split of the players in two has wins in both directions (Ford 1957).

    Args:
        wins: (n, n), how often the row's player beat the column's, >= 0; a tie is half a win for both.

    Raises ValueError on a table that is not square, finite and >= 0, or has no finite maximum.
    """
    table = wins.detach().to("cpu", torch.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not bool((table.isfinite() & (table >= 0)).all()):
        raise ValueError(f"wins must be a square table of finite counts >= 0, got {tuple(wins.shape)}.")
    n = len(table)
    table = table / table.max().clamp(min=1e-300) if n else table
    reach = ((table > 0) | torch.eye(n, dtype=torch.bool)).double()
    for _ in range(n.bit_length()):
        reach = ((reach @ reach) > 0).double()
    if n == 0 or not bool((reach > 0).all()):
        raise ValueError(
            "wins has no finite maximum: some players never lost to, or never won against, all the others."
        )

    games = table + table.T
    strengths, step = table.new_zeros(n), table.new_zeros(n)
    for _ in range(300):
        chance = torch.sigmoid(strengths.unsqueeze(1) - strengths)
        slope = (table * chance.T - table.T * chance).sum(1)
        weights = games * chance * chance.T
        curvature = weights.sum(1).diag() - weights
        step[1:] = torch.linalg.solve(curvature[1:, 1:], slope[1:])  # the first stays where it is: the mean is free
        longest = float(step.max() - step.min())
        strengths = strengths + step * (math.log1p(longest) / longest if longest > 0 else 1.0)
        if longest < 1e-12:
            return strengths - strengths.mean()
    raise ValueError("wins spans too many orders of magnitude for its maximum to be found.")
