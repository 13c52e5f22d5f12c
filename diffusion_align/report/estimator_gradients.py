"""Expected gradient of every KL form for a small softmax policy, and the noise of k1 against dimension.

[002] "Rethinking KL Divergence in RLHF", 2025, §3 and §4; [000] Y. Liu, "Rethinking the Reference model in RLHF", 2025,
eq. 31.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_align.estimators.categorical import categorical_kl
from diffusion_align.estimators.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.kl import Kind, kl_gradient_coefficient, kl_loss, kl_reward
from diffusion_align.estimators.policy import importance_ratio, score_function_loss
from diffusion_align.report.estimator_values import KINDS

_STD = 0.5  # of the transition whose noise is measured, which it does not change; a power of two divides exactly
_PATHS: tuple[Literal["direct", "unbiased"], ...] = ("direct", "unbiased")
_COEFFICIENT = "coefficient in reward"
_COEFFICIENTS: dict[str, Kind | Literal["minimax"]] = {"k3 (eq. 35)": "k3", "k3_clip": "k3_clip", "minimax": "minimax"}
_CHUNK = 2**20  # numbers in one batch of samples


class Softmax(NamedTuple):
    """Logits of a policy, of its reference and of the older policy whose samples it is trained on off-policy."""

    policy: tuple[float, ...]
    reference: tuple[float, ...]
    old: tuple[float, ...]


# Two actions are less likely than under the reference by more than the clip: what k3_clip does there can be seen.
EXAMPLE = Softmax(policy=(2.5, 2.0, -1.5, -3.0), reference=(-2.5, -3.0, -1.0, 0.5), old=(2.0, 2.0, -1.5, -2.5))


class ExpectedGradient(NamedTuple):
    """One form's gradient in the logits; ``cosine`` to the true one is None where the expectation is zero."""

    placement: str
    form: str
    gradient: tuple[float, ...]
    cosine: float | None
    norm_ratio: float


class GradientNoise(NamedTuple):
    """tr Cov / |E g|² of the gradient for one Gaussian decision of d dimensions, D standard deviations away."""

    d: int
    distance: float
    k1_reward: float
    k1_reward_theory: float
    with_baseline: float
    with_baseline_theory: float
    closed_form: float


def random_softmax(actions: int, seed: int) -> Softmax:
    """Logits from N(0, 2²) for the policy and its reference; the old policy's are N(0, 0.5²) away from the policy's.

    Raises:
        ValueError: fewer than 2 actions.
    """
    if actions < 2:
        raise ValueError(f"actions={actions} is not allowed: a choice needs at least 2.")
    noise = torch.randn(3, actions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    policy, reference = 2 * noise[:2]
    return Softmax(*(tuple(x.tolist()) for x in (policy, reference, policy + 0.5 * noise[2])))


def expected_gradients(example: Softmax, *, off_policy: bool) -> list[ExpectedGradient]:
    """The true gradient of KL(pi||ref), first, and that of each form in each placement, by enumeration, float64.

    "In the reward" is the penalty of the policy that sampled, frozen, times the importance ratio ([002] eq. 39).
    Off-policy, with k1, that is grad KL(pi||ref) - grad KL(pi||old). "Coefficient" is ``kl_gradient_coefficient`` in
    that place; with k3 it is [002] eq. 35.
    """
    theta, reference, old = (torch.tensor(x, dtype=torch.float64) for x in example)
    theta.requires_grad_()
    logp, logp_ref = theta.log_softmax(0), reference.log_softmax(0)
    logp_old = old.log_softmax(0) if off_policy else logp.detach()
    weight = importance_ratio(logp, logp_old).detach()

    def expected(losses: Tensor) -> Tensor:
        return torch.autograd.grad((logp_old.exp() * losses).sum(), theta, retain_graph=True)[0]

    def in_the_reward(penalty: Tensor) -> Tensor:
        return expected(score_function_loss(logp, -weight * penalty))

    (true,) = torch.autograd.grad(categorical_kl(theta, reference), theta, retain_graph=True)
    found = [("exact", "full vocabulary", true)]
    for kind in KINDS:
        found.append(("in the reward", kind, in_the_reward(kl_reward(logp_old, logp_ref, kind, allow_biased=True))))
    for form, coefficient in _COEFFICIENTS.items():
        found.append((_COEFFICIENT, form, in_the_reward(kl_gradient_coefficient(logp_old, logp_ref, coefficient))))
    behind = logp_old if off_policy else None
    for gradient in _PATHS:
        for kind in KINDS:
            loss = kl_loss(logp, logp_ref, logp_old=behind, kind=kind, gradient=gradient, allow_biased=True)
            found.append((f"loss, {gradient}", kind, expected(loss)))
    return [_compared(placement, form, gradient, true) for placement, form, gradient in found]


def _compared(placement: str, form: str, gradient: Tensor, true: Tensor) -> ExpectedGradient:
    ratio = (gradient.norm() / true.norm()).item()
    cosine = None if ratio < 1e-12 else (torch.dot(gradient, true) / (gradient.norm() * true.norm())).item()
    return ExpectedGradient(placement, form, tuple(gradient.tolist()), cosine, ratio)


def gradient_noise(
    dimensions: Sequence[int], *, distance: float = 1.0, samples: int = 1000, seed: int = 0
) -> list[GradientNoise]:
    """Relative variance, against d, of the gradient in the mean when k1 of a transition is the penalty ([000] eq. 31).

    Theory: d (1 + D²/4) + 1, and d + 1 with the KL as the baseline. The closed form has the same expectation and no
    noise. In float32, as in training.

    Args:
        dimensions: the values of d.
        distance: D, the distance of the means in standard deviations.
        samples: at least that many for each d; more where d is small and the noise has heavy tails.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for d in dimensions:
        sums = torch.zeros(3, dtype=torch.float64)
        rows = max(1, _CHUNK // d)
        count = max(samples, _CHUNK // (2 * d))
        for start in range(0, count, rows):
            sums += _squared_errors(min(rows, count - start), d, distance, generator)
        k1_reward, with_baseline, closed_form = (sums / count).tolist()
        theory = d * (1 + distance**2 / 4) + 1
        found.append(GradientNoise(d, distance, k1_reward, theory, with_baseline, d + 1.0, closed_form))
    return found


def _squared_errors(n: int, d: int, distance: float, generator: torch.Generator) -> Tensor:
    """Sum over ``n`` samples of |g - E g|² / |E g|²: k1 in the reward, less the KL, and the closed form."""
    mean = torch.zeros(n, d, requires_grad=True)
    mean_ref = torch.full((n, d), -_STD * distance / math.sqrt(d))
    x = _STD * torch.randn(n, d, generator=generator)
    logp = gaussian_log_prob(x, mean, _STD)
    k1 = kl_reward(logp, gaussian_log_prob(x, mean_ref, _STD))
    kl = gaussian_kl(mean, mean_ref, _STD)
    expectation = (mean.detach() - mean_ref) / _STD**2
    errors = []
    for loss in (score_function_loss(logp, -k1), score_function_loss(logp, kl - k1), kl):
        (gradient,) = torch.autograd.grad(loss.sum(), mean, retain_graph=True)
        errors.append(((gradient - expectation).square().sum(1) / expectation.square().sum(1)).double().sum())
    return torch.stack(errors)
