"""Bias and spread of the KL estimators for two Gaussians, sampled and exact.

[002] "Rethinking KL Divergence in RLHF", 2025, appendix D: q is sampled (the policy), p is the reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_align.estimators.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.kl import KINDS, Kind, kl_value

CLIP = 10.0
LARGEST_KL = 1e12
_REACH, _PANEL = 14.0, 0.5  # standard deviations to either side of a peak, and between two edges there
_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(16))


class Normal(NamedTuple):
    """N(mean, std²) in one dimension."""

    mean: float
    std: float


class EstimatorError(NamedTuple):
    """How far one estimator is from the KL, in nats; ``exact_log_std`` is the logarithm of the exact deviation.

    As a logarithm, because near the boundary of integrability the deviation is finite but may be beyond any float. It
    is inf where the second moment diverges.
    """

    kind: Kind
    sampled_bias: float
    sampled_std: float
    exact_bias: float
    exact_log_std: float


def estimator_errors(
    q: Normal, p: Normal, *, samples: int = 10_000, seed: int = 0, clip: float = CLIP
) -> tuple[float, list[EstimatorError]]:
    """KL(q||p) in nats, exact, and each estimator's errors over ``samples`` draws from q and by quadrature.

    The second moment of k3 is finite exactly where that of p/q is: 2/std_p² > 1/std_q².

    Raises:
        ValueError: fewer than 2 samples, numbers that are not finite, a std that is not > 0, or a KL above 1e12.
    """
    if samples < 2:
        raise ValueError(f"samples={samples} is not allowed: a standard deviation needs at least 2.")
    kl = _true_kl(q, p)
    q, p = Normal(0.0, 1.0), Normal((p.mean - q.mean) / q.std, p.std / q.std)  # in q's own units; p/q stays the same
    drawn = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x, log_weights = _quadrature(q, p, clip)
    rows = []
    for kind in KINDS:
        values = kl_value(*_log_probs(drawn, q, p), kind, clip=clip)
        bias, log_std = _exact(kind, x, log_weights, q, p, clip)
        sampled_bias, sampled_std = values.mean().item() - kl, values.std().item()
        rows.append(EstimatorError(kind, sampled_bias, sampled_std, bias - kl, log_std))
    return kl, rows


def _true_kl(q: Normal, p: Normal) -> float:
    for name, normal in (("q", q), ("p", p)):
        if not (all(map(math.isfinite, normal)) and normal.std > 0):
            raise ValueError(f"{name} = {normal.mean:g} {normal.std:g} is no Gaussian: give a mean and a std > 0.")
    mean_q, mean_p = (torch.tensor([n.mean], dtype=torch.float64) for n in (q, p))
    kl = gaussian_kl(mean_q, mean_p, q.std, p.std).item()
    if not kl <= LARGEST_KL or not max(q.std, p.std) <= LARGEST_KL * min(q.std, p.std):
        raise ValueError(
            f"q = {q.mean:g} {q.std:g} and p = {p.mean:g} {p.std:g} are too different to compare (KL {kl:.3g}): "
            f"the KL, and the ratio of the stds, must be at most {LARGEST_KL:g}."
        )
    return max(kl, 0.0)


def _log_probs(x: Tensor, q: Normal, p: Normal) -> tuple[Tensor, Tensor]:
    log_q, log_p = (gaussian_log_prob(x, torch.full_like(x, normal.mean), normal.std) for normal in (q, p))
    return log_q, log_p


def _squared_over(q: Normal, p: Normal) -> Normal | None:
    """The Gaussian that p²/q is proportional to; None where it has no integral."""
    surplus = 2 * q.std**2 - p.std**2
    if surplus <= 0:
        return None
    return Normal((2 * p.mean * q.std**2 - q.mean * p.std**2) / surplus, q.std * p.std / math.sqrt(surplus))


def _quadrature(q: Normal, p: Normal, clip: float) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and log-weights on panels that are narrow around the peaks of q, p and p²/q.

    What is integrated is one of these three times a polynomial, so it vanishes where it is far from every peak and
    panels are wide. Edges also lie where p/q = clip: on either side of them k3_clip is smooth.
    """
    steps = np.arange(-_REACH, _REACH + _PANEL, _PANEL)
    peaks = [normal for normal in (q, p, _squared_over(q, p)) if normal is not None]
    edges = np.unique(np.concatenate([normal.mean + normal.std * steps for normal in peaks]))
    kinks = np.roots(_log_density(p) - _log_density(q) - [0.0, 0.0, math.log(clip)])
    kinks = kinks[np.isreal(kinks)].real
    cuts = torch.from_numpy(np.union1d(edges, kinks[(kinks > edges[0]) & (kinks < edges[-1])]))
    half = cuts.diff()[:, None] / 2
    return (cuts[:-1, None] + half * (1 + _NODES)).flatten(), (half * _WEIGHTS).log().flatten()


def _log_density(normal: Normal) -> np.ndarray:
    """As a polynomial, highest power first and without the constant that all have; it only says where to cut."""
    return np.array([-0.5, normal.mean, -0.5 * normal.mean**2]) / normal.std**2 - [0.0, 0.0, math.log(normal.std)]


def _exact(kind: Kind, x: Tensor, log_weights: Tensor, q: Normal, p: Normal, clip: float) -> tuple[float, float]:
    """Mean, and logarithm of the standard deviation, in log space: p/q may be huge where q is tiny."""
    log_q, log_p = _log_probs(x, q, p)
    value = kl_value(log_q, log_p, kind, clip=clip)
    # kl_value bounds p/q. Long before that k3 = p/q to the last bit: q k3 = p and q k3² = p²/q, without a bound.
    unclipped = kind in ("k3", "k4")
    huge = (log_p - log_q > 250) & unclipped
    mean = (value.sign() * (log_weights + torch.where(huge, log_p, log_q + value.abs().log())).exp()).sum()
    if unclipped and _squared_over(q, p) is None:
        return mean.item(), math.inf
    log_square = torch.where(huge, 2 * log_p - log_q, log_q + 2 * (value - mean).abs().log())
    return mean.item(), 0.5 * (log_weights + log_square).logsumexp(0).item()
