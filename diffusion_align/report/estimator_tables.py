"""What ``diffusion-align estimators`` prints of the KL estimators: their values and their gradients.

Values: bias and spread for two Gaussians, sampled and exact; q is sampled (the policy), p is the reference. Gradients:
the expected one of every form for a small softmax policy, and the noise of k1 against dimension.

[002] "Rethinking KL Divergence in RLHF", 2025, §3, §4 and appendix D; [000] Y. Liu, "Rethinking the Reference model in
RLHF", 2025, eq. 31.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from diffusion_align.estimators.categorical import categorical_kl
from diffusion_align.estimators.gaussian import gaussian_kl, gaussian_log_prob
from diffusion_align.estimators.kl import KINDS, Kind, kl_gradient_coefficient, kl_loss, kl_reward, kl_value
from diffusion_align.estimators.policy import importance_ratio, score_function_loss

CLIP = 10.0
LARGEST_KL = 1e12
_REACH, _PANEL = 14.0, 0.5  # standard deviations to either side of a peak, and between two edges there
_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(16))
_STD = 0.5  # of the transition whose noise is measured, which it does not change; a power of two divides exactly
_PATHS: tuple[Literal["direct", "unbiased"], ...] = ("direct", "unbiased")
_COEFFICIENT = "coefficient in reward"
_COEFFICIENTS: dict[str, Kind | Literal["minimax"]] = {"k3 (eq. 35)": "k3", "k3_clip": "k3_clip", "minimax": "minimax"}
_CHUNK = 2**20  # numbers in one batch of samples
NEGLIGIBLE_KL = 1e-12  # nats: below it the rounding of a log-prob is no longer small beside the KL
SHOWN_ACTIONS = 4


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
    """KL(q||p) in nats, exact, and each estimator's errors over ``samples`` from q and by quadrature.

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
            raise ValueError(f"{name} = {normal.mean:g} {normal.std:g} is not a Gaussian: give a mean and a std > 0")
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
    """tr Cov / |E g|² of the gradient for one Gaussian action of d dimensions, D standard deviations away."""

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


def value_report(q: Normal, p: Normal, *, samples: int, seed: int) -> Iterator[str | Table]:
    """The estimators' values for samples from q; ``ValueError`` as ``estimator_errors``."""
    kl, rows = estimator_errors(q, p, samples=samples, seed=seed)
    yield (
        f"Values. The policy q is sampled, p is the reference; {samples:,} samples, seed {seed}.\n"
        f"  q has mean {q.mean:g}, std {q.std:g}; p has mean {p.mean:g}, std {p.std:g}; KL(q||p) = {kl:.7g} nats\n"
    )
    if kl <= NEGLIGIBLE_KL:
        yield "The KL is 0, or too small to divide by: bias and std are in nats.\n"
    yield value_table(kl, rows)
    if any(row.exact_log_std == math.inf for row in rows):
        yield "\ninfinite: p²/q has no integral; a sample mean of k3 is then mostly too low."


def gradient_report(example: Softmax) -> Iterator[str | Table]:
    """The expected gradients of a softmax policy, on-policy and off-policy."""
    yield f"Gradients. Softmax policy of {len(example.policy)} actions, exact by enumeration. Logits:"
    for name, logits in zip(("policy", "reference", "old policy"), example):
        more = " …" if len(logits) > SHOWN_ACTIONS else ""
        yield f"  {name:<12}" + " ".join(f"{_number(x):>7}" for x in logits[:SHOWN_ACTIONS]) + more
    yield "\nOn-policy: samples of the policy itself.\n"
    yield gradient_table(expected_gradients(example, off_policy=False))
    yield (
        "\nOff-policy: samples of the old policy. The penalty in the reward is frozen and\n"
        "weighed by pi/pi_old; with k1 that is grad KL(pi||ref) - grad KL(pi||old).\n"
    )
    yield gradient_table(expected_gradients(example, off_policy=True))


def value_table(kl: float, rows: Sequence[EstimatorError]) -> Table:
    """Bias and standard deviation of each estimator over the KL; in nats where there is next to no KL."""
    relative = kl > NEGLIGIBLE_KL
    scale, unit = (kl, "/KL") if relative else (1.0, "")
    shown = _number if relative else "{:.3g}".format
    table = _table("estimator", f"sampled bias{unit}", f"sampled std{unit}", f"exact bias{unit}", f"exact std{unit}")
    for row in rows:
        spread = _exponential(row.exact_log_std - math.log(scale)) if relative else shown(math.exp(row.exact_log_std))
        table.add_row(row.kind, *(shown(x / scale) for x in row[1:4]), spread)
    return table


def gradient_table(rows: Sequence[ExpectedGradient]) -> Table:
    """Every form's expected gradient beside the true one; of more than four actions the first four."""
    table = _table("form", "expected gradient in the logits", "cosine", "norm ratio")
    placement = ""
    for row in rows:
        if row.placement != placement:
            placement = row.placement
            table.add_row(placement)
        gradient = " ".join(f"{_number(x):>7}" for x in row.gradient[:SHOWN_ACTIONS])
        gradient += " …" if len(row.gradient) > SHOWN_ACTIONS else ""
        cosine = "none" if row.cosine is None else _number(row.cosine)
        table.add_row(f"  {row.form}", gradient, cosine, _number(row.norm_ratio))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(x: float) -> str:
    text = f"{x:.4f}" if abs(x) < 1e5 else f"{x:.3e}"
    return "0.0000" if text == "-0.0000" else text


def _exponential(log: float) -> str:
    """exp(log), also where that is beyond any float."""
    if log == math.inf:
        return "infinite"
    return _number(math.exp(log)) if log < 34 else f"10^{log / math.log(10):.5g}"
